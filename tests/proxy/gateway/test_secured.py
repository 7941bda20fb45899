"""TLS over our own buffers: nothing is lost, nothing comes out of order or while nobody reads, and nothing grows."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import random
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import uvloop

from proxy.gateway import secured, tls
from proxy.gateway.secured import PIECE, READ_AT_ONCE, RECORD, Secured
from tests.proxy.gateway.wire import DEADLINE_S, NAME, VERSIONS, Far, Forger, Papers, papers, sockets

MIB = 1024 * 1024
SIDES = ("server", "client")
"""What we are on the connection."""


class Ear(asyncio.BufferedProtocol):
    """Hears what a peer's protocol does, and that it hears nothing when it should not."""

    def __init__(self, *, room: int = 192 * 1024, pause_each: bool = False) -> None:
        self.heard: list[str] = []
        self.data = bytearray()
        self.transport: asyncio.Transport | None = None
        self.paused = False
        self.pause_each = pause_each
        self.lost: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self.congested = asyncio.Event()
        self.relieved = asyncio.Event()
        self._buffer = memoryview(bytearray(room))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._hear("made")

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        assert nbytes and not self.paused
        self.data += self._buffer[:nbytes]
        self._hear("data")
        if self.pause_each:
            self.pause()

    def eof_received(self) -> None:
        assert not self.paused
        self._hear("end")

    def connection_lost(self, exc: Exception | None) -> None:
        self._hear("lost")
        self.lost.set_result(exc)

    def pause_writing(self) -> None:
        self.congested.set()

    def resume_writing(self) -> None:
        self.relieved.set()

    async def has(self, size: int) -> None:
        while len(self.data) < size:  # noqa: ASYNC110  # pieces of any size may come
            await asyncio.sleep(0)

    def _hear(self, what: str) -> None:
        if self.heard[-1:] != [what]:
            self.heard.append(what)

    def pause(self) -> None:
        assert self.transport is not None
        self.paused = True
        self.transport.pause_reading()

    def resume(self) -> None:
        assert self.transport is not None
        self.paused = False
        self.transport.resume_reading()


@pytest.fixture(scope="module")
def issued(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    return papers(tmp_path_factory.mktemp("papers"))


def play(scene: Callable[[], Awaitable[None]]) -> None:
    async def played() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await scene()

    uvloop.run(played())


@asynccontextmanager
async def unshaken(
    issued: Papers, side: str, version: str = "1.3", *, context: ssl.SSLContext | None = None, **ear: Any
) -> AsyncIterator[tuple[Ear, Far, asyncio.Task[Secured]]]:
    """Our end, which is about to shake hands, and the far one, which has done nothing yet."""
    near, other = sockets()
    hearing = Ear(**ear)
    if side == "server":
        far = Far(other, issued.trusting(version), serves=False)
        task = asyncio.create_task(secured.accept(near, hearing, context or issued.serving(version)))
    else:
        far = Far(other, issued.serving(version), serves=True)
        raw, _ = await asyncio.get_running_loop().create_connection(lambda: hearing, sock=near)
        hearing.heard.clear()
        task = asyncio.create_task(secured.upgrade(raw, hearing, context or issued.trusting(version), NAME))
    try:
        yield hearing, far, task
    finally:
        far.socket.close()
        if not hearing.lost.done() and hearing.transport is not None:
            hearing.transport.abort()
            await hearing.lost


@asynccontextmanager
async def connected(issued: Papers, side: str, version: str = "1.3", **more: Any) -> AsyncIterator[tuple[Ear, Far]]:
    async with unshaken(issued, side, version, **more) as (ear, far, task):
        await far.shake_hands()
        await task
        yield ear, far


each_side = pytest.mark.parametrize("side", SIDES)
each_version = pytest.mark.parametrize("version", VERSIONS)


# --- the handshake ----------------------------------------------------------------------------------------------------


@each_side
@each_version
@pytest.mark.parametrize("step", [1, 7, 1000])
def test_a_handshake_may_come_in_any_pieces(issued: Papers, side: str, version: str, step: int) -> None:
    async def scene() -> None:
        async with unshaken(issued, side, version) as (ear, far, task):
            await far.shake_hands(step, then=b"at once")
            made = await task
            assert ear.transport is made
            made.write(b"answer")
            assert await far.receive(6) == b"answer"
            await far.end()
            assert await ear.lost is None
            assert (ear.heard, bytes(ear.data)) == (["made", "data", "end", "lost"], b"at once")

    play(scene)


@each_side
@each_version
def test_what_comes_with_the_handshake_waits_until_it_may_be_read(issued: Papers, side: str, version: str) -> None:
    class Pausing(Ear):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            super().connection_made(transport)
            self.pause()

    async def scene() -> None:
        near, other = sockets()
        if side == "server":
            ear, far = Pausing(), Far(other, issued.trusting(version), serves=False)
            task = asyncio.create_task(secured.accept(near, ear, issued.serving(version)))
        else:
            ear, far = Pausing(), Far(other, issued.serving(version), serves=True)
            plain = Ear()
            raw, _ = await asyncio.get_running_loop().create_connection(lambda: plain, sock=near)
            task = asyncio.create_task(secured.upgrade(raw, ear, issued.trusting(version), NAME))
        await far.shake_hands(then=b"x" * 300_000)
        await far.end()
        await task
        await asyncio.sleep(0.05)
        assert ear.heard == ["made"]
        ear.resume()
        await ear.lost
        assert (ear.heard, len(ear.data)) == (["made", "data", "end", "lost"], 300_000)
        other.close()

    play(scene)


@each_side
@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n", b"\0" * 400, b"\x16\x03\x01\xff\xff" + b"a" * 70_000])
def test_what_is_no_tls_is_refused(issued: Papers, side: str, garbage: bytes) -> None:
    async def scene() -> None:
        async with unshaken(issued, side) as (ear, far, task):
            await asyncio.sleep(0.01)
            await far.send_raw(garbage)
            with pytest.raises(ssl.SSLError) as failed:
                await task
            assert tls.explain(failed.value).startswith("TLS failed: ")
            await far.raw_rest()
            far.socket.close()
            await ear.lost
            assert ear.heard == ["lost"]

    play(scene)


@each_version
def test_a_server_whose_certificate_is_not_trusted_hears_why(issued: Papers, version: str, tmp_path: Path) -> None:
    async def scene() -> None:
        other = papers(tmp_path).trusting(version)
        async with unshaken(issued, "client", version, context=other) as (ear, far, task):
            with pytest.raises(ssl.SSLError) as heard:
                await far.shake_hands()
                await far.receive(1)
            assert "unknown ca" in tls.explain(heard.value)
            with pytest.raises(ssl.SSLCertVerificationError) as failed:
                await task
            assert tls.explain(failed.value).startswith("its certificate was not accepted: ")
            far.socket.close()
            await ear.lost

    play(scene)


@each_version
def test_a_client_that_does_not_trust_us_is_told_of(issued: Papers, version: str, tmp_path: Path) -> None:
    async def scene() -> None:
        async with unshaken(issued, "server", version) as (_, far, task):
            stranger = Far(far.socket, papers(tmp_path).trusting(version), serves=False)
            with pytest.raises(ssl.SSLCertVerificationError):
                await stranger.shake_hands()
            await stranger.flush()
            with pytest.raises(ssl.SSLError) as failed:
                await task
            assert "unknown ca" in tls.explain(failed.value)

    play(scene)


@each_side
@pytest.mark.parametrize("begun", [b"", b"\x16\x03\x01\x00\x50abc"])
def test_a_peer_may_leave_in_the_handshake(issued: Papers, side: str, begun: bytes) -> None:
    async def scene() -> None:
        async with unshaken(issued, side) as (ear, far, task):
            await asyncio.sleep(0.01)
            await far.send_raw(begun)
            far.socket.shutdown(1)
            with pytest.raises(ConnectionResetError) as failed:
                await task
            assert tls.explain(failed.value) == "connection reset by peer"
            await ear.lost
            assert ear.heard == ["lost"]

    play(scene)


@each_side
def test_a_handshake_has_a_deadline(issued: Papers, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secured, "HANDSHAKE_TIMEOUT_S", 0.1)

    async def scene() -> None:
        async with unshaken(issued, side) as (ear, far, task):
            with pytest.raises(TimeoutError):
                await task
            await ear.lost
            await far.raw_rest()

    play(scene)


def test_a_handshake_without_end_is_cut(issued: Papers) -> None:
    async def scene() -> None:
        async with unshaken(issued, "client") as (_, far, task):
            await asyncio.sleep(0.01)
            sent = 0
            while not task.done():
                # HelloRequest: to be ignored in a handshake, however many there are (RFC 5246, section 7.4.1.1)
                await far.send_raw(b"\x16\x03\x03\x00\x04\x00\x00\x00\x00" * 1000)
                sent += 9000
                await asyncio.sleep(0.001)
            with pytest.raises(OSError, match="exceeds"):
                await task
            assert sent < 2 * secured.MAX_HANDSHAKE

    play(scene)


# --- reading ----------------------------------------------------------------------------------------------------------


@each_side
@each_version
@pytest.mark.parametrize("room", [RECORD, 20_000, 192 * 1024])
def test_nothing_is_lost_when_a_peer_ends_while_it_is_not_read(
    issued: Papers, side: str, version: str, room: int
) -> None:
    sent = random.Random(room).randbytes(3 * MIB)

    async def scene() -> None:
        async with connected(issued, side, version, room=room, pause_each=True) as (ear, far):

            async def read_slowly() -> None:
                while not ear.lost.done():
                    await asyncio.sleep(0.0001)
                    if ear.paused:
                        ear.resume()

            reading = asyncio.create_task(read_slowly())
            await far.send(sent)
            await far.end()
            await reading
            assert ear.lost.result() is None
            assert bytes(ear.data) == sent
            assert ear.heard == ["made", "data", "end", "lost"]

    play(scene)


@each_side
def test_a_pause_holds_at_every_boundary(issued: Papers, side: str) -> None:
    sizes = [
        size + step
        for size in (1, PIECE, RECORD, 2 * RECORD, READ_AT_ONCE - 4 * RECORD, READ_AT_ONCE, 192 * 1024)
        for step in (-1, 0, 1)
        if size + step
    ]

    async def scene() -> None:
        async with connected(issued, side, room=4 * RECORD, pause_each=True) as (ear, far):
            for size in sizes:
                before, sent = len(ear.data), random.Random(size).randbytes(size)
                sending = asyncio.create_task(far.send(sent))
                while len(ear.data) - before < size:
                    await asyncio.sleep(0.002)  # the ear itself sees to it that nothing comes while it is paused
                    if ear.paused:
                        ear.resume()
                        ear.pause()
                        ear.resume()
                await sending
                assert ear.data[before:] == sent
                ear.resume()

    play(scene)


@each_version
def test_an_end_without_a_word_is_an_end(issued: Papers, version: str) -> None:
    async def scene() -> None:
        async with connected(issued, "server", version) as (ear, far):
            await far.send(b"half an ans")
            far.socket.shutdown(1)
            await ear.lost
            assert (ear.heard, bytes(ear.data)) == (["made", "data", "end", "lost"], b"half an ans")

    play(scene)


def test_bytes_that_were_changed_end_the_connection_with_an_alert(issued: Papers) -> None:
    async def scene() -> None:
        async with connected(issued, "server") as (ear, far):
            far.tls.write(b"good")
            far.tls.write(b"changed")
            data = bytearray(far.outgoing.read())
            data[-1] ^= 1
            await far.send_raw(bytes(data))
            assert isinstance(await ear.lost, ssl.SSLError)
            assert (ear.heard, bytes(ear.data)) == (["made", "data", "lost"], b"good")
            with pytest.raises(ssl.SSLError, match="bad record mac"):
                await far.receive(1)

    play(scene)


def test_a_server_that_sends_tickets_and_no_data_is_left(issued: Papers) -> None:
    async def scene() -> None:
        async with unshaken(issued, "client") as (ear, far, task):
            context = issued.serving()
            context.num_tickets = 1000
            await Far(far.socket, context, serves=True).shake_hands()
            await task
            assert "without data" in str(await ear.lost)
            assert ear.heard == ["made", "lost"]

    play(scene)


def forger(log: Path) -> Forger:
    (line,) = [line for line in log.read_text().splitlines() if line.startswith("CLIENT_TRAFFIC_SECRET_0")]
    return Forger(bytes.fromhex(line.split()[2]))


@asynccontextmanager
async def forging(issued: Papers, log: Path) -> AsyncIterator[tuple[Ear, Far, Forger]]:
    context = issued.serving()
    context.keylog_filename = str(log)
    async with connected(issued, "server", context=context) as (ear, far):
        yield ear, far, forger(log)


@pytest.mark.parametrize("between", [0, 1], ids=["no data", "a byte now and then"])
def test_key_updates_without_data_are_cut(issued: Papers, tmp_path: Path, between: int) -> None:
    async def scene() -> None:
        async with forging(issued, tmp_path / "log") as (ear, far, forge):
            some = [forge.data(b"a"), *(forge.key_update() for _ in range(500)), forge.data(b"b")]
            await far.send_raw(b"".join(some))
            await ear.has(2)
            assert bytes(ear.data) == b"ab"
            more = [forge.data(b"c") if between and n % 100 == 0 else forge.key_update() for n in range(3000)]
            await far.send_raw(b"".join(more))
            assert "without data" in str(await ear.lost)

    play(scene)


def test_a_peer_that_asks_for_key_updates_and_reads_none_is_left(
    issued: Papers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secured, "LINGER_S", 0.1)

    async def scene() -> None:
        async with forging(issued, tmp_path / "log") as (ear, far, forge):
            made = cast(Secured, ear.transport)
            made.set_write_buffer_limits(high=64 * 1024)
            while not ear.congested.is_set():
                made.write(b"x" * 60_000)
                await asyncio.sleep(0.001)
            most = 0
            with contextlib.suppress(OSError):
                while not ear.lost.done():
                    await far.send_raw(b"".join([forge.data(b"a" * RECORD), *(forge.key_update() for _ in range(30))]))
                    await asyncio.sleep(0.001)
                    most = max(most, made.get_write_buffer_size())
                    assert len(ear.data) < 8 * MIB
            assert "does not read" in str(await ear.lost)
            assert most < 256 * 1024

    play(scene)


# --- writing, and the end ---------------------------------------------------------------------------------------------


@each_side
@each_version
def test_a_reader_that_stops_is_told_of_and_gets_all_later(issued: Papers, side: str, version: str) -> None:
    piece = random.Random(1).randbytes(200_000)

    async def scene() -> None:
        async with connected(issued, side, version) as (ear, far):
            assert ear.transport is not None
            ear.transport.set_write_buffer_limits(high=256 * 1024)
            written = 0
            while not ear.congested.is_set():
                ear.transport.write(piece if written % 2 else memoryview(bytearray(piece)))
                written += 1
                await asyncio.sleep(0)
            assert 256 * 1024 < ear.transport.get_write_buffer_size() < MIB
            assert await far.receive(written * len(piece)) == piece * written
            await ear.relieved.wait()

    play(scene)


@each_side
@each_version
@pytest.mark.parametrize("chatter", [0, 2 * MIB])
def test_all_that_was_written_arrives_before_the_end(issued: Papers, side: str, version: str, chatter: int) -> None:
    """Also to a peer that is sending meanwhile, which nobody reads any more."""
    sent = random.Random(2).randbytes(4 * MIB)

    async def scene() -> None:
        async with connected(issued, side, version) as (ear, far):
            assert ear.transport is not None
            ear.pause()
            talking = asyncio.create_task(far.send(b"x" * chatter))
            await asyncio.sleep(0.02)
            ear.transport.write(sent)
            ear.transport.close()
            ear.transport.write(b"too late")
            ear.transport.close()
            assert await far.receive() == sent
            await talking
            await far.end()
            assert await ear.lost is None
            assert ear.heard == ["made", "lost"]

    play(scene)


def test_a_peer_that_is_gone_is_told_of_while_something_is_written(issued: Papers) -> None:
    async def scene() -> None:
        async with connected(issued, "server") as (ear, far):
            assert ear.transport is not None
            far.socket.close()
            while not ear.lost.done():
                ear.transport.write(b"x" * 1000)
                await asyncio.sleep(0.001)
            ear.transport.write(b"y")
            ear.transport.abort()
            ear.transport.close()
            assert ear.heard[-1] == "lost"

    play(scene)


# --- memory -----------------------------------------------------------------------------------------------------------


class Allocated(ctypes.Structure):
    """`struct mallinfo2` (mallinfo(3))."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


def allocated() -> int:
    """Bytes that malloc has given out."""
    gc.collect()
    libc = ctypes.CDLL(None)
    libc.mallinfo2.restype = Allocated
    found = libc.mallinfo2()
    return int(found.uordblks + found.hblkhd)


def test_an_idle_connection_costs_little_more_than_openssl_alone(issued: Papers) -> None:
    count, bulk = 300, 300_000
    serving, trusting = issued.serving(), issued.trusting()

    def bare() -> object:
        here, there = ssl.MemoryBIO(), ssl.MemoryBIO()
        server = serving.wrap_bio(here, there, server_side=True)
        client = trusting.wrap_bio(there, here, server_hostname=NAME)
        unfinished = [client, server]
        while unfinished:
            for each in tuple(unfinished):
                try:
                    each.do_handshake()
                    unfinished.remove(each)
                except ssl.SSLWantReadError:
                    pass
        client.write(b"x" * 500)
        server.read(500)
        return server, client

    async def pair() -> tuple[Ear, Ear]:
        near, other = sockets()
        server, client = Ear(room=0), Ear(room=0)
        server._buffer = client._buffer = room
        raw, _ = await asyncio.get_running_loop().create_connection(lambda: client, sock=other)
        await asyncio.gather(secured.accept(near, server, serving), secured.upgrade(raw, client, trusting, NAME))
        return server, client

    async def carry(giving: Ear, taking: Ear, size: int) -> None:
        assert giving.transport is not None
        giving.transport.write(b"x" * size)
        await taking.has(size)
        taking.data = bytearray()

    room = memoryview(bytearray(192 * 1024))
    serving.num_tickets = 0
    kept = [bare() for _ in range(20)]
    before = allocated()
    kept += [bare() for _ in range(count)]
    alone = (allocated() - before) / count

    serving.num_tickets = 1

    async def scene() -> None:
        pairs = [await pair() for _ in range(20)]
        before = allocated()
        try:
            pairs += [await pair() for _ in range(count)]
            for server, client in pairs[20:]:
                # like a watch: a session ticket, then an event, and not another word of the client's
                await carry(server, client, 500)
            idle = (allocated() - before) / count
            for server, client in pairs[20:]:
                await carry(server, client, bulk)
                await carry(client, server, bulk)
            busy = (allocated() - before) / count
        finally:
            for ear in [ear for each in pairs for ear in each]:
                assert ear.transport is not None
                ear.transport.abort()
                await ear.lost
        assert idle < 1.4 * alone
        assert busy < idle + 4 * 1.5 * PIECE

    play(scene)
