"""What the policy says of one operation."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Decision(enum.IntEnum):
    """Ordered by strictness: the meet of two decisions is their maximum."""

    ALLOW = 0
    HOLD = 1
    DENY = 2

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Reason:
    """Why one hop got its decision. `rule` is the rule's name, or says in brackets what stood in for one."""

    hop: str
    rule: str
    decision: Decision
    text: str


@dataclass(frozen=True, slots=True)
class Ruling:
    """The met decision, one reason a hop (root first), and what the person who was denied may do next.

    `message` and `hint` are ready for the client; `hold_timeout_s` counts when the decision is `hold`. `cancelled` says
    that it was the client itself who no longer wanted it, while it was held. `record_input` is an obligation: what is
    typed into the operation goes on record too.
    """

    decision: Decision
    reasons: tuple[Reason, ...]
    message: str
    hint: str
    policy_version: str
    hold_timeout_s: float = 0.0
    cancelled: bool = False
    record_input: bool = False
