"""What becomes of an answer that this process cannot take, or that nobody waits for any more."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import pytest

from proxy import ports
from proxy.gateway.channel import decoder
from proxy.gateway.link import HostLink
from proxy.model import Endpoint

PEER, DIALLED = Endpoint("192.0.2.1", 40000), Endpoint("192.0.2.10", 5432)


def attributed(request: int) -> bytes:
    return msgspec.msgpack.encode(
        ports.Attributed(
            id=request,
            session="20261124-120000-abcdef",
            chain=None,
            target="",
            protocol="",
            refusal="",
            hint="",
            records=1,
            digest="00",
        )
    )


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [os.dup(0)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, hard))
    try:
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                taken.append(os.dup(0))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for each in taken:
            os.close(each)


def received(host: socket.socket) -> object:
    return decoder(ports.FromWorker).decode(host.recv(ports.MAX_MESSAGE))


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    host, worker = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with host, worker:
        yield host, worker


def test_without_a_descriptor_for_the_recording_the_session_is_given_back(
    ends: tuple[socket.socket, socket.socket],
) -> None:
    host, worker = ends
    lost: list[str] = []

    async def scenario() -> None:
        link = HostLink(worker, lambda _push, _descriptors: None, lost.append)
        asking = asyncio.ensure_future(link.attribute(PEER, DIALLED))
        await asyncio.sleep(0)
        request = received(host)
        assert isinstance(request, ports.Attribute)
        socket.send_fds(host, [attributed(request.id)], [0])
        with no_descriptor_left(), pytest.raises(ports.Unavailable, match="no room for more connections"):
            await asking

    asyncio.run(scenario())
    given_back = received(host)
    assert isinstance(given_back, ports.SessionClosed)
    assert (given_back.session, given_back.records, given_back.digest) == ("20261124-120000-abcdef", 1, "00")
    assert lost == []


def test_an_answer_that_comes_too_late_is_given_back(ends: tuple[socket.socket, socket.socket]) -> None:
    host, worker = ends

    async def scenario() -> None:
        link = HostLink(worker, lambda _push, _descriptors: None, lambda _why: None)
        asking = asyncio.ensure_future(link.attribute(PEER, DIALLED))
        await asyncio.sleep(0)
        request = received(host)
        assert isinstance(request, ports.Attribute)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        before = len(os.listdir("/proc/self/fd"))
        socket.send_fds(host, [attributed(request.id)], [0])
        await asyncio.sleep(0.05)
        assert len(os.listdir("/proc/self/fd")) == before

    asyncio.run(scenario())
    given_back = received(host)
    assert isinstance(given_back, ports.SessionClosed)
    assert given_back.session == "20261124-120000-abcdef"
