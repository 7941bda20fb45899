"""Masks compiled: which of them hold for which objects, and for each object the tree of all masked paths at once.

    MaskSet    the masks of a session
    Verdict    those that concern objects of one kind, and the resources that these could be of
    Tree       those that hold for one object: a walk along it meets exactly what is on the way to a masked field

An object is known by the resource that was asked for and by its own kind, of which the resource is guessed as API
servers name them by default; a mask that means either holds.
"""

from __future__ import annotations

import base64
import binascii
import fnmatch
import re
from collections.abc import Iterable, Sequence
from typing import Final

import msgspec

from proxy.model import FieldMask, Masker
from proxy.model.fields import STAR, FieldPath, Step

MAX_CACHED: Final = 1024
"""Kinds, and sets of masks, of which the compiled form is kept."""

HIDE: Final = "hide"
REDACT: Final = "redact"
"""The method of which nothing depends on the value."""
LAST_APPLIED: Final = "kubectl.kubernetes.io/last-applied-configuration"

_BYTES: Final = {
    resource: tuple(map(FieldPath.parse, paths))
    for resource, paths in {
        "secrets": ("data.*",),
        "configmaps": ("binaryData.*",),
        "certificatesigningrequests.certificates.k8s.io": ("spec.request", "status.certificate"),
        "mutatingwebhookconfigurations.admissionregistration.k8s.io": ("webhooks[*].clientConfig.caBundle",),
        "validatingwebhookconfigurations.admissionregistration.k8s.io": ("webhooks[*].clientConfig.caBundle",),
        "customresourcedefinitions.apiextensions.k8s.io": ("spec.conversion.webhook.clientConfig.caBundle",),
        "apiservices.apiregistration.k8s.io": ("spec.caBundle",),
    }.items()
}
"""Fields of type `[]byte` in the API's Go types."""


class Rule:
    """One mask with its patterns compiled."""

    __slots__ = ("constant", "hides", "mask", "names", "namespaces", "path", "resource", "title")

    def __init__(self, mask: FieldMask) -> None:
        self.resource = mask.resource
        self.namespaces = _globs(mask.namespaces)
        self.names = _globs(mask.names)
        self.hides = mask.label == HIDE
        self.path = None if self.hides else FieldPath.parse(mask.path)
        self.mask: Masker = mask.mask
        self.constant = mask.label == REDACT
        self.title = f"{mask.resource} {mask.path or HIDE}"

    @property
    def always(self) -> bool:
        return self.namespaces is None and self.names is None

    def meets(self, namespace: str, name: str) -> bool:
        """Whether the object is one of those meant. One whose name is not known is meant, unless it would be hidden."""
        if self.namespaces is not None and not self.namespaces.match(namespace):
            return False
        if not name:
            return not self.hides
        return self.names is None or self.names.match(name) is not None


def _globs(globs: Sequence[str]) -> re.Pattern[str] | None:
    return re.compile("|".join(map(fnmatch.translate, globs))) if globs else None


class Leaf:
    """What is done with the values at the end of a path. `encoded`: they are base64."""

    __slots__ = ("_constant", "encoded", "mask", "title")

    def __init__(self, rule: Rule, encoded: bool) -> None:
        self.mask = rule.mask
        self.title = rule.title
        self.encoded = encoded
        self._constant = self._masked("") if rule.constant else None

    def masked(self, texts: Sequence[str | None]) -> list[str | None]:
        """Each of these values masked; None is null, and stays."""
        if self._constant is not None:
            return [None if text is None else self._constant for text in texts]
        return [None if text is None else self._masked(text) for text in texts]

    def _masked(self, text: str) -> str:
        if self.encoded:
            try:
                value = base64.b64decode(text, validate=True)
            except (binascii.Error, ValueError):
                value = text.encode()
            return base64.b64encode(self.mask(value)).decode()
        return self.mask(text.encode()).decode("utf-8", "replace")


_Rest = tuple[tuple[Step, ...], Leaf]


class Node:
    """All paths that lead through one place of an object: which members are on the way, and what is done here. `flat`:
    all of them end below."""

    __slots__ = ("flat", "leaves", "members", "other")

    def __init__(self, rests: Sequence[_Rest]) -> None:
        self.leaves = tuple(leaf for steps, leaf in rests if not steps)
        ahead = [(steps, leaf) for steps, leaf in rests if steps]
        starred = [(steps[1:], leaf) for steps, leaf in ahead if steps[0] is STAR]
        self.other = Node(starred) if starred else None
        self.members = {
            key: Node([(steps[1:], leaf) for steps, leaf in ahead if steps[0] in (key, STAR)])
            for key in {steps[0] for steps, _ in ahead if isinstance(steps[0], str)}
        }
        below = [*self.members.values(), *([self.other] if self.other is not None else [])]
        self.flat = bool(below) and all(node.leaves for node in below)


class Tree:
    """The masks that hold for one object."""

    __slots__ = ("_needles", "names_last_applied", "names_metadata", "root")

    def __init__(self, rules: Iterable[Rule], resources: frozenset[str]) -> None:
        encoded = [path for resource in resources for path in _BYTES.get(resource, ())]
        rests: list[_Rest] = []
        needles: set[bytes] = set()
        for rule in rules:
            assert rule.path is not None
            steps = rule.path.steps
            rests.append((steps, Leaf(rule, any(may_meet(steps, path.steps) for path in encoded))))
            if steps[0] == "data" and "secrets" in resources:
                rests.append((("stringData", *steps[1:]), Leaf(rule, encoded=False)))
            if steps[-1] is STAR:
                needles |= {b'"v:', b'"k:'}
            elif len(steps) > 1 and steps[-2] is STAR:
                needles.add(_inner_key(str(steps[-1])))
        self.root = Node(rests)
        self._needles = tuple(sorted(needles))
        annotations = self.root.members.get("metadata", _NOWHERE).members.get("annotations", _NOWHERE)
        self.names_last_applied = LAST_APPLIED in annotations.members
        self.names_metadata = "metadata" in self.root.members

    def quoted(self, managed_fields: bytes) -> bool:
        """Whether keys or values of list elements in `managedFields` could be masked values."""
        return any(needle in managed_fields for needle in self._needles)


def _inner_key(key: str) -> bytes:
    """A key and its colon in a JSON text that stands inside a string of another."""
    inner = msgspec.json.encode(msgspec.json.encode({key: 0}).decode())
    return inner[2:-3]


def may_meet(steps: tuple[Step, ...], others: tuple[Step, ...]) -> bool:
    """Whether two paths could name the same field."""
    return len(steps) == len(others) and all(
        one is STAR or other is STAR or one == other for one, other in zip(steps, others, strict=True)
    )


_NOWHERE = Node(())


class Verdict:
    """What holds for objects of one kind in the answers to one resource: the rules, and the tree that they make where
    no object's namespace or name matters."""

    __slots__ = ("resources", "rules", "tree")

    def __init__(self, rules: tuple[Rule, ...], resources: frozenset[str]) -> None:
        self.rules = rules
        self.resources = resources
        settled = all(rule.always and not rule.hides for rule in rules)
        self.tree = Tree(rules, resources) if settled and rules else None

    @property
    def settled(self) -> bool:
        return self.tree is not None or not self.rules


def _resources_of(api_version: str, kind: str) -> frozenset[str]:
    """The resources that objects of a kind could belong to, as API servers name them by default."""
    group = api_version.rpartition("/")[0]
    lower = kind.lower()
    plurals = {f"{lower}s", lower} if lower.endswith("s") else {f"{lower}s"}
    if lower.endswith(("s", "x", "ch", "sh")):
        plurals.add(f"{lower}es")
    if lower.endswith("y"):
        plurals.add(f"{lower[:-1]}ies")
    return frozenset(f"{plural}.{group}" if group else plural for plural in plurals)


class MaskSet:
    """All masks of a session, and what they come to for objects of each kind. Raises `BadFieldPath`."""

    def __init__(self, masks: Sequence[FieldMask]) -> None:
        self._rules = tuple(Rule(mask) for mask in masks)
        self._verdicts: dict[tuple[frozenset[str], str, str], Verdict] = {}
        self._trees: dict[tuple[tuple[int, ...], frozenset[str]], Tree] = {}

    def __bool__(self) -> bool:
        return bool(self._rules)

    def rules(self, resources: frozenset[str]) -> tuple[Rule, ...]:
        """The masks that mean one of these resources."""
        return tuple(rule for rule in self._rules if rule.resource == "*" or rule.resource in resources)

    def verdict(self, asked: frozenset[str], api_version: str, kind: str) -> Verdict:
        """What holds for an object of this kind in the answer to a request for the resource that is `asked`."""
        key = (asked, api_version, kind)
        found = self._verdicts.get(key)
        if found is None:
            if len(self._verdicts) >= MAX_CACHED:
                self._verdicts.clear()
            resources = asked | _resources_of(api_version, kind)
            found = self._verdicts[key] = Verdict(self.rules(resources), resources)
        return found

    def tree(self, rules: Sequence[Rule], resources: frozenset[str]) -> Tree:
        """The masks of some rules together."""
        key = (tuple(map(id, rules)), resources)
        found = self._trees.get(key)
        if found is None:
            if len(self._trees) >= MAX_CACHED:
                self._trees.clear()
            found = self._trees[key] = Tree(rules, resources)
        return found
