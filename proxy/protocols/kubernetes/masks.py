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

**How it comes.** Lists and tables are masked and sent on while they come, some objects at a time: nothing leaves that
was not read to the end of its object, and masked. A list that turns out to be broken, or has a member twice, is cut
off, so that the client sees a broken one. Everything else is masked when it is all there, and so is an answer that
could be something else than the list it looks like: where masks reach into a member `items`, or where the list says of
which kind it is behind objects that do not say of which they are.

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
from typing import Final, cast

import msgspec

from proxy.model import FieldMask, RequestFacts
from proxy.model.fields import STAR, FieldPath
from proxy.protocols.kubernetes.fields import MaskSet, Rule
from proxy.protocols.kubernetes.values import MAX_VALUE, Oversized, Values
from proxy.protocols.kubernetes.view import GONE, Indivisible, Members, Unmaskable, View, is_plural, not_found

__all__ = ["Plan", "Redactor", "Transformer", "Unmaskable"]

MAX_SHORT: Final = 64 * 1024
"""Bytes of an answer that is masked when it is all there, whatever it is."""
MAX_WHOLE: Final = 16 * 1024 * 1024
"""The same of one that is no list, or does not say so in time."""
MAX_GUESSES: Final = 4
"""How often an end of an object is guessed at before it is looked for."""
MAX_MISSES: Final = 64
"""Wrong guesses in one list: then there are no more."""
_SLICE: Final = 128 * 1024
"""Bytes that are looked at in one go."""

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
_OBJECTS = msgspec.json.Decoder(list[dict[str, msgspec.Raw]])
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
            return Transformer(view, _Stream(_watch(view, values := Values()), values) if watching else _Body(view))
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

    __slots__ = ("_form", "_view")

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
            return self._form.feed(data)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            raise Unmaskable("the server's answer is no JSON that can be read, so it cannot be masked") from None
        except RecursionError:
            raise Unmaskable("the server's answer is nested too deeply to be masked") from None
        except Oversized:
            raise Unmaskable(f"an object of the server's answer has more than `{MAX_VALUE}` bytes") from None


class _Body:
    """One object, list or failure. A list of more than `MAX_SHORT` bytes is masked while it comes, if it can be;
    everything else when it is all there."""

    __slots__ = ("_begun", "_kept", "_parts", "_size", "_view", "_whole")

    def __init__(self, view: View) -> None:
        self._view = view
        self._kept: list[bytes] = []
        self._size = 0
        self._parts: _Stream | None = None
        self._whole = not view.divisible()
        self._begun = False

    def feed(self, data: bytes) -> bytes:
        if self._begun and self._parts is not None:
            return self._in_parts(self._parts, data)
        self._kept.append(bytes(data))
        self._size += len(data)
        if not self._whole and self._size > MAX_SHORT:
            if self._parts is None:
                values = Values()
                self._parts = _Stream(_listed(self._view, values), values)
                data = b"".join(self._kept)
            if shown := self._in_parts(self._parts, data):
                return shown
        if self._size > MAX_WHOLE:
            raise Unmaskable(f"an answer of more than `{MAX_WHOLE}` bytes does not say at once that it is a list")
        return b""

    def finish(self) -> bytes:
        if self._parts is not None and not self._whole:
            shown = self._in_parts(self._parts, None)
            if not self._whole:
                return shown
        body = b"".join(self._kept)
        self._kept.clear()
        return _encode(self._view.answer(msgspec.Raw(body.strip()))) + b"\n" if body else b""

    def _in_parts(self, parts: _Stream, data: bytes | None) -> bytes:
        try:
            shown = parts.finish() if data is None else parts.feed(data)
        except Indivisible:
            if self._begun:
                raise Unmaskable("some objects of the list do not say of which kind they are") from None
            self._whole = True
            self._view.forget()
            return b""
        if shown and not self._begun:
            self._begun = True
            self._kept.clear()
        return shown


_Steps = Generator[bytes, None, None]


class _Stream:
    """Taken apart by a generator that is resumed when there is more: it yields what to send."""

    __slots__ = ("_steps", "_values")

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
    """Events, one behind the other. Between them, perhaps for hours, it holds nothing of them."""
    out: list[bytes] = []
    while True:
        while _shown_event(view, values, out):
            pass
        if values.ended and values.peek() >= 0:
            raise Unmaskable("the watch ended inside an event")
        yield _taken(out)


def _shown_event(view: View, values: Values, out: list[bytes]) -> bool:
    """Whether there was one."""
    raw = values.value()
    if raw is None:
        return False
    shown = view.event(msgspec.Raw(raw))
    if shown is not GONE:
        out += (_encode(shown), b"\n")
    return True


def _listed(view: View, values: Values) -> _Steps:
    """A list or a table, some elements at a time; what stands before and behind the elements is kept. Raises
    `Indivisible`, perhaps after something was yielded."""
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
        if not opened and key in ("items", "rows") and (yield from _peek(values, out)) == _BRACKET:
            opened = True
            yield from _elements(values, out, _encode({**members, key: []})[:-2], view.parts(key, members))
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
            if not is_plural(members):
                raise Indivisible
    yield from _mark(values, out, b"}")
    if not opened:
        raise Indivisible
    if "items" in seen:
        view.ended(behind)
    out.append(b"}\n")
    while values.peek() < 0:
        yield _taken(out)
    raise Unmaskable("the server's answer goes on behind its end")


def _elements(values: Values, out: list[bytes], head: bytes, show: Callable[[list[Members]], list[object]]) -> _Steps:
    """An array of objects, up to its end, behind `head`, which waits until the first of them could be shown."""
    yield from _mark(values, out, b"[")
    first = shown_first = True
    mark = b""
    misses = 0
    while (yield from _peek(values, out)) != _CLOSING_BRACKET:
        if not first:
            yield from _mark(values, out, b",")
        several: list[Members] | None = None
        while mark and misses < MAX_MISSES and not values.ended:
            several, wrong = _several(values, mark)
            if several is None and not wrong and values.unread < _SLICE:
                yield _flushed(values, out)
                continue
            misses += wrong or several is None
            break
        if several is None:
            raw = yield from _next(values, out)
            several = _objects(raw)
            if first:
                mark = b"," + raw[: raw.find(b":") + 1] if raw[:2] == b'{"' else b""
        shown = show(several)
        if first:
            out.append(head)
            first = False
        if shown:
            if not shown_first:
                out.append(b",")
            shown_first = False
            out.append(_encode(shown)[1:-1])
    yield from _mark(values, out, b"]")
    out.append(head + b"]" if first else b"]")


def _several(values: Values, mark: bytes) -> tuple[list[Members] | None, int]:
    """The next elements, as many as are there, if the one behind them begins as the first one did; and how often what
    looks like the end of one was none. What is read from the beginning of an element as elements and commas is so,
    whatever comes behind it. An API server's objects begin alike, and this is fifty times faster than to look for the
    end of each."""
    misses = 0
    end = _SLICE
    while misses < MAX_GUESSES and (raw := values.up_to_last(mark, end)) is not None:
        try:
            several = _objects(raw)
        except msgspec.DecodeError:
            misses += 1
            end = len(raw)
            continue
        values.take(len(raw))
        return several, 0
    return None, misses


def _objects(raw: bytes) -> list[Members]:
    """The members of objects with commas between them. Raises `DecodeError`."""
    return cast("list[Members]", _OBJECTS.decode(b"[%b]" % raw))


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
    return _taken(out)


def _taken(out: list[bytes]) -> bytes:
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


_Form = _Body | _Stream | _Withheld | _Empty
