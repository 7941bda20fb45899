"""Names of relations, columns and functions as a rule writes them, and when one covers what a statement names.

A name is written as the server's catalog spells it: case counts, and a part may be put in double quotes (a quote in
it doubled) when it holds a dot, a star or a quote. Outside quotes `*` stands for any run of characters inside one part.

Two questions are asked of a pattern, and they err in opposite directions:

- `covers`: may this rule *grant* the name? An unqualified name counts as `public.name`. Schemas of the system
  (`pg_…`, `information_schema`) are covered only by a pattern that spells their name out.
- `touches`: could this rule's *restriction* concern the name? An unqualified name could be in any schema.

Blind spot: the classifier sees no catalog. A schema called like the role, a role whose `search_path` was changed on the
server, or a user's function that overloads a built-in one, can make an unqualified name mean something else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

DEFAULT_SCHEMA = "public"

_PART = re.compile(r'"((?:[^"]|"")+)"|([^".\s]+)')


class BadName(ValueError):
    """The text is not a name; the message says why."""


def split_name(text: str) -> tuple[tuple[str, bool], ...]:
    """The parts of a dotted name, each with whether it was quoted. Raises `BadName`."""
    parts: list[tuple[str, bool]] = []
    at = 0
    while True:
        match = _PART.match(text, at)
        if match is None:
            raise BadName(f"`{text}` is not a name")
        quoted, plain = match.groups()
        parts.append((quoted.replace('""', '"'), True) if quoted else (plain, False))
        at = match.end()
        if at == len(text):
            return tuple(parts)
        if text[at] != ".":
            raise BadName(f"`{text}` is not a name: unexpected `{text[at]}`")
        at += 1


def split_column(text: str) -> tuple[str, str, str]:
    """`schema.relation.column`, exact. Raises `BadName`."""
    parts = split_name(text)
    if len(parts) != 3:
        raise BadName(f"`{text}` is not `schema.relation.column`")
    for part, quoted in parts:
        if "*" in part and not quoted:
            raise BadName(f"`{text}` has a star: a mask names one column exactly")
    schema, relation, column = (part for part, _ in parts)
    return schema, relation, column


def is_system_schema(schema: str) -> bool:
    """Whether PostgreSQL itself owns the schema (names that start with `pg_` are reserved for it)."""
    return schema.startswith("pg_") or schema == "information_schema"


def _compile(part: str, quoted: bool) -> re.Pattern[str] | str:
    if quoted or "*" not in part:
        return part
    return re.compile(".*".join(map(re.escape, part.split("*"))), re.DOTALL)


def _matches(pattern: re.Pattern[str] | str, text: str) -> bool:
    return pattern == text if isinstance(pattern, str) else pattern.fullmatch(text) is not None


@dataclass(frozen=True, slots=True)
class RelationPattern:
    """`schema.relation`; either part may hold stars. `*` alone is `*.*`."""

    schema: re.Pattern[str] | str
    name: re.Pattern[str] | str

    @classmethod
    def parse(cls, text: str) -> RelationPattern:
        """Raises `BadName`."""
        if text == "*":
            text = "*.*"
        parts = split_name(text)
        if len(parts) != 2:
            raise BadName(f"`{text}` is not `schema.relation`; a star may stand for a part")
        return cls(_compile(*parts[0]), _compile(*parts[1]))

    def covers(self, schema: str, name: str) -> bool:
        schema = schema or ("pg_catalog" if name.startswith("pg_") else DEFAULT_SCHEMA)
        if is_system_schema(schema) and not isinstance(self.schema, str):
            return False
        return _matches(self.schema, schema) and _matches(self.name, name)

    def touches(self, schema: str, name: str) -> bool:
        return (not schema or _matches(self.schema, schema)) and _matches(self.name, name)


@dataclass(frozen=True, slots=True)
class FunctionPattern:
    """`function` or `schema.function`. Without a schema it grants in `public` and `pg_catalog`, and restricts in any.

    A star never grants a built-in function that the proxy does not hold for safe: that has to be spelled out. Operators
    that are not built in are written as their symbol (`<%>`)."""

    schema: re.Pattern[str] | str | None
    name: re.Pattern[str] | str

    @classmethod
    def parse(cls, text: str) -> FunctionPattern:
        """Raises `BadName`."""
        if text and not any(char.isalnum() or char in '_."$' for char in text) and text != "*":
            return cls(None, text)
        parts = split_name(text)
        if len(parts) > 2:
            raise BadName(f"`{text}` is not `function` or `schema.function`")
        return cls(_compile(*parts[0]) if len(parts) == 2 else None, _compile(*parts[-1]))

    def covers(self, schema: str, name: str, *, unsafe_builtin: bool) -> bool:
        if unsafe_builtin and not isinstance(self.name, str):
            return False
        if self.schema is None:
            fits = schema in ("", DEFAULT_SCHEMA, "pg_catalog")
        elif schema:
            fits = _matches(self.schema, schema)
        else:
            fits = _matches(self.schema, "pg_catalog" if unsafe_builtin else DEFAULT_SCHEMA)
        return fits and _matches(self.name, name)

    def touches(self, schema: str, name: str) -> bool:
        fits = self.schema is None or not schema or _matches(self.schema, schema)
        return fits and _matches(self.name, name)


def split_function(text: str) -> tuple[str, str]:
    """Schema (or nothing) and name of a function as `StatementFacts.functions` spells it."""
    schema, dot, name = text.partition(".")
    return (schema, name) if dot and name else ("", text)
