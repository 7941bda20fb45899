"""What one hop says of a SQL statement.

A statement makes demands: *its kind on each relation it writes*, *select on each relation it reads*, and
its kind alone when it names no relation. (COPY reads under its own kind.) Then, in this order:

1. A `deny` rule that touches the statement denies it.
2. A statement that could show a masked value in a form that nothing traces is denied (below).
3. A `hold` rule that touches the statement makes it wait; for what it names it also grants, once approved.
4. Every demand has to be covered by an `allow` rule or by such a `hold`, or belong to the driver's housekeeping
   (`housekeeping`); every function that is not a safe built-in one has to be named by one of those rules. Rules add up:
   two rules may cover two relations of one join.
5. What is left over is denied.

A rule *touches* a statement when its kind fits, and, if the rule names relations, one of them could be among the
statement's, and, if it names functions, one of them is called. A rule that names functions and no relations
grants those functions and no relation. A rule that names relations grants nothing to statements without any (`do`).

**Masks.** `StatementFacts` says where columns are named. With a masked relation in a statement: a masked column named
anywhere but plainly in the output, or any construct that carries values without naming columns, is denied. For
relations that the server says are derived from a masked one (views, partitions) every column counts as masked. Kinds of
which nobody can see what they do (`do`, `create-function`, …) and changes to a masked relation's definition are denied.

Blind spots: sees only what the classifier could name. A function that a rule names is trusted with everything it does.
A view made after login is not known as derived until the next one. A prepared statement or cursor goes on under the
masks that held when it was made, apart from the columns that RowDescription traces.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

from proxy.model import Decision, Operation, Relation, StatementFacts
from proxy.policy import catalog, housekeeping, vocabulary
from proxy.policy.document import Mask
from proxy.policy.names import FunctionPattern, RelationPattern, split_function
from proxy.policy.verdicts import HINT_DENY, Verdict, joined, missing

Demand = tuple[str, Relation | None]

_READS_AS_ITSELF = frozenset({"select", "copy-out", "copy-file", "copy-program"})

_QUERY_KINDS = vocabulary.READ | vocabulary.WRITE | {"create-table-as", "select-into", "create-view"}
_TRACEABLE_ON_MASKED = (
    _QUERY_KINDS
    | housekeeping.KINDS
    | {"create-materialized-view", "lock-table", "vacuum", "analyze", "drop-table", "set"}
)
"""Kinds that may name a masked relation: what they show of it is told by `StatementFacts`, or nothing."""

_TRACEABLE = (
    _TRACEABLE_ON_MASKED
    | vocabulary.TWO_PHASE
    | vocabulary.MAINTENANCE
    | {"reset", "show", "listen", "notify", "comment", "create-table", "create-index", "create-sequence"}
    | {"create-type", "create-schema", "alter-table", "alter-sequence", "alter-index", "create-statistics"}
    | {kind for kind in vocabulary.DDL if kind.startswith("drop-")}
)
"""Kinds that are let through beside masks when they name no masked relation; the rest could show anything."""


@dataclass(frozen=True, slots=True)
class StatementRule:
    """One rule, its words turned into sets and patterns. `any_relation`: the rule does not name relations."""

    name: str
    decision: Decision
    kinds: frozenset[str]
    relations: tuple[RelationPattern, ...]
    functions: tuple[FunctionPattern, ...]
    timeout_s: float
    hint: str

    def touches(self, statement: StatementFacts, demands: Iterable[Demand]) -> bool:
        """Whether this rule's restriction concerns the statement."""
        if not any(self.touches_demand(demand) for demand in demands):
            return False
        return not self.functions or any(
            pattern.touches(*split_function(function))
            for pattern, function in product(self.functions, statement.functions)
        )

    def touches_demand(self, demand: Demand) -> bool:
        kind, relation = demand
        if kind not in self.kinds:
            return False
        if not self.relations:
            return True
        return relation is not None and any(
            pattern.touches(relation.schema, relation.name) for pattern in self.relations
        )

    def covers(self, demand: Demand) -> bool:
        """Whether this rule grants the demand."""
        kind, relation = demand
        if kind not in self.kinds:
            return False
        if relation is None:
            return not self.relations
        if not self.relations:
            return not self.functions and _ANY_RELATION.covers(relation.schema, relation.name)
        return any(pattern.covers(relation.schema, relation.name) for pattern in self.relations)

    def covers_function(self, kind: str, function: str) -> bool:
        if kind not in self.kinds:
            return False
        schema, name = split_function(function)
        unsafe = schema in ("", "pg_catalog") and name in catalog.UNSAFE_FUNCTIONS
        return any(pattern.covers(schema, name, unsafe_builtin=unsafe) for pattern in self.functions)


_ANY_RELATION = RelationPattern.parse("*")


@dataclass(frozen=True, slots=True)
class StatementHop:
    """The rules of one agent at one database, and its masks with the names of the rules that they come from."""

    agent: str
    denies: tuple[StatementRule, ...]
    holds: tuple[StatementRule, ...]
    allows: tuple[StatementRule, ...]
    masks: tuple[tuple[Mask, str], ...]

    def judge(self, operation: Operation, derived: frozenset[tuple[str, str]]) -> list[Verdict]:
        """A verdict for every statement of a classified operation."""
        if operation.requests:
            text = f"agent `{self.agent}` may not send requests to a database"
            return [Verdict(Decision.DENY, "[unclassified]", text)]
        if not operation.statements:
            text = f"agent `{self.agent}` may send an empty string"
            return [Verdict(Decision.ALLOW, "[driver housekeeping]", text)]
        return [self._statement(statement, derived) for statement in operation.statements]

    def _statement(self, statement: StatementFacts, derived: frozenset[tuple[str, str]]) -> Verdict:
        demands = list(_demands(statement))
        for part in statement.parts:
            if part.kind == "set" and housekeeping.is_fixed(part.parameter, part.value):
                text = f"agent `{self.agent}` may not set {part.parameter}: names or texts would mean something else"
                return Verdict(Decision.DENY, "[fixed setting]", text, "no rule can allow this; qualify names instead")
        for part, rule in product(statement.parts, self.denies):
            if rule.touches(part, _own_demands(part)):
                text = f"agent `{self.agent}` may not {_deed(statement, demands)} (rule `{rule.name}`)"
                return Verdict(Decision.DENY, rule.name, text, rule.hint or HINT_DENY)
        leak = self._leak(statement, derived)
        if leak is not None:
            return leak
        return self._grant(statement, demands)

    def _grant(self, statement: StatementFacts, demands: list[Demand]) -> Verdict:
        held: list[StatementRule] = []
        used: dict[str, None] = {}
        for part in statement.parts:
            unsafe = {function for function in part.functions if not _is_safe(function)}
            own = list(_own_demands(part))
            chores = [demand for demand in own if _is_chore(part, demand, unsafe)]
            work = [demand for demand in own if demand not in chores]
            holds = [
                rule for rule in self.holds if rule.touches(part, own if rule.relations or rule.functions else work)
            ]
            held += holds
            grants = (*self.allows, *holds)
            for demand in work:
                rule = next((rule for rule in grants if rule.covers(demand)), None)
                if rule is None and not _by_function(part, demand, unsafe):
                    return self._missing(f"{demand[0]}{_on(demand[1])} {part.parameter}".rstrip(), demand[0])
                if rule is not None:
                    used[rule.name] = None
            kinds = {part.kind, *(kind for kind, _ in own)}
            for function in sorted(unsafe):
                rule = next(
                    (rule for rule in grants if any(rule.covers_function(kind, function) for kind in kinds)), None
                )
                if rule is None:
                    return self._missing(f"call {function} in {_article(part.kind)}", part.kind, function)
                used[rule.name] = None
        deed = _deed(statement, demands)
        if held:
            names = joined(rule.name for rule in held)
            if statement.kind == "prepare":
                text = f"agent `{self.agent}` may not PREPARE what needs approval (rule `{names}`)"
                return Verdict(Decision.DENY, names, text, "send the statement itself: each execution is approved")
            return Verdict(
                Decision.HOLD,
                names,
                f"agent `{self.agent}` needs approval to {deed} (rule `{names}`)",
                next((rule.hint for rule in held if rule.hint), ""),
                min(rule.timeout_s for rule in held),
            )
        if not used:
            return Verdict(Decision.ALLOW, "[driver housekeeping]", f"agent `{self.agent}` may {deed}")
        return Verdict(Decision.ALLOW, joined(used), f"agent `{self.agent}` may {deed}")

    def _leak(self, statement: StatementFacts, derived: frozenset[tuple[str, str]]) -> Verdict | None:
        """Whether the statement could show what this hop may see only masked."""
        if not self.masks:
            return None
        parts = statement.parts
        for part in parts:
            if part.kind not in _TRACEABLE:
                mask, rule = self.masks[0]
                where = f"where columns are masked ({_column(mask)}, rule `{rule}`)"
                text = f"agent `{self.agent}` may not {part.kind} {where}"
                return Verdict(Decision.DENY, rule, text, "what it does cannot be seen from the statement")
        relations = frozenset[Relation]().union(*(part.relations for part in parts))
        exposed = frozenset[str]().union(*(part.exposed_columns for part in parts))
        opaque = [words for part in parts for words in part.opaque]
        definition = next((part.kind for part in parts if part.kind not in _TRACEABLE_ON_MASKED), "")
        for mask, rule in self.masks:
            if not any(_is(relation, mask.schema, mask.relation) for relation in relations):
                continue
            why = _why(mask.column if mask.column in exposed else "", opaque, definition)
            if why:
                text = f"agent `{self.agent}` sees {_column(mask)} masked: {why} is not allowed (rule `{rule}`)"
                return Verdict(Decision.DENY, rule, text, _HINT_MASK)
        for schema, name in sorted(derived):
            if any(_is(relation, schema, name) for relation in relations):
                why = _why(", ".join(sorted(exposed)), opaque, definition)
                if why:
                    rule = self.masks[0][1]
                    text = (
                        f"agent `{self.agent}` sees {schema}.{name} masked, as it shows masked columns: "
                        f"{why} is not allowed (rule `{rule}`)"
                    )
                    return Verdict(Decision.DENY, rule, text, _HINT_MASK)
        return None

    def _missing(self, deed: str, kind: str, function: str = "") -> Verdict:
        what = f"`{kind}` with the function `{function}`" if function else f"`{kind}` there"
        return missing(self.agent, deed, what)


_HINT_MASK = (
    "select the masked column by its plain name, and nothing else with it: no expression, condition, order or copy"
)


def _is(relation: Relation, schema: str, name: str) -> bool:
    return relation.name == name and relation.schema in ("", schema)


def _why(column: str, opaque: list[str], definition: str) -> str:
    if column:
        return f"naming `{column}` outside of a plain output column"
    return opaque[0] if opaque else definition


def _column(mask: Mask) -> str:
    return f"{mask.schema}.{mask.relation}.{mask.column}"


def _own_demands(part: StatementFacts) -> Iterator[Demand]:
    read_kind = part.kind if part.kind in _READS_AS_ITSELF else "select"
    for relation in sorted(part.reads, key=str):
        yield read_kind, relation
    for relation in sorted(part.writes, key=str):
        yield part.kind, relation
    if not part.writes and not (part.reads and read_kind == part.kind):
        yield part.kind, None


def _demands(statement: StatementFacts) -> Iterator[Demand]:
    for part in statement.parts:
        yield from _own_demands(part)


def _is_safe(function: str) -> bool:
    """Whether it is a built-in function or operator that needs no rule. Those of information_schema serve its views."""
    schema, name = split_function(function)
    return schema == "information_schema" or (
        schema in ("", "pg_catalog") and (name in catalog.SAFE_FUNCTIONS or name in catalog.OPERATORS)
    )


def _is_chore(part: StatementFacts, demand: Demand, unsafe: set[str]) -> bool:
    kind, relation = demand
    if kind == "select" and relation is None and unsafe:
        return False
    return housekeeping.covers(part, kind, relation)


def _by_function(part: StatementFacts, demand: Demand, unsafe: set[str]) -> bool:
    """Whether the demand is no more than calling functions, each of which needs a rule of its own."""
    kind, relation = demand
    return relation is None and bool(unsafe) and kind in ("select", "call")


def _on(relation: Relation | None) -> str:
    return f" {relation}" if relation is not None else ""


def _article(kind: str) -> str:
    return f"{'an' if kind[:1] in 'aeiou' else 'a'} {kind}"


def _deed(statement: StatementFacts, demands: list[Demand]) -> str:
    """What the statement does, in words: `select public.a and public.b`."""
    by_kind: dict[str, list[str]] = {}
    for kind, relation in demands:
        by_kind.setdefault(kind, []).extend([str(relation)] if relation is not None else [])
    if statement.kind in ("set", "reset", "show"):
        return f"{statement.kind} {statement.parameter}"
    own = by_kind.pop(statement.kind, [])
    told = " ".join([statement.kind, " and ".join(dict.fromkeys(own))]).strip()
    rest = [f"{kind} {' and '.join(dict.fromkeys(names))}".strip() for kind, names in by_kind.items()]
    return " with ".join([told, *rest])
