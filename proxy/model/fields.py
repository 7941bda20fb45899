"""Paths to fields inside a decoded JSON object, as masks and conditions of a policy name them.

    data.*                                        every value of the object `data`
    spec.containers[*].env[*].value               inside every element of two lists
    metadata.annotations["example.com/owner"]     a key that is more than letters, digits, `_`, `-` and `$`

A path is a chain of steps. A step is a key, or a star. `.*` and `[*]` are two spellings of the same star: every value
of an object, every element of a list. A key means that key of an object; its case counts. There are no indexes: where
an element stands in a list is for whoever writes the object to say, so a mask or a condition on `[0]` could be walked
around. The first step is a key, since a star there would also mean `kind` and `metadata`.

A path that meets something else on its way (a number where it wants an object) names nothing there.
"""

from __future__ import annotations

import enum
import json
import re
from dataclasses import dataclass

MAX_LENGTH = 1024
MAX_STEPS = 32

_NAME = re.compile(r"[A-Za-z0-9_$-]+")
_QUOTED = re.compile(r'\["((?:[^"\\]|\\.)*)"\]')
_STAR = re.compile(r"\.?\*|\[\*\]")


class BadFieldPath(ValueError):
    """The text is not a path; the message says where and what to write instead."""


class Star(enum.Enum):
    """The step that means every value of an object and every element of a list."""

    STAR = "*"


STAR = Star.STAR

Step = str | Star


@dataclass(frozen=True, slots=True)
class FieldPath:
    """A parsed path. `text` is as it was written; two spellings of the same steps are not equal."""

    text: str
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        return self.text

    @classmethod
    def parse(cls, text: str) -> FieldPath:
        """Raises `BadFieldPath`."""
        if not text:
            raise BadFieldPath("a path is empty; write one like `data.*`")
        if len(text) > MAX_LENGTH:
            raise BadFieldPath(f"a path has `{len(text)}` characters, at most `{MAX_LENGTH}` are read")
        if text.startswith((".", "$.", "{")):
            raise BadFieldPath(f"`{text}` starts with `{text[0]}`; write a path like `data.*`, with nothing before it")
        steps: list[Step] = []
        at = 0
        while at < len(text):
            step, at = _step(text, at, first=not steps)
            steps.append(step)
        if steps[0] is STAR:
            raise BadFieldPath(f"`{text}` starts with a star; name the first field, as in `data.*`")
        if len(steps) > MAX_STEPS:
            raise BadFieldPath(f"`{text}` has `{len(steps)}` steps, at most `{MAX_STEPS}` are followed")
        return cls(text, tuple(steps))

    def select(self, document: object) -> list[object]:
        """The values that the path names in a decoded object, in the order in which they stand."""
        return _follow([document], self.steps)

    def touches(self, pointer: str) -> bool:
        """Whether a JSON pointer (RFC 6901), as in a JSON patch, could name a field of this path, something inside one,
        or something that holds one. What is no pointer touches everything."""
        if pointer == "":
            return True
        if not pointer.startswith("/"):
            return True
        tokens = [token.replace("~1", "/").replace("~0", "~") for token in pointer[1:].split("/")]
        return all(step is STAR or step == token for step, token in zip(self.steps, tokens, strict=False))


def _step(text: str, at: int, *, first: bool) -> tuple[Step, int]:
    """The step that starts at `at`, and where it ends."""
    if star := _STAR.match(text, at):
        if first or star.group() != "*":
            return STAR, star.end()
    elif quoted := _QUOTED.match(text, at):
        try:
            key = json.loads(f'"{quoted.group(1)}"')
        except ValueError:
            raise BadFieldPath(f"`{quoted.group()}` in `{text}` is not a key in double quotes as JSON has it") from None
        return str(key), quoted.end()
    elif text[at] == "[":
        raise BadFieldPath(
            f"`{text[at:]}` in `{text}`: in brackets stands a star or a key in double quotes, as in `[*]` and "
            '`["a.b/c"]`'
        )
    elif first or text[at] == ".":
        start = at if first else at + 1
        if name := _NAME.match(text, start):
            return name.group(), name.end()
        if start == len(text):
            raise BadFieldPath(f"`{text}` ends with a dot; name the field after it")
        raise BadFieldPath(
            f'`{text[start:]}` in `{text}` is not a field\'s name; write `.*`, or `["…"]` for other keys'
        )
    raise BadFieldPath(
        f"`{text[at:]}` in `{text}` follows a field's name; a key of other characters is written in brackets and "
        'quotes, as in `metadata.annotations["example.com/owner"]`'
    )


def _follow(documents: list[object], steps: tuple[Step, ...] | list[Step]) -> list[object]:
    found = documents
    for step in steps:
        if not found:
            break
        if step is STAR:
            found = [
                value
                for each in found
                for value in (each.values() if isinstance(each, dict) else each if isinstance(each, list) else ())
            ]
        else:
            found = [each[step] for each in found if isinstance(each, dict) and step in each]
    return found
