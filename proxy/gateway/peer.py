"""One side of a session as the loop sees it: its transport, with or without TLS, and why it is not read just now."""

from __future__ import annotations

import asyncio
import fcntl
import socket
import ssl
import struct
import termios
from typing import TYPE_CHECKING, Final, cast

from proxy.gateway import secured
from proxy.protocols import base
from proxy.protocols.base import Side

if TYPE_CHECKING:
    from proxy.gateway.session import Session

HIGH_WATER = 256 * 1024
"""Bytes that wait for one peer before the other is no longer read."""
READ_AT_ONCE = 192 * 1024
"""Bytes that are taken in by one read, at most; what is made of them is then a little more, and still no block that
malloc maps by itself (see `worker`)."""
_INBOX: Final = memoryview(bytearray(READ_AT_ONCE))
_INT: Final = struct.Struct("i")


class Peer(asyncio.BufferedProtocol):
    """All read into one buffer, since each is done with it before the next: a loop that makes `bytes` itself makes them
    as large as could come."""

    __slots__ = ("_outbox", "_paused", "closed", "congested", "dropped", "session", "side", "transport")

    def __init__(self, session: Session, side: Side) -> None:
        self.session = session
        self.side = side
        self.transport: asyncio.Transport | None = None
        """None before there is one, during a TLS handshake, and when it is gone."""
        self.closed = False
        self.dropped = False
        """Nobody wants to hear of it any more."""
        self.congested = False
        """It does not take what is written."""
        self._outbox: list[base.Buffer] = []
        self._paused: tuple[str, ...] = ()

    # --- what the session wants ---------------------------------------------------------------------------------------

    def send(self, data: base.Buffer) -> None:
        """Leaves with the next `deliver`."""
        self._outbox.append(data)

    def deliver(self) -> None:
        """What one event led to goes out in one write: a packet costs more than what is in it."""
        outbox = self._outbox
        if outbox:
            data = outbox[0] if len(outbox) == 1 else b"".join(outbox)
            outbox.clear()
            if self.transport is not None:
                self.transport.write(data)

    def pause(self, why: str) -> None:
        """It is not read any more until nothing speaks against it."""
        if why not in self._paused:
            self._paused += (why,)
            if self.transport is not None:
                self.transport.pause_reading()

    def resume(self, why: str) -> None:
        if why in self._paused:
            self._paused = tuple(each for each in self._paused if each != why)
            if not self._paused and self.transport is not None:
                self.transport.resume_reading()

    async def secure(self, context: ssl.SSLContext) -> None:
        """Does the TLS handshake, as the server. Raises like `secured.upgrade`."""
        assert self.transport is not None
        raw, self.transport = self.transport, None
        await secured.upgrade(raw, self, context)

    def unwritten(self) -> int:
        """Bytes that were sent and have not come to the peer's kernel: they wait here or in ours."""
        if self.transport is None:
            return 0
        connection: socket.socket | None = self.transport.get_extra_info("socket")
        if connection is None or connection.fileno() < 0:
            return 0
        (queued,) = _INT.unpack(fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(_INT.size)))
        return self.transport.get_write_buffer_size() + cast(int, queued)

    def close(self) -> None:
        """Ends behind what was sent."""
        if self.transport is not None:
            self.transport.close()

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    # --- what the loop tells ------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=HIGH_WATER)
        if self._paused:
            self.transport.pause_reading()

    def get_buffer(self, sizehint: int) -> memoryview:
        return _INBOX

    def buffer_updated(self, nbytes: int) -> None:
        if not self.dropped:
            self.session.received(self.side, bytes(_INBOX[:nbytes]))

    def eof_received(self) -> None:
        if not self.dropped:
            self.session.ended(self.side)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed = True
        self.transport = None
        if not self.dropped:
            self.session.lost(self.side)

    def pause_writing(self) -> None:
        self.congested = True
        if not self.dropped:
            self.session.congested(self.side)

    def resume_writing(self) -> None:
        self.congested = False
        if not self.dropped:
            self.session.congested(self.side)
