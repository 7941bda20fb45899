"""Checks what a rule says in Kubernetes' words, and gives it the form that workers get.

What could never be meant, or never come true, is a mistake: a `deny` that fits nothing protects nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from proxy.model.fields import BadFieldPath, FieldPath
from proxy.policy.bodies import overlap
from proxy.policy.document import ConditionEntry, MaskEntry, ObjectMask, Requests, RuleEntry, Where, words
from proxy.policy.names import BadName
from proxy.policy.resources import CONNECTING, METHODS, VERBS, Glob, ResourcePattern, expand

KEYS = ("verbs", "resources", "paths", "namespaces", "names", "commands", "ports", "where", "record")
"""Keys of a rule that speak of requests."""

_NAME_GLOB = re.compile(r"[A-Za-z0-9.:_*-]+")
_ONLY_OF_RESOURCES = ("namespaces", "names", "commands", "ports", "where")
_BODIED = frozenset({"create", "update", "patch"})
_IDENTITY = tuple(
    map(FieldPath.parse, ("kind", "apiVersion", "metadata.name", "metadata.namespace", "metadata.resourceVersion"))
)

Complain = Callable[[str, str], None]
At = Callable[..., str]


class RequestTerms:
    """One rule's terms; `at` tells the place of a key, `complain` takes a place and a message."""

    def __init__(self, entry: RuleEntry, at: At, complain: Complain) -> None:
        self._entry = entry
        self._at = at
        self._complain = complain

    def checked(self) -> Requests:
        entry = self._entry
        paths = self._each("paths", words(entry.paths), _path)
        resources = self._each("resources", words(entry.resources), ResourcePattern.parse)
        ports = entry.ports if isinstance(entry.ports, tuple) else (entry.ports,)
        requests = Requests(
            verbs=words(entry.verbs),
            resources=resources,
            paths=paths,
            namespaces=self._each("namespaces", words(entry.namespaces), Glob.parse),
            names=self._each("names", words(entry.names), Glob.parse),
            commands=self._each("commands", words(entry.commands), Glob.parse),
            ports=ports,
            where=tuple(self._condition(index, each) for index, each in enumerate(entry.where)),
            record_input=entry.record == "input",
        )
        if not resources and not paths:
            self._complain(self._at("verbs"), f"rule `{entry.name}` has no `resources`, and no `paths`")
        if resources and paths:
            self._complain(self._at("paths"), f"`paths` are in place of `resources`: write two rules of `{entry.name}`")
        for key in _ONLY_OF_RESOURCES if paths else ():
            if getattr(entry, key) != ():
                self._complain(self._at(key), f"`{key}` is of `resources`: rule `{entry.name}` has `paths`")
        self._check_verbs(requests)
        self._check_streams(requests)
        for index, port in enumerate(ports):
            if not 0 < port < 65536:
                self._complain(self._at("ports", index), f"`{port}` is not a port")
        return requests

    def _each(self, key: str, given: tuple[str, ...], parse: Callable[[str], object]) -> tuple[str, ...]:
        for index, word in enumerate(given):
            try:
                parse(word)
            except BadName as error:
                self._complain(self._at(key, index), f"{error} (rule `{self._entry.name}`)")
        return given

    def _check_verbs(self, requests: Requests) -> None:
        name = self._entry.name
        verbs: set[str] = set()
        for index, word in enumerate(requests.verbs):
            try:
                verbs |= expand((word,), paths=bool(requests.paths))
            except BadName as error:
                other = METHODS if not requests.paths else VERBS
                hint = ": post is create, put is update" if word in other and not requests.paths else ""
                self._complain(self._at("verbs", index), f"{error} in rule `{name}`{hint}")
                return
        subresources = {word.partition("/")[2] for word in requests.resources}
        if subresources and verbs and subresources <= CONNECTING and "create" not in verbs:
            listed = ", ".join(f"`{each}`" for each in sorted(subresources))
            self._complain(self._at("verbs"), f"the verb of {listed} is always `create` (rule `{name}`)")
        if requests.where and not verbs <= _BODIED:
            self._complain(
                self._at("where"), f"`where` looks at bodies: `verbs` can be create, update, patch in `{name}`"
            )

    def _check_streams(self, requests: Requests) -> None:
        for key, subresource in (("commands", "exec"), ("ports", "portforward")):
            if getattr(requests, key) and any(word.partition("/")[2] != subresource for word in requests.resources):
                self._complain(
                    self._at(key), f"`{key}` is of `pods/{subresource}`: rule `{self._entry.name}` has other resources"
                )

        terminals = all(word.partition("/")[2] in ("exec", "attach") for word in requests.resources)
        if requests.record_input and (not terminals or not requests.resources or self._entry.decision == "deny"):
            why = f"`record` is of `pods/exec` and `pods/attach` that rule `{self._entry.name}` grants"
            self._complain(self._at("record"), why)

    def _condition(self, index: int, entry: ConditionEntry) -> Where:
        def complain(key: str, message: str) -> None:
            self._complain(self._at("where", index, key), f"{message} (rule `{self._entry.name}`)")

        within, outside = words(entry.within), words(entry.not_in)
        try:
            FieldPath.parse(entry.path)
        except BadFieldPath as error:
            complain("path", str(error))
        for key, globs in (("in", within), ("not_in", outside)):
            if any(not each for each in globs):
                complain(key, "an empty glob fits nothing")
        if not within and not outside and not entry.absent:
            complain("path", f"a condition on `{entry.path}` needs `in`, `not_in` or `absent: true`")
        return Where(entry.path, within, outside, entry.absent)


def object_masks(entries: Iterable[tuple[int, MaskEntry]], at: At, complain: Complain) -> Iterable[ObjectMask]:
    """The masks of a rule that name a resource."""
    seen: set[ObjectMask] = set()
    for index, entry in entries:
        mask = ObjectMask(entry.resource, words(entry.namespaces), words(entry.names), entry.field, entry.method)
        problem = _mask_problem(mask)
        if problem:
            complain(at("masks", index, problem[0]), problem[1])
            continue
        unmethodical = ObjectMask(mask.resource, mask.namespaces, mask.names, mask.field, "hide")
        if unmethodical in seen:
            complain(at("masks", index), f"`{mask.field}` of `{mask.resource}` is masked twice in this rule")
        seen.add(unmethodical)
        yield mask


def _mask_problem(mask: ObjectMask) -> tuple[str, str] | None:
    try:
        if mask.resource != "*":
            ResourcePattern.parse(mask.resource)
    except BadName as error:
        return "resource", str(error)
    if ("*" in mask.resource and mask.resource != "*") or "/" in mask.resource:
        return "resource", f"`{mask.resource}`: a mask names one resource exactly, without a subresource, or is for `*`"
    for key in ("namespaces", "names"):
        for glob in getattr(mask, key):
            if not _NAME_GLOB.fullmatch(glob):
                return key, f"`{glob}` is no glob on names: letters, digits, `.`, `-`, `_`, `:`, and `*`"
    if mask.method == "hide":
        return ("field", "`hide` leaves out objects: it has no `field`") if mask.field else None
    if not mask.field:
        return "resource", f"a mask on `{mask.resource}` needs a `field`, or the method `hide`"
    try:
        path = FieldPath.parse(mask.field)
    except BadFieldPath as error:
        return "field", str(error)
    if any(overlap(path, each) for each in _IDENTITY):
        return "field", f"`{mask.field}`: clients need kind, version and name to read an object; use `hide`"
    return None


def _path(text: str) -> Glob:
    if not text.startswith(("/", "*")):
        raise BadName(f"`{text}` is not a path: it starts with `/`")
    return Glob.parse(text)
