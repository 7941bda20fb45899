"""Reads the protobuf that typed clients send (kubectl's `create` and `run`, controllers) as the JSON that it stands
for.

`kinds.json`, which `scripts/generate-kubernetes-kinds` makes from client-go's own types, tells how the built-in kinds
are laid out in both. The result is judged, and sent on in place of the protobuf, so a mistake of ours cannot make the
server see something else than the policy did.

    "k8s\\0" Unknown{1: TypeMeta{1: apiVersion, 2: kind}, 2: raw, 3: contentEncoding, 4: contentType}

Kinds and fields that the table does not have are refused: a client that is newer than the table has to send JSON.
"""

from __future__ import annotations

import base64
import datetime
import struct
from collections.abc import Iterator
from functools import cache
from importlib import resources
from typing import Final

import msgspec

MAGIC: Final = b"k8s\0"
MAX_DEPTH = 64
MAX_FIELDS = 200_000
"""Fields in one body, at most; an object has some hundred. Everybody else waits while they are read."""

_REPEATED, _MAPPED, _INLINE, _OMITTED = 1, 2, 4, 8
_VARINT, _FIXED64, _BYTES = 0, 1, 2
_WIRE = {"bool": _VARINT, "int": _VARINT, "float": _FIXED64}
_ZERO: dict[str, object] = {"string": "", "bytes": "", "bool": False, "int": 0, "float": 0.0, "time": None}

# read while it may still be: a worker gives up the right to read files before the first client comes
_TABLE: Final = resources.files(__package__).joinpath("kinds.json").read_bytes()


class ProtobufUnreadable(Exception):
    """The body is not read; the message says why."""


class _Field(msgspec.Struct, frozen=True, array_like=True):
    number: int
    name: str
    kind: str
    type: int
    flags: int


class _Kinds(msgspec.Struct, frozen=True):
    kinds: dict[str, int]
    types: tuple[tuple[_Field, ...], ...]


@cache
def _kinds() -> tuple[dict[str, int], tuple[dict[int, _Field], ...]]:
    table = msgspec.json.decode(_TABLE, type=_Kinds)
    return table.kinds, tuple({field.number: field for field in fields} for fields in table.types)


def read_protobuf(body: bytes) -> dict[str, object]:
    """The object in `body`, as JSON has it. Raises `ProtobufUnreadable`."""
    return _Reader().envelope(body, 0)


class _Reader:
    def __init__(self) -> None:
        self._left = MAX_FIELDS

    def envelope(self, body: bytes, depth: int) -> dict[str, object]:
        if not body.startswith(MAGIC):
            raise ProtobufUnreadable("it does not start as Kubernetes' protobuf does")
        parts: dict[int, bytes] = {}
        for number, wire, value in self._fields(memoryview(body)[len(MAGIC) :]):
            if wire != _BYTES or not isinstance(value, memoryview) or number not in (1, 2, 3, 4) or number in parts:
                raise ProtobufUnreadable("its envelope has a field that is not known")
            parts[number] = bytes(value)
        if parts.get(3) or parts.get(4, b"") not in (b"", b"application/vnd.kubernetes.protobuf"):
            raise ProtobufUnreadable("its envelope holds another encoding")
        meta = {1: "", 2: ""}
        for number, wire, value in self._fields(memoryview(parts.get(1, b""))):
            if wire != _BYTES or not isinstance(value, memoryview) or number not in meta:
                raise ProtobufUnreadable("its type is not told as it should be")
            meta[number] = _text(value)
        kinds, _ = _kinds()
        found = kinds.get(f"{meta[1]}/{meta[2]}")
        if found is None:
            raise ProtobufUnreadable(f"the kind `{meta[1][:64]}/{meta[2][:64]}` is none of those that are known")
        message = self._message(memoryview(parts.get(2, b"")), found, depth)
        return {"apiVersion": meta[1], "kind": meta[2], **message}

    def _message(self, data: memoryview, index: int, depth: int) -> dict[str, object]:
        if depth > MAX_DEPTH:
            raise ProtobufUnreadable("it is nested too deeply")
        fields = _kinds()[1][index]
        found: dict[str, object] = {}
        for number, wire, value in self._fields(data):
            field = fields.get(number)
            if field is None:
                raise ProtobufUnreadable(
                    f"it has the field `{number}`, which is not known; the client is newer than we are"
                )
            self._put(found, field, wire, value, depth)
        return found

    def _put(self, found: dict[str, object], field: _Field, wire: int, value: int | memoryview, depth: int) -> None:
        if field.flags & _MAPPED:
            key, inner = self._entry(field, wire, value, depth)
            mapping = found.setdefault(field.name, {})
            assert isinstance(mapping, dict)
            mapping[key] = inner
        elif field.flags & _REPEATED:
            sequence = found.setdefault(field.name, [])
            assert isinstance(sequence, list)
            if wire == _BYTES and field.kind in _WIRE and isinstance(value, memoryview):
                sequence += self._packed(field, value)
            else:
                sequence.append(self._value(field, wire, value, depth))
        else:
            inner = self._value(field, wire, value, depth)
            if field.flags & _INLINE:
                if not isinstance(inner, dict):
                    raise ProtobufUnreadable("an inlined field is no message")
                found.update(inner)
            elif not (field.flags & _OMITTED and field.kind in _ZERO and inner == _ZERO[field.kind]):
                found[field.name] = inner
            else:
                found.pop(field.name, None)

    def _entry(self, field: _Field, wire: int, value: int | memoryview, depth: int) -> tuple[str, object]:
        if wire != _BYTES or not isinstance(value, memoryview):
            raise ProtobufUnreadable(f"`{field.name}` is not encoded as it should be")
        key, inner = "", self._nothing(field, depth)
        for number, each, part in self._fields(value):
            if number == 1 and isinstance(part, memoryview):
                key = _text(part)
            elif number == 2:
                inner = self._value(field, each, part, depth)
            else:
                raise ProtobufUnreadable(f"`{field.name}` has an entry that is not encoded as it should be")
        return key, inner

    def _nothing(self, field: _Field, depth: int) -> object:
        if field.kind in _ZERO:
            return _ZERO[field.kind]
        return self._value(field, _BYTES, memoryview(b""), depth)

    def _packed(self, field: _Field, data: memoryview) -> list[object]:
        values: list[object] = []
        at = 0
        while at < len(data):
            if field.kind == "float":
                part, at = data[at : at + 8], at + 8
                values.append(_float(part))
            else:
                number, at = _varint(data, at)
                values.append(_scalar(field.kind, number))
        return values

    def _value(self, field: _Field, wire: int, value: int | memoryview, depth: int) -> object:
        kind = field.kind
        if wire != _WIRE.get(kind, _BYTES):
            raise ProtobufUnreadable(f"`{field.name}` is not encoded as it should be")
        if isinstance(value, int):
            return _scalar(kind, value)
        match kind:
            case "string":
                return _text(value)
            case "bytes":
                return base64.b64encode(value).decode()
            case "float":
                return _float(value)
            case "message":
                return self._message(value, field.type, depth + 1)
            case "strings":
                return [_text(part) for number, part in self._parts(value) if _only(number, 1)]
            case "quantity":
                return "".join([_text(part) for number, part in self._parts(value) if _only(number, 1)][-1:]) or "0"
            case "raw":
                return self._raw(value, depth)
        numbers = {number: part for number, _, part in self._fields(value)}
        match kind:
            case "time" | "microtime":
                return _time(kind, numbers)
            case "duration":
                return f"{_signed(_int(numbers.get(1, 0)))}ns"
            case "intorstring":
                text = numbers.get(3, b"")
                if _int(numbers.get(1, 0)):
                    return _text(text) if isinstance(text, memoryview) else ""
                return _signed(_int(numbers.get(2, 0)))
        raise ProtobufUnreadable(f"`{field.name}` is of a kind that is not known")

    def _raw(self, value: memoryview, depth: int) -> object:
        raw = b"".join([bytes(part) for number, part in self._parts(value) if _only(number, 1)][-1:])
        if not raw:
            return None
        if raw.startswith(MAGIC):
            if depth > MAX_DEPTH:
                raise ProtobufUnreadable("it is nested too deeply")
            return self.envelope(raw, depth + 1)
        try:
            decoded: object = msgspec.json.decode(raw)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise ProtobufUnreadable("what is embedded in it is no JSON that can be read") from None
        return decoded

    def _parts(self, data: memoryview) -> Iterator[tuple[int, memoryview]]:
        for number, _, value in self._fields(data):
            if isinstance(value, int):
                raise ProtobufUnreadable("a text is not encoded as it should be")
            yield number, value

    def _fields(self, data: memoryview) -> Iterator[tuple[int, int, int | memoryview]]:
        """Number, wire type and value of each field; 64-bit values are given as their bytes."""
        at, end = 0, len(data)
        while at < end:
            self._left -= 1
            if self._left < 0:
                raise ProtobufUnreadable(f"it has more than `{MAX_FIELDS}` fields")
            key, at = _varint(data, at)
            number, wire = key >> 3, key & 7
            match wire:
                case 0:
                    value, at = _varint(data, at)
                    yield number, wire, value
                    continue
                case 1:
                    size = 8
                case 2:
                    size, at = _varint(data, at)
                case 5:
                    size = 4
                case _:
                    raise ProtobufUnreadable("it has a group, or what is no field at all")
            if number == 0 or at + size > end:
                raise ProtobufUnreadable("it ends in the middle of a field")
            yield number, wire, data[at : at + size]
            at += size


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if at >= len(data) or shift > 63:
            raise ProtobufUnreadable("a number in it does not end")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & 0xFFFF_FFFF_FFFF_FFFF, at
        shift += 7


def _scalar(kind: str, value: int) -> object:
    return value != 0 if kind == "bool" else _signed(value)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _int(value: int | memoryview) -> int:
    if not isinstance(value, int):
        raise ProtobufUnreadable("a number is not encoded as it should be")
    return value


def _float(value: memoryview) -> float:
    if len(value) != 8:
        raise ProtobufUnreadable("a number is not encoded as it should be")
    (number,) = struct.unpack("<d", value)
    if number != number or number in (float("inf"), float("-inf")):
        raise ProtobufUnreadable("it has a number that JSON does not have")
    return float(number)


def _text(value: memoryview) -> str:
    try:
        return str(value, "utf-8")
    except UnicodeDecodeError:
        raise ProtobufUnreadable("a text in it is no UTF-8") from None


def _only(number: int, wanted: int) -> bool:
    if number != wanted:
        raise ProtobufUnreadable(f"it has the field `{number}`, which is not known; the client is newer than we are")
    return True


def _time(kind: str, numbers: dict[int, int | memoryview]) -> str | None:
    """RFC 3339, as metav1.Time and MicroTime are written. An empty message is no time at all."""
    if not numbers:
        return None
    seconds, nanos = _signed(_int(numbers.get(1, 0))), _signed(_int(numbers.get(2, 0)))
    try:
        at = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(seconds=seconds)
    except OverflowError:
        raise ProtobufUnreadable("it has a time that no calendar has") from None
    fraction = f".{nanos // 1000 % 1_000_000:06d}" if kind == "microtime" else ""
    return f"{at:%Y-%m-%dT%H:%M:%S}{fraction}Z"
