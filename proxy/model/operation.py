"""What a client asks in one step, and what could be told of it before it runs."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class OperationKind(enum.StrEnum):
    """How the operation arrived (PostgreSQL: a simple Query, a Parse, an Execute, a FunctionCall; Kubernetes: a
    request, or a connection that a client opens inside a port-forward)."""

    QUERY = "query"
    PARSE = "parse"
    EXECUTE = "execute"
    FUNCTION_CALL = "function-call"
    REQUEST = "request"
    FORWARD = "forward"


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


@dataclass(frozen=True, slots=True)
class RequestFacts:
    """What one request to a Kubernetes API server is, as the server's own RequestInfo tells it.

    `verb` is RBAC's: `get`, `list`, `watch`, `create`, `update`, `patch`, `delete`, `deletecollection`; `impersonate`
    for each identity that the request asks to act as; for `exec`, `attach`, `portforward` and `proxy` always `create`,
    whatever the HTTP method; for a path that is no resource the HTTP method in lower case. `resource` is empty for such
    a path. `group` is empty for the core group. `namespace` is empty for what is cluster-scoped, or asked over all
    namespaces; `name` for what names no single object. `label_selector`
    and `field_selector` are as sent, `dry_run` says that nothing is to be stored.

    `command` is what `exec` is to run (empty elsewhere), `ports` what a port-forward is to reach inside the pod.
    `body` is the decoded object that is sent, or for a patch the patch, and None where there is none; `patch` names its
    kind (`json`, `merge`, `strategic`, `apply`), and is empty for what is no patch. `opaque` names, in words for
    people, what could show or change something that nothing here tells; empty when there is nothing.
    """

    verb: str
    path: str
    resource: str = ""
    group: str = ""
    version: str = ""
    subresource: str = ""
    namespace: str = ""
    name: str = ""
    label_selector: str = ""
    field_selector: str = ""
    dry_run: bool = False
    command: tuple[str, ...] = ()
    ports: tuple[int, ...] = ()
    body: object = None
    patch: str = ""
    opaque: tuple[str, ...] = ()

    @property
    def target(self) -> str:
        """The resource as kubectl spells it: `pods`, `deployments.apps`, `pods/exec`; a path as it is."""
        if not self.resource:
            return self.path
        whole = f"{self.resource}.{self.group}" if self.group else self.resource
        return f"{whole}/{self.subresource}" if self.subresource else whole

    @property
    def kind(self) -> str:
        """For people and recordings: `delete deployments.apps`."""
        return f"{self.verb} {self.target}"


@dataclass(frozen=True, slots=True, eq=False)
class Operation:
    """One operation, described once and shared by all its executions: equality is identity, so it can key a cache.

    `text` is what a person would call it (the SQL; `delete deployments.apps/web in shop`); `recorded_text` is what may
    be written down, with secrets taken out. `statements` is what it consists of, empty for an empty
    string; for a protocol of requests it is empty, and `requests` is the request itself, first, and the identities that
    it asks to act as. `unclassified` says why the operation could not be classified, and
    is empty when it could: what could not be classified is denied; `ungrammatical` says that the
    language's own grammar refused it, which the target would do too. `example` is another operation that differs in its
    texts only, by constants of which no fact depends: what is ruled on one is ruled on both. `once` says that it will
    not be asked about again, so that nothing is kept of it.
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
    once: bool = False
    requests: tuple[RequestFacts, ...] = ()

    @property
    def kinds(self) -> tuple[str, ...]:
        """What it consists of, in the words that recordings use."""
        return (*(part.kind for part in self.statements), *(part.kind for part in self.requests))
