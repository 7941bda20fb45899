"""What a request to an API server asks for, told from its head and body as the server's own RequestInfo tells it
(Kubernetes, k8s.io/apiserver, package request).

    classify   the head: verb, resource, names, selectors, and what is to be done with the body
    describe   the body: decoded, and encoded anew, so that what is judged is what is sent

A path or query that two readers could read differently is not classified, and so denied: dot segments, empty segments,
an encoded slash, bytes that are no UTF-8, a parameter given twice where the server looks at one. What passes is spelled
anew, canonically, for the server.

What cannot be seen: the body of what is proxied into the cluster (`proxy`), CBOR bodies (denied, with the advice to
send JSON), what an admission webhook makes of an object.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Final
from urllib.parse import quote

import msgspec

from proxy.model import Operation, OperationKind, Phase, RequestFacts
from proxy.protocols.kubernetes.commands import told
from proxy.protocols.kubernetes.protobuf import ProtobufUnreadable, read_protobuf
from proxy.protocols.kubernetes.scrub import scrubbed, scrubbed_words
from proxy.protocols.kubernetes.yaml import YamlUnreadable, read_yaml

PROTOCOL: Final = "kubernetes"
MAX_JUDGED_BODY = 3 * 1024 * 1024
"""Bytes of a body that is read before it is sent on: as many as the server takes (its `maxRequestBodyBytes`)."""
MAX_PATCH = 10_000
"""Operations of a JSON patch: as many as the server takes."""
MAX_TARGET = 16 * 1024
"""Characters of a request target."""
MAX_PARAMETERS = 512
MAX_RECORDED_TARGET = 2048
"""Characters of a proxied request's target that are recorded."""
MAX_RECORDED_BODY = 4096
"""Characters of a body that are recorded."""

_PROTOBUF = "application/vnd.kubernetes.protobuf"
HINT_MEDIA = "send application/json"

STREAMING = frozenset({"exec", "attach", "portforward"})
"""Subresources that turn the connection into another protocol."""
_CONNECTING = STREAMING | {"proxy"}
_VERBS = {
    "POST": "create",
    "GET": "get",
    "HEAD": "get",
    "PUT": "update",
    "PATCH": "patch",
    "DELETE": "delete",
}
_NAMESPACE_SUBRESOURCES = frozenset({"status", "finalize"})
_ONCE = frozenset({"watch", "fieldSelector", "labelSelector", "container", "stdin", "stdout", "stderr", "tty"})
"""Parameters of which the server looks at one value."""
_PATCHES = {
    "application/json-patch+json": "json",
    "application/merge-patch+json": "merge",
    "application/strategic-merge-patch+json": "strategic",
    "application/apply-patch+yaml": "apply",
}
KNOWN: Final = 256
"""Heads that are kept with what they ask for, the latest: whoever polls asks the same again."""
_SAFE_IN_SEGMENT = "!$&'()*+,;=:@~-._"
_SAFE_IN_QUERY = "!$'()*,/:@~-._"
_LINES: Final = {ord("\t"): "\\t", ord("\n"): "\\n", ord("\r"): "\\r"}
"""Control characters that a script has which is a word of a command, and how they are told."""
_PERCENT = re.compile(r"%(?![0-9A-Fa-f]{2})")
_FOLDED = re.compile(rb"\x7f|\xc2[\x80-\x9f]|\xe2\x80[\xa8\xa9]|\xef\xbb\xbf|\xef\xbf[\xbe\xbf]")
"""In UTF-8, what YAML takes for the end of a line inside a string, which becomes a space, or takes no text with."""
_EXACT_NAME = re.compile(r"metadata\.name==?(?!\.{1,2}$)([^=!,\\/%]+)")
"""A selector of one object by what can be a name."""


class Head(msgspec.Struct, frozen=True):
    """A request's head: names of headers in lower case; target and values as Latin-1 text."""

    method: str
    target: str
    headers: tuple[tuple[str, str], ...]

    def values(self, name: str) -> tuple[str, ...]:
        """All values of a header, in order."""
        return tuple(value for each, value in self.headers if each == name)


class Body(enum.Enum):
    """What is to be done with a request's body: there must be none; it is read whole and judged; it is not looked at
    and streamed."""

    NONE = "none"
    JUDGED = "judged"
    STREAMED = "streamed"


class Request(msgspec.Struct, frozen=True, eq=False):
    """What a head says; the same object while the head is known. `target` is what to send to the server; `impersonated`
    are the identities that it asks to act as; `unclassified` says why it could not be told, empty when it could."""

    facts: RequestFacts
    impersonated: tuple[RequestFacts, ...]
    body: Body
    target: str
    unclassified: str = ""


class Described(msgspec.Struct, frozen=True):
    """The operation, and what to send in place of the client's body."""

    operation: Operation
    body: bytes
    content_type: str


class _Unclear(Exception):
    pass


# --- the head ---------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=KNOWN)
def classify(head: Head) -> Request:
    """What the head asks for. Never raises for what a client sent."""
    try:
        return _classify(head)
    except _Unclear as unclear:
        facts = RequestFacts(verb=head.method.lower()[:16], path=head.target[:256])
        return Request(facts, (), Body.NONE, "", unclassified=str(unclear))


def _classify(head: Head) -> Request:
    if head.method not in (*_VERBS, "OPTIONS"):
        raise _Unclear(f"the method `{head.method[:16]}` is none of an API server's")
    if len(head.target) > MAX_TARGET:
        raise _Unclear(f"the request target has more than `{MAX_TARGET}` characters")
    if "#" in head.target:
        raise _Unclear("the request target has a fragment")
    path, question, query = head.target.partition("?")
    segments = _segments(path)
    parameters = _parameters(query) if question else []
    tail = "/" if path.endswith("/") and segments else ""
    canonical = "/" + "/".join(quote(segment, safe=_SAFE_IN_SEGMENT) for segment in segments) + tail
    target = canonical + ("?" + _encoded(parameters) if parameters else "")
    facts = _facts(head.method, segments, canonical, parameters)
    if not facts.resource or facts.subresource == "proxy":
        body = Body.NONE if head.method in ("GET", "HEAD", "OPTIONS") else Body.STREAMED
    elif facts.subresource in STREAMING or head.method in ("GET", "HEAD"):
        body = Body.NONE
    else:
        body = Body.JUDGED
    return Request(facts, _impersonated(head), body, target)


def _segments(path: str) -> list[str]:
    """The path's segments, decoded; one slash at its end does not count."""
    if not path.startswith("/"):
        raise _Unclear("the request target is no absolute path")
    raw = path[1:].split("/")
    if raw[-1] == "":
        raw.pop()
    segments = [_decoded(segment) for segment in raw]
    for segment in segments:
        if segment in ("", ".", ".."):
            raise _Unclear("the path has an empty segment, or one of dots")
        if "/" in segment or "\\" in segment:
            raise _Unclear("a segment of the path has a slash")
    return segments


def _decoded(text: str, *, lines: bool = False) -> str:
    """Percent-decoded; UTF-8 only, and no control characters, but for those that a text of several `lines` has."""
    if _PERCENT.search(text):
        raise _Unclear("a `%` is not followed by two hex digits")
    try:
        raw = text.encode("latin-1")
        if b"%" in raw:
            raw = re.sub(rb"%([0-9A-Fa-f]{2})", lambda match: bytes([int(match[1], 16)]), raw)
        decoded = raw.decode("utf-8")
    except UnicodeError:
        raise _Unclear("the request target is no UTF-8") from None
    if any((letter < " " and not (lines and ord(letter) in _LINES)) or letter == "\x7f" for letter in decoded):
        raise _Unclear("the request target has a control character")
    return decoded


def _parameters(query: str) -> list[tuple[str, str]]:
    if ";" in query:
        raise _Unclear("the query has a `;`, which servers read differently; write `%3B`")
    parameters = []
    for part in query.split("&"):
        if part:
            name, _, value = part.partition("=")
            key = _decoded(name.replace("+", " "))
            parameters.append((key, _decoded(value.replace("+", "%20"), lines=key == "command")))
    if len(parameters) > MAX_PARAMETERS:
        raise _Unclear(f"the query has more than `{MAX_PARAMETERS}` parameters")
    names = [name for name, _ in parameters]
    for name in _ONCE.intersection(names):
        if names.count(name) > 1:
            raise _Unclear(f"the parameter `{name}` is there twice")
    return parameters


def _encoded(parameters: Iterable[tuple[str, str]]) -> str:
    return "&".join(
        f"{quote(name, safe=_SAFE_IN_QUERY)}={quote(value, safe=_SAFE_IN_QUERY)}" for name, value in parameters
    )


def _facts(method: str, segments: Sequence[str], path: str, parameters: Sequence[tuple[str, str]]) -> RequestFacts:
    """RequestInfo's own steps, in its order."""
    parts = list(segments)
    if len(parts) < 3 or parts[0] not in ("api", "apis"):
        return RequestFacts(verb=method.lower(), path=path)
    group = ""
    if parts.pop(0) == "apis":
        if len(parts) < 3:
            return RequestFacts(verb=method.lower(), path=path)
        group = parts.pop(0)
    version = parts.pop(0)
    if method not in _VERBS:
        raise _Unclear(f"the method `{method}` means nothing for a resource")
    verb = _VERBS[method]
    if parts[0] == "proxy":
        raise _Unclear("`/proxy/` in front of a resource is what no server serves any more")
    if parts[0] == "watch":
        if len(parts) < 2 or method not in ("GET", "HEAD"):
            raise _Unclear("`/watch/` without a resource, or with a method that changes something")
        verb = parts.pop(0)
    namespace = ""
    if parts[0] == "namespaces" and len(parts) > 1:
        namespace = parts[1]
        if len(parts) > 2 and parts[2] not in _NAMESPACE_SUBRESOURCES:
            parts = parts[2:]
    resource, name, subresource = (*parts, "", "")[:3]
    if len(parts) > 3 and subresource != "proxy":
        raise _Unclear(f"the path goes on behind the subresource `{subresource}`")
    if "." in resource:
        raise _Unclear(f"`{resource}` is no name of a resource")
    values = dict(reversed(parameters))
    field_selector = values.get("fieldSelector", "")
    if not name and verb == "get":
        # an empty value counts as true, as in the server
        verb = "list" if values.get("watch", "0").lower() in ("0", "false") else "watch"
        exact = _EXACT_NAME.fullmatch(field_selector)
        name = exact[1] if exact else ""
    elif not name and verb == "delete":
        verb = "deletecollection"
    selecting = verb in ("list", "watch", "deletecollection")
    return RequestFacts(
        verb="create" if subresource in _CONNECTING else verb,
        path=path,
        resource=resource,
        group=group,
        version=version,
        subresource=subresource,
        namespace=namespace,
        name=name,
        label_selector=values.get("labelSelector", "") if selecting else "",
        field_selector=field_selector if selecting else "",
        dry_run=_dry([value for key, value in parameters if key == "dryRun"]),
        command=tuple(value for key, value in parameters if key == "command") if subresource == "exec" else (),
        ports=_ports(parameters) if subresource == "portforward" else (),
        opaque=("what the proxied server answers",) if subresource == "proxy" else (),
    )


def _dry(values: object) -> bool:
    """Whether the server only tries it: it takes the word more than once, and no other."""
    return isinstance(values, list) and bool(values) and all(value == "All" for value in values)


def _ports(parameters: Iterable[tuple[str, str]]) -> tuple[int, ...]:
    ports = []
    for name, value in parameters:
        if name == "ports":
            for word in value.split(","):
                if not re.fullmatch(r"[0-9]{1,5}", word) or not 0 < int(word) < 65536:
                    raise _Unclear(f"`{word[:16]}` is no port")
                ports.append(int(word))
    return tuple(ports)


def _impersonated(head: Head) -> tuple[RequestFacts, ...]:
    """The identities that the request asks to act as (Kubernetes, "User impersonation")."""
    found = []

    def add(resource: str, name: str, group: str = "", namespace: str = "", subresource: str = "") -> None:
        path = f"impersonate {resource}/{name}"
        found.append(
            RequestFacts(
                verb="impersonate",
                path=path,
                resource=resource,
                group=group,
                version="v1",
                subresource=subresource,
                namespace=namespace,
                name=name,
            )
        )

    for header, raw in head.headers:
        if not header.startswith("impersonate-"):
            continue
        try:
            value = raw.encode("latin-1").decode("utf-8")
        except UnicodeError:
            raise _Unclear(f"`{header}` is no UTF-8") from None
        if header == "impersonate-user":
            account = value.split(":")
            if len(account) == 4 and account[:2] == ["system", "serviceaccount"]:
                add("serviceaccounts", account[3], namespace=account[2])
            else:
                add("users", value)
        elif header == "impersonate-group":
            add("groups", value)
        elif header == "impersonate-uid":
            add("uids", value, group="authentication.k8s.io")
        elif header.startswith("impersonate-extra-"):
            key = _decoded(header.removeprefix("impersonate-extra-"))
            add("userextras", value, group="authentication.k8s.io", subresource=key)
        else:
            raise _Unclear(f"`{header}` asks to act as somebody in a way that is not known")
    return tuple(found)


# --- the body ---------------------------------------------------------------------------------------------------------


def describe(request: Request, head: Head, body: bytes) -> Described:
    """The operation of a request whose body, if it is a judged one, is all there. Never raises for what a client
    sent."""
    if request.body is not Body.JUDGED and not request.unclassified:
        return Described(_bodiless(request, head.method), body, "")
    facts, unclassified = request.facts, request.unclassified
    content_type = (head.values("content-type") or ("",))[0]
    sent = body
    if not unclassified and request.body is Body.JUDGED and body:
        try:
            value, patch, content_type = _decode(facts, content_type, head, body)
            sent = _encode(value, patch)
            facts = _with_body(facts, value, patch)
        except _Unclear as unclear:
            unclassified, sent = str(unclear), b""
    elif request.body is Body.JUDGED and facts.verb in ("create", "update", "patch") and not unclassified:
        unclassified = f"there is no body to {facts.verb} with"
    return Described(_operation(facts, request, head.method, unclassified), sent, content_type)


def _bodiless(request: Request, method: str) -> Operation:
    """From the second time on the same operation, which then is ruled on and encoded once. Nothing is kept of what is
    asked once."""
    kept = _asked(request, method)
    if not kept:
        kept.append(None)
        return _operation(request.facts, request, method, "")
    if (again := kept[0]) is None:
        kept[0] = again = _operation(request.facts, request, method, "", once=False)
    return again


@lru_cache(maxsize=KNOWN)
def _asked(request: Request, method: str) -> list[Operation | None]:
    """Room for the operation of a request that was asked before."""
    return []


def _decode(facts: RequestFacts, content_type: str, head: Head, body: bytes) -> tuple[object, str, str]:
    """The decoded body, the kind of the patch, and the media type to send it under."""
    media, _, parameters = content_type.partition(";")
    media = media.strip().lower()
    patch = _PATCHES.get(media, "")
    if len(head.values("content-type")) > 1:
        raise _Unclear("there are two `Content-Type` headers")
    if head.values("content-encoding") not in ((), ("identity",)):
        raise _Unclear("the body is compressed; send it as it is")
    charset = parameters.replace(" ", "").lower()
    if charset not in ("", "charset=utf-8"):
        raise _Unclear(f"the body's `Content-Type` has parameters that are not read; {HINT_MEDIA}")
    if facts.verb == "patch" and not patch:
        raise _Unclear(f"a patch of type `{media[:64]}` is not read; send {', '.join(sorted(_PATCHES))}")
    if facts.verb != "patch" and media not in ("", "application/json", "application/yaml", _PROTOBUF):
        raise _Unclear(f"bodies of type `{media[:64]}` are not read for `{facts.verb}`; {HINT_MEDIA}")
    value: object
    try:
        value = read_protobuf(body) if media == _PROTOBUF else msgspec.json.decode(body)
    except ProtobufUnreadable as unreadable:
        raise _Unclear(f"the body is no protobuf that can be read: {unreadable}; {HINT_MEDIA}") from None
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        if media not in ("application/yaml", "application/apply-patch+yaml"):
            raise _Unclear(f"the body is no JSON that can be read: {_short(error)}") from None
        try:
            value = read_yaml(body)
        except YamlUnreadable as unreadable:
            raise _Unclear(f"the body is no YAML that can be read: {unreadable}") from None
    if not isinstance(value, list if patch == "json" else dict):
        raise _Unclear("the body is no JSON array of operations" if patch == "json" else "the body is no JSON object")
    if isinstance(value, list) and len(value) > MAX_PATCH:
        raise _Unclear(f"the patch has more than `{MAX_PATCH}` operations, which no server takes")
    return value, patch, media if patch else "application/json"


def _encode(value: object, patch: str) -> bytes:
    """JSON; for server-side apply, which is read as YAML, without the characters that only JSON takes for text."""
    try:
        encoded = msgspec.json.encode(value)
    except RecursionError as error:
        raise _Unclear(f"the body cannot be written anew: {_short(error)}") from None
    if patch == "apply":
        encoded = _FOLDED.sub(lambda match: b"\\u%04x" % ord(match[0].decode()), encoded)
    return encoded


def _short(error: Exception) -> str:
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]


def _with_body(facts: RequestFacts, value: object, patch: str) -> RequestFacts:
    name, dry_run = facts.name, facts.dry_run
    if isinstance(value, dict):
        metadata = value.get("metadata")
        if facts.verb == "create" and not name and isinstance(metadata, dict) and isinstance(metadata.get("name"), str):
            name = metadata["name"]
        if facts.verb in ("delete", "deletecollection"):
            # the server looks at the query only where there is no body
            dry_run = _dry(value.get("dryRun"))
    return RequestFacts(
        verb=facts.verb,
        path=facts.path,
        resource=facts.resource,
        group=facts.group,
        version=facts.version,
        subresource=facts.subresource,
        namespace=facts.namespace,
        name=name,
        label_selector=facts.label_selector,
        field_selector=facts.field_selector,
        dry_run=dry_run,
        command=facts.command,
        ports=facts.ports,
        body=value,
        patch=patch,
        opaque=facts.opaque,
    )


# --- for people -------------------------------------------------------------------------------------------------------


def _operation(
    facts: RequestFacts, request: Request, method: str, unclassified: str, *, once: bool = True
) -> Operation:
    text = tell(facts)
    if facts.subresource == "proxy" and request.target:
        # what a kubelet does for it, a command too, is in here alone
        text += f": {method} {scrubbed_words([request.target])[:MAX_RECORDED_TARGET]}"
    acting = " and ".join(f"{each.resource} {each.name}" for each in request.impersonated)
    if acting:
        text += f" as {acting}"
    recorded = text
    if facts.command:
        recorded = recorded.replace(_in_a_line(facts.command), _in_a_line([scrubbed_words(facts.command)]))
    if facts.subresource in STREAMING:
        parameters = _parameters(request.target.partition("?")[2])
        recorded += "".join(f" (in container {value})" for name, value in parameters if name == "container" and value)
    if facts.body is not None:
        shown = msgspec.json.encode(scrubbed(facts.resource, facts.body)).decode()
        recorded += f" {shown[:MAX_RECORDED_BODY]}" + (" …" if len(shown) > MAX_RECORDED_BODY else "")
    return Operation(
        protocol=PROTOCOL,
        kind=OperationKind.REQUEST,
        phase=Phase.EXECUTE,
        text=text,
        recorded_text=recorded,
        statements=(),
        unclassified=unclassified,
        once=once,
        requests=(facts, *request.impersonated),
    )


def _in_a_line(command: Sequence[str]) -> str:
    """A command as one line, whatever a word of it holds: more of them could say something else to who reads it."""
    return " ".join(command).translate(_LINES)


def told_inside(facts: RequestFacts) -> str:
    """What a person would call a connection inside a port-forward: `forward pods/web in shop to 5432`."""
    return tell(dataclasses.replace(facts, verb="forward", subresource=""))


def tell(facts: RequestFacts) -> str:
    """What a person would call it: `delete deployments.apps/web in shop`."""
    if not facts.resource:
        return f"{facts.verb} {facts.path}"
    whole = f"{facts.resource}.{facts.group}" if facts.group else facts.resource
    if facts.name:
        whole += f"/{facts.name}"
    if facts.subresource:
        whole += f" {facts.subresource}" if facts.name else f"/{facts.subresource}"
    text = f"{facts.verb} {whole}"
    if facts.namespace:
        text += f" in {facts.namespace}"
    if facts.label_selector:
        text += f" where {facts.label_selector}"
    if facts.field_selector:
        text += f" with {facts.field_selector}"
    if facts.ports:
        text += f" to {', '.join(map(str, facts.ports))}"
    if facts.command:
        text += f": {_in_a_line(facts.command)}"
        copies = told(facts.command)
        text += f" ({copies.translate(_LINES)})" if copies else ""
    return text + (" (dry run)" if facts.dry_run else "")
