"""What one hop says of a request to a Kubernetes API server, or of an identity that it asks to act as.

1. A `deny` rule that touches the request denies it.
2. A request that could show, test or overwrite a masked value is denied (below).
3. A `hold` rule that touches it makes it wait; for what it names it also grants, once approved.
4. It has to be covered by an `allow` rule or by such a `hold`, or belong to `housekeeping`. One rule has to cover it
   whole; each port of a port-forward by itself, and server-side apply as `patch` and as `create`, since it may be both.
5. What is left over is denied.

`covers` and `touches` err in opposite directions (`resources`, `conditions`): a request without a name could be about
any name, one over all namespaces about any namespace.

**Port-forward.** Opening one is a `create`; every connection inside it is asked about again. A rule with `ports` speaks
of the connections, a rule without of the opening: so each is held once. A port that the policy protects has to be named
in `ports`.

**Masks.** What the server answers is masked elsewhere. Denied is what would tell a masked value in another way: a
selector, a JSON patch that tests, copies or moves it, a strategic one that takes it out of a list by its value, a
write that only tries whether it is the same (a dry run, a server-side apply that conflicts), and a write of the mask
itself, which would overwrite the value. Objects that are hidden cannot be named.

Blind spots: what a process in the cluster does with what it may mount; a write without a dry run still tells, by the
object's version, whether the value was the same; what admission makes of a body.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from proxy.model import Decision, Operation, OperationKind, RequestFacts
from proxy.model.fields import BadFieldPath, FieldPath
from proxy.policy import housekeeping
from proxy.policy.bodies import Unseen, compares, overlap, patched, places, pointer_of, scalars
from proxy.policy.conditions import Condition, all_could, all_surely
from proxy.policy.document import ObjectMask
from proxy.policy.resources import CLUSTER_SCOPED, CONNECTING, IMPERSONATE, Glob, ResourcePattern
from proxy.policy.verdicts import HINT_DENY, Verdict, joined, missing

_BODIED = frozenset({"create", "update", "patch"})
_SELECTING = frozenset({"list", "watch", "deletecollection"})


@dataclass(frozen=True, slots=True)
class RequestRule:
    """One rule, its words turned into sets and patterns. Empty: any. `restricts` are the verbs that a restriction
    concerns, `every_verb` says that a star stands among them; `paths` are given in place of `resources`; `protected`
    are the ports that have to be named in `ports`; `record_input` says that what is typed goes on record."""

    name: str
    decision: Decision
    verbs: frozenset[str]
    restricts: frozenset[str]
    every_verb: bool
    resources: tuple[ResourcePattern, ...]
    paths: tuple[Glob, ...]
    namespaces: tuple[Glob, ...]
    names: tuple[Glob, ...]
    commands: tuple[Glob, ...]
    ports: frozenset[int]
    where: tuple[Condition, ...]
    protected: frozenset[int]
    record_input: bool
    timeout_s: float
    hint: str

    def touches(self, facts: RequestFacts, *, inside: bool = False) -> bool:
        """Whether this rule's restriction could concern the request; `inside`: a connection in a port-forward."""
        if facts.verb not in self.restricts and not self.every_verb:
            return False
        if not facts.resource:
            return any(glob.matches(path) for glob in self.paths for path in _spelled(facts.path))
        return (
            any(each.touches(facts.resource, facts.group, facts.subresource) for each in self.resources)
            and could_be_in(self.namespaces, facts)
            and could_be_named(self.names, facts)
            and (not self.commands or not facts.command or _fits(self.commands, " ".join(facts.command)))
            and (not self.ports or bool(self.ports.intersection(facts.ports)) or (inside and not facts.ports))
            and (not self.where or (_has_body(facts) and all_could(self.where, facts.body, facts.patch)))
        )

    def covers(self, facts: RequestFacts) -> bool:
        """Whether this rule grants the request."""
        return self.covers_head(facts) and self.covers_ports(facts) and all_surely(self.where, facts.body, facts.patch)

    def covers_head(self, facts: RequestFacts) -> bool:
        """`covers`, ports and conditions on the body apart."""
        if facts.verb not in self.verbs:
            return False
        if not facts.resource:
            return any(glob.matches(facts.path) for glob in self.paths)
        return (
            any(each.covers(facts.resource, facts.group, facts.subresource) for each in self.resources)
            and (not self.namespaces or _fits(self.namespaces, facts.namespace))
            and (not self.names or _fits(self.names, _name(facts)))
            and (not self.commands or (bool(facts.command) and _fits(self.commands, " ".join(facts.command))))
        )

    def covers_ports(self, facts: RequestFacts) -> bool:
        return self.ports.issuperset(facts.ports) if self.ports else self.protected.isdisjoint(facts.ports)

    def unmet(self, facts: RequestFacts) -> str:
        """The path of the first condition that does not surely hold."""
        return next((each.path.text for each in self.where if not each.surely(facts.body, facts.patch)), "")

    def waits(self, facts: RequestFacts, *, inside: bool) -> bool:
        """Whether a `hold` that touches the request is to be asked now, and not at the other end of a port-forward."""
        return bool(self.ports) is inside if facts.subresource == "portforward" else True

    def spells(self, facts: RequestFacts) -> bool:
        """Whether the rule names what the request is about without a star."""
        if not facts.resource:
            return any(glob.literal and glob.matches(path) for glob in self.paths for path in _spelled(facts.path))
        return any(
            each.literal and each.touches(facts.resource, facts.group, facts.subresource) for each in self.resources
        )


@dataclass(frozen=True, slots=True)
class RequestMask:
    """A mask with the name of its rule; `paths` are empty for `hide`."""

    rule: str
    written: ObjectMask
    namespaces: tuple[Glob, ...]
    names: tuple[Glob, ...]
    paths: tuple[FieldPath, ...]

    def concerns(self, facts: RequestFacts) -> bool:
        """Whether objects that it masks could be in the request or its answer."""
        whole = f"{facts.resource}.{facts.group}" if facts.group else facts.resource
        return (
            bool(facts.resource)
            and self.written.resource in ("*", whole)
            and could_be_in(self.namespaces, facts)
            and could_be_named(self.names, facts)
        )


@dataclass(frozen=True, slots=True)
class RequestHop:
    """The rules of one agent at one API server, and its masks."""

    agent: str
    denies: tuple[RequestRule, ...]
    holds: tuple[RequestRule, ...]
    allows: tuple[RequestRule, ...]
    masks: tuple[RequestMask, ...]

    def judge(self, operation: Operation, derived: frozenset[tuple[str, str]]) -> list[Verdict]:
        """A verdict for the request, and for every identity that it asks to act as."""
        if not operation.requests:
            text = f"agent `{self.agent}` may not send what is no request"
            return [Verdict(Decision.DENY, "[unclassified]", text)]
        inside = operation.kind is OperationKind.FORWARD
        return [self._request(facts, inside) for facts in operation.requests]

    def _request(self, facts: RequestFacts, inside: bool) -> Verdict:
        demands = list(_demands(facts))
        if inside and not facts.ports:
            text = f"agent `{self.agent}` may not {_deed(facts)}: the port is not told"
            return Verdict(Decision.DENY, "[unclassified]", text)
        for rule in self.denies:
            if any(rule.touches(demand, inside=inside) for demand in demands):
                text = f"agent `{self.agent}` may not {_deed(facts)} (rule `{rule.name}`)"
                return Verdict(Decision.DENY, rule.name, text, rule.hint or HINT_DENY)
        leak = self._leak(facts)
        if leak is not None:
            return leak
        verdict = self._grant(facts, demands, inside)
        recorded = any(rule.record_input and rule.touches(facts) for rule in (*self.allows, *self.holds))
        return replace(verdict, record_input=True) if recorded else verdict

    def _grant(self, facts: RequestFacts, demands: list[RequestFacts], inside: bool) -> Verdict:
        held: list[RequestRule] = []
        used: list[str] = []
        for demand in demands:
            chore = housekeeping.covers_request(demand)
            held += (
                rule
                for rule in self.holds
                if rule.touches(demand, inside=inside)
                and rule.waits(demand, inside=inside)
                and (not chore or rule.spells(demand))
            )
            rule = next((rule for rule in (*self.allows, *self.holds) if rule.covers(demand)), None)
            if rule is not None:
                used.append(rule.name)
            elif not chore:
                return self._missing(demand)
        deed = _deed(facts)
        if held:
            names = joined(rule.name for rule in held)
            return Verdict(
                Decision.HOLD,
                names,
                f"agent `{self.agent}` needs approval to {deed} (rule `{names}`)",
                next((rule.hint for rule in held if rule.hint), ""),
                min(rule.timeout_s for rule in held),
            )
        return Verdict(Decision.ALLOW, joined(used) or "[client housekeeping]", f"agent `{self.agent}` may {deed}")

    def _missing(self, facts: RequestFacts) -> Verdict:
        """Says what is nearest to a grant, if anything is."""
        near = [rule for rule in (*self.allows, *self.holds) if rule.covers_head(facts)]
        what = f"`{facts.kind}` there"
        why = "no rule allows it"
        for rule in near:
            if not rule.covers_ports(facts):
                why = f"rule `{rule.name}` does not name port {', '.join(map(str, facts.ports))}"
                what = (
                    "the port in `ports`" if rule.protected.isdisjoint(facts.ports) else "this protected port by name"
                )
            elif rule.unmet(facts):
                why = f"rule `{rule.name}` does not allow it with this `{rule.unmet(facts)}`"
        return missing(self.agent, _deed(facts), what, why)

    # --- masks --------------------------------------------------------------------------------------------------------

    def _leak(self, facts: RequestFacts) -> Verdict | None:
        if facts.verb == IMPERSONATE:
            return None
        for mask in self.masks:
            if not mask.concerns(facts):
                continue
            if not mask.paths:
                if _name(facts):
                    text = f"agent `{self.agent}` may not {_deed(facts)}: it is hidden (rule `{mask.rule}`)"
                    return Verdict(Decision.DENY, mask.rule, text, "objects like this are left out of what you see")
                if facts.opaque:
                    return self._leaks(mask, facts, facts.opaque[0], "")
                continue
            for path in mask.paths:
                why, hint = _tells(path, mask.written.method, facts)
                if why:
                    return self._leaks(mask, facts, why, hint)
        return None

    def _leaks(self, mask: RequestMask, facts: RequestFacts, why: str, hint: str) -> Verdict:
        resource, field = mask.written.resource, mask.written.field
        seen = f"sees {resource} {field} masked" if field else f"does not see all {resource}"
        text = f"agent `{self.agent}` {seen}: {why} is not allowed (rule `{mask.rule}`)"
        return Verdict(Decision.DENY, mask.rule, text, hint or "read the object itself: its field is shown masked")


# --- parts ------------------------------------------------------------------------------------------------------------


def _fits(globs: tuple[Glob, ...], text: str) -> bool:
    return bool(text) and any(glob.matches(text) for glob in globs)


def _spelled(path: str) -> tuple[str, str]:
    """The path without a slash at its end and with one: servers answer both alike."""
    bare = path.rstrip("/")
    return bare, f"{bare}/"


def _has_body(facts: RequestFacts) -> bool:
    return facts.verb in _BODIED and facts.subresource not in CONNECTING


def _metadata(facts: RequestFacts, key: str) -> str:
    metadata = facts.body.get("metadata") if isinstance(facts.body, dict) else None
    value = metadata.get(key) if isinstance(metadata, dict) else None
    return value if isinstance(value, str) else ""


def _name(facts: RequestFacts) -> str:
    """The object's name; for what is created without one in the path, that in its body."""
    return facts.name or (_metadata(facts, "name") if facts.verb == "create" else "")


def could_be_named(globs: tuple[Glob, ...], facts: RequestFacts) -> bool:
    """Whether the request could be about an object with such a name. For `proxy` a scheme and a port may stand around
    it: `https:web:443`."""
    name = _name(facts)
    if not globs or not name or _fits(globs, name):
        return True
    return facts.subresource == "proxy" and any(_fits(globs, part) for part in name.split(":"))


def could_be_in(globs: tuple[Glob, ...], facts: RequestFacts) -> bool:
    """Whether the request could be about an object in such a namespace. What names one object and no namespace is about
    something that is in none; what selects is about all namespaces, unless the resource is known to be in none."""
    if not globs:
        return True
    namespace = facts.namespace or (_metadata(facts, "namespace") if facts.verb in _BODIED else "")
    if namespace:
        return _fits(globs, namespace)
    whole = f"{facts.resource}.{facts.group}" if facts.group else facts.resource
    return facts.verb in _SELECTING and whole not in CLUSTER_SCOPED


def _demands(facts: RequestFacts) -> Iterator[RequestFacts]:
    if len(facts.ports) > 1:
        for port in dict.fromkeys(facts.ports):
            yield replace(facts, ports=(port,))
        return
    yield facts
    if facts.patch == "apply":
        yield replace(facts, verb="create", patch="")


def _deed(facts: RequestFacts) -> str:
    """What the request does, in words: `delete deployments.apps/web in shop`."""
    if not facts.resource:
        return f"{facts.verb} {facts.path}"
    whole = f"{facts.resource}.{facts.group}" if facts.group else facts.resource
    name = _name(facts)
    whole += f"/{name}" if name else ""
    if facts.subresource:
        whole += f" {facts.subresource}" if name else f"/{facts.subresource}"
    namespace = f" in {facts.namespace}" if facts.namespace else ""
    ports = f" to port {', '.join(map(str, facts.ports))}" if facts.ports else ""
    return f"{facts.verb} {whole}{namespace}{ports}"


_ALWAYS_TOLD = (("metadata", "name"), ("metadata", "namespace"))
_LABELS = FieldPath.parse("metadata.labels")
_LAST_APPLIED = FieldPath.parse('metadata.annotations["kubectl.kubernetes.io/last-applied-configuration"]')
"""A copy of the object, which is shown masked as the object is."""
_ALIASES = {
    "spec.host": FieldPath.parse("spec.nodeName"),
    "status.successful": FieldPath.parse("status.succeeded"),
    "source": FieldPath.parse("reportingComponent"),
}
"""Fields of Pods, Jobs and Events that selectors name in another way than the object does, too."""
_SELECTOR_TERM = re.compile(r"(?:[^\\,]|\\.)+", re.DOTALL)
_SELECTOR_FIELD = re.compile(r"([^=!\\]+)(?:==|!=|=)")
_HASHED = re.compile(rb"[0-9a-f]{16}")


def _tells(path: FieldPath, method: str, facts: RequestFacts) -> tuple[str, str]:
    """Why the request would tell, or overwrite, what is masked, and what to do instead; empty when it would not."""
    if facts.opaque:
        return facts.opaque[0], "nobody can mask what is not seen"
    if facts.field_selector:
        for field in _selected(facts.field_selector):
            if field is None or (field.steps not in _ALWAYS_TOLD and overlap(field, path)):
                return f"the field selector `{facts.field_selector}`", "select by labels, or by metadata.name"
    if facts.label_selector and overlap(_LABELS, path):
        return f"the label selector `{facts.label_selector}`", "select by metadata.name"
    if facts.verb not in _BODIED or facts.body is None:
        return "", ""
    if facts.patch == "json":
        for operation in facts.body if isinstance(facts.body, list) else ():
            if _reads(operation, path) or _reads(operation, _LAST_APPLIED):
                return f"a JSON patch with `{operation.get('op')}`", "use add, replace or remove"
    if facts.patch == "strategic" and compares(facts.body, path.steps):
        return "a patch with `$deleteFromPrimitiveList`", "write the whole list"
    written = [place for place in _written(facts, path) if place is not Unseen.ABSENT]
    if any(_is_mark(method, value) for place in written for value in scalars(place)):
        return "writing the mask in place of the value", "leave the field out, or write the value that it is to have"
    if written and facts.dry_run and facts.verb != "create":
        return "trying a value in a dry run", "write it, or leave the field out"
    if written and facts.patch == "apply":
        return (
            "trying a value with a server-side apply",
            "use a patch or an update (`kubectl apply` without the option)",
        )
    return "", ""


def _selected(selector: str) -> Iterator[FieldPath | None]:
    """The fields that a field selector names; None for what cannot be read."""
    for term in _SELECTOR_TERM.findall(selector):
        match = _SELECTOR_FIELD.match(term)
        name = match[1].strip() if match else ""
        try:
            yield FieldPath.parse(name) if name else None
        except BadFieldPath:
            yield None
        if name in _ALIASES:
            yield _ALIASES[name]


def _reads(operation: object, path: FieldPath) -> bool:
    """Whether an operation of a JSON patch tests the field, or carries its value elsewhere."""
    if not isinstance(operation, dict):
        return False
    match operation.get("op"):
        case "test":
            keys = ["path"]
        case "copy" | "move":
            keys = ["from", "path"]
        case _:
            return False
    pointers = [pointer_of(operation, key) for key in keys]
    return any(pointer is None or path.touches(pointer) for pointer in pointers)


def _written(facts: RequestFacts, path: FieldPath) -> Iterator[object]:
    if facts.patch == "json":
        return patched(facts.body, path)
    return places(facts.body, path.steps, partial=True)


def _is_mark(method: str, value: object) -> bool:
    """Whether a value that is to be written is what a mask shows."""
    if not isinstance(value, str):
        return False
    raw = value.encode(errors="replace")
    spelled = [raw]
    with contextlib.suppress(binascii.Error):
        spelled.append(base64.b64decode(raw, validate=True))
    if method == "hash":
        return any(_HASHED.fullmatch(each) for each in spelled)
    return any(b"***" in each for each in spelled)
