"""Paths to fields of a Kubernetes object, and what a body says at them.

A path is written `spec.containers[*].image`: keys with dots between them, `*` for any key, `[*]` for any element of a
list, and `["example.com/x"]` for a key with a dot or another odd character.

    places     what an object, or a patch that looks like one, has at a path
    patched    what the operations of a JSON patch (RFC 6902) put there

A patch shows parts. What it leaves alone is no place. Where it may make something anew (an element of a list, an entry
of a map, a map that a directive empties), what is missing counts as absent. Directives of strategic merge patches
(`$patch`, `$retainKeys`, …) take away and never put a value in: next to them what is missing is absent, and behind
`$patch` what is there may be absent too; `$setElementOrder` changes nothing but order.

Blind spot: a resource may have its fields elsewhere in another version of its group.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator

from proxy.policy.names import BadName


class Step(enum.Enum):
    """A part of a path that is no key."""

    ANY_KEY = "*"
    ANY_ITEM = "[*]"


class Unseen(enum.Enum):
    """What stands for a value that cannot be shown: there is none, or it cannot be told which."""

    ABSENT = "absent"
    UNTOLD = "untold"


FieldPath = tuple[str | Step, ...]

_PART = re.compile(r'(?P<item>\[\*\])|\["(?P<quoted>[^"\\]+)"\]|(?P<dot>\.?)(?:(?P<any>\*)|(?P<key>[A-Za-z0-9_$-]+))')
_HARMLESS_DIRECTIVE = "$setElementOrder/"


def parse_field(text: str) -> FieldPath:
    """Raises `BadName`."""
    path: list[str | Step] = []
    at = 0
    while at < len(text):
        match = _PART.match(text, at)
        if match is None or (match["dot"] is not None and bool(match["dot"]) is not bool(path)):
            raise BadName(f'`{text}` is not a field: wants the form `spec.containers[*].image`, `a["odd.key"]`')
        if match["item"]:
            path.append(Step.ANY_ITEM)
        elif match["any"]:
            path.append(Step.ANY_KEY)
        else:
            path.append(match["quoted"] or match["key"])
        at = match.end()
    if not path or path[0] is Step.ANY_ITEM:
        raise BadName(f"`{text}` is not a field of an object")
    return tuple(path)


def overlap(one: FieldPath, other: FieldPath) -> bool:
    """Whether one could lead to what the other leads to, or into it, or past it."""
    return all(a == b or isinstance(a, Step) or isinstance(b, Step) for a, b in zip(one, other, strict=False))


def places(value: object, path: FieldPath, *, partial: bool, anew: bool = False) -> Iterator[object]:
    """What `value` has at the path: values, or what is `Unseen`. With `partial` it is a patch, and what it leaves alone
    is left out; `anew` says that there is nothing behind it that could be left alone."""
    if value is None:
        yield Unseen.ABSENT
    elif not path:
        yield value
    elif path[0] is Step.ANY_ITEM:
        if not isinstance(value, list):
            yield Unseen.UNTOLD
            return
        for item in value:
            yield from places(item, path[1:], partial=partial, anew=True)
    elif not isinstance(value, dict):
        yield Unseen.UNTOLD
    else:
        if partial and "$patch" in value:
            yield Unseen.ABSENT
        anew = anew or any(key.startswith("$") and not key.startswith(_HARMLESS_DIRECTIVE) for key in value)
        if path[0] is Step.ANY_KEY:
            for inner in value.values():
                yield from places(inner, path[1:], partial=partial, anew=True)
        elif path[0] in value:
            yield from places(value[path[0]], path[1:], partial=partial, anew=anew)
        elif anew or not partial:
            yield Unseen.ABSENT


def patched(operations: object, path: FieldPath) -> Iterator[object]:
    """What the operations of a JSON patch put at the path, as `places` tells it."""
    if not isinstance(operations, list):
        yield Unseen.UNTOLD
        return
    for operation in operations:
        yield from _put(operation, path)


def _put(operation: object, path: FieldPath) -> Iterator[object]:
    pointer = pointer_of(operation, "path")
    if pointer is None or not isinstance(operation, dict):
        yield Unseen.UNTOLD
        return
    here = points_at(pointer, path)
    match operation.get("op"):
        case "test":
            pass
        case "add" | "replace":
            if here and (len(pointer) > len(path) or "value" not in operation):
                yield Unseen.UNTOLD
            elif here:
                yield from places(operation["value"], path[len(pointer) :], partial=False)
        case "remove":
            if here:
                yield Unseen.UNTOLD if len(pointer) > len(path) else Unseen.ABSENT
        case "move" | "copy" as kind:
            source = pointer_of(operation, "from")
            if here or source is None:
                yield Unseen.UNTOLD
            elif kind == "move" and points_at(source, path):
                yield Unseen.UNTOLD if len(source) > len(path) else Unseen.ABSENT
        case _:
            yield Unseen.UNTOLD


def pointer_of(operation: object, key: str) -> tuple[str, ...] | None:
    """The tokens of a JSON pointer (RFC 6901) of an operation, or None where there is none that can be read."""
    pointer = operation.get(key) if isinstance(operation, dict) else None
    if not isinstance(pointer, str) or (pointer and not pointer.startswith("/")):
        return None
    return tuple(token.replace("~1", "/").replace("~0", "~") for token in pointer.split("/")[1:])


def points_at(pointer: tuple[str, ...], path: FieldPath) -> bool:
    """Whether the pointer leads to the path's place, or into it, or past it. Any token may stand for an element:
    servers take `-`, and negative numbers."""
    return all(isinstance(step, Step) or step == token for step, token in zip(path, pointer, strict=False))


def scalars(value: object) -> Iterator[object]:
    """Every value inside that is neither a list nor an object."""
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            waiting += each.values()
        elif isinstance(each, list):
            waiting += each
        else:
            yield each
