"""What a client asks in one step, and what could be told of it before it runs."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class OperationKind(enum.StrEnum):
    """How the operation arrived (PostgreSQL: a simple Query, a Parse, an Execute, a FunctionCall)."""

    QUERY = "query"
    PARSE = "parse"
    EXECUTE = "execute"
    FUNCTION_CALL = "function-call"


class Phase(enum.StrEnum):
    """Whether the operation has effect (`execute`), or only prepares one that will be asked about again (`prepare`)."""

    PREPARE = "prepare"
    EXECUTE = "execute"


@dataclass(frozen=True, slots=True)
class Relation:
    """A relation as the statement names it, folded as the server folds it. `schema` is empty where the statement has
    none. Names that a WITH clause makes are not relations."""

    schema: str
    name: str

    def __str__(self) -> str:
        return f"{self.schema}.{self.name}" if self.schema else self.name


@dataclass(frozen=True, slots=True)
class StatementFacts:
    """What the grammar alone says of one statement.

    `kind` is a documented lower-case word (`select`, `insert`, `update`, `delete`, `drop-table`, `set`, …).
    `parameter` is the setting's name in lower case for `set`/`reset`/`show`, and `value` what it is set to where that
    is a plain constant. `unguarded` says that an UPDATE or DELETE has no WHERE. `also` are parts of the statement that
    are kinds of their own: a data-modifying WITH query, what PREPARE prepares, the rows that FOR UPDATE locks.

    For masks: `output_columns` are names of plain column references in the outermost target list, which the server's
    RowDescription will trace; `exposed_columns` are names of columns referred to anywhere else (expressions, WHERE,
    JOIN, ORDER BY, sub-selects, USING, …), whose values could leave in a form that nothing traces; `opaque` names,
    in words for people, the constructs with which values of a relation can leave without any column's name being
    written (whole-row reference, column aliases, `*` inside a set operation or a data-moving statement, NATURAL
    join, COPY, …); empty when there are none.
    """

    kind: str
    reads: frozenset[Relation] = frozenset()
    writes: frozenset[Relation] = frozenset()
    functions: frozenset[str] = frozenset()
    parameter: str = ""
    value: str = ""
    unguarded: bool = False
    output_columns: frozenset[str] = frozenset()
    exposed_columns: frozenset[str] = frozenset()
    opaque: tuple[str, ...] = ()
    also: tuple[StatementFacts, ...] = ()

    @property
    def relations(self) -> frozenset[Relation]:
        return self.reads | self.writes

    @property
    def parts(self) -> tuple[StatementFacts, ...]:
        """The statement itself and every kind inside it."""
        return (self, *(part for inner in self.also for part in inner.parts))


@dataclass(frozen=True, slots=True, eq=False)
class Operation:
    """One operation, described once and shared by all its executions: equality is identity, so it can key a cache.

    `text` is what a person would call it (the SQL); `recorded_text` is what may be written down, with secrets taken
    out. `statements` is empty for an empty string. `unclassified` says why the operation could not be classified, and
    is empty when it could: what could not be classified is denied; `ungrammatical` says that the
    language's own grammar refused it, which the target would do too. `example` is another operation that differs in its
    texts only, by constants of which no fact depends: what is ruled on one is ruled on both.
    """

    protocol: str
    kind: OperationKind
    phase: Phase
    text: str
    recorded_text: str
    statements: tuple[StatementFacts, ...]
    unclassified: str = ""
    ungrammatical: bool = False
    example: Operation | None = None
