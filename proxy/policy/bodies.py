"""What the body of a request says of a field of a Kubernetes object: its values, or that they cannot be told.

    places     what an object, or a patch that looks like one, has at a path
    patched    what the operations of a JSON patch (RFC 6902) put there
    compares   whether a patch says what is there by taking it away

A patch shows parts. What it leaves alone is no place. Where it may make something anew (an element of a list, an entry
of a map, a map that a directive empties), what is missing counts as absent, and so does all of a list that it empties.
Directives of strategic merge patches (`$patch`, `$retainKeys`, …) take away and never put a value in: next to them what
is missing is absent, and behind `$patch` what is there may be absent too; `$setElementOrder` changes nothing but order.

Blind spot: a resource may have its fields elsewhere in another version of its group.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator

from proxy.model.fields import STAR, FieldPath, Step


class Unseen(enum.Enum):
    """What stands for a value that cannot be shown: there is none, or it cannot be told which."""

    ABSENT = "absent"
    UNTOLD = "untold"


_HARMLESS_DIRECTIVE = "$setElementOrder/"
_COMPARING_DIRECTIVE = "$deleteFromPrimitiveList/"


def overlap(one: FieldPath, other: FieldPath) -> bool:
    """Whether one could lead to what the other leads to, or into it, or past it."""
    return all(a == b or a is STAR or b is STAR for a, b in zip(one.steps, other.steps, strict=False))


def places(value: object, steps: tuple[Step, ...], *, partial: bool, anew: bool = False) -> Iterator[object]:
    """What `value` has where the steps lead: values, or what is `Unseen`. With `partial` it is a patch, and what it
    leaves alone is left out; `anew` says that there is nothing behind it that could be left alone."""
    if value is None:
        yield Unseen.ABSENT
        return
    if not steps:
        yield value
        return
    step, rest = steps[0], steps[1:]
    if isinstance(value, dict):
        if partial and "$patch" in value:
            yield Unseen.ABSENT
        anew = anew or any(key.startswith("$") and not key.startswith(_HARMLESS_DIRECTIVE) for key in value)
        if step is STAR:
            if not value and not partial:
                yield Unseen.ABSENT
            for inner in value.values():
                yield from places(inner, rest, partial=partial, anew=True)
        elif step in value:
            yield from places(value[step], rest, partial=partial, anew=anew)
        elif anew or not partial:
            yield Unseen.ABSENT
    elif isinstance(value, list) and step is STAR:
        if not value:
            yield Unseen.ABSENT
        for inner in value:
            yield from places(inner, rest, partial=partial, anew=True)
    else:
        yield Unseen.UNTOLD


def compares(patch: object, steps: tuple[Step, ...]) -> bool:
    """Whether a strategic merge patch takes elements out of a list on the way by their value: what is left of the list
    says which were there."""
    if not steps:
        return False
    step, rest = steps[0], steps[1:]
    if isinstance(patch, list):
        return step is STAR and any(compares(inner, rest) for inner in patch)
    if not isinstance(patch, dict):
        return False
    for key, inner in patch.items():
        if key.startswith(_COMPARING_DIRECTIVE) and step in (STAR, key.removeprefix(_COMPARING_DIRECTIVE)):
            return True
        if step in (STAR, key) and compares(inner, rest):
            return True
    return False


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
    here, depth = path.touches(pointer), pointer.count("/")
    match operation.get("op"):
        case "test":
            pass
        case "add" | "replace":
            if here and (depth > len(path.steps) or "value" not in operation):
                yield Unseen.UNTOLD
            elif here:
                yield from places(operation["value"], path.steps[depth:], partial=False)
        case "remove":
            if here:
                yield Unseen.UNTOLD if depth > len(path.steps) else Unseen.ABSENT
        case "move" | "copy" as kind:
            source = pointer_of(operation, "from")
            if here or source is None:
                yield Unseen.UNTOLD
            elif kind == "move" and path.touches(source):
                yield Unseen.UNTOLD if source.count("/") > len(path.steps) else Unseen.ABSENT
        case _:
            yield Unseen.UNTOLD


def pointer_of(operation: object, key: str) -> str | None:
    """A JSON pointer (RFC 6901) of an operation, or None where there is none that can be read."""
    pointer = operation.get(key) if isinstance(operation, dict) else None
    return pointer if isinstance(pointer, str) and (not pointer or pointer.startswith("/")) else None


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
