"""Whole sessions with TLS on both sides: what a server sends before it ends reaches a client that reads slowly."""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import uvloop

from proxy.gateway import peer, session
from proxy.gateway.session import Session
from proxy.model import Endpoint, Target, TlsMode
from proxy.protocols import base
from proxy.protocols.base import Side
from tests.proxy.gateway.wire import DEADLINE_S, NAME, Far, Papers, papers, sockets
from tests.proxy.recording.test_recording import begin

MIB = 1024 * 1024


class Relay:
    """A machine that looks at nothing: TLS first, on both sides, and then what comes goes over."""

    incomplete = unanswered = False

    def __init__(self) -> None:
        self.ready = asyncio.Event()
        self._steps: list[base.Command | None] = [base.Connect(), base.StartTls(Side.SERVER), None]

    def begin(self) -> base.Commands:
        return [base.StartTls(Side.CLIENT)]

    def notify(self, event: base.Event) -> base.Commands:
        step = self._steps.pop(0)
        if step is None:
            self.ready.set()
        return [step] if step is not None else []

    def receive(self, side: Side, data: base.Buffer) -> base.Commands:
        return [base.Send(Side.SERVER if side is Side.CLIENT else Side.CLIENT, data)]

    def eof(self, side: Side) -> base.Commands:
        return [base.Close(f"the {side.value} has ended")]


class Worker(SimpleNamespace):
    """What a session asks of its worker, without a host agent."""

    def __init__(self, context: ssl.SSLContext) -> None:
        super().__init__(full=False, connections=0, ended=asyncio.Event())
        self.link = SimpleNamespace(closed=lambda message: self.ended.set())
        self.spawn = asyncio.create_task
        self._context = context

    def closed(self, ended: Session) -> None:
        pass

    async def serving_context(self, *what: object) -> ssl.SSLContext:
        return self._context


@asynccontextmanager
async def relayed(issued: Papers, folder: Path, version: str = "1.3") -> AsyncIterator[tuple[Session, Far, Far]]:
    """A session that stands, its client and its server."""
    loop = asyncio.get_running_loop()
    worker = Worker(issued.serving(version))
    made = Session(cast(Any, worker))
    made.recording = begin(folder / "recording")
    near, other = sockets()
    client = Far(other, issued.trusting(version), serves=False)
    made._accepted = near
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.setblocking(False)
        address, port = listening.getsockname()
        made._dialled = Endpoint(address, port)
        made.target = Target(
            "db", "relay", (made._dialled,), TlsMode.VERIFY_FULL, NAME, issued.ca_pem, credential="none"
        )
        relay = Relay()
        await made._admit(cast(base.Machine, relay))
        await client.shake_hands()
        accepted, _ = await loop.sock_accept(listening)
        server = Far(accepted, issued.serving(version), serves=True)
        await server.shake_hands()
        await relay.ready.wait()
    try:
        yield made, client, server
        await worker.ended.wait()
    finally:
        client.socket.close()
        server.socket.close()
        await worker.ended.wait()


@pytest.fixture(scope="module")
def issued(tmp_path_factory: pytest.TempPathFactory) -> Papers:
    return papers(tmp_path_factory.mktemp("papers"))


def play(scene: Any) -> None:
    async def played() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await scene()

    uvloop.run(played())


@pytest.mark.parametrize("version", ["1.2", "1.3"])
@pytest.mark.parametrize("abrupt", [False, True], ids=["close_notify", "FIN alone"])
def test_the_tail_reaches_a_client_that_reads_slowly(
    issued: Papers, tmp_path: Path, version: str, abrupt: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when it needs longer than a session has to deliver its last bytes, as long as it goes on reading."""
    monkeypatch.setattr(session, "FLUSH_TIMEOUT_S", 0.6)
    sent = random.Random(3).randbytes(20 * MIB)

    async def scene() -> None:
        async with relayed(issued, tmp_path, version) as (made, client, server):

            async def serve() -> None:
                await server.send(sent)
                if abrupt:
                    server.socket.shutdown(1)
                else:
                    await server.end()

            serving = asyncio.create_task(serve())
            got = bytearray()
            while len(got) < len(sent):
                got += await client.receive(MIB)
                await asyncio.sleep(0.1)
            assert got == sent
            assert await client.receive() == b""
            await serving
            assert made._reason == "the server has ended"

    play(scene)


def test_a_client_that_stops_reading_stops_the_server_and_holds_nobody_for_ever(
    issued: Papers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "FLUSH_TIMEOUT_S", 0.2)

    async def scene() -> None:
        async with relayed(issued, tmp_path) as (made, _, server):

            async def pour() -> None:
                while True:
                    await server.send(b"x" * MIB)

            pouring = asyncio.create_task(pour())
            while not made.client.congested:  # noqa: ASYNC110  # nobody tells a test
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.3)  # long enough for much more to come
            assert made.client.transport is not None
            assert made.client.transport.get_write_buffer_size() < peer.HIGH_WATER + 2 * peer.READ_AT_ONCE
            pouring.cancel()
            made._close("enough")
            await made.worker.ended.wait()  # type: ignore[attr-defined]

    play(scene)


def test_what_a_client_sends_last_reaches_the_server(issued: Papers, tmp_path: Path) -> None:
    sent = random.Random(4).randbytes(5 * MIB)

    async def scene() -> None:
        async with relayed(issued, tmp_path) as (_, client, server):

            async def ask() -> None:
                await client.send(sent)
                await client.end()

            asking = asyncio.create_task(ask())
            await asyncio.sleep(0.05)
            assert await server.receive(len(sent)) == sent
            assert await server.receive() == b""
            await asking
            await server.end()

    play(scene)
