"""Masks on fields of Kubernetes objects, in every form in which an API server shows them, applied while they stream.

    Redactor     the masks of a session
    Plan         what they mean for one request: what to ask the server for, and how to read its answer
    Transformer  one answer: bytes in, masked bytes out

**What is masked.** Objects, lists of them, tables (the objects in their rows), events of watches, answers to writes and
to dry runs, `PartialObjectMetadata`. A mask holds for the resource that was asked for, and for whatever object says
that it is of this resource's kind, so for the Secrets in a mixed `List` too. Inside of what is masked:

- `kubectl.kubernetes.io/last-applied-configuration` is a copy of the object as text. It is masked inside by the same
  paths, and goes whole (`***`) when it cannot be read. A star over annotations does not cover it, only its own name
  does.
- `managedFields` names fields and no values, except where it names elements of a list by a key or a value. Where a mask
  concerns such a one, `managedFields` is left out.
- A `Status` that tells of a failure can quote what is masked. Its message is kept only if it is one of a few sentences
  of the server's that quote names and no values, else it is replaced by the reason and the names of the fields.

**What a masked value becomes.** A string goes through the mask's function. Where Kubernetes keeps bytes as base64
(`Secret.data`, `ConfigMap.binaryData`, `caBundle`, …) the decoded bytes do, and the result is encoded again, so that
every client can decode it. `null` stays. Numbers, booleans, lists and objects have no masked form that a typed client
could decode, so they are removed. A mask on `data` of Secrets holds for `stringData` as well, which only
`last-applied-configuration` shows.

**What is not looked at is not touched.** Only members on the way to a masked field are decoded and encoded again;
everything else passes as the server wrote it, numbers included. Of keys that are there twice the last counts, as it
does for the server.

`hide` leaves objects out of lists, tables and watches. A request that names one is answered `Plan.not_found`.

Blind spots, for a policy to deny or to mask under their own names: what Pods write (logs, exec, `pods/proxy`); the same
value in another resource (the environment of a Deployment is in its ReplicaSets, Pods and ControllerRevisions; Events
quote); copies that other tools than kubectl keep in annotations; an aggregated API that shows built-in objects as
resources of its own; the `Warning` header; that a JSON patch can test or copy a field that it does not show
(`Redactor.objection` tells); `resourceVersion`, counts and the `continue` token of a list, which holds the name of the
last object of the page, hidden or not.
"""

from __future__ import annotations

import base64
import binascii
import enum
import fnmatch
import re
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Final

import msgspec

from proxy.model import FieldMask, Masker, RequestFacts
from proxy.model.fields import STAR, FieldPath, Step
from proxy.protocols.kubernetes.values import MAX_VALUE, Oversized, Values

MAX_WHOLE: Final = 16 * 1024 * 1024
"""Bytes of an answer that is decoded at once; a longer one is taken apart while it comes, object by object."""
MAX_CACHED: Final = 1024

HIDE: Final = "hide"
REDACTED: Final = "***"

_LAST_APPLIED: Final = "kubectl.kubernetes.io/last-applied-configuration"
_EVENTS_END: Final = "k8s.io/initial-events-end"
"""What says that the objects of a watch list are all there: no value of anybody's."""

_UNMASKABLE_SUBRESOURCES: Final = frozenset({"log", "exec", "attach", "portforward", "proxy"})

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

_PRINTED_GROUPS: Final = frozenset({"", "apps", "batch"})
_NOT_PRINTED: Final = tuple(
    map(
        FieldPath.parse,
        (
            "data",
            "stringData",
            "binaryData",
            "metadata.annotations",
            *(
                f"{pod}.{containers}[*].{field}"
                for pod in ("spec", "spec.template.spec", "spec.jobTemplate.spec.template.spec")
                for containers in ("containers", "initContainers", "ephemeralContainers")
                for field in ("env", "envFrom", "command", "args")
            ),
        ),
    )
)
"""What no built-in printer of these groups shows in a table's cell (Kubernetes, pkg/printers/internalversion)."""

_KEPT_MESSAGES: Final = re.compile(
    r'[\w./-]+ "[^"\n]*" (?:not found|already exists)'
    r'|Operation cannot be fulfilled on [\w./-]+ "[^"\n]*": the object has been modified; '
    r"please apply your changes to the latest version and try again"
    r'|[\w./-]+(?: "[^"\n]*")? is forbidden: User "[^"\n]*" cannot \w+ resource "[^"\n]*" in API group "[^"\n]*"'
    r'(?: in the namespace "[^"\n]*"| at the cluster scope)'
    r"|too old resource version: [0-9]+ \([0-9]+\)"
    r"|the server could not find the requested resource|Unauthorized"
)
_FIELD_SELECTED: Final = re.compile(r"\[(?![0-9]+\]|[\w./-]*\])[^\]]*\]?")
"""What stands in brackets behind a field's name and is neither an index nor a key: it can hold a value."""
_MENTIONED: Final = re.compile(rb"last-applied-configuration|initial-events-end|\\u")
_WORD: Final = re.compile(r"[A-Za-z]{0,64}")
_MAX_FIELDS: Final = 64

_OBJECT = msgspec.json.Decoder(dict[str, msgspec.Raw])
_LIST = msgspec.json.Decoder(list[msgspec.Raw])
_TEXT = msgspec.json.Decoder(str)
_VALID = msgspec.json.Decoder(msgspec.Raw)
_encode = msgspec.json.Encoder().encode

_BRACE, _BRACKET, _QUOTE, _NULL = b'{["n'
_CLOSING_BRACE, _CLOSING_BRACKET = b"}]"

Members = dict[str, object]
"""An object that is decoded as far as a mask reaches into it: the rest is `msgspec.Raw`."""


class Unmaskable(Exception):
    """The answer cannot be shown masked; the message says why, for the client, in place of the answer."""


class Gone(enum.Enum):
    """In the place of a value or an object: it is not to be shown at all."""

    GONE = "gone"


GONE: Final = Gone.GONE


# --- masks, compiled --------------------------------------------------------------------------------------------------


class _Rule:
    """One mask with its patterns compiled."""

    __slots__ = ("hides", "mask", "names", "namespaces", "path", "resource", "title")

    def __init__(self, mask: FieldMask) -> None:
        self.resource = mask.resource
        self.namespaces = _globs(mask.namespaces)
        self.names = _globs(mask.names)
        self.hides = mask.label == HIDE
        self.path = None if self.hides else FieldPath.parse(mask.path)
        self.mask: Masker = mask.mask
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


class _Leaf:
    """What is done with the values at the end of a path. `encoded`: they are base64."""

    __slots__ = ("encoded", "mask", "title")

    def __init__(self, rule: _Rule, encoded: bool) -> None:
        self.mask = rule.mask
        self.title = rule.title
        self.encoded = encoded

    def masked(self, text: str) -> str:
        if self.encoded:
            try:
                value = base64.b64decode(text, validate=True)
            except (binascii.Error, ValueError):
                value = text.encode()
            return base64.b64encode(self.mask(value)).decode()
        return self.mask(text.encode()).decode("utf-8", "replace")


_Rest = tuple[tuple[Step, ...], _Leaf]


class _Node:
    """All paths that lead through one place of an object: which members are on the way, and what is done here."""

    __slots__ = ("leaves", "members", "other")

    def __init__(self, rests: Sequence[_Rest]) -> None:
        self.leaves = tuple(leaf for steps, leaf in rests if not steps)
        ahead = [(steps, leaf) for steps, leaf in rests if steps]
        starred = [(steps[1:], leaf) for steps, leaf in ahead if steps[0] is STAR]
        self.other = _Node(starred) if starred else None
        self.members = {
            key: _Node([(steps[1:], leaf) for steps, leaf in ahead if steps[0] in (key, STAR)])
            for key in {steps[0] for steps, _ in ahead if isinstance(steps[0], str)}
        }


class _Tree:
    """The masks that hold for one object. `quoted` finds in its `managedFields` what could be a masked value."""

    __slots__ = ("names_last_applied", "quoted", "root")

    def __init__(self, rules: Iterable[_Rule], resources: frozenset[str]) -> None:
        encoded = [path for resource in resources for path in _BYTES.get(resource, ())]
        rests: list[_Rest] = []
        needles: set[str] = set()
        for rule in rules:
            assert rule.path is not None
            steps = rule.path.steps
            rests.append((steps, _Leaf(rule, any(_may_meet(steps, path.steps) for path in encoded))))
            if steps[0] == "data" and "secrets" in resources:
                rests.append((("stringData", *steps[1:]), _Leaf(rule, encoded=False)))
            if steps[-1] is STAR:
                needles |= {'"v:', '"k:'}
            elif len(steps) > 1 and steps[-2] is STAR:
                needles.add(f'"k:.*?{re.escape(_inner_key(str(steps[-1])))}')
        self.root = _Node(rests)
        self.quoted = re.compile("|".join(sorted(needles)).encode()) if needles else None
        annotations = self.root.members.get("metadata", _NOWHERE).members.get("annotations", _NOWHERE)
        self.names_last_applied = _LAST_APPLIED in annotations.members


def _inner_key(key: str) -> str:
    """A key of a JSON text that stands inside a string of another."""
    inner = _encode(_encode({key: 0}).decode()).decode()
    return inner[2:-3]


def _may_meet(steps: tuple[Step, ...], others: tuple[Step, ...]) -> bool:
    return len(steps) == len(others) and all(
        one is STAR or other is STAR or one == other for one, other in zip(steps, others, strict=True)
    )


_NOWHERE = _Node(())


class _Verdict:
    """What holds for objects of one kind in the answers to one resource: the rules, and the tree that they make where
    no object's namespace or name matters."""

    __slots__ = ("resources", "rules", "tree")

    def __init__(self, rules: tuple[_Rule, ...], resources: frozenset[str]) -> None:
        self.rules = rules
        self.resources = resources
        settled = all(rule.always and not rule.hides for rule in rules)
        self.tree = _Tree(rules, resources) if settled and rules else None

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


# --- a session's masks, and a request's -------------------------------------------------------------------------------


class Redactor:
    """All field masks of a session. Raises `BadFieldPath` for a path that is none."""

    def __init__(self, masks: Sequence[FieldMask]) -> None:
        self._rules = tuple(_Rule(mask) for mask in masks)
        self._verdicts: dict[tuple[frozenset[str], str, str], _Verdict] = {}
        self._trees: dict[tuple[tuple[int, ...], frozenset[str]], _Tree] = {}

    def plan(self, facts: RequestFacts) -> Plan | None:
        """What the masks mean for a request; None when they mean nothing, so that its answer passes untouched.

        The proxy of anything but Pods and Services may lead to an API that shows objects of any kind: it gets a plan as
        soon as there is a mask."""
        if not self._rules or not facts.resource:
            return None
        asked = _asked(facts)
        rules = self._rules_for(asked)
        if facts.subresource in _UNMASKABLE_SUBRESOURCES:
            if facts.subresource == "proxy" and (facts.group or facts.resource not in ("pods", "services")):
                return Plan(self, facts, asked, rules)
            return Plan(self, facts, asked, rules) if _hidden(rules, facts) else None
        return Plan(self, facts, asked, rules) if rules else None

    def objection(self, facts: RequestFacts) -> str:
        """What is wrong with a request in view of the masks, in words for the client; empty when nothing is.

        A JSON patch that tests, copies or moves a masked field tells its value without showing it. A selector on one
        does too. A body that holds what `redact` made of a value would store that in its place."""
        if not self._rules or not facts.resource:
            return ""
        for rule in self._rules_for(_asked(facts)):
            path = rule.path
            if path is None or not rule.meets(facts.namespace, facts.name):
                continue
            if facts.patch == "json" and _patch_reads(facts.body, path):
                return f"the patch tests or copies `{path}`, which is masked"
            if _selector_reads(facts, path):
                return f"the selector asks about `{path}`, which is masked"
            if _holds_redacted(facts, path):
                return f"the request would store `{REDACTED}` in `{path}`: what a mask shows is no value to write back"
        return ""

    def _rules_for(self, resources: frozenset[str]) -> tuple[_Rule, ...]:
        return tuple(rule for rule in self._rules if rule.resource == "*" or rule.resource in resources)

    def verdict(self, asked: frozenset[str], api_version: str, kind: str) -> _Verdict:
        key = (asked, api_version, kind)
        found = self._verdicts.get(key)
        if found is None:
            if len(self._verdicts) >= MAX_CACHED:
                self._verdicts.clear()
            resources = asked | _resources_of(api_version, kind)
            found = self._verdicts[key] = _Verdict(self._rules_for(resources), resources)
        return found

    def tree(self, rules: Sequence[_Rule], resources: frozenset[str]) -> _Tree:
        key = (tuple(map(id, rules)), resources)
        found = self._trees.get(key)
        if found is None:
            if len(self._trees) >= MAX_CACHED:
                self._trees.clear()
            found = self._trees[key] = _Tree(rules, resources)
        return found


def _asked(facts: RequestFacts) -> frozenset[str]:
    """The names by which a mask can mean the resource of a request: with its subresource and without."""
    plain = f"{facts.resource}.{facts.group}" if facts.group else facts.resource
    return frozenset((plain, facts.target))


def _hidden(rules: Iterable[_Rule], facts: RequestFacts) -> bool:
    """Whether a request names one object, which is there, and is hidden."""
    if not facts.name or facts.verb in ("list", "watch", "deletecollection"):
        return False
    if facts.verb == "create" and not facts.subresource:
        return False
    return any(rule.hides and rule.meets(facts.namespace, facts.name) for rule in rules)


def _patch_reads(body: object, path: FieldPath) -> bool:
    if not isinstance(body, list):
        return True
    for step in body:
        if not isinstance(step, dict):
            return True
        pointer = {"test": "path", "copy": "from", "move": "from"}.get(str(step.get("op")))
        if pointer is not None and path.touches(str(step.get(pointer, ""))):
            return True
    return False


def _selector_reads(facts: RequestFacts, path: FieldPath) -> bool:
    if facts.label_selector and path.touches("/metadata/labels"):
        return True
    fields = re.findall(r"(?:^|,)([^=!,]+)", facts.field_selector)
    return any(path.touches("/" + field.strip().replace(".", "/")) for field in fields)


def _holds_redacted(facts: RequestFacts, path: FieldPath) -> bool:
    encoded = base64.b64encode(REDACTED.encode()).decode()
    if facts.patch == "json":
        written = [
            step.get("value")
            for step in (facts.body if isinstance(facts.body, list) else ())
            if isinstance(step, dict) and path.touches(str(step.get("path", "")))
        ]
        return any(value in (REDACTED, encoded) for value in written)
    return any(value in (REDACTED, encoded) for value in path.select(facts.body))


class Plan:
    """What the masks mean for one request."""

    def __init__(
        self, redactor: Redactor, facts: RequestFacts, asked: frozenset[str], rules: tuple[_Rule, ...]
    ) -> None:
        self._redactor = redactor
        self._facts = facts
        self._asked = asked
        self._rules = rules
        self._tables = facts.subresource != "proxy" and all(
            rule.path is None or _unprinted(facts, rule.path) for rule in rules
        )

    @property
    def not_found(self) -> bytes | None:
        """The `Status` (404) to answer with in place of asking the server, when the request names a hidden object."""
        return _not_found(self._facts) if _hidden(self._rules, self._facts) else None

    def accept(self, header: str) -> str:
        """What to ask for in place of the client's `Accept`: of what it takes, the forms of JSON that can be masked;
        plain JSON when none is left. A table is one of them where its cells show nothing that is masked."""
        kept: list[str] = []
        for part in header.split(","):
            media, *parameters = (word.strip() for word in part.split(";"))
            if media.lower() not in ("application/json", "application/*", "*/*"):
                continue
            values = {name.strip().lower(): value.strip() for name, _, value in (p.partition("=") for p in parameters)}
            weight = values.get("q", "")
            if not re.fullmatch(r"|0(\.[0-9]{1,3})?|1(\.0{1,3})?", weight) or (weight and float(weight) == 0):
                continue
            form = values.get("as", "")
            if form not in ("", "PartialObjectMetadata", "PartialObjectMetadataList", *("Table",) * self._tables):
                continue
            if form and (values.get("g"), values.get("v")) not in (("meta.k8s.io", "v1"), ("meta.k8s.io", "v1beta1")):
                continue
            words = ["application/json"]
            if form:
                words += [f"as={form}", f"v={values['v']}", f"g={values['g']}"]
            if values.get("stream") == "watch":
                words.append("stream=watch")
            if weight:
                words.append(f"q={weight}")
            if (wanted := ";".join(words)) not in kept:
                kept.append(wanted)
        return ",".join(kept) or "application/json"

    def transformer(self, status: int, content_type: str) -> Transformer:
        """For the answer with this status and `Content-Type`, which must not be compressed. Raises `Unmaskable`."""
        media = content_type.partition(";")[0].strip().lower()
        view = _View(self._redactor, self._facts, self._asked, status, self._tables)
        if media == "application/json":
            watching = self._facts.verb == "watch" and status == 200
            return Transformer(view, _Stream(_watch(view, values := Values()), values) if watching else _Whole(view))
        if media == "text/plain" and status >= 400:
            return Transformer(view, _Withheld(status))
        if not media:
            return Transformer(view, _Empty())
        raise Unmaskable(f"the server answers `{media[:64]}`, in which fields of {self._facts.target} cannot be masked")


def _unprinted(facts: RequestFacts, path: FieldPath) -> bool:
    """Whether all that the path names is within what no cell shows."""
    return facts.group in _PRINTED_GROUPS and any(
        len(path.steps) >= len(other.steps)
        and all(wide is STAR or step == wide for step, wide in zip(path.steps, other.steps, strict=False))
        for other in _NOT_PRINTED
    )


def _not_found(facts: RequestFacts) -> bytes:
    qualified = f"{facts.resource}.{facts.group}" if facts.group else facts.resource
    details = {"name": facts.name, "group": facts.group, "kind": facts.resource}
    return _encode(
        {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": f'{qualified} "{facts.name}" not found',
            "reason": "NotFound",
            "details": {key: value for key, value in details.items() if value},
            "code": 404,
        }
    )


# --- one answer -------------------------------------------------------------------------------------------------------


class _View:
    """The masks as one answer is read through them, and what they did."""

    def __init__(
        self, redactor: Redactor, facts: RequestFacts, asked: frozenset[str], status: int, tables: bool
    ) -> None:
        self._redactor = redactor
        self._facts = facts
        self._asked = asked
        self._status = status
        self._tables = tables
        self._hides = any(rule.hides for rule in redactor._rules_for(asked))
        self.objects = 0
        self.masked: set[str] = set()

    # answers, by their kind

    def answer(self, raw: msgspec.Raw) -> object:
        """What the whole body of an answer is to be replaced by."""
        members = self._members(raw)
        shown = self.root(members, raw)
        return msgspec.Raw(_not_found(self._facts)) if shown is GONE else shown

    def event(self, raw: msgspec.Raw) -> object:
        """What an event of a watch becomes; GONE when nothing may be said."""
        members = self._members(raw)
        inner = members.get("object")
        if inner is None and _text(members.get("kind")) == "Status":
            return self.root(members, raw)
        if inner is None or _first(inner) != _BRACE:
            raise Unmaskable("an event of the watch holds no object")
        shown = self.root(self._members(inner), inner)
        if shown is GONE:
            return GONE
        members["object"] = shown
        return members

    def root(self, members: Members, raw: object) -> object:
        kind, api_version = _text(members.get("kind")), _text(members.get("apiVersion"))
        if kind == "Status" and api_version == "v1":
            return self._status_of(members)
        if self._status >= 400:
            return self._status_of({"code": self._status})
        if kind == "Table" and api_version.startswith("meta.k8s.io/"):
            return self._table(members)
        if _is_list(kind, members):
            items = members["items"]
            if _first(items) == _BRACKET:
                default = (api_version, kind.removesuffix("List"))
                members["items"] = [
                    shown for item in _LIST.decode(_raw(items)) if (shown := self.item(item, default)) is not GONE
                ]
            return members
        return self._object(members, raw, ("", ""), self._facts.name)

    def item(self, raw: msgspec.Raw, default: tuple[str, str]) -> object:
        """One of a list. `default` is the version and kind of an item that does not say them."""
        return self._object(self._members(raw), raw, default, "")

    def row(self, raw: msgspec.Raw) -> object:
        """One of a table."""
        if not self._tables:
            raise Unmaskable("the server answers with a table, whose cells may show what is masked")
        members = self._members(raw)
        inner = members.get("object")
        if inner is None or _first(inner) != _BRACE:
            if self._hides:
                raise Unmaskable(
                    "rows of the table do not say which object they show; ask without `includeObject=None`"
                )
            self.objects += 1
            return raw
        shown = self._object(self._members(inner), inner, ("", ""), "")
        if shown is GONE:
            return GONE
        members["object"] = shown
        return members

    def _table(self, members: Members) -> object:
        rows = members.get("rows")
        if rows is None or _first(rows) != _BRACKET:
            return members
        before = _LIST.decode(_raw(rows))
        after = [shown for row in before if (shown := self.row(row)) is not GONE]
        members["rows"] = after
        columns = members.get("columnDefinitions")
        if before and not after and self._facts.verb == "watch" and (columns is None or _first(columns) != _BRACKET):
            return GONE
        return members

    def listed(self, key: str, members: Members) -> Callable[[msgspec.Raw], object]:
        """What to do with each element of the array `key` of an answer that is too long to be seen at once; `members`
        came before it. Raises `Unmaskable` where they do not say what it is."""
        kind, api_version = _text(members.get("kind")), _text(members.get("apiVersion"))
        if self._status < 400:
            if key == "rows" and kind == "Table" and api_version.startswith("meta.k8s.io/"):
                return self.row
            if key == "items" and kind and "metadata" in members and _is_list(kind, {**members, key: None}):
                default = (api_version, kind.removesuffix("List"))
                return lambda raw: self.item(raw, default)
        raise Unmaskable(f"an answer of more than `{MAX_WHOLE}` bytes does not say that it is a list, before its {key}")

    # objects

    def _object(self, members: Members, raw: object, default: tuple[str, str], name: str) -> object:
        """The object masked, the bytes that it came in where no mask holds for it, or GONE."""
        api_version = _text(members.get("apiVersion")) or default[0]
        kind = _text(members.get("kind")) or default[1]
        verdict = self._redactor.verdict(self._asked, api_version, kind)
        if not verdict.rules:
            self.objects += 1
            return raw
        metadata = members.get("metadata")
        if metadata is not None and _first(metadata) == _BRACE:
            members["metadata"] = metadata = self._members(metadata)
        else:
            metadata = {}
        tree = verdict.tree
        if tree is None:
            name = _text(metadata.get("name")) or name
            namespace = _text(metadata.get("namespace")) or self._facts.namespace
            if kind == "Namespace" or "namespaces" in self._asked:
                namespace = name
            rules = [rule for rule in verdict.rules if rule.meets(namespace, name)]
            if any(rule.hides for rule in rules):
                return GONE
            self.objects += 1
            if not rules:
                return raw
            tree = self._redactor.tree(rules, verdict.resources)
        else:
            self.objects += 1
        self._mask(members, metadata, tree)
        return members

    def _mask(self, members: Members, metadata: Members, tree: _Tree) -> None:
        managed = metadata.get("managedFields")
        if managed is not None and tree.quoted is not None and tree.quoted.search(_raw(managed)):
            del metadata["managedFields"]
        annotations = metadata.get("annotations")
        kept: Members = {}
        if annotations is not None and _mentions(annotations):
            metadata["annotations"] = annotations = self._members(annotations)
            if not tree.names_last_applied and _LAST_APPLIED in annotations:
                kept[_LAST_APPLIED] = self._last_applied(annotations[_LAST_APPLIED], tree)
            if _text(annotations.get(_EVENTS_END)) == "true":
                kept[_EVENTS_END] = annotations[_EVENTS_END]
        self._walk(members, tree.root)
        if kept and (shown := metadata.get("annotations")) is not None and members.get("metadata") is metadata:
            assert isinstance(shown, dict)
            shown.update(kept)

    def _last_applied(self, raw: object, tree: _Tree) -> object:
        """The annotation's text, masked inside."""
        try:
            members: Members = dict(_OBJECT.decode(_text(raw)))
            metadata = members.get("metadata")
            if metadata is not None and _first(metadata) == _BRACE:
                members["metadata"] = inner = self._members(metadata)
                annotations = inner.get("annotations")
                if annotations is not None and _mentions(annotations):
                    inner["annotations"] = deeper = self._members(annotations)
                    deeper.pop(_LAST_APPLIED, None)
            self._walk(members, tree.root)
            return _encode(members).decode() + "\n"
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
            return REDACTED

    def _walk(self, members: Members, node: _Node) -> None:
        if node.other is None:
            keys: Iterable[str] = [key for key in node.members if key in members]
        else:
            keys = list(members)
        for key in keys:
            below = node.members.get(key) or node.other
            assert below is not None
            shown = self._below(members[key], below)
            if shown is GONE:
                del members[key]
            else:
                members[key] = shown

    def _below(self, value: object, node: _Node) -> object:
        if node.leaves:
            return self._value(value, node.leaves)
        if isinstance(value, dict):
            self._walk(value, node)
            return value
        first = _first(value)
        if first == _BRACE:
            members = self._members(value)
            self._walk(members, node)
            return members
        if first == _BRACKET and node.other is not None:
            other = node.other
            return [shown for each in _LIST.decode(_raw(value)) if (shown := self._below(each, other)) is not GONE]
        return value

    def _value(self, value: object, leaves: tuple[_Leaf, ...]) -> object:
        first = _BRACE if isinstance(value, dict) else _first(value)
        if first == _NULL:
            return value
        for leaf in leaves:
            self.masked.add(leaf.title)
        if first != _QUOTE:
            return GONE
        text = _text(value)
        for leaf in leaves:
            text = leaf.masked(text)
        return text

    # failures

    def _status_of(self, members: Members) -> object:
        """A `Status` without words that could quote a value."""
        reason, message = _text(members.get("reason")), _text(members.get("message"))
        reason = reason if _WORD.fullmatch(reason) else ""
        shown: Members = {"kind": "Status", "apiVersion": "v1", "metadata": members.get("metadata", {})}
        failed = _text(members.get("status")) != "Success"
        shown["status"] = "Failure" if failed else "Success"
        details, fields = self._details(members.get("details"))
        if _KEPT_MESSAGES.fullmatch(message):
            shown["message"] = message
        elif failed:
            shown["message"] = (
                f"the server refused this ({reason or 'no reason given'}); its own words are not shown, since fields "
                f"of {self._facts.target} are masked here" + (f"; it names: {', '.join(fields)}" if fields else "")
            )
        if reason:
            shown["reason"] = reason
        if details:
            shown["details"] = details
        code = members.get("code")
        if isinstance(code, int) or (code is not None and re.fullmatch(rb"[0-9]{1,3}", _raw(code))):
            shown["code"] = code
        return shown

    def _details(self, raw: object) -> tuple[Members, list[str]]:
        if raw is None or _first(raw) != _BRACE:
            return {}, []
        members = self._members(raw)
        shown: Members = {
            key: members[key] for key in ("name", "group", "kind", "uid", "retryAfterSeconds") if key in members
        }
        fields: list[str] = []
        causes = members.get("causes")
        if causes is not None and _first(causes) == _BRACKET:
            told = []
            for cause in _LIST.decode(_raw(causes))[:_MAX_FIELDS]:
                each = self._members(cause)
                field = _FIELD_SELECTED.sub("[…]", _text(each.get("field")))[:256]
                reason = _text(each.get("reason"))
                told.append({"reason": reason if _WORD.fullmatch(reason) else "", "field": field})
                told[-1]["message"] = "the server's words are not shown"
                if field:
                    fields.append(field)
            shown["causes"] = told
        return shown, fields

    def _members(self, raw: object) -> Members:
        if _first(raw) != _BRACE:
            raise Unmaskable("the server's answer holds something else where an object is expected")
        return dict(_OBJECT.decode(_raw(raw)))


def _is_list(kind: str, members: Members) -> bool:
    """A list has items and no name of its own."""
    if "items" not in members or (kind and not kind.endswith("List")):
        return False
    metadata = members.get("metadata")
    if metadata is None or _first(metadata) != _BRACE:
        return True
    return not _text(_OBJECT.decode(_raw(metadata)).get("name"))


def _raw(value: object) -> bytes:
    """Undecoded JSON: `bytes`, or what msgspec's stubs take for a kind of them."""
    assert isinstance(value, (bytes, msgspec.Raw))
    return value


def _first(value: object) -> int:
    """The first byte of undecoded JSON, which says of which type it is."""
    if isinstance(value, dict):
        return _BRACE
    view = memoryview(_raw(value))
    return view[0] if len(view) else 0


def _text(value: object) -> str:
    """The string that undecoded JSON is; empty when it is something else or not there."""
    if value is None or isinstance(value, dict) or _first(value) != _QUOTE:
        return ""
    return _TEXT.decode(_raw(value))


def _mentions(annotations: object) -> bool:
    """Whether there could be annotations that are no values like others."""
    if _first(annotations) != _BRACE:
        return False
    return _MENTIONED.search(_raw(annotations)) is not None


# --- how an answer comes ----------------------------------------------------------------------------------------------


class Transformer:
    """One answer: `feed` it as it comes, then `finish`; what they return goes to the client.

    `masked` names the masks that met a value, and `objects` counts what was shown. Both methods may raise `Unmaskable`,
    also after bytes were returned: then the answer is to be cut off, so that the client sees that it is not whole."""

    def __init__(self, view: _View, form: _Form) -> None:
        self._view = view
        self._form: _Form = form

    def feed(self, data: bytes) -> bytes:
        return self._run(data)

    def finish(self) -> bytes:
        return self._run(None)

    @property
    def masked(self) -> tuple[str, ...]:
        return tuple(sorted(self._view.masked))

    @property
    def objects(self) -> int:
        return self._view.objects

    def _run(self, data: bytes | None) -> bytes:
        try:
            if data is None:
                return self._form.finish()
            if isinstance(self._form, _Whole) and self._form.size + len(data) > MAX_WHOLE:
                earlier = self._form.chunks
                values = Values()
                self._form = _Stream(_listed(self._view, values), values)
                return b"".join(map(self._form.feed, (*earlier, data)))
            return self._form.feed(data)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            raise Unmaskable("the server's answer is no JSON that can be read, so it cannot be masked") from None
        except RecursionError:
            raise Unmaskable("the server's answer is nested too deeply to be masked") from None
        except Oversized:
            raise Unmaskable(f"an object of the server's answer has more than `{MAX_VALUE}` bytes") from None


class _Whole:
    """Kept until it is all there."""

    def __init__(self, view: _View) -> None:
        self._view = view
        self.chunks: list[bytes] = []
        self.size = 0

    def feed(self, data: bytes) -> bytes:
        self.chunks.append(bytes(data))
        self.size += len(data)
        return b""

    def finish(self) -> bytes:
        body = b"".join(self.chunks)
        self.chunks.clear()
        return _encode(self._view.answer(msgspec.Raw(body.strip()))) + b"\n" if body else b""


_SLICE: Final = 64 * 1024

_Steps = Generator[bytes, None, None]


class _Stream:
    """Taken apart by a generator that is resumed when there is more: it yields what to send."""

    def __init__(self, steps: _Steps, values: Values) -> None:
        self._steps = steps
        self._values = values

    def feed(self, data: bytes) -> bytes:
        shown = []
        for at in range(0, len(data), _SLICE):
            self._values.feed(data[at : at + _SLICE])
            shown.append(next(self._steps))
        return b"".join(shown)

    def finish(self) -> bytes:
        self._values.ended = True
        return next(self._steps)


def _watch(view: _View, values: Values) -> _Steps:
    """Events, one behind the other."""
    out: list[bytes] = []
    while True:
        raw = values.value()
        if raw is not None:
            shown = view.event(msgspec.Raw(raw))
            if shown is not GONE:
                out += (_encode(shown), b"\n")
            continue
        if values.ended and values.peek() >= 0:
            raise Unmaskable("the watch ended inside an event")
        yield b"".join(out)
        out.clear()


def _listed(view: _View, values: Values) -> _Steps:
    """A list or a table, element by element; what stands before and behind the elements is kept."""
    out: list[bytes] = []
    members: Members = {}
    seen: set[str] = set()
    opened = False
    yield from _mark(values, out, b"{")
    while (yield from _peek(values, out)) != _CLOSING_BRACE:
        if seen:
            yield from _mark(values, out, b",")
        key = _TEXT.decode((yield from _next(values, out)))
        if key in seen:
            raise Unmaskable(f"the server's answer has the member `{key[:64]}` twice")
        seen.add(key)
        yield from _mark(values, out, b":")
        if key in ("items", "rows") and (yield from _peek(values, out)) == _BRACKET:
            show = view.listed(key, members)
            out.append(_encode({**members, key: []})[:-2])
            opened = True
            yield from _elements(values, out, show)
            continue
        raw = _VALID.decode((yield from _next(values, out)))
        if opened:
            out += (b",", _encode(key), b":", bytes(raw))
        else:
            members[key] = raw
    yield from _mark(values, out, b"}")
    out.append(b"}\n" if opened else _encode(view.answer(msgspec.Raw(_encode(members)))))
    while values.peek() < 0:
        yield b"".join(out)
        out.clear()
    raise Unmaskable("the server's answer goes on behind its end")


def _elements(values: Values, out: list[bytes], show: Callable[[msgspec.Raw], object]) -> _Steps:
    """An array, up to its end."""
    yield from _mark(values, out, b"[")
    first = shown_first = True
    while (yield from _peek(values, out)) != _CLOSING_BRACKET:
        if not first:
            yield from _mark(values, out, b",")
        first = False
        shown = show(msgspec.Raw((yield from _next(values, out))))
        if shown is not GONE:
            if not shown_first:
                out.append(b",")
            shown_first = False
            out.append(_encode(shown))
    yield from _mark(values, out, b"]")
    out.append(b"]")


def _next(values: Values, out: list[bytes]) -> Generator[bytes, None, bytes]:
    while (raw := values.value()) is None:
        yield _flushed(values, out)
    return raw


def _peek(values: Values, out: list[bytes]) -> Generator[bytes, None, int]:
    while (byte := values.peek()) < 0:
        yield _flushed(values, out)
    return byte


def _mark(values: Values, out: list[bytes], mark: bytes) -> _Steps:
    """Steps over a byte that must come."""
    byte = yield from _peek(values, out)
    if byte != mark[0]:
        raise Unmaskable("the server's answer is no JSON that can be read, so it cannot be masked")
    values.take(1)


def _flushed(values: Values, out: list[bytes]) -> bytes:
    if values.ended:
        raise Unmaskable("the server's answer ends before its end")
    shown = b"".join(out)
    out.clear()
    return shown


class _Withheld:
    """A failure told in plain text, which could quote anything."""

    def __init__(self, status: int) -> None:
        self._status = status

    def feed(self, data: bytes) -> bytes:
        return b""

    def finish(self) -> bytes:
        return f"the server answered {self._status}; its words are not shown, since fields are masked here\n".encode()


class _Empty:
    def feed(self, data: bytes) -> bytes:
        raise Unmaskable("the server's answer does not say of which type it is, so it cannot be masked")

    def finish(self) -> bytes:
        return b""


_Form = _Whole | _Stream | _Withheld | _Empty
