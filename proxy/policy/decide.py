"""Decides what a hop chain may do with one operation. Pure: no clock, no I/O.

**One hop** says of each part of an operation (a SQL statement: `statements`; a request: `requests`) what its own rules
say: `deny` beats `hold` beats `allow`, and what no rule allows is denied. The strictest part counts.

**The chain.** Each hop is decided on its own; the strictest decision counts, and all masks. No hop has more than the
one before.

**Preparing.** What only prepares (`Parse`) is denied where its execution would be, and never held: the execution is.
SQL's own PREPARE of what would be held is denied, since later EXECUTEs would go by the one approval.

Blind spot: sees only what the classifier could name; what it could not name is denied.
"""

from __future__ import annotations

from collections.abc import Iterable

from proxy.model import ColumnMask, Decision, FieldMask, Operation, OperationKind, Phase, Reason, Ruling
from proxy.policy.requests import RequestHop
from proxy.policy.statements import StatementHop
from proxy.policy.verdicts import Verdict, joined, missing

MAX_CACHED = 4096
"""Rulings one judge keeps."""

Hop = StatementHop | RequestHop
"""The rules of one agent at one target, in the words of the target's protocol."""


class Judge:
    """Rules on the operations of one chain at one target. Shared by all sessions with the same chain.

    `masks` and `field_masks` are all that hold, for each column or field the strictest; `mask_signature` changes
    exactly when they do."""

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
        hops: tuple[Hop, ...],
        masks: tuple[ColumnMask, ...],
        field_masks: tuple[FieldMask, ...] = (),
        derived: frozenset[tuple[str, str]] = frozenset(),
    ) -> None:
        self._version = version
        self._target = target
        self._hops = hops
        self._derived = derived
        self._cache: dict[Operation, Ruling] = {}
        self._siblings: dict[frozenset[tuple[str, str]], Judge] = {}
        self.masks = masks
        self.field_masks = field_masks
        self.mask_signature = (
            *((mask.schema, mask.relation, mask.column, mask.label) for mask in masks),
            *((mask.resource, mask.namespaces, mask.names, mask.path, mask.label) for mask in field_masks),
        )

    def with_derived(self, derived: Iterable[tuple[str, str]]) -> Judge:
        """The same judge, knowing that every column of these relations shows masked values."""
        key = frozenset(derived) - {(mask.schema, mask.relation) for mask in self.masks}
        if key == self._derived:
            return self
        if key not in self._siblings:
            if len(self._siblings) >= 64:
                self._siblings.clear()
            self._siblings[key] = Judge(self._version, self._target, self._hops, self.masks, self.field_masks, key)
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
            record_input=any(verdict.record_input for verdict in verdicts),
        )

    def _hop(self, hop: Hop, operation: Operation) -> Verdict:
        if operation.unclassified:
            return Verdict(
                Decision.DENY,
                "[unclassified]",
                f"agent `{hop.agent}` may not run what cannot be classified: {operation.unclassified}",
                _HINT_REQUEST if operation.kind in _REQUESTS else _HINT_STATEMENT,
            )
        if not hop.allows and not hop.holds:
            return missing(hop.agent, "do anything here", "`*` there")
        verdicts = hop.judge(operation, self._derived)
        decision = max(verdict.decision for verdict in verdicts)
        decisive = next(verdict for verdict in verdicts if verdict.decision == decision)
        record_input = any(verdict.record_input for verdict in verdicts)
        if decision == Decision.ALLOW:
            rules = joined(verdict.rule for verdict in verdicts)
            return Verdict(decision, rules, decisive.text, record_input=record_input)
        if decision == Decision.HOLD and operation.phase == Phase.PREPARE:
            text = f"agent `{hop.agent}` may prepare this; it is held when executed"
            return Verdict(Decision.ALLOW, decisive.rule, f"{text} (rule `{decisive.rule}`)")
        if decision == Decision.HOLD:
            held = [verdict for verdict in verdicts if verdict.decision == decision]
            rule = joined(verdict.rule for verdict in held)
            timeout_s = min(verdict.timeout_s for verdict in held)
            return Verdict(decision, rule, decisive.text, decisive.hint, timeout_s, record_input)
        return decisive


_REQUESTS = (OperationKind.REQUEST, OperationKind.FORWARD)
_HINT_STATEMENT = "write the statement so that it can be classified, or run it outside the gateway's targets"
_HINT_REQUEST = "send the request as kubectl would: plain path, JSON body"
