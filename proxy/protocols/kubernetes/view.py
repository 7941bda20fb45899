"""One answer of an API server, read through masks: lists, tables, events, objects and failures, each by its kind.

Nothing is decoded that is not on the way to a masked field: what is decoded is a `dict` of members, what is not is
`msgspec.Raw`, and passes as it came.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Literal, cast

import msgspec

from proxy.model import RequestFacts
from proxy.model.fields import STAR
from proxy.protocols.kubernetes.fields import LAST_APPLIED, Leaf, MaskSet, Node, Tree

REDACTED: Final = "***"

_EVENTS_END: Final = "k8s.io/initial-events-end"
"""What says that the objects of a watch list are all there: no value of anybody's."""

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
_WORD: Final = re.compile(r"[A-Za-z]{0,64}")
_MAX_FIELDS: Final = 64

_OBJECT = msgspec.json.Decoder(dict[str, msgspec.Raw])
_LIST = msgspec.json.Decoder(list[msgspec.Raw])
_OBJECTS = msgspec.json.Decoder(list[dict[str, msgspec.Raw]])
_TEXT = msgspec.json.Decoder(str)
_TEXTS = msgspec.json.Decoder(list[str | None])
_TEXT_MAPS = msgspec.json.Decoder(list[dict[str, str | None]])
_OBJECT_LISTS = msgspec.json.Decoder(list[list[dict[str, msgspec.Raw]]])
encode = msgspec.json.Encoder().encode

_BRACE, _BRACKET, _QUOTE, _NULL = b'{["n'

Members = dict[str, object]
"""An object that is decoded as far as a mask reaches into it: the rest is `msgspec.Raw`."""


class Unmaskable(Exception):
    """The answer cannot be shown masked; the message says why, for the client, in place of the answer."""


class Indivisible(Exception):
    """The answer can only be masked when it is all there."""


class Gone(enum.Enum):
    """In the place of a value or an object: it is not to be shown at all."""

    GONE = "gone"


GONE: Final = Gone.GONE


def not_found(facts: RequestFacts) -> bytes:
    """The `Status` of an object that is not there, as the server words it."""
    qualified = f"{facts.resource}.{facts.group}" if facts.group else facts.resource
    details = {"name": facts.name, "group": facts.group, "kind": facts.resource}
    return encode(
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


class View:
    """The masks as one answer is read through them, and what they did."""

    __slots__ = ("_asked", "_facts", "_hides", "_inside", "_masks", "_status", "_tables", "masked", "objects")

    def __init__(self, masks: MaskSet, facts: RequestFacts, asked: frozenset[str], status: int, tables: bool) -> None:
        self._masks = masks
        self._facts = facts
        self._asked = asked
        self._status = status
        self._tables = tables
        rules = masks.rules(asked)
        self._hides = any(rule.hides for rule in rules)
        self._inside = any(rule.path is not None and rule.path.steps[0] in ("items", STAR) for rule in rules)
        """Whether masks reach into members of that name, of what is no list."""
        self.objects = 0
        self.masked: set[str] = set()

    # answers, by their kind

    def answer(self, raw: msgspec.Raw) -> object:
        """What the whole body of an answer is to be replaced by."""
        members = self._members(raw)
        shown = self.root(members, raw)
        return msgspec.Raw(not_found(self._facts)) if shown is GONE else shown

    def event(self, raw: msgspec.Raw) -> object:
        """What an event of a watch becomes; GONE when nothing may be said."""
        members = self._members(raw)
        inner = members.get("object")
        if inner is None and _text(members.get("kind")) == "Status":
            return self.root(members, raw)
        if not _is_object(inner):
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
            if _starts(items, _BRACKET):
                members["items"] = self._objects(_objects(items), (api_version, kind.removesuffix("List")))
            return members
        return self._object(members, raw, self._facts.name)

    def _row(self, members: Members) -> object:
        if not self._tables:
            raise Unmaskable("the server answers with a table, whose cells may show what is masked")
        inner = members.get("object")
        if not _is_object(inner):
            if self._hides:
                raise Unmaskable(
                    "rows of the table do not say which object they show; ask without `includeObject=None`"
                )
            self.objects += 1
            return members
        shown = self._object(self._members(inner), inner, "")
        if shown is GONE:
            return GONE
        members["object"] = shown
        return members

    def _table(self, members: Members) -> object:
        rows = members.get("rows")
        if not _starts(rows, _BRACKET):
            return members
        before = _objects(rows)
        after = [shown for row in before if (shown := self._row(row)) is not GONE]
        members["rows"] = after
        columns = members.get("columnDefinitions")
        if before and not after and self._facts.verb == "watch" and (not _starts(columns, _BRACKET)):
            return GONE
        return members

    # answers in parts

    def divisible(self) -> bool:
        """Whether the answer may be a list, as far as the request and the status tell."""
        return self._facts.verb in ("list", "deletecollection") and self._status < 400 and not self._inside

    def parts(self, key: str, head: Members) -> Callable[[list[Members]], list[object]]:
        """What to do with some elements of the array `key` of an answer that comes in parts; `head` came before it.

        Built-in lists and tables say first what they are. A list of custom resources says its kind behind its items,
        which say their own: then each of them has to. Raises `Indivisible` where neither is so."""
        kind, api_version = _text(head.get("kind")), _text(head.get("apiVersion"))
        if key == "rows" and kind == "Table" and api_version.startswith("meta.k8s.io/"):
            return lambda rows: [shown for row in rows if (shown := self._row(row)) is not GONE]
        if key == "items" and _is_list(kind, {**head, key: None}):
            if kind and api_version:
                return lambda items: self._objects(items, (api_version, kind.removesuffix("List")))
            if "kind" not in head:
                return self._telling_items
        raise Indivisible

    def _telling_items(self, items: list[Members]) -> list[object]:
        if not all(_text(item.get("kind")) and _text(item.get("apiVersion")) for item in items):
            raise Indivisible
        return self._objects(items, ("", ""))

    def forget(self) -> None:
        """What was seen in parts is seen once more."""
        self.objects = 0
        self.masked.clear()

    def ended(self, members: Members) -> None:
        """What came behind the elements does not say that it was no list. Raises `Unmaskable`."""
        if not _is_list(_text(members.get("kind")), {**members, "items": None}):
            raise Unmaskable("an answer that began as a list turned out to be something else")

    # objects

    def _object(self, members: Members, raw: object, name: str) -> object:
        """The object masked, the bytes that it came in where no mask holds for it, or GONE."""
        tree = self._tree(members, ("", ""), name)
        if tree is GONE:
            return GONE
        self.objects += 1
        if tree is None:
            return raw
        self._mask([members], tree)
        return members

    def _objects(self, items: list[Members], default: tuple[str, str]) -> list[object]:
        """Those of a list. `default` is the version and kind of an object that does not say them."""
        shown: list[object] = []
        masked: dict[Tree, list[Members]] = {}
        for item in items:
            tree = self._tree(item, default, "")
            if tree is GONE:
                continue
            shown.append(item)
            if tree is not None:
                masked.setdefault(tree, []).append(item)
        self.objects += len(shown)
        for tree, objects in masked.items():
            self._mask(objects, tree)
        return shown

    def _tree(self, members: Members, default: tuple[str, str], name: str) -> Tree | Literal[Gone.GONE] | None:
        """The masks that hold for an object; None where there are none, and GONE where it is hidden."""
        api_version = _text(members["apiVersion"]) if "apiVersion" in members else default[0]
        kind = _text(members["kind"]) if "kind" in members else default[1]
        verdict = self._masks.verdict(self._asked, api_version or default[0], kind or default[1])
        if verdict.tree is not None or not verdict.rules:
            return verdict.tree
        metadata = members.get("metadata")
        known = self._members(metadata) if _is_object(metadata) else {}
        name = _text(known.get("name")) or name
        namespace = _text(known.get("namespace")) or self._facts.namespace
        if kind == "Namespace" or "namespaces" in self._asked:
            namespace = name
        rules = [rule for rule in verdict.rules if rule.meets(namespace, name)]
        if any(rule.hides for rule in rules):
            return GONE
        return self._masks.tree(rules, verdict.resources) if rules else None

    def _mask(self, objects: list[Members], tree: Tree) -> None:
        settled = [
            annotations
            for members in objects
            if _is_object(metadata := members.get("metadata"))
            and (annotations := self._settle(members, bytes(_raw(metadata)), tree))
        ]
        self._walk(objects, tree.root)
        for annotations in settled:
            for key, value in annotations.items():
                if isinstance(value, _Settled):
                    annotations[key] = value.text

    def _settle(self, members: Members, raw: bytes, tree: Tree) -> Members:
        """Deals with what `metadata` holds besides plain values: copies of the object, names of its fields. Returns the
        annotations, if they had to be decoded."""
        quoted = tree.quoted(raw)
        if not quoted and not _mentions(raw):
            return {}
        metadata = members["metadata"] = self._members(raw)
        if quoted:
            metadata.pop("managedFields", None)
        if not _is_object(metadata.get("annotations")):
            return {}
        metadata["annotations"] = annotations = self._members(metadata["annotations"])
        if LAST_APPLIED in annotations and not tree.names_last_applied:
            annotations[LAST_APPLIED] = _Settled(self._last_applied(annotations[LAST_APPLIED], tree))
        if _text(annotations.get(_EVENTS_END)) == "true":
            annotations[_EVENTS_END] = _Settled("true")
        return annotations

    def _last_applied(self, raw: object, tree: Tree) -> str:
        """The annotation's text, masked inside."""
        try:
            members = self._members(_text(raw).encode())
            if _is_object(metadata := members.get("metadata")):
                members["metadata"] = inner = self._members(metadata)
                if _is_object(annotations := inner.get("annotations")):
                    inner["annotations"] = deeper = self._members(annotations)
                    deeper.pop(LAST_APPLIED, None)
            self._walk([members], tree.root)
            return encode(members).decode() + "\n"
        except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError, Unmaskable):
            return REDACTED

    def _walk(self, objects: Sequence[Members], node: Node) -> None:
        """Masks what the node says inside of objects. What is in the same place of many is decoded together: that takes
        as long as to decode one."""
        if node.other is None:
            for key, below in node.members.items():
                holding = [each for each in objects if key in each]
                _put(holding, key, self._below([each[key] for each in holding], below))
            return
        for each in objects:
            for key in list(each):
                _put([each], key, self._below([each[key]], node.members.get(key) or node.other))

    def _below(self, values: list[object], node: Node) -> Sequence[object]:
        """What values become, all of them in the place that the node stands for."""
        if node.leaves:
            return self._ends(values, node.leaves)
        try:
            if node.other is None:
                objects = _objects(encode(values))
                self._walk(objects, node)
                return objects
            if not node.members and node.other.leaves:
                maps = _TEXT_MAPS.decode(encode(values))
                texts = iter(self._texts([text for each in maps for text in each.values()], node.other.leaves))
                return [dict(zip(each, texts, strict=False)) for each in maps]
            if not node.members:
                lists = cast("list[list[Members]]", _OBJECT_LISTS.decode(encode(values)))
                self._walk([each for objects in lists for each in objects], node.other)
                return lists
        except (msgspec.ValidationError, TypeError):
            # they are not all alike, or partly settled
            pass
        return [self._one_below(value, node) for value in values]

    def _one_below(self, value: object, node: Node) -> object:
        if isinstance(value, _Settled):
            return value
        if isinstance(value, dict):
            members: Members = value
        else:
            first = memoryview(_raw(value))[0]
            if first == _BRACKET and node.other is not None:
                shown = self._below(cast("list[object]", _LIST.decode(_raw(value))), node.other)
                return [each for each in shown if each is not GONE]
            if first != _BRACE:
                return value
            members = self._members(value)
        self._walk([members], node)
        return members

    def _ends(self, values: list[object], leaves: tuple[Leaf, ...]) -> Sequence[object]:
        """Masked values, at the end of a path."""
        try:
            return self._texts(_TEXTS.decode(encode(values)), leaves)
        except (msgspec.ValidationError, TypeError):
            return [self._end(value, leaves) for value in values]

    def _end(self, value: object, leaves: tuple[Leaf, ...]) -> object:
        if isinstance(value, _Settled):
            return value
        first = _BRACE if isinstance(value, dict) else memoryview(_raw(value))[0]
        if first in (_QUOTE, _NULL):
            return self._texts([_TEXT.decode(_raw(value)) if first == _QUOTE else None], leaves)[0]
        self._met(leaves)
        return GONE

    def _texts(self, texts: list[str | None], leaves: tuple[Leaf, ...]) -> list[str | None]:
        if texts.count(None) < len(texts):
            self._met(leaves)
            for leaf in leaves:
                texts = leaf.masked(texts)
        return texts

    def _met(self, leaves: tuple[Leaf, ...]) -> None:
        self.masked.update([leaf.title for leaf in leaves])

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
        if not _is_object(raw):
            return {}, []
        members = self._members(raw)
        shown: Members = {
            key: members[key] for key in ("name", "group", "kind", "uid", "retryAfterSeconds") if key in members
        }
        fields: list[str] = []
        causes = members.get("causes")
        if _starts(causes, _BRACKET):
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
        if not _is_object(raw):
            raise Unmaskable("the server's answer holds something else where an object is expected")
        return cast(Members, _OBJECT.decode(_raw(raw)))


def _put(objects: Iterable[Members], key: str, values: Iterable[object]) -> None:
    """Gives each of the objects its value; GONE takes the member away."""
    for each, value in zip(objects, values, strict=True):
        if value is GONE:
            del each[key]
        else:
            each[key] = value


class _Settled:
    """A string that no mask is to change any more."""

    __slots__ = ("text",)

    def __init__(self, text: str) -> None:
        self.text = text


def is_plural(head: Members) -> bool:
    """Whether the first members of an answer leave it open that it is a list or a table."""
    kind = _text(head.get("kind"))
    return "kind" not in head or kind.endswith("List") or kind == "Table"


def _is_list(kind: str, members: Members) -> bool:
    """A list has items and no name of its own."""
    if "items" not in members or (kind and not kind.endswith("List")):
        return False
    metadata = members.get("metadata")
    return not _is_object(metadata) or not _text(_OBJECT.decode(_raw(metadata)).get("name"))


def _raw(value: object) -> bytes:
    """Undecoded JSON is `bytes`, or `Raw`, which msgspec's stubs take for a kind of them."""
    return cast(bytes, value)


def _objects(raw: object) -> list[Members]:
    """The objects of an array of nothing else."""
    return cast("list[Members]", _OBJECTS.decode(_raw(raw)))


def _starts(value: object, first: int) -> bool:
    """Whether a member is there and is undecoded JSON of the type that starts so."""
    if value is None:
        return False
    view = memoryview(_raw(value))
    return len(view) > 0 and view[0] == first


def _is_object(value: object) -> bool:
    return _starts(value, _BRACE)


def _text(value: object) -> str:
    """The string that undecoded JSON is; empty when it is something else or not there."""
    return _TEXT.decode(_raw(value)) if _starts(value, _QUOTE) else ""


def _mentions(metadata: bytes) -> bool:
    """Whether there could be annotations that are no values like others, however their names are escaped."""
    return b"last-applied-configuration" in metadata or b"initial-events-end" in metadata or b"\\u" in metadata
