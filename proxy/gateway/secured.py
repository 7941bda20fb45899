"""TLS over buffers of our own: a protocol to the socket's transport, and a transport to what speaks inside.

    socket -> raw transport -> _CIPHERTEXT -> incoming BIO -> OpenSSL -> the protocol's buffer
    socket <- raw transport <-------- outgoing BIO <-------- OpenSSL <- write

    SHAKING ---> OPEN ---> CLOSING ---> LOST
       handshake   |          close_notify and FIN go out behind all that was written; what the peer still sends is
                   |          thrown away until it ends as well
                   +- while paused nothing is handed on, and an end of file waits behind the data

The protocol hears `connection_made` with this transport when the handshake is done, and `connection_lost` when the
socket is gone, whatever the state. What a peer can make us hold is bounded: one read of the socket, one record inside
OpenSSL, MAX_ANSWERS, and what the raw transport has to write.

Why not the loop's own TLS: it drops what it has not handed on when a peer ends while it is not read; it keeps two large
buffers for each connection; and it gives no say in how OpenSSL's grow.

Blind spots: the end of the socket without a close_notify is taken as an end like any other. What a paused peer has sent
lies in the kernel: if that resets the connection, because something was written to a peer that is gone, it is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Awaitable, Callable
from typing import Any, Final, cast

HANDSHAKE_TIMEOUT_S = 10.0
LINGER_S = 10.0
"""How long a peer may take to end when TLS with it has failed."""
READ_AT_ONCE = 128 * 1024
PIECE = 8 * 1024
"""Bytes that go into a BIO in one go. It grows to a third more and never shrinks: a connection that once was busy may
idle for hours. Larger records would make bulk faster by a millisecond for 6 MB."""
RECORD = 16 * 1024
"""Plain bytes of a TLS record, at most (RFC 8446, section 5.1)."""
MAX_HANDSHAKE = 256 * 1024
"""Bytes of a peer's handshake: OpenSSL takes certificates of 100 KiB."""
MAX_FRUITLESS = 32 * 1024
"""Bytes without data inside, beyond a sixteenth of what has some: a record that has not come whole, session tickets,
key updates, of which each costs OpenSSL as much as 100 KB of data."""
OVERHEAD = {"TLSv1.3": 5 + 1 + 16}
"""Bytes of a record beside the data, where key updates exist."""
MAX_OVERHEAD = 512
"""The same where they do not."""
MAX_ANSWERS = 16 * 1024
"""Bytes of TLS's own (key updates) for a peer that does not read."""

_CIPHERTEXT: Final = bytearray(READ_AT_ONCE)
_CIPHERTEXT_VIEW: Final = memoryview(_CIPHERTEXT)


class Secured(asyncio.BufferedProtocol, asyncio.Transport):
    """Made by `accept` and `upgrade`."""

    __slots__ = (
        "_closing",
        "_congested",
        "_ended",
        "_error",
        "_fruitless",
        "_held",
        "_incoming",
        "_object",
        "_outgoing",
        "_overhead",
        "_paused",
        "_protocol",
        "_raw",
        "_standing",
        "_timer",
    )

    def __init__(
        self,
        protocol: asyncio.BufferedProtocol,
        context: ssl.SSLContext,
        server_hostname: str | None,
        standing: asyncio.Future[None],
    ) -> None:
        """Raises `ValueError` when `server_hostname` cannot be one."""
        self._protocol = protocol
        self._raw: asyncio.Transport | None = None
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._object = context.wrap_bio(
            self._incoming, self._outgoing, server_side=server_hostname is None, server_hostname=server_hostname
        )
        self._standing: asyncio.Future[None] | None = standing
        """Until the handshake is done."""
        self._held = b""
        """Has come and waits until it may be handed on."""
        self._fruitless = 0
        self._overhead = MAX_OVERHEAD
        self._paused = False
        self._congested = False
        self._ended = False
        """The peer sends no more."""
        self._closing = False
        self._error: Exception | None = None
        self._timer: asyncio.TimerHandle | None = None

    # --- what the socket tells ----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._raw = cast(asyncio.Transport, transport)
        self._shake_hands()

    def get_buffer(self, sizehint: int) -> memoryview:
        return _CIPHERTEXT_VIEW

    def buffer_updated(self, nbytes: int) -> None:
        if self._closing or self._ended:
            return
        if self._paused:
            # the loop may have read before it heard of the pause
            self._held += _CIPHERTEXT_VIEW[:nbytes]
        else:
            self._take(_CIPHERTEXT_VIEW[:nbytes])

    def eof_received(self) -> bool:
        """Keeps the socket: what is to be written may take longer."""
        if self._standing is not None:
            self._ended = True
            self._fail(ConnectionResetError())
        elif not self._closing:
            self._end()
        return not self._closing

    def connection_lost(self, exc: Exception | None) -> None:
        self._closing = True
        self._held = b""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        standing, self._standing = self._standing, None
        if standing is None:
            self._protocol.connection_lost(self._error or exc)
            return
        if not standing.done():
            standing.set_exception(exc or ConnectionResetError())
        # who waits for the handshake knows better what this means, and comes first
        asyncio.get_running_loop().call_soon(self._protocol.connection_lost, exc)

    def pause_writing(self) -> None:
        self._congested = True
        if self._standing is None:
            self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._congested = False
        if self._standing is None:
            self._answer()
            self._protocol.resume_writing()

    # --- what the protocol wants --------------------------------------------------------------------------------------

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Sends it behind what was written before; nothing once this is closed."""
        raw = self._raw
        if self._closing or not data or raw is None:
            return
        write, encrypted = self._object.write, self._outgoing.read
        try:
            if len(data) <= PIECE:
                write(data)
                raw.write(encrypted())
                return
            view = memoryview(data)
            for start in range(0, len(view), PIECE):
                write(view[start : start + PIECE])
                raw.write(encrypted())
        except ssl.SSLError as error:
            self._fail(error)

    def pause_reading(self) -> None:
        self._paused = True
        if self._raw is not None and not self._closing:
            self._raw.pause_reading()

    def resume_reading(self) -> None:
        if self._paused and not self._closing:
            self._paused = False
            # not from here: whoever resumes is in the middle of something
            asyncio.get_running_loop().call_soon(self._go_on)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        if self._raw is not None:
            self._raw.set_write_buffer_limits(high, low)

    def get_write_buffer_size(self) -> int:
        return self._raw.get_write_buffer_size() if self._raw is not None else 0

    def get_extra_info(self, name: str, default: object = None) -> Any:
        return self._raw.get_extra_info(name, default) if self._raw is not None else default

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        """Ends in good order, behind what was written, and waits for the peer to end as well: for how long is for the
        caller to say, with `abort`. Nothing more is handed on."""
        if not self._closing:
            # it complains that the peer has not ended yet, or has sent more meanwhile: nobody waits for either
            with contextlib.suppress(ssl.SSLError):
                self._object.unwrap()
            self._part(linger=not self._ended)

    def abort(self) -> None:
        """Drops the socket and what is not written yet."""
        self._closing = True
        if self._raw is not None:
            self._raw.abort()

    @property
    def peer_certificate(self) -> bytes | None:
        """What the peer has shown, as DER."""
        return self._object.getpeercert(binary_form=True)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _shake_hands(self) -> None:
        """As far as it goes with what has come."""
        try:
            self._object.do_handshake()
        except ssl.SSLWantReadError:
            self._answer()
            return
        except ssl.SSLError as error:
            self._fail(error)
            return
        self._answer()
        standing, self._standing = self._standing, None
        self._fruitless = 0
        self._overhead = OVERHEAD.get(self._object.version() or "", MAX_OVERHEAD)
        self._protocol.connection_made(self)
        if standing is not None and not standing.done():
            standing.set_result(None)

    def _take(self, data: memoryview | bytes) -> None:
        """Bytes of the peer; the buffer is the caller's again afterwards."""
        start = 0
        while self._standing is not None and start < len(data):
            taken = self._incoming.write(data[start : start + PIECE])
            start += taken
            self._fruitless += taken
            if self._fruitless > MAX_HANDSHAKE:
                self._fail(OSError(f"a TLS handshake exceeds `{MAX_HANDSHAKE}` bytes"))
            else:
                self._shake_hands()
            if self._closing:
                return
        if self._paused:
            self._held = bytes(data[start:])
        elif self._standing is None:
            self._hand_on(data, start)

    def _hand_on(self, data: memoryview | bytes, start: int) -> None:
        """What is inside the bytes from `start` on, and in the BIO, goes on in one go, as far as the protocol's buffer
        takes it."""
        incoming, read = self._incoming, cast(Callable[[int, memoryview], int], self._object.read)
        room = memoryview(self._protocol.get_buffer(-1))
        filled = 0
        error: Exception | None = None
        ended = False
        while True:
            try:
                # OpenSSL reads no further than the record: where nothing is left to read, it has nothing to give
                while incoming.pending and not ended:
                    if len(room) - filled < RECORD:
                        self._protocol.buffer_updated(filled)
                        filled = 0
                        if self._paused or self._closing:
                            self._held = b"" if self._closing else bytes(data[start:])
                            return
                    got = read(len(room) - filled, room[filled:] if filled else room)
                    filled += got
                    ended = not got
                    self._fruitless = max(self._fruitless - got - got // 16 - self._overhead, 0)
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError as failure:
                error = failure
            if self._fruitless > MAX_FRUITLESS and error is None:
                error = OSError(f"more than `{MAX_FRUITLESS}` bytes of TLS came without data in them")
            if error is not None or ended or start >= len(data):
                break
            taken = incoming.write(data[start : start + PIECE])
            start += taken
            self._fruitless += taken
        if self._fruitless:
            # after a session ticket OpenSSL keeps a record's buffer until the next write; an empty one sends nothing
            # (SSL_write_ex(3)), and whoever watches does not write for hours
            with contextlib.suppress(ssl.SSLError):
                self._object.write(b"")
        self._answer()
        if filled:
            self._protocol.buffer_updated(filled)
        if error is not None:
            self._fail(error)
        elif ended and not self._closing:
            self._end()

    def _go_on(self) -> None:
        if self._paused or self._closing or self._raw is None:
            return
        held, self._held = self._held, b""
        try:
            self._take(held)
            if self._ended and not self._paused and not self._closing:
                self._end()
        except BaseException:
            # as the loop does where a protocol fails
            self.abort()
            raise
        if not self._paused and not self._closing:
            self._raw.resume_reading()

    def _end(self) -> None:
        """The peer has ended: told when all that came before has been handed on."""
        self._ended = True
        if not self._paused:
            self._protocol.eof_received()
            self.close()

    def _answer(self) -> None:
        """Sends what TLS itself has to say; to a peer that does not read, later."""
        if self._outgoing.pending and not self._closing and self._raw is not None:
            if not self._congested:
                self._raw.write(self._outgoing.read())
            elif self._outgoing.pending > MAX_ANSWERS:
                self._fail(OSError(f"it does not read, and asks for more than `{MAX_ANSWERS}` bytes of TLS"))

    def _fail(self, error: Exception) -> None:
        """An alert says why, where OpenSSL has one to say."""
        if self._closing:
            return
        self._error = error
        if self._standing is not None and not self._standing.done():
            self._standing.set_exception(error)
        self._part(linger=self._standing is not None and not self._ended)
        if self._raw is not None:
            self._timer = asyncio.get_running_loop().call_later(LINGER_S, self._raw.abort)

    def _part(self, *, linger: bool) -> None:
        """Behind what is to be written goes the end. A socket that is closed with bytes unread takes back what the peer
        has not read yet: where that matters, they are thrown away until the peer ends."""
        self._closing = True
        self._held = b""
        raw = self._raw
        if raw is None or raw.is_closing():
            return
        if self._outgoing.pending:
            raw.write(self._outgoing.read())
        if linger:
            raw.write_eof()
            raw.resume_reading()
        else:
            raw.close()


async def accept(connection: socket.socket, protocol: asyncio.BufferedProtocol, context: ssl.SSLContext) -> Secured:
    """Does the handshake as the server on an accepted connection of which nothing was read. Raises `OSError`: of the
    socket, `ssl.SSLError`, `TimeoutError`."""
    loop = asyncio.get_running_loop()
    standing: asyncio.Future[None] = loop.create_future()
    secured = Secured(protocol, context, None, standing)
    await _until_stands(secured, standing, loop.connect_accepted_socket(lambda: secured, connection))
    return secured


async def upgrade(
    raw: asyncio.Transport,
    protocol: asyncio.BufferedProtocol,
    context: ssl.SSLContext,
    server_hostname: str | None = None,
) -> Secured:
    """Does the handshake on a connection that has spoken in plain: as the client of that server, or as the server.
    Whatever comes from now on is TLS. Raises like `accept`, and `ValueError` for a name that is none."""
    standing: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    secured = Secured(protocol, context, server_hostname, standing)
    raw.set_protocol(secured)
    secured.connection_made(raw)
    raw.resume_reading()
    await _until_stands(secured, standing)
    return secured


async def _until_stands(
    secured: Secured, standing: asyncio.Future[None], connecting: Awaitable[object] | None = None
) -> None:
    try:
        async with asyncio.timeout(HANDSHAKE_TIMEOUT_S):
            if connecting is not None:
                await connecting
            await standing
    except (TimeoutError, asyncio.CancelledError):
        secured.abort()
        raise
