"""The words that a rule may use for requests to a Kubernetes API server: verbs, resources, and globs.

A resource is written as kubectl spells it: `pods`, `deployments.apps`, `pods/log`; a star stands for any run of
characters inside the name, the group or the subresource, `*` alone for every resource. As with `names`, two questions
are asked of a pattern, and they err in opposite directions:

- `covers`: may this rule *grant* the request? `*` and `pods` are no subresource; a star in the place of the subresource
  covers none of those in `GUARDED`, and a star for the verb no `impersonate`: those do more than what they stand under.
- `touches`: could this rule's *restriction* concern it? `*` is every resource with every subresource, and a verb also
  those that come to the same (`ALSO`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from proxy.policy.names import BadName

READ = frozenset({"get", "list", "watch"})
WRITE = frozenset({"create", "update", "patch", "delete", "deletecollection"})
IMPERSONATE = "impersonate"
VERBS = READ | WRITE | {IMPERSONATE}
"""Verbs of requests for resources, as RBAC has them."""
METHODS = frozenset({"get", "head", "options", "post", "put", "patch", "delete"})
"""Verbs of requests for other paths: HTTP's methods."""
GROUPS = {"read": READ, "write": WRITE, "*": VERBS - {IMPERSONATE}}
PATH_GROUPS = {"read": frozenset({"get", "head", "options"}), "*": METHODS}

ALSO = {
    "get": frozenset({"list", "watch"}),
    "list": frozenset({"watch"}),
    "update": frozenset({"patch"}),
    "patch": frozenset({"update"}),
    "delete": frozenset({"deletecollection"}),
}
"""Verbs that do what another one does, to more objects or by another way: who may not get may not list."""

CONNECTING = frozenset({"exec", "attach", "portforward", "proxy"})
"""Subresources whose verb is `create`, whatever the HTTP method."""
GUARDED = CONNECTING | {"token", "ephemeralcontainers", "approval", "eviction", "binding", "finalize"}
"""Subresources that a grant has to name: they run something, reach past the API server, hand out a credential, or do
what is a verb of its own elsewhere."""

CORE = frozenset(
    {
        *{"bindings", "componentstatuses", "configmaps", "endpoints", "events", "limitranges", "namespaces", "nodes"},
        *{"persistentvolumeclaims", "persistentvolumes", "pods", "podtemplates", "replicationcontrollers"},
        *{"resourcequotas", "secrets", "serviceaccounts", "services", "users", "groups"},
    }
)
"""The core group, which has no name (`users` and `groups` are there for `impersonate`)."""
CLUSTER_SCOPED = frozenset(
    {
        *{"componentstatuses", "namespaces", "nodes", "persistentvolumes", "users", "groups"},
        *{"clusterroles.rbac.authorization.k8s.io", "clusterrolebindings.rbac.authorization.k8s.io"},
        *{"storageclasses.storage.k8s.io", "csidrivers.storage.k8s.io", "csinodes.storage.k8s.io"},
        *{"volumeattachments.storage.k8s.io", "ingressclasses.networking.k8s.io"},
        *{"customresourcedefinitions.apiextensions.k8s.io", "apiservices.apiregistration.k8s.io"},
        *{"certificatesigningrequests.certificates.k8s.io", "priorityclasses.scheduling.k8s.io"},
        *{"mutatingwebhookconfigurations.admissionregistration.k8s.io", "runtimeclasses.node.k8s.io"},
        *{"validatingwebhookconfigurations.admissionregistration.k8s.io"},
    }
)
"""Resources of Kubernetes itself that are in no namespace: to list them is not to list over all namespaces."""
_ELSEWHERE = {
    "apps": {"deployments", "daemonsets", "statefulsets", "replicasets", "controllerrevisions"},
    "batch": {"jobs", "cronjobs"},
    "autoscaling": {"horizontalpodautoscalers"},
    "policy": {"poddisruptionbudgets"},
    "networking.k8s.io": {"ingresses", "networkpolicies", "ingressclasses"},
    "rbac.authorization.k8s.io": {"roles", "rolebindings", "clusterroles", "clusterrolebindings"},
    "storage.k8s.io": {"storageclasses"},
    "coordination.k8s.io": {"leases"},
    "apiextensions.k8s.io": {"customresourcedefinitions"},
    "certificates.k8s.io": {"certificatesigningrequests"},
}
_SPELLING = re.compile(
    r"(?P<name>[a-z0-9*][a-z0-9*-]*)(?:\.(?P<group>[a-z0-9*][a-z0-9*.-]*))?(?:/(?P<sub>[A-Za-z0-9*._-]+))?"
)


@dataclass(frozen=True, slots=True)
class Glob:
    """Text in which `*` stands for any run of characters, and everything else for itself. Never more than the lengths
    multiplied, in time: what it is held against comes from a peer."""

    parts: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Glob:
        """Raises `BadName`."""
        if not text:
            raise BadName("an empty glob fits nothing")
        return cls(tuple(text.split("*")))

    @property
    def literal(self) -> bool:
        return len(self.parts) == 1

    @property
    def anything(self) -> bool:
        return not any(self.parts) and not self.literal

    def matches(self, text: str) -> bool:
        first, *middle = self.parts
        if not middle:
            return text == first
        last = middle.pop()
        if not text.startswith(first) or not text.endswith(last) or len(text) < len(first) + len(last):
            return False
        at, end = len(first), len(text) - len(last)
        for part in middle:
            at = text.find(part, at, end)
            if at < 0:
                return False
            at += len(part)
        return True


@dataclass(frozen=True, slots=True)
class ResourcePattern:
    """`resource`, `resource.group`, either with `/subresource`. `group` None: any, the core one too."""

    name: Glob
    group: Glob | None
    subresource: Glob | None

    @classmethod
    def parse(cls, text: str) -> ResourcePattern:
        """Raises `BadName`, also for what is certainly in another group than the core one."""
        match = _SPELLING.fullmatch(text)
        if match is None:
            raise BadName(f"`{text}` is not a resource: wants the form `pods`, `deployments.apps` or `pods/log`")
        name, group, sub = match["name"], match["group"], match["sub"]
        if group is None and name != "*":
            if "*" not in name and name not in CORE:
                known = next((each for each, names in _ELSEWHERE.items() if name in names), "")
                advice = f"write `{name}.{known}`" if known else "write `resource.group` (`kubectl api-resources`)"
                raise BadName(f"`{name}` is no resource of the core group: {advice}")
            group = ""
        return cls(
            Glob.parse(name),
            None if group is None else Glob((group,)) if not group else Glob.parse(group),
            Glob.parse(sub) if sub else None,
        )

    def _fits(self, resource: str, group: str) -> bool:
        return self.name.matches(resource) and (self.group is None or self.group.matches(group))

    def covers(self, resource: str, group: str, subresource: str) -> bool:
        if not self._fits(resource, group):
            return False
        if self.subresource is None or not subresource:
            # the old way to do what `pods/binding` does
            bound = resource == "bindings" and not group and not self.name.literal
            return self.subresource is None and not subresource and not bound
        return self.subresource.matches(subresource) and (self.subresource.literal or subresource not in GUARDED)

    def touches(self, resource: str, group: str, subresource: str) -> bool:
        if not self._fits(resource, group):
            return False
        if self.subresource is None:
            return not subresource or (self.group is None and self.name.anything)
        return bool(subresource) and self.subresource.matches(subresource)

    @property
    def literal(self) -> bool:
        """Whether no star stands in the resource's own name."""
        return self.name.literal


def expand(words: tuple[str, ...], *, paths: bool) -> frozenset[str]:
    """The verbs that the words of a rule mean. Raises `BadName` for a word that means none."""
    groups, verbs = (PATH_GROUPS, METHODS) if paths else (GROUPS, VERBS)
    found: set[str] = set()
    for word in words:
        if word not in groups and word not in verbs:
            raise BadName(f"unknown verb `{word}` for {'`paths`' if paths else '`resources`'}")
        found |= groups.get(word, {word})
    return frozenset(found)
