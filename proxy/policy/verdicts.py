"""What one hop says of one part of an operation, before the hops are met."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from proxy.model import Decision
from proxy.policy.document import DEFAULT_HOLD_S

HINT_DENY = "a rule forbids this; ask those who keep the policy"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A decision, the rules that it comes from, and why, in words for the client. `record_input` is an obligation:
    what is typed goes on record."""

    decision: Decision
    rule: str
    text: str
    hint: str = ""
    timeout_s: float = DEFAULT_HOLD_S
    record_input: bool = False


def missing(agent: str, deed: str, what: str, why: str = "no rule allows it") -> Verdict:
    """Nothing grants it; `what` is what a rule would have to allow."""
    return Verdict(
        Decision.DENY,
        "[no rule allows it]",
        f"agent `{agent}` may not {deed} ({why})",
        f"ask those who keep the policy for a rule that allows {what}",
    )


def joined(names: Iterable[str]) -> str:
    """Each name once, in order."""
    return ", ".join(dict.fromkeys(names))
