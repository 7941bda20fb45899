"""Conditions on the body of a request (`where` in a rule), decided safely in both directions.

- `surely`: do they hold, certainly? Asked for a grant. Of an object every value at the path has to fit, and there has
  to be one unless absence fits too; of a patch everything that it puts there has to fit.
- `could`: might they hold? Asked for a restriction. One value that fits is enough, and so is what cannot be told.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from proxy.model.fields import FieldPath
from proxy.policy.bodies import Unseen, patched, places
from proxy.policy.resources import Glob

MAX_PLACES = 4096
"""Values at one path that are looked at; of more it cannot be told. Everybody else waits meanwhile."""


class Could(enum.Enum):
    """Whether a condition might hold of what comes of a request: `LEFT` where the request does not say."""

    NO = "no"
    LEFT = "left alone"
    YES = "yes"


@dataclass(frozen=True, slots=True)
class Condition:
    """Values at `path` are in `within`, if there is any of those, and not in `outside`; `absent`: there may be none."""

    path: FieldPath
    within: tuple[Glob, ...]
    outside: tuple[Glob, ...]
    absent: bool

    def surely(self, body: object, patch: str) -> bool:
        if body is None:
            return False
        found = self._places(body, patch)
        return all(self._fits(place) is True for place in found) and (bool(found) or self.absent or bool(patch))

    def could(self, body: object, patch: str) -> Could:
        if body is None:
            return Could.YES
        found = self._places(body, patch)
        if any(self._fits(place) is not False for place in found):
            return Could.YES
        if not patch:
            return Could.YES if self.absent and not found else Could.NO
        return Could.NO if found and all(isinstance(step, str) for step in self.path.steps) else Could.LEFT

    def _places(self, body: object, patch: str) -> list[object]:
        match patch:
            case "json":
                found = patched(body, self.path)
            case "" | "merge" | "strategic" | "apply":
                found = places(body, self.path.steps, partial=bool(patch))
            case _:
                return [Unseen.UNTOLD]
        seen = list(islice(found, MAX_PLACES + 1))
        return seen if len(seen) <= MAX_PLACES else [Unseen.UNTOLD]

    def _fits(self, place: object) -> bool | None:
        """None where it cannot be told."""
        if place is Unseen.ABSENT:
            return self.absent
        if place is Unseen.UNTOLD:
            return None
        if not self.within and not self.outside:
            return False
        text = _text(place)
        if text is None:
            whole = any(glob.anything for glob in self.within) and not self.outside
            return True if whole else None
        inside = not self.within or any(glob.matches(text) for glob in self.within)
        return inside and not any(glob.matches(text) for glob in self.outside)


def all_surely(conditions: Iterable[Condition], body: object, patch: str) -> bool:
    """Whether all of them hold, certainly."""
    return all(condition.surely(body, patch) for condition in conditions)


def all_could(conditions: tuple[Condition, ...], body: object, patch: str) -> bool:
    """Whether all of them might hold, and one of them by what this body says."""
    said = [condition.could(body, patch) for condition in conditions]
    return not said or (Could.NO not in said and Could.YES in said)


def _text(value: object) -> str | None:
    """A value as globs see it; None for a list or an object."""
    match value:
        case str():
            return value
        case bool():
            return "true" if value else "false"
        case float() if value.is_integer() and abs(value) < 1 << 63:
            # a strategic patch may say 0.0 where the server then has 0
            return str(int(value))
        case float():
            return str(value)
        case int() if abs(value) < 1 << 64:
            return str(value)
        case _:
            return None
