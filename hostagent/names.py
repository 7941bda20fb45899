"""Which addresses the policy's host names have: asked again and again, and forgotten late.

    current   what the resolver said last; a name that stops resolving keeps it
    former    what it said before: kept for `KEEP_S`, since clients remember addresses too, and for as long as a session
              is at one

The resolver is the host's own (`getaddrinfo`), because that is whom clients ask: hosts files and search domains count.
It does not tell how long an answer is good for, so the name servers of `/etc/resolv.conf` are asked for the TTL; where
none of them tells, it is `DEFAULT_S`.

Blind spots: a client may learn an address before we do. At a protected port it is refused, and we ask sooner (`hurry`);
at any other port its connection is not redirected. Who has a name server answer him alone is in that position: protect
ports.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import structlog

from hostagent import resolver

log = structlog.get_logger()

DEFAULT_S = 30.0
MIN_S = 5.0
MAX_S = 300.0
"""Bounds of the time between two questions, whatever the TTL."""
KEEP_S = 600.0
"""How long a former address belongs to the name though no session uses it."""
MAX_ADDRESSES = 256

Ask = Callable[[str], resolver.Answer]


@dataclass(frozen=True, slots=True)
class _Known:
    current: tuple[str, ...]
    due_s: float
    asked_s: float
    left_s: dict[str, float] = field(default_factory=dict)
    trouble: str = ""


def _log_alert(what: str, *, done: str) -> None:
    log.error("alert", what=what, done=done)


class Names:
    """What is known of every name that was asked for. `ask` may block, and raises `OSError`."""

    def __init__(
        self,
        ask: Ask = resolver.ask,
        *,
        alert: Callable[..., None] = _log_alert,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.alert = alert
        self._ask = ask
        self._clock = clock
        self._known: dict[str, _Known] = {}

    def addresses(self, name: str) -> Sequence[str]:
        """The current addresses; asks for them. Raises `OSError` for a name that never resolved."""
        outcome = self.ask(name)
        if isinstance(outcome, OSError) and name not in self._known:
            raise outcome
        self.learn(name, outcome, frozenset())
        return self._known[name].current

    def current(self, name: str) -> Sequence[str]:
        """What is known already. Raises `OSError` for a name that is not."""
        if name not in self._known:
            raise OSError("it was not asked for yet")
        return self._known[name].current

    def former(self, name: str) -> Sequence[str]:
        known = self._known.get(name)
        return sorted(known.left_s) if known is not None else ()

    def keep_only(self, names: Iterable[str]) -> None:
        """Forgets the others."""
        self._known = {name: self._known[name] for name in names if name in self._known}

    def due(self) -> tuple[str, ...]:
        """The names to ask for now."""
        now_s = self._clock()
        return tuple(name for name, known in self._known.items() if known.due_s <= now_s)

    def hurry(self) -> None:
        """Somebody was refused at an address that is no target: what has not been asked for in the last `MIN_S` is due,
        since the client may have heard of a new address before us."""
        now_s = self._clock()
        self._known = {
            name: replace(known, due_s=min(known.due_s, max(now_s, known.asked_s + MIN_S)))
            for name, known in self._known.items()
        }

    def ask(self, name: str) -> resolver.Answer | OSError:
        """Asks, and may block; nothing is changed, so this may run in another thread."""
        try:
            answer = self._ask(name)
        except OSError as error:
            return error
        if not answer.addresses:
            return OSError("it has no address")
        if len(answer.addresses) > MAX_ADDRESSES:
            return OSError(f"it has `{len(answer.addresses)}` addresses, more than {MAX_ADDRESSES}: give a network")
        return answer

    def learn(self, name: str, outcome: resolver.Answer | OSError, in_use: frozenset[str]) -> bool:
        """Takes what came of a question; true when the addresses changed. `in_use` are those that sessions are at."""
        now_s = self._clock()
        before = self._known.get(name, _Known((), now_s, now_s))
        if isinstance(outcome, OSError):
            why = outcome.strerror or str(outcome)
            if why != before.trouble:
                self.alert(f"host name `{name}` does not resolve any more: {why}", done="its old addresses are kept")
            after = replace(before, due_s=now_s + DEFAULT_S, asked_s=now_s, trouble=why)
        else:
            if before.trouble:
                log.info("a name resolves again", name=name)
            lifetime_s = DEFAULT_S if outcome.ttl_s is None else min(max(outcome.ttl_s, MIN_S), MAX_S)
            left_s = dict.fromkeys(before.current, now_s) | before.left_s
            after = _Known(
                current=outcome.addresses,
                due_s=now_s + lifetime_s,
                asked_s=now_s,
                left_s={address: at_s for address, at_s in left_s.items() if address not in outcome.addresses},
            )
        kept = {
            address: now_s if address in in_use else at_s
            for address, at_s in after.left_s.items()
            if address in in_use or now_s - at_s < KEEP_S
        }
        self._known[name] = replace(after, left_s=kept)
        return (after.current, kept.keys()) != (before.current, before.left_s.keys())

    def state(self, name: str) -> object:
        """What is known of a name, to be put back with `restore`."""
        return self._known.get(name)

    def restore(self, name: str, state: object) -> None:
        """Puts back what was known, but for the time of the next question."""
        if isinstance(state, _Known):
            self._known[name] = replace(state, due_s=self._clock() + DEFAULT_S)
