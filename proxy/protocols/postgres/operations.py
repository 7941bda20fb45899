"""Statements as operations: one `Operation` for each distinct text, shared by all sessions of the process.

Statements that repeat cost one dictionary look-up on their exact bytes. The memory is two generations: a text that is used
moves into the young one; when that is full it becomes the old one, and what was not used meanwhile is gone.

Blind spot: a text that is not in one of the supported client encodings is not understood, and so unclassified.
"""

from __future__ import annotations

import enum
from dataclasses import replace
from typing import NamedTuple

from proxy.model import Operation, OperationKind, Phase
from proxy.protocols.postgres.classify import Unclassified, classify
from proxy.protocols.postgres.redaction import recordable

PROTOCOL = "postgresql"
MAX_REMEMBERED = 4_096
"""Operations of one generation."""
MAX_REMEMBERED_BYTES = 4 * 1024 * 1024
"""Text of one generation."""
MAX_REMEMBERED_TEXT = 64 * 1024
"""Bytes of a text that is worth remembering."""

LEXER_SETTINGS = frozenset({"client_encoding", "names", "standard_conforming_strings"})
"""Settings that change how the server reads the bytes of the next statement."""


class Trait(enum.IntFlag):
    """What the machine itself has to know of an operation."""

    NONE = 0
    CHANGES_LEXER = 1
    EXECUTES_PREPARED = 2
    DEALLOCATES = 4


class Described(NamedTuple):
    operation: Operation
    traits: Trait


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
    traits = Trait.NONE
    for facts in statements:
        if facts.kind == "execute":
            traits |= Trait.EXECUTES_PREPARED
        elif facts.kind == "deallocate":
            traits |= Trait.DEALLOCATES
        if facts.parameter.lower() in LEXER_SETTINGS or any(name.endswith("set_config") for name in facts.functions):
            traits |= Trait.CHANGES_LEXER
    return Described(
        Operation(PROTOCOL, kind, _PHASES[kind], decoded, recordable(decoded), statements), traits
    )


def unclassified(kind: OperationKind, text: str, reason: str) -> Described:
    return Described(Operation(PROTOCOL, kind, _PHASES[kind], text, recordable(text), (), reason), Trait.NONE)


def refuse(described: Described, reason: str) -> Described:
    """The same operation, of which a session knows a reason not to trust the classification."""
    return described._replace(operation=replace(described.operation, unclassified=reason))
