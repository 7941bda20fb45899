"""Decides what a hop chain may do with one operation. Pure: no clock, no I/O.

**One hop.** A statement makes demands: *its kind on each relation it writes*, *select on each relation it reads*, and
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

**The chain.** Each hop is decided on its own; the strictest decision counts, and all masks. No hop has more than the
one before.

**Preparing.** What only prepares (`Parse`) is denied where its execution would be, and never held: the execution is.
SQL's own PREPARE of what would be held is denied, since later EXECUTEs would go by the one approval.

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

from proxy.model import ColumnMask, Decision, FieldMask, Operation, Phase, Reason, Relation, Ruling, StatementFacts
from proxy.policy import catalog, housekeeping, vocabulary
from proxy.policy.document import DEFAULT_HOLD_S, Mask
from proxy.policy.names import FunctionPattern, RelationPattern, split_function

MAX_CACHED = 4096
"""Rulings one judge keeps."""

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
class CompiledRule:
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
class HopRules:
    """The rules of one agent at one target, and its masks with the names of the rules that they come from."""

    agent: str
    target: str
    denies: tuple[CompiledRule, ...]
    holds: tuple[CompiledRule, ...]
    allows: tuple[CompiledRule, ...]
    masks: tuple[tuple[Mask, str], ...]


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What one hop says of one statement."""

    decision: Decision
    rule: str
    text: str
    hint: str = ""
    timeout_s: float = DEFAULT_HOLD_S


class Judge:
    """Rules on the operations of one chain at one target. Shared by all sessions with the same chain.

    `masks` are all that hold, for each column the strictest; `mask_signature` changes exactly when they do."""

    __slots__ = (
        "_cache",
        "_derived",
        "_hops",
        "_siblings",
        "_target",
        "_version",
        "field_masks",
        "mask_signature",
        "masks",
    )

    def __init__(
        self,
        version: str,
        target: str,
        hops: tuple[HopRules, ...],
        masks: tuple[ColumnMask, ...],
        derived: frozenset[tuple[str, str]] = frozenset(),
    ) -> None:
        self._version = version
        self._target = target
        self._hops = hops
        self._derived = derived
        self._cache: dict[Operation, Ruling] = {}
        self._siblings: dict[frozenset[tuple[str, str]], Judge] = {}
        self.masks = masks
        self.field_masks: tuple[FieldMask, ...] = ()
        self.mask_signature = tuple((mask.schema, mask.relation, mask.column, mask.label) for mask in masks)

    def with_derived(self, derived: Iterable[tuple[str, str]]) -> Judge:
        """The same judge, knowing that every column of these relations shows masked values."""
        key = frozenset(derived) - {(mask.schema, mask.relation) for mask in self.masks}
        if key == self._derived:
            return self
        if key not in self._siblings:
            if len(self._siblings) >= 64:
                self._siblings.clear()
            self._siblings[key] = Judge(self._version, self._target, self._hops, self.masks, key)
        return self._siblings[key]

    def decide(self, operation: Operation) -> Ruling:
        """The met ruling. Equal operations are ruled once, and so are those with the same example; pure."""
        if operation.once:
            return self._rule(operation)
        operation = operation.example or operation
        ruling = self._cache.get(operation)
        if ruling is None:
            ruling = self._rule(operation)
            if len(self._cache) >= MAX_CACHED:
                self._cache.clear()
            self._cache[operation] = ruling
        return ruling

    def _rule(self, operation: Operation) -> Ruling:
        verdicts = [self._hop(hop, operation) for hop in self._hops]
        reasons = tuple(
            Reason(hop.agent, verdict.rule, verdict.decision, verdict.text)
            for hop, verdict in zip(self._hops, verdicts, strict=True)
        )
        decision = max(verdict.decision for verdict in verdicts)
        # The hop nearest to the client is the one whom its reader can place.
        decisive = next(verdict for verdict in reversed(verdicts) if verdict.decision == decision)
        return Ruling(
            decision=decision,
            reasons=reasons,
            message=f"target `{self._target}`: {decisive.text}",
            hint=decisive.hint,
            policy_version=self._version,
            hold_timeout_s=min(verdict.timeout_s for verdict in verdicts if verdict.decision == decision)
            if decision == Decision.HOLD
            else 0.0,
        )

    def _hop(self, hop: HopRules, operation: Operation) -> _Verdict:
        if operation.unclassified:
            return _Verdict(
                Decision.DENY,
                "[unclassified]",
                f"agent `{hop.agent}` may not run what cannot be classified: {operation.unclassified}",
                "write the statement so that it can be classified, or run it outside the gateway's targets",
            )
        if not hop.allows and not hop.holds:
            return _missing(hop, "do anything here", "*")
        verdicts = [self._statement(hop, statement) for statement in operation.statements]
        if not verdicts:
            return _Verdict(Decision.ALLOW, "[driver housekeeping]", f"agent `{hop.agent}` may send an empty string")
        decision = max(verdict.decision for verdict in verdicts)
        decisive = next(verdict for verdict in verdicts if verdict.decision == decision)
        if decision == Decision.ALLOW:
            return _Verdict(decision, _joined(verdict.rule for verdict in verdicts), decisive.text)
        if decision == Decision.HOLD and operation.phase == Phase.PREPARE:
            text = f"agent `{hop.agent}` may prepare this; it is held when executed"
            return _Verdict(Decision.ALLOW, decisive.rule, f"{text} (rule `{decisive.rule}`)")
        if decision == Decision.HOLD:
            held = [verdict for verdict in verdicts if verdict.decision == decision]
            rule = _joined(verdict.rule for verdict in held)
            return _Verdict(decision, rule, decisive.text, decisive.hint, min(verdict.timeout_s for verdict in held))
        return decisive

    def _statement(self, hop: HopRules, statement: StatementFacts) -> _Verdict:
        demands = list(_demands(statement))
        for part in statement.parts:
            if part.kind == "set" and housekeeping.is_fixed(part.parameter, part.value):
                text = f"agent `{hop.agent}` may not set {part.parameter}: names or texts would mean something else"
                return _Verdict(Decision.DENY, "[fixed setting]", text, "no rule can allow this; qualify names instead")
        for part, rule in product(statement.parts, hop.denies):
            if rule.touches(part, _own_demands(part)):
                text = f"agent `{hop.agent}` may not {_deed(statement, demands)} (rule `{rule.name}`)"
                return _Verdict(Decision.DENY, rule.name, text, rule.hint or _HINT_DENY)
        leak = self._leak(hop, statement)
        if leak is not None:
            return leak
        return self._grant(hop, statement, demands)

    def _grant(self, hop: HopRules, statement: StatementFacts, demands: list[Demand]) -> _Verdict:
        held: list[CompiledRule] = []
        used: dict[str, None] = {}
        for part in statement.parts:
            unsafe = {function for function in part.functions if not _is_safe(function)}
            own = list(_own_demands(part))
            chores = [demand for demand in own if _is_chore(part, demand, unsafe)]
            work = [demand for demand in own if demand not in chores]
            holds = [
                rule for rule in hop.holds if rule.touches(part, own if rule.relations or rule.functions else work)
            ]
            held += holds
            grants = (*hop.allows, *holds)
            for demand in work:
                rule = next((rule for rule in grants if rule.covers(demand)), None)
                if rule is None and not _by_function(part, demand, unsafe):
                    return _missing(hop, f"{demand[0]}{_on(demand[1])} {part.parameter}".rstrip(), demand[0])
                if rule is not None:
                    used[rule.name] = None
            kinds = {part.kind, *(kind for kind, _ in own)}
            for function in sorted(unsafe):
                rule = next(
                    (rule for rule in grants if any(rule.covers_function(kind, function) for kind in kinds)), None
                )
                if rule is None:
                    return _missing(hop, f"call {function} in {_article(part.kind)}", part.kind, function)
                used[rule.name] = None
        deed = _deed(statement, demands)
        if held:
            names = _joined(rule.name for rule in held)
            if statement.kind == "prepare":
                text = f"agent `{hop.agent}` may not PREPARE what needs approval (rule `{names}`)"
                return _Verdict(Decision.DENY, names, text, "send the statement itself: each execution is approved")
            return _Verdict(
                Decision.HOLD,
                names,
                f"agent `{hop.agent}` needs approval to {deed} (rule `{names}`)",
                next((rule.hint for rule in held if rule.hint), ""),
                min(rule.timeout_s for rule in held),
            )
        if not used:
            return _Verdict(Decision.ALLOW, "[driver housekeeping]", f"agent `{hop.agent}` may {deed}")
        return _Verdict(Decision.ALLOW, _joined(used), f"agent `{hop.agent}` may {deed}")

    def _leak(self, hop: HopRules, statement: StatementFacts) -> _Verdict | None:
        """Whether the statement could show what this hop may see only masked."""
        if not hop.masks:
            return None
        parts = statement.parts
        for part in parts:
            if part.kind not in _TRACEABLE:
                mask, rule = hop.masks[0]
                text = (
                    f"agent `{hop.agent}` may not {part.kind} where columns are masked ({_column(mask)}, rule `{rule}`)"
                )
                return _Verdict(Decision.DENY, rule, text, "what it does cannot be seen from the statement")
        relations = frozenset[Relation]().union(*(part.relations for part in parts))
        exposed = frozenset[str]().union(*(part.exposed_columns for part in parts))
        opaque = [words for part in parts for words in part.opaque]
        definition = next((part.kind for part in parts if part.kind not in _TRACEABLE_ON_MASKED), "")
        for mask, rule in hop.masks:
            if not any(_is(relation, mask.schema, mask.relation) for relation in relations):
                continue
            why = _why(mask.column if mask.column in exposed else "", opaque, definition)
            if why:
                text = f"agent `{hop.agent}` sees {_column(mask)} masked: {why} is not allowed (rule `{rule}`)"
                return _Verdict(Decision.DENY, rule, text, _HINT_MASK)
        for schema, name in sorted(self._derived):
            if any(_is(relation, schema, name) for relation in relations):
                why = _why(", ".join(sorted(exposed)), opaque, definition)
                if why:
                    rule = hop.masks[0][1]
                    text = (
                        f"agent `{hop.agent}` sees {schema}.{name} masked, as it shows masked columns: "
                        f"{why} is not allowed (rule `{rule}`)"
                    )
                    return _Verdict(Decision.DENY, rule, text, _HINT_MASK)
        return None


_HINT_DENY = "a rule forbids this; ask those who keep the policy"
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


def _missing(hop: HopRules, deed: str, kind: str, function: str = "") -> _Verdict:
    what = f"`{kind}` with the function `{function}`" if function else f"`{kind}` there"
    return _Verdict(
        Decision.DENY,
        "[no rule allows it]",
        f"agent `{hop.agent}` may not {deed} (no rule allows it)",
        f"ask those who keep the policy for a rule that allows {what}",
    )


def _joined(names: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(names))
