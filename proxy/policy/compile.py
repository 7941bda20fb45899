"""Turns a resolved policy into judges: sets and patterns once a policy version, rules by hop once a chain.

Blind spot: an agent that this version of the policy does not know (a chain attributed under an older one) has no rules.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from proxy.masking import masker
from proxy.model import UNATTRIBUTED, ColumnMask, Decision, Endpoint, FieldMask, Reason, Ruling, Target
from proxy.model.fields import FieldPath
from proxy.policy import vocabulary
from proxy.policy.conditions import Condition
from proxy.policy.decide import Hop, Judge
from proxy.policy.document import MASK_METHODS, Mask, ObjectMask, Requests, ResolvedPolicy, Rule
from proxy.policy.names import FunctionPattern, RelationPattern
from proxy.policy.requests import RequestHop, RequestMask, RequestRule
from proxy.policy.resources import ALSO, Glob, ResourcePattern, expand
from proxy.policy.statements import StatementHop, StatementRule

MAX_JUDGES = 1024
"""Judges one policy keeps: one a chain and target."""

_DECISIONS = {"allow": Decision.ALLOW, "hold": Decision.HOLD, "deny": Decision.DENY}


class CompiledPolicy:
    """One version of the policy, ready to rule. `targets` are by name; `agents` are names; `mask_key` keys the `hash`
    masks."""

    def __init__(self, resolved: ResolvedPolicy, mask_key: bytes) -> None:
        self.version = resolved.version
        self.agents = frozenset(agent.name for agent in resolved.agents) | {UNATTRIBUTED}
        self._protocols = dict(resolved.protected_ports)
        self.targets = {target.name: target for target in resolved.targets}
        self._endpoints = {endpoint: target for target in resolved.targets for endpoint in target.endpoints}
        self._networks = sorted(
            (
                (ipaddress.ip_network(prefix.network), prefix.port, target)
                for target in resolved.targets
                for prefix in target.prefixes
            ),
            key=lambda each: each[0].prefixlen,
            reverse=True,
        )
        self._rules = [(rule, _compile(rule)) for rule in resolved.rules if rule.requests is None]
        protected = frozenset(resolved.protected_ports)
        self._request_rules = [
            (rule, _compile_requests(rule, rule.requests, protected) if rule.requests is not None else None)
            for rule in resolved.rules
        ]
        # What is hidden is left out: the function is there for what should never be shown.
        self._maskers = {
            method: masker("redact" if method == "hide" else method, mask_key) for method in (*MASK_METHODS, "hide")
        }
        self._hops: dict[tuple[str, str], Hop] = {}
        self._judges: dict[tuple[tuple[str, ...], str], Judge] = {}

    def target_at(self, endpoint: Endpoint) -> Target | None:
        """The target that this address and port belong to: that with the longest prefix."""
        exact = self._endpoints.get(endpoint)
        if exact is not None or not self._networks:
            return exact
        address = ipaddress.ip_address(endpoint.address)
        for network, port, target in self._networks:
            if port == endpoint.port and network.version == address.version and address in network:
                return target
        return None

    def protocol_at(self, port: int) -> str | None:
        """The protocol spoken at a protected port, wherever it is."""
        return self._protocols.get(port)

    def bind(self, principals: tuple[str, ...], target: Target, database: str) -> Judge:
        """The judge of a chain at a target. The database matters at `login` only."""
        key = (principals, target.name)
        judge = self._judges.get(key)
        if judge is None:
            if not principals:
                raise ValueError("a chain without principals: it would be met over nothing")
            hops = tuple(self._hop(principal, target) for principal in principals)
            if len(self._judges) >= MAX_JUDGES:
                self._judges.clear()
            judge = self._judges[key] = Judge(
                self.version, target.name, hops, self._met_masks(hops), self._met_field_masks(hops)
            )
        return judge

    def login(self, principals: tuple[str, ...], target: Target, database: str) -> Ruling:
        """May the chain log in at all? Each hop needs a rule that allows or holds something there, and the database has
        to be one of the target's. Startup parameters are the protocol's to judge."""
        reasons: list[Reason] = []
        for principal in principals:
            hop = self._hop(principal, target)
            granting = [rule.name for rule in (*hop.allows, *hop.holds)]
            if granting:
                reasons.append(Reason(principal, granting[0], Decision.ALLOW, f"agent `{principal}` may log in"))
            else:
                text = f"agent `{principal}` may not log in (no rule allows it anything here)"
                reasons.append(Reason(principal, "[no rule allows it]", Decision.DENY, text))
        last = principals[-1] if principals else UNATTRIBUTED
        if not principals:
            reasons.append(Reason(last, "[no attribution]", Decision.DENY, "nobody is behind this connection"))
        if target.databases and database not in target.databases:
            text = f"agent `{last}` may not open database `{database}` (target has {_listed(target.databases)})"
            reasons.append(Reason(last, "[target's databases]", Decision.DENY, text))
        decisive = next((reason for reason in reasons if reason.decision == Decision.DENY), reasons[-1])
        return Ruling(
            decision=decisive.decision,
            reasons=tuple(reasons),
            message=f"target `{target.name}`: {decisive.text}",
            hint=_LOGIN_HINTS.get(decisive.rule, ""),
            policy_version=self.version,
        )

    def _hop(self, principal: str, target: Target) -> Hop:
        hop = self._hops.get((principal, target.name))
        if hop is None:
            known = principal in self.agents
            if target.protocol == "kubernetes":
                hop = _request_hop(principal, target.name, self._request_rules if known else ())
            else:
                hop = _statement_hop(principal, target.name, self._rules if known else ())
            if known:
                self._hops[principal, target.name] = hop
        return hop

    def _met_masks(self, hops: Iterable[Hop]) -> tuple[ColumnMask, ...]:
        """For each column the strictest method of any hop."""
        strictest: dict[tuple[str, str, str], Mask] = {}
        for hop in hops:
            for mask, _ in hop.masks if isinstance(hop, StatementHop) else ():
                key = (mask.schema, mask.relation, mask.column)
                known = strictest.setdefault(key, mask)
                strictest[key] = min(known, mask, key=lambda each: MASK_METHODS.index(each.method))
        return tuple(
            ColumnMask(mask.schema, mask.relation, mask.column, mask.method, self._maskers[mask.method])
            for _, mask in sorted(strictest.items())
        )

    def _met_field_masks(self, hops: Iterable[Hop]) -> tuple[FieldMask, ...]:
        """All of what is hidden, then for each field of the same objects the strictest method of any hop, the strictest
        first."""
        strictness = ("hide", *MASK_METHODS)
        masks = [mask.written for hop in hops if isinstance(hop, RequestHop) for mask in hop.masks]
        strictest: dict[tuple[object, ...], ObjectMask] = {}
        for mask in sorted(masks, key=lambda each: strictness.index(each.method)):
            strictest.setdefault((mask.method == "hide", mask.resource, mask.namespaces, mask.names, mask.field), mask)
        return tuple(
            FieldMask(mask.resource, mask.namespaces, mask.names, mask.field, mask.method, self._maskers[mask.method])
            for mask in sorted(
                strictest.values(),
                key=lambda each: (
                    strictness.index(each.method),
                    each.resource,
                    each.field,
                    each.namespaces,
                    each.names,
                ),
            )
        )


_LOGIN_HINTS = {
    "[no rule allows it]": "ask those who keep the policy for a rule that names this agent and target",
    "[target's databases]": "connect to a database that the policy names for this target",
}


def _compile(rule: Rule) -> StatementRule | None:
    if rule.decision is None:
        return None
    return StatementRule(
        name=rule.name,
        decision=_DECISIONS[rule.decision],
        kinds=frozenset[str]().union(*map(vocabulary.expand, rule.statements)),
        relations=tuple(map(RelationPattern.parse, rule.relations)),
        functions=tuple(map(FunctionPattern.parse, rule.functions)),
        timeout_s=rule.timeout_s,
        hint=rule.hint,
    )


def _compile_requests(rule: Rule, requests: Requests, protected: frozenset[int]) -> RequestRule | None:
    if rule.decision is None:
        return None
    verbs = expand(requests.verbs, paths=bool(requests.paths))
    return RequestRule(
        name=rule.name,
        decision=_DECISIONS[rule.decision],
        verbs=verbs,
        restricts=verbs if requests.paths else verbs.union(*(ALSO.get(verb, ()) for verb in verbs)),
        every_verb="*" in requests.verbs,
        resources=tuple(map(ResourcePattern.parse, requests.resources)),
        paths=tuple(map(Glob.parse, requests.paths)),
        namespaces=tuple(map(Glob.parse, requests.namespaces)),
        names=tuple(map(Glob.parse, requests.names)),
        commands=tuple(map(Glob.parse, requests.commands)),
        ports=frozenset(requests.ports),
        where=tuple(
            Condition(
                FieldPath.parse(each.path),
                tuple(map(Glob.parse, each.within)),
                tuple(map(Glob.parse, each.outside)),
                each.absent,
            )
            for each in requests.where
        ),
        protected=protected,
        record_input=requests.record_input,
        timeout_s=rule.timeout_s,
        hint=rule.hint,
    )


def _compile_mask(mask: ObjectMask, rule: str) -> RequestMask:
    return RequestMask(
        rule=rule,
        written=mask,
        namespaces=tuple(map(Glob.parse, mask.namespaces)),
        names=tuple(map(Glob.parse, mask.names)),
        paths=tuple(map(FieldPath.parse, _fields_of(mask))),
    )


def _fields_of(mask: ObjectMask) -> tuple[str, ...]:
    """The field, and where the same value is written: Secrets take `data` as `stringData`, too."""
    if not mask.field:
        return ()
    if mask.resource in ("secrets", "*") and FieldPath.parse(mask.field).steps[0] == "data":
        return mask.field, f"stringData{mask.field.removeprefix('data')}"
    return (mask.field,)


def _is_for(rule: Rule, principal: str, target: str) -> bool:
    return (principal in rule.agents or ("*" in rule.agents and principal != UNATTRIBUTED)) and (
        target in rule.targets or "*" in rule.targets
    )


def _statement_hop(principal: str, target: str, rules: Iterable[tuple[Rule, StatementRule | None]]) -> StatementHop:
    here = [(rule, compiled) for rule, compiled in rules if _is_for(rule, principal, target)]
    by_decision: dict[Decision, list[StatementRule]] = {decision: [] for decision in Decision}
    for _, compiled in here:
        if compiled is not None:
            by_decision[compiled.decision].append(compiled)
    return StatementHop(
        agent=principal,
        denies=tuple(by_decision[Decision.DENY]),
        holds=tuple(by_decision[Decision.HOLD]),
        allows=tuple(by_decision[Decision.ALLOW]),
        masks=tuple((mask, rule.name) for rule, _ in here for mask in rule.masks),
    )


def _request_hop(principal: str, target: str, rules: Iterable[tuple[Rule, RequestRule | None]]) -> RequestHop:
    here = [(rule, compiled) for rule, compiled in rules if _is_for(rule, principal, target)]
    by_decision: dict[Decision, list[RequestRule]] = {decision: [] for decision in Decision}
    for _, compiled in here:
        if compiled is not None:
            by_decision[compiled.decision].append(compiled)
    return RequestHop(
        agent=principal,
        denies=tuple(by_decision[Decision.DENY]),
        holds=tuple(by_decision[Decision.HOLD]),
        allows=tuple(by_decision[Decision.ALLOW]),
        masks=tuple(_compile_mask(mask, rule.name) for rule, _ in here for mask in rule.object_masks),
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
