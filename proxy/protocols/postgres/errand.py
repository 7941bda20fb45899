"""Machines with one errand to the server, over a connection of their own: a CancelRequest with the server's own key, or
only to see whether it can be spoken to.

States: those of `Upstream`, then closed. The server says nothing to a CancelRequest and closes.
"""

from __future__ import annotations

import struct

from proxy.model import Target
from proxy.protocols.base import (
    Buffer,
    Close,
    Command,
    Errand,
    Event,
    Send,
    Side,
    UpstreamFailed,
    UpstreamReady,
)
from proxy.protocols.postgres.messages import CANCEL_REQUEST
from proxy.protocols.postgres.upstream import Upstream, UpstreamRefused


def cancelling(target: Target, key: bytes) -> PostgresErrand:
    """Asks the server to cancel what the session with this key runs."""
    request = struct.pack(">II", 8 + len(key), CANCEL_REQUEST) + key
    return PostgresErrand(target, [Send(Side.SERVER, request), Close("the cancel request was passed on")])


def visiting(target: Target) -> PostgresErrand:
    """Goes as far as the first byte of a login, TLS as the target's mode says, and leaves (`base.Visit`)."""
    return PostgresErrand(target, [Close("")])


class PostgresErrand(Errand):
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
