"""Machines with one errand to the server, over a connection of their own: a CancelRequest with the server's own key, or
only to see whether it can be spoken to.

States: those of `Upstream`, then closed. The server says nothing to a CancelRequest and closes.
"""

from __future__ import annotations

import struct

from proxy.model import Target
from proxy.protocols.base import (
    Ask,
    AskRuling,
    Buffer,
    Close,
    Command,
    Event,
    Machine,
    Reply,
    Send,
    Side,
    UpstreamFailed,
    UpstreamReady,
)
from proxy.protocols.postgres.messages import CANCEL_REQUEST
from proxy.protocols.postgres.upstream import Upstream, UpstreamRefused


def cancelling(target: Target, key: bytes) -> Errand:
    """Asks the server to cancel what the session with this key runs."""
    request = struct.pack(">II", 8 + len(key), CANCEL_REQUEST) + key
    return Errand(target, [Send(Side.SERVER, request), Close("the cancel request was passed on")])


def visiting(target: Target) -> Errand:
    """Goes as far as the first byte of a login, TLS as the target's mode says, and leaves (`base.Visit`)."""
    return Errand(target, [Close("")])


class Errand:
    """Speaks to the SERVER alone. `last` is what is done once the server may be spoken to."""

    def __init__(self, target: Target, last: list[Command]) -> None:
        self._upstream = Upstream(target)
        self._last = last

    def begin(self) -> list[Command]:
        return self._upstream.begin()

    def receive(self, side: Side, data: Buffer) -> list[Command]:
        try:
            return self._go_on(self._upstream.receive(bytes(data)))
        except UpstreamRefused as refusal:
            return [Close(str(refusal))]

    def notify(self, event: Event) -> list[Command]:
        match event:
            case UpstreamReady():
                return self._go_on(self._upstream.stands(event))
            case UpstreamFailed(message):
                return [Close(message)]
            case _:
                raise ValueError(f"an errand has no client: `{event}`")

    def _go_on(self, out: list[Command]) -> list[Command]:
        return out + self._last if self._upstream.ready else out

    def eof(self, side: Side) -> list[Command]:
        return [Close(f"the {side.value} closed the connection")]

    def answer(self, ask: Ask, reply: Reply) -> list[Command]:
        raise ValueError("an errand asks nothing")

    def notice(self, message: str, hint: str = "") -> list[Command]:
        return []

    def preview(self, ask: AskRuling) -> list[Command]:
        raise ValueError("an errand asks nothing")

    def farewell(self, message: str, hint: str = "") -> list[Command]:
        return [Close(message)]

    def canceller(self) -> Machine | None:
        return None

    @property
    def incomplete(self) -> bool:
        return False

    @property
    def unanswered(self) -> bool:
        return False
