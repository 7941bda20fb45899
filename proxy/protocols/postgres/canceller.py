"""A machine with one errand: a CancelRequest to the server, over a connection of its own, with the server's own key.

States: those of `Upstream`, then closed. The server says nothing to a CancelRequest and closes.
"""

from __future__ import annotations

import struct

from proxy.model import Target
from proxy.protocols.base import (
    Ask,
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


class Canceller:
    """Speaks to the SERVER alone."""

    def __init__(self, target: Target, key: bytes) -> None:
        self._upstream = Upstream(target)
        self._key = key

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
                raise ValueError(f"a canceller has no client: `{event}`")

    def _go_on(self, out: list[Command]) -> list[Command]:
        if self._upstream.ready:
            out.append(Send(Side.SERVER, struct.pack(">II", 8 + len(self._key), CANCEL_REQUEST) + self._key))
            out.append(Close("the cancel request was passed on"))
        return out

    def eof(self, side: Side) -> list[Command]:
        return [Close(f"the {side.value} closed the connection")]

    def answer(self, ask: Ask, reply: Reply) -> list[Command]:
        raise ValueError("a canceller asks nothing")

    def notice(self, message: str, hint: str = "") -> list[Command]:
        return []

    def farewell(self, message: str, hint: str = "") -> list[Command]:
        return [Close(message)]

    def canceller(self) -> Machine | None:
        return None

    @property
    def unanswered(self) -> bool:
        return False
