"""What a human who is asked about a request gets to see of it: the server's own dry run against what is there now.

    create            the request with `dryRun=All`
    update, patch     GET of the object, then the request with `dryRun=All`
    delete            the same, with `dryRun` in the body too, which is where the server looks when there is one
    eviction          the same as for the pod's deletion
    deletecollection  the request with `dryRun`; of what it would delete the names are shown

A server that does not know `dryRun` would do what is asked. So it is only asked of groups that an API server of
Kubernetes serves itself, at subresources that store an object; of others the human sees the request alone.

Secrets are taken out of both sides before they are compared; that a value changes is still told.

Blind spots: what admission makes of the request in earnest may differ; a custom resource is shown without a dry run.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from itertools import islice
from typing import Final
from urllib.parse import unquote

import msgspec

from proxy.model import Operation, RequestFacts
from proxy.protocols.kubernetes import answers
from proxy.protocols.kubernetes.requests import Described, Request
from proxy.protocols.kubernetes.scrub import scrubbed, scrubbed_message

MAX_TEXT: Final = 4000
"""Characters of all that is shown."""
MAX_OBJECT: Final = 1024 * 1024
"""Bytes of an object that is compared; an API server stores about as much."""
_MAX_TOLD: Final = 1200
"""Characters of the request itself, when more is shown."""
_MAX_LINES: Final = 600
"""Lines of either side where they differ: comparing takes the square of it."""
_MAX_DEPTH: Final = 64
_MAX_NAMES: Final = 50
"""Names of what would be deleted at once."""

_SERVED_ITSELF: Final = frozenset(
    {
        "",
        "admissionregistration.k8s.io",
        "apiextensions.k8s.io",
        "apps",
        "autoscaling",
        "batch",
        "certificates.k8s.io",
        "coordination.k8s.io",
        "discovery.k8s.io",
        "events.k8s.io",
        "extensions",
        "flowcontrol.apiserver.k8s.io",
        "networking.k8s.io",
        "node.k8s.io",
        "policy",
        "rbac.authorization.k8s.io",
        "resource.k8s.io",
        "scheduling.k8s.io",
        "storage.k8s.io",
    }
)
_STORED: Final = frozenset({"", "ephemeralcontainers", "eviction", "resize", "scale", "status"})
_UNSTORED: Final = frozenset({"bindings", "componentstatuses"})
_METHODS: Final = {
    "create": "POST",
    "update": "PUT",
    "patch": "PATCH",
    "delete": "DELETE",
    "deletecollection": "DELETE",
}
_EVICTION: Final = "eviction"
_NOISE: Final = ("creationTimestamp", "generation", "managedFields", "resourceVersion", "selfLink", "uid")
_APPLIED: Final = "kubectl.kubernetes.io/last-applied-configuration"


class Question(msgspec.Struct, frozen=True):
    """One request to the server. `facts` say what its answer shows."""

    method: str
    target: str
    facts: RequestFacts
    body: bytes = b""
    content_type: str = ""


class Inquiry:
    """The questions about one operation, in order, and what the answers come to."""

    __slots__ = ("_before", "_facts", "_operation", "_questions", "_remark", "_shown_before", "_text")

    def __init__(self, request: Request, described: Described) -> None:
        self._operation: Operation = described.operation
        self._facts = described.operation.requests[0]
        self._questions = _questions(request, described)
        self._before: object = None
        self._shown_before: object = None
        self._remark = ""
        self._text = ""

    def next(self) -> Question | None:
        """What to ask now."""
        return self._questions[0] if self._questions else None

    def stop(self, remark: str) -> None:
        """Nothing more is asked; `remark` says why."""
        self._questions = []
        self._remark = remark

    def hear(self, status: int, body: bytes, masked: bytes) -> None:
        """The answer to the question; `masked` is what of it may be shown."""
        question = self._questions.pop(0)
        asked = question.method != "GET"
        if status >= 400:
            if asked:
                self._remark = f"the server would refuse it: {_refusal(status, body, self._facts, body != masked)}"
            elif status != 404:
                self.stop(f"what is there now could not be read: {status} {answers.phrase(status)}")
            return
        try:
            value, shown = _object(body), scrubbed(self._facts.resource, _object(masked))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            self.stop("the server's answer is no JSON")
            return
        if not asked:
            self._before, self._shown_before = value, shown
            return
        if question.facts.verb == "deletecollection":
            self._remark, self._text = _deleted(value)
            return
        if question.method == "DELETE" or question.facts.subresource == _EVICTION:
            value = shown = None
        differing = _difference(_lines(self._shown_before), _lines(_marked(self._before, value, shown)))
        self._remark = "" if differing else "nothing would change"
        self._text = "\n".join(differing)

    @property
    def text(self) -> str:
        """For the human."""
        recorded = self._operation.recorded_text
        remark = f"({self._remark})" if self._remark else ""
        if not remark and not self._text:
            return _cut(recorded, MAX_TEXT)
        return _cut("\n".join(part for part in (_cut(recorded, _MAX_TOLD), remark, self._text) if part), MAX_TEXT)


def _questions(request: Request, described: Described) -> list[Question]:
    facts = described.operation.requests[0]
    if facts.verb not in _METHODS or not facts.resource or facts.dry_run:
        return []
    path, _, query = request.target.partition("?")
    seen = dataclasses.replace(facts, verb="get", body=None, patch="")
    out = [] if facts.verb in ("create", "deletecollection") else [Question("GET", path, seen)]
    if facts.subresource == _EVICTION:
        pod = dataclasses.replace(seen, subresource="")
        out = [Question("GET", path.rstrip("/").removesuffix(f"/{_EVICTION}"), pod)]
    if facts.group not in _SERVED_ITSELF or facts.subresource not in _STORED or facts.resource in _UNSTORED:
        return []
    body, content_type = described.body, described.content_type
    if facts.verb in ("delete", "deletecollection"):
        options = msgspec.json.decode(body) if body else {}
        defaults = {"kind": "DeleteOptions", "apiVersion": "v1"}
        body, content_type = msgspec.json.encode({**defaults, **options, "dryRun": ["All"]}), "application/json"
    if facts.subresource == _EVICTION:
        body = _dry_eviction(body)
    parameters = [part for part in query.split("&") if part and unquote(part.partition("=")[0]) != "dryRun"]
    target = f"{path}?{'&'.join([*parameters, 'dryRun=All'])}"
    return [*out, Question(_METHODS[facts.verb], target, facts, body, content_type)]


def _dry_eviction(body: bytes) -> bytes:
    """Dry by what it says of the deletion, too."""
    eviction = msgspec.json.decode(body)
    options = eviction.get("deleteOptions")
    dry = {**(options if isinstance(options, dict) else {}), "dryRun": ["All"]}
    return msgspec.json.encode({**eviction, "deleteOptions": dry})


def _object(body: bytes) -> object:
    value = msgspec.json.decode(body)
    if isinstance(value, dict) and isinstance(value.get("metadata"), dict):
        metadata = {key: inner for key, inner in value["metadata"].items() if key not in _NOISE}
        if isinstance(metadata.get("annotations"), dict):
            metadata["annotations"] = {k: v for k, v in metadata["annotations"].items() if k != _APPLIED}
        value = {**value, "metadata": metadata}
    return value


def _deleted(value: object) -> tuple[str, str]:
    """What a dry run of a `deletecollection` answers with, told: how many objects, and their names."""
    items = value.get("items") if isinstance(value, dict) else None
    if not isinstance(items, list):
        return "the server does not say what it would delete", ""
    told = []
    for item in items:
        metadata = item.get("metadata") if isinstance(item, dict) else None
        if isinstance(metadata, dict):
            namespace = metadata.get("namespace")
            told.append(f"-{_word(metadata.get('name'))}" + (f" in {_word(namespace)}" if namespace else ""))
    many = len(items) - _MAX_NAMES
    lines = told[:_MAX_NAMES] + ([f"… and {many} more"] if many > 0 else [])
    return f"it would delete {len(items)}", "\n".join(lines)


def _refusal(status: int, body: bytes, facts: RequestFacts, masked: bool) -> str:
    """The server's reason; without its words where these may quote a value that is not to be seen."""
    line = f"{status} {answers.phrase(status)}"
    message = "" if masked else scrubbed_message(facts.resource, answers.told(body))
    return f"{line}: {message}" if message else line


def _marked(before: object, after: object, shown: object, depth: int = 0) -> object:
    """What is shown, with a word at each hidden value that changes."""
    if before is None or depth > _MAX_DEPTH:
        return shown
    match before, after, shown:
        case dict(), dict(), dict():
            return {k: _marked(before.get(k), after.get(k), inner, depth + 1) for k, inner in shown.items()}
        case list(), list(), list() if len(before) == len(after) == len(shown):
            return [_marked(b, a, inner, depth + 1) for b, a, inner in zip(before, after, shown, strict=True)]
        case _:
            hidden = shown != after and before != after
            return f"{shown} (changed)" if hidden else shown


def _lines(value: object, indent: str = "", depth: int = 0) -> list[str]:
    """Lines in the manner of YAML, keys sorted; what a terminal could take for more than text is escaped."""
    if value is None and not depth:
        return []
    if depth > _MAX_DEPTH:
        return [f"{indent}…"]
    pairs: list[tuple[str, object]] = []
    match value:
        case dict():
            pairs = [(f"{_word(key)}:", inner) for key, inner in sorted(value.items())]
        case list():
            pairs = [("-", inner) for inner in value]
        case _:
            return [f"{indent}{_word(value)}"]
    out = []
    for label, inner in pairs:
        if isinstance(inner, dict | list) and inner:
            out.append(f"{indent}{label}")
            out.extend(_lines(inner, indent + "  ", depth + 1))
        else:
            out.append(f"{indent}{label} {_word(inner)}")
    return out


def _word(value: object) -> str:
    if isinstance(value, str) and value and value.isprintable():
        return value
    return json.dumps(value)


def _difference(before: list[str], after: list[str]) -> list[str]:
    """A unified diff without names and places, computed where the sides differ only."""
    first = 0
    while first < len(before) and first < len(after) and before[first] == after[first]:
        first += 1
    last = 0
    while last < min(len(before), len(after)) - first and before[-1 - last] == after[-1 - last]:
        last += 1
    if first == len(before) == len(after):
        return []
    start = max(0, first - 2)
    end = max(0, last - 2)
    before, after = before[start : len(before) - end], after[start : len(after) - end]
    if before and after and max(len(before), len(after)) > _MAX_LINES:
        return [f"({len(before)} lines become {len(after)}: too many to be compared)"]
    # the first three lines name files and places, which there are none of
    hunks = islice(difflib.unified_diff(before, after, lineterm="", n=2), 3, _MAX_LINES + 3)
    return ["…" if line.startswith("@@") else line for line in hunks]


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 2] + " …"
