"""Statements as operations: one `Operation` for each distinct text, shared by all sessions of the process.

Statements that repeat cost one dictionary look-up on their exact bytes. The memory is two generations: a text that is used
moves into the young one; when that is full it becomes the old one, and what was not used meanwhile is gone.

Blind spot: a text that is not in one of the supported client encodings is not understood, and so unclassified.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, NamedTuple

from pglast.parser import parse_sql_json

from proxy.model import Operation, OperationKind, Phase
from proxy.protocols.postgres.classify import Unclassified, classify
from proxy.protocols.postgres.messages import MAX_NAME
from proxy.protocols.postgres.redaction import recordable

PROTOCOL = "postgresql"
MAX_REMEMBERED = 4_096
"""Operations of one generation."""
MAX_REMEMBERED_BYTES = 4 * 1024 * 1024
"""Text of one generation."""
MAX_REMEMBERED_TEXT = 64 * 1024
"""Bytes of a text that is worth remembering."""

LEXER_SETTINGS = frozenset({"client_encoding", "standard_conforming_strings"})
"""Settings that change how the server reads the bytes of the next statement."""


class Described(NamedTuple):
    """An operation, and what the machine itself has to know of it: whether it changes how the server reads text, which
    prepared statements it executes by SQL, and which it deallocates (only where that is all it does)."""

    operation: Operation
    changes_lexer: bool = False
    executes: frozenset[bytes] = frozenset()
    deallocates: bytes = b""


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
        known = self._old.get(text) or describe(self._kind, text, "utf-8")
        if len(text) <= MAX_REMEMBERED_TEXT:
            if len(self._young) >= MAX_REMEMBERED or self._bytes + len(text) > MAX_REMEMBERED_BYTES:
                self._old, self._young, self._bytes = self._young, {}, 0
            self._young[text] = known
            self._bytes += len(text)
        return known


QUERIES = Memory(OperationKind.QUERY)
PARSES = Memory(OperationKind.PARSE)
EXECUTIONS = Memory(OperationKind.EXECUTE)


def describe(kind: OperationKind, text: bytes, codec: str) -> Described:
    """The operation for a text, classified now."""
    try:
        decoded = text.decode(codec)
    except UnicodeDecodeError:
        shown = text.decode("ascii", "backslashreplace")
        return unclassified(kind, shown, "the text is not valid in the client's encoding")
    try:
        statements = classify(decoded)
    except Unclassified as reason:
        return unclassified(kind, decoded, str(reason))
    operation = Operation(PROTOCOL, kind, _PHASES[kind], decoded, recordable(decoded), statements)
    parts = [part for facts in statements for part in facts.parts]
    kinds = {part.kind for part in parts}
    return Described(
        operation,
        any(part.parameter in LEXER_SETTINGS or "set_config" in part.functions for part in parts),
        _names("ExecuteStmt", decoded) if "execute" in kinds else frozenset(),
        next(iter(_names("DeallocateStmt", decoded)), b"") if kinds == {"deallocate"} and len(parts) == 1 else b"",
    )


def _names(tag: str, text: str) -> frozenset[bytes]:
    """The names in all statements of one kind, as the server cuts them."""
    found: set[bytes] = set()
    trees: list[Any] = [json.loads(parse_sql_json(text))]
    while trees:
        match trees.pop():
            case dict() as tree:
                if isinstance(statement := tree.get(tag), dict):
                    found.add(str(statement.get("name", "")).encode()[:MAX_NAME])
                trees.extend(tree.values())
            case list() as several:
                trees.extend(several)
    return frozenset(found)


def unclassified(kind: OperationKind, text: str, reason: str) -> Described:
    return Described(Operation(PROTOCOL, kind, _PHASES[kind], text, recordable(text), (), reason))


def refuse(described: Described, reason: str) -> Described:
    """The same operation, of which a session knows a reason not to trust the classification."""
    return described._replace(operation=replace(described.operation, unclassified=reason))
