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

Helm keeps its releases, with every value in them, in `Secret.data`: it does not work through a mask on those Secrets.

`hide` leaves objects out of lists, tables and watches. A request that names one is answered `Plan.not_found`.

Blind spots, for a policy to deny or to mask under their own names: what Pods write (logs, exec, `pods/proxy`); the same
value in another resource (the environment of a Deployment is in its ReplicaSets, Pods and ControllerRevisions; Events
quote); copies that other tools than kubectl keep in annotations; an aggregated API that shows built-in objects as
resources of its own; the `Warning` header; `resourceVersion`, counts and the `continue` token of a list, which holds
the name of the last object of the page, hidden or not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Final

import msgspec

from proxy.model import FieldMask, RequestFacts
from proxy.model.fields import STAR, FieldPath
from proxy.protocols.kubernetes.fields import MaskSet, Rule
from proxy.protocols.kubernetes.values import MAX_VALUE, Oversized, Values
from proxy.protocols.kubernetes.view import GONE, Members, Unmaskable, View, not_found

__all__ = ["Plan", "Redactor", "Transformer", "Unmaskable"]

MAX_WHOLE: Final = 16 * 1024 * 1024
"""Bytes of an answer that is decoded at once; a longer one is taken apart while it comes, object by object."""

_UNMASKABLE_SUBRESOURCES: Final = frozenset({"log", "exec", "attach", "portforward", "proxy"})

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

_VALID = msgspec.json.Decoder(msgspec.Raw)
_TEXT = msgspec.json.Decoder(str)
_encode = msgspec.json.Encoder().encode

_BRACKET, _CLOSING_BRACE, _CLOSING_BRACKET = b"[}]"

# --- a session's masks, and a request's -------------------------------------------------------------------------------


class Redactor:
    """All field masks of a session. Raises `BadFieldPath` for a path that is none."""

    def __init__(self, masks: Sequence[FieldMask]) -> None:
        self._masks = MaskSet(masks)

    def plan(self, facts: RequestFacts) -> Plan | None:
        """What the masks mean for a request; None when they mean nothing, so that its answer passes untouched.

        The proxy of anything but Pods and Services may lead to an API that shows objects of any kind: it gets a plan as
        soon as there is a mask."""
        if not self._masks or not facts.resource:
            return None
        asked = _asked(facts)
        rules = self._masks.rules(asked)
        if facts.subresource in _UNMASKABLE_SUBRESOURCES:
            if facts.subresource == "proxy" and (facts.group or facts.resource not in ("pods", "services")):
                return Plan(self._masks, facts, asked, rules)
            return Plan(self._masks, facts, asked, rules) if _hidden(rules, facts) else None
        return Plan(self._masks, facts, asked, rules) if rules else None


def _asked(facts: RequestFacts) -> frozenset[str]:
    """The names by which a mask can mean the resource of a request: with its subresource and without."""
    plain = f"{facts.resource}.{facts.group}" if facts.group else facts.resource
    return frozenset((plain, facts.target))


def _hidden(rules: Iterable[Rule], facts: RequestFacts) -> bool:
    """Whether a request names one object, which is there, and is hidden."""
    if not facts.name or facts.verb in ("list", "watch", "deletecollection"):
        return False
    if facts.verb == "create" and not facts.subresource:
        return False
    return any(rule.hides and rule.meets(facts.namespace, facts.name) for rule in rules)


class Plan:
    """What the masks mean for one request."""

    def __init__(self, masks: MaskSet, facts: RequestFacts, asked: frozenset[str], rules: tuple[Rule, ...]) -> None:
        self._masks = masks
        self._facts = facts
        self._asked = asked
        self._rules = rules
        self._tables = facts.subresource != "proxy" and all(
            rule.path is None or _unprinted(facts, rule.path) for rule in rules
        )

    @property
    def not_found(self) -> bytes | None:
        """The `Status` (404) to answer with in place of asking the server, when the request names a hidden object."""
        return not_found(self._facts) if _hidden(self._rules, self._facts) else None

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
        view = View(self._masks, self._facts, self._asked, status, self._tables)
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


# --- how an answer comes ----------------------------------------------------------------------------------------------


class Transformer:
    """One answer: `feed` it as it comes, then `finish`; what they return goes to the client.

    `masked` names the masks that met a value, and `objects` counts what was shown. Both methods may raise `Unmaskable`,
    also after bytes were returned: then the answer is to be cut off, so that the client sees that it is not whole."""

    def __init__(self, view: View, form: _Form) -> None:
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

    def __init__(self, view: View) -> None:
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


def _watch(view: View, values: Values) -> _Steps:
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


def _listed(view: View, values: Values) -> _Steps:
    """A list or a table, element by element; what stands before and behind the elements is kept."""
    out: list[bytes] = []
    members: Members = {}
    behind: Members = {}
    seen: set[str] = set()
    opened, size = False, 0
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
        size += len(key) + len(memoryview(raw))
        if size > MAX_VALUE:
            raise Oversized
        if opened:
            out += (b",", _encode(key), b":", bytes(raw))
            behind[key] = raw
        else:
            members[key] = raw
    yield from _mark(values, out, b"}")
    if "items" in seen and opened:
        view.ended(behind)
    out.append(b"}\n" if opened else _encode(view.answer(msgspec.Raw(_encode(members)))))
    while values.peek() < 0:
        yield b"".join(out)
        out.clear()
    raise Unmaskable("the server's answer goes on behind its end")


def _elements(values: Values, out: list[bytes], show: Callable[[msgspec.Raw], object]) -> _Steps:
    """An array, up to its end."""
    yield from _mark(values, out, b"[")
    first = shown_first = True
    mark = b""
    while (yield from _peek(values, out)) != _CLOSING_BRACKET:
        if not first:
            yield from _mark(values, out, b",")
        raw = _guessed(values, mark) if mark else None
        if raw is None:
            raw = yield from _next(values, out)
        if first:
            first = False
            mark = b"," + raw[: raw.find(b":") + 1] if raw[:2] == b'{"' else b""
        shown = show(msgspec.Raw(raw))
        if shown is not GONE:
            if not shown_first:
                out.append(b",")
            shown_first = False
            out.append(_encode(shown))
    yield from _mark(values, out, b"]")
    out.append(b"]")


def _guessed(values: Values, mark: bytes) -> bytes | None:
    """The next element, if the one behind it begins as the first one did. This is so in what an API server sends, and
    ten times faster than to look for the end."""
    raw = values.up_to(mark)
    if raw is None:
        return None
    try:
        _VALID.decode(raw)
    except msgspec.DecodeError:
        return None
    values.take(len(raw))
    return raw


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
