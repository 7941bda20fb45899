"""Turns a resolved policy into judges: sets and patterns once a policy version, rules by hop once a chain.

Blind spot: an agent that this version of the policy does not know (a chain attributed under an older one) has no rules.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from proxy.masking import masker
from proxy.model import UNATTRIBUTED, ColumnMask, Decision, Endpoint, Reason, Ruling, Target
from proxy.policy import vocabulary
from proxy.policy.decide import CompiledRule, HopRules, Judge
from proxy.policy.document import MASK_METHODS, Mask, ResolvedPolicy, Rule
from proxy.policy.names import FunctionPattern, RelationPattern

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
        self._rules = [(rule, _compile(rule)) for rule in resolved.rules]
        self._maskers = {
            method: masker(method, mask_key)
            for method in {mask.method for rule in resolved.rules for mask in rule.masks}
        }
        self._hops: dict[tuple[str, str], HopRules] = {}
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
            hops = tuple(self._hop(principal, target.name) for principal in principals)
            if len(self._judges) >= MAX_JUDGES:
                self._judges.clear()
            judge = self._judges[key] = Judge(self.version, target.name, hops, self._met_masks(hops))
        return judge

    def login(self, principals: tuple[str, ...], target: Target, database: str) -> Ruling:
        """May the chain log in at all? Each hop needs a rule that allows or holds something there, and the database has
        to be one of the target's. Startup parameters are the protocol's to judge."""
        reasons: list[Reason] = []
        for principal in principals:
            hop = self._hop(principal, target.name)
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

    def _hop(self, principal: str, target: str) -> HopRules:
        hop = self._hops.get((principal, target))
        if hop is None:
            hop = _hop_rules(principal, target, self._rules if principal in self.agents else ())
            if principal in self.agents:
                self._hops[principal, target] = hop
        return hop

    def _met_masks(self, hops: Iterable[HopRules]) -> tuple[ColumnMask, ...]:
        """For each column the strictest method of any hop."""
        strictest: dict[tuple[str, str, str], Mask] = {}
        for hop in hops:
            for mask, _ in hop.masks:
                key = (mask.schema, mask.relation, mask.column)
                known = strictest.setdefault(key, mask)
                strictest[key] = min(known, mask, key=lambda each: MASK_METHODS.index(each.method))
        return tuple(
            ColumnMask(mask.schema, mask.relation, mask.column, mask.method, self._maskers[mask.method])
            for _, mask in sorted(strictest.items())
        )


_LOGIN_HINTS = {
    "[no rule allows it]": "ask those who keep the policy for a rule that names this agent and target",
    "[target's databases]": "connect to a database that the policy names for this target",
}


def _compile(rule: Rule) -> CompiledRule | None:
    if rule.decision is None:
        return None
    return CompiledRule(
        name=rule.name,
        decision=_DECISIONS[rule.decision],
        kinds=frozenset[str]().union(*map(vocabulary.expand, rule.statements)),
        relations=tuple(map(RelationPattern.parse, rule.relations)),
        functions=tuple(map(FunctionPattern.parse, rule.functions)),
        timeout_s=rule.timeout_s,
        hint=rule.hint,
    )


def _hop_rules(principal: str, target: str, rules: Iterable[tuple[Rule, CompiledRule | None]]) -> HopRules:
    here = [
        (rule, compiled)
        for rule, compiled in rules
        if (principal in rule.agents or ("*" in rule.agents and principal != UNATTRIBUTED))
        and (target in rule.targets or "*" in rule.targets)
    ]

    def having(decision: Decision) -> tuple[CompiledRule, ...]:
        return tuple(compiled for _, compiled in here if compiled is not None and compiled.decision == decision)

    return HopRules(
        agent=principal,
        target=target,
        denies=having(Decision.DENY),
        holds=having(Decision.HOLD),
        allows=having(Decision.ALLOW),
        masks=tuple((mask, rule.name) for rule, _ in here for mask in rule.masks),
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
