"""Statements as operations: one `Operation` for each distinct text, shared by all sessions of the process.

Statements that repeat cost one dictionary look-up on their exact bytes. Those that repeat but for numbers that are
compared, set or limits (`_VARIABLE`) cost another one, on their shape, and are the same operation with other texts:
PostgreSQL's grammar sees the kinds of tokens and not what they say, the classifier looks at no such number, and a
number is no secret. The shape of a text is looked for only where nothing in it can hide where a token begins
(`_HIDING`). The memory is two generations: a text that
is used moves into the young one; when that is full it becomes the old one, and what was not used meanwhile is gone.

Blind spot: the settings by which a server reads text are followed by what statements say and the server reports; a
function that changes them is seen only when the server reports it.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any, NamedTuple

from pglast.parser import parse_sql_json

from proxy.model import Operation, OperationKind, Phase
from proxy.protocols.postgres.classify import Unclassified, Ungrammatical, classify
from proxy.protocols.postgres.messages import MAX_NAME
from proxy.protocols.postgres.redaction import recordable
from proxy.protocols.postgres.startup import encoding_codec

PROTOCOL = "postgresql"
MAX_REMEMBERED = 4_096
"""Operations of one generation."""
MAX_REMEMBERED_BYTES = 4 * 1024 * 1024
"""Text of one generation."""
MAX_REMEMBERED_TEXT = 64 * 1024
"""Bytes of a text that is worth remembering."""

_HIDING = re.compile(rb"""['"$\\\x80-\xff]|--|/\*""")
"""Quotes, escapes, comments, and what is not ASCII."""
_VARIABLE = re.compile(rb"([=<>]|\b(?:limit|offset)(?=\s))(\s*)[0-9]{1,9}(?![\w.])", re.IGNORECASE)
"""An integer (9 digits always are one) behind a comparison, an assignment, LIMIT or OFFSET: no ordinal, no type's
modifier, no part of another token."""
_IN_ITS_PLACE = rb"\1\2\0"
"""No text has a NUL."""
_WITH_VARIABLES = frozenset({"select", "insert", "update", "delete"})
"""Kinds that shapes are used for; others mean something by their numbers (SET, FETCH, EXPLAIN)."""

LEXER_SETTINGS = frozenset({"client_encoding", "standard_conforming_strings"})
"""Settings that change how the server reads the bytes of the next statement."""


class Described(NamedTuple):
    """An operation, and what the machine itself has to know of it: whether it changes how the server reads text,
    which prepared statements it executes by SQL, and which it may deallocate (the empty name: all)."""

    operation: Operation
    changes_lexer: bool = False
    executes: frozenset[bytes] = frozenset()
    deallocates: frozenset[bytes] = frozenset()


_PHASES = {
    OperationKind.QUERY: Phase.EXECUTE,
    OperationKind.PARSE: Phase.PREPARE,
    OperationKind.EXECUTE: Phase.EXECUTE,
    OperationKind.FUNCTION_CALL: Phase.EXECUTE,
}


class Memory:
    """Operations by text, of one kind."""

    def __init__(self, kind: OperationKind) -> None:
        self._kind = kind
        self._young: dict[bytes, Described] = {}
        self._old: dict[bytes, Described] = {}
        self._bytes = 0

    def describe(self, text: bytes) -> Described:
        """The operation for a text in UTF-8."""
        known = self._young.get(text)
        if known is not None:
            return known
        known = self._recall(text)
        if known is not None:
            return known
        if len(text) > MAX_REMEMBERED_TEXT:
            return describe(self._kind, text, "utf-8")
        shape = text if _HIDING.search(text) else _VARIABLE.sub(_IN_ITS_PLACE, text)
        if shape != text and (example := self._young.get(shape) or self._recall(shape)) is not None:
            return _like(example, text)
        known = describe(self._kind, text, "utf-8")
        if shape != text and _stands_for_its_shape(known):
            self._keep(shape, known)
        self._keep(text, known)
        return known

    def _recall(self, text: bytes) -> Described | None:
        known = self._old.get(text)
        if known is not None:
            self._keep(text, known)
        return known

    def _keep(self, text: bytes, known: Described) -> None:
        if len(self._young) >= MAX_REMEMBERED or self._bytes + len(text) > MAX_REMEMBERED_BYTES:
            self._old, self._young, self._bytes = self._young, {}, 0
        self._young[text] = known
        self._bytes += len(text)


QUERIES = Memory(OperationKind.QUERY)
PARSES = Memory(OperationKind.PARSE)
EXECUTIONS = Memory(OperationKind.EXECUTE)


def _stands_for_its_shape(described: Described) -> bool:
    """Whether all that is known of this operation holds for every text of its shape."""
    operation = described.operation
    return (
        bool(operation.statements)
        and operation.recorded_text == operation.text
        and all(part.kind in _WITH_VARIABLES for facts in operation.statements for part in facts.parts)
        and not (described.changes_lexer or described.executes or described.deallocates)
    )


def _like(described: Described, text: bytes) -> Described:
    """The operation of another text of the same shape."""
    example = described.operation
    spelled = text.decode("ascii")
    return Described(
        Operation(
            PROTOCOL,
            example.kind,
            example.phase,
            spelled,
            spelled,
            example.statements,
            example=example.example or example,
        )
    )


def describe(kind: OperationKind, text: bytes, codec: str) -> Described:
    """The operation for a text, classified now."""
    try:
        decoded = text.decode(codec)
    except UnicodeDecodeError:
        return unclassified(kind, _shown(text), "the text is not valid in the client's encoding")
    try:
        statements = classify(decoded)
    except Unclassified as reason:
        described = unclassified(kind, decoded, str(reason))
        ungrammatical = isinstance(reason, Ungrammatical)
        return described._replace(operation=replace(described.operation, ungrammatical=ungrammatical))
    operation = Operation(PROTOCOL, kind, _PHASES[kind], decoded, recordable(decoded), statements)
    parts = [part for facts in statements for part in facts.parts]
    kinds = {part.kind for part in parts}
    return Described(
        operation,
        any(part.parameter in LEXER_SETTINGS or "set_config" in part.functions for part in parts),
        _names("ExecuteStmt", decoded) if "execute" in kinds else frozenset(),
        _names("DeallocateStmt", decoded) | _names("DiscardStmt", decoded)
        if "deallocate" in kinds or "discard" in kinds
        else frozenset(),
    )


_DISCARDS_NO_NAMES = frozenset({"DISCARD_PLANS", "DISCARD_SEQUENCES", "DISCARD_TEMP"})


def _names(tag: str, text: str) -> frozenset[bytes]:
    """The names in all statements of one kind, as the server cuts them; empty where one stands for all."""
    found: set[bytes] = set()
    trees: list[Any] = [json.loads(parse_sql_json(text))]
    while trees:
        match trees.pop():
            case dict() as tree:
                if isinstance(statement := tree.get(tag), dict) and statement.get("target") not in _DISCARDS_NO_NAMES:
                    found.add(str(statement.get("name", "")).encode()[:MAX_NAME])
                trees.extend(tree.values())
            case list() as several:
                trees.extend(several)
    return frozenset(found)


def unclassified(kind: OperationKind, text: str, reason: str) -> Described:
    return Described(Operation(PROTOCOL, kind, _PHASES[kind], text, recordable(text), (), reason))


def refuse(described: Described, reason: str) -> Described:
    """The same operation, of which a session knows a reason not to trust the classification."""
    return described._replace(operation=replace(described.operation, unclassified=reason, example=None))


class TextReader:
    """Reads one session's statements as its server does: in its client encoding, and with its kind of strings.

    In the supported encodings a byte below 0x80 is that ASCII character, so only other bytes and, where strings are
    not standard conforming, backslashes could make the server read something else than the classifier."""

    def __init__(self, codec: str, conforming: bool) -> None:
        self._codec = codec
        self._conforming = conforming
        self._unsettled = False
        self._plain = codec == "utf-8" and conforming

    def describe(self, kind: OperationKind, memory: Memory, text: bytes) -> Described:
        """`memory` is the one of that kind."""
        if self._plain:
            return memory.describe(text)
        escapes = b"\\" in text
        if self._unsettled and (escapes or not text.isascii()):
            return unclassified(kind, _shown(text), "an earlier statement is just changing how text is read")
        if escapes and not self._conforming:
            return unclassified(
                kind, _shown(text), "with standard_conforming_strings off a backslash can hide a string's end"
            )
        if self._codec == "utf-8" or text.isascii():
            return memory.describe(text)
        return describe(kind, text, self._codec)

    def unsettle(self) -> None:
        """A statement that changes the settings is on its way."""
        self._unsettled = True
        self._plain = False

    def settle(self) -> None:
        """Nothing is on its way any more."""
        if self._unsettled:
            self._unsettled = False
            self._plain = self._codec == "utf-8" and self._conforming

    def report(self, name: bytes, value: bytes) -> str:
        """The server reported a setting. Returns why the session cannot go on with it, or nothing."""
        if name == b"client_encoding":
            codec = encoding_codec(_shown(value))
            if codec is None:
                return f"client encoding `{_shown(value)[:64]}` does not pass the gateway"
            self._codec = codec
        elif name == b"standard_conforming_strings":
            self._conforming = value == b"on"
        self._plain = self._codec == "utf-8" and self._conforming and not self._unsettled
        return ""


def _shown(text: bytes) -> str:
    return text.decode("ascii", "backslashreplace")
