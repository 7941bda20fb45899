"""What the kernel programs tell reaches the reader in order, each event once; what finds no room is gone."""

from __future__ import annotations

import asyncio
import ctypes
import os
import select
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hostagent import kernel
from hostagent.kernel import abi, bpf
from proxy.model import Endpoint
from tests.kernel.bed import Bed

_RINGBUF, _SOCKET_FILTER, _SO_ATTACH_BPF = 27, 1, 50
_EVENT = abi.Event(
    time_ns=1 << 40,
    node=77 << 8,
    netns=3,
    socket=4,
    source=(192, 0, 2, 1),
    dest=tuple(range(16)),
    source_port=40_000,
    dest_port=6000,
    family=4,
    detail=9,
    type=1,
    tgid=1234,
)


@contextmanager
def _told_by_datagram(ring: int, event: bytes) -> Iterator[socket.socket]:
    """Each datagram to this socket tells the event, by a program that then drops the datagram."""
    code = bytearray()
    for at in range(0, len(event), 4):
        # *(u32 *)(r10 - size + at) = …
        code += bytes([0x62, 10]) + (at - len(event)).to_bytes(2, "little", signed=True) + event[at : at + 4]
    code += bytes([0x18, 0x11, 0, 0]) + ring.to_bytes(4, "little") + bytes(8)
    code += bytes([0xBF, 0xA2, 0, 0, 0, 0, 0, 0]) + bytes([0x07, 2, 0, 0])
    code += (-len(event)).to_bytes(4, "little", signed=True)
    code += bytes([0xB7, 3, 0, 0]) + len(event).to_bytes(4, "little") + bytes([0xB7, 4, 0, 0, 0, 0, 0, 0])
    code += bytes([0x85, 0, 0, 0]) + (130).to_bytes(4, "little")
    code += bytes([0xB7, 0, 0, 0, 0, 0, 0, 0]) + bytes([0x95, 0, 0, 0, 0, 0, 0, 0])
    program = bpf.program_load(_SOCKET_FILTER, bytes(code))
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with here, there:
        there.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_BPF, program)
        os.close(program)
        here.setblocking(False)
        yield here


def _ring(size: int) -> int:
    return bpf.map_create(_RINGBUF, 0, 0, size)


def test_events_come_in_order_and_whole() -> None:
    ring = _ring(4096)
    with _told_by_datagram(ring, bytes(_EVENT)) as tell:
        events = kernel.Events(os.dup(ring))
        try:
            assert events.read(10) == []
            assert not select.select([events.fileno()], [], [], 0)[0]
            # many times the size of the ring, so that entries lie across its end
            for turn in range(500):
                tell.send(b"1")
                assert select.select([events.fileno()], [], [], 5)[0], turn
                (event,) = events.read(10)
                assert event == kernel.Event(
                    type=1,
                    detail=9,
                    node=77 << 8,
                    tgid=1234,
                    netns=3,
                    socket=4,
                    time_ns=1 << 40,
                    source=Endpoint("192.0.2.1", 40_000),
                    dest=Endpoint("0.1.2.3", 6000),
                )
        finally:
            events.close()
            os.close(ring)


def test_no_more_is_read_than_was_asked_for() -> None:
    ring = _ring(4096)
    with _told_by_datagram(ring, bytes(_EVENT)) as tell:
        events = kernel.Events(os.dup(ring))
        try:
            for _ in range(5):
                tell.send(b"1")
            assert [len(events.read(2)) for _ in range(4)] == [2, 2, 1, 0]
        finally:
            events.close()
            os.close(ring)


def test_a_full_ring_takes_no_more_until_it_is_read() -> None:
    ring = _ring(4096)
    with _told_by_datagram(ring, bytes(_EVENT)) as tell:
        events = kernel.Events(os.dup(ring))
        try:
            taken = 4096 // (abi.EVENT_BYTES + 8)
            for _ in range(taken):
                tell.send(b"1")
            tell.send(b"1")
            assert len(events.read(1000)) == taken
            tell.send(b"1")
            assert len(events.read(1000)) == 1
        finally:
            events.close()
            os.close(ring)


async def _handled(tell: socket.socket, events: kernel.Events, number: int) -> list[kernel.Event]:
    handled: list[kernel.Event] = []
    all_of_them = asyncio.Event()

    def handle(event: kernel.Event) -> None:
        handled.append(event)
        if len(handled) == number:
            all_of_them.set()

    for _ in range(number):
        tell.send(b"1")
    following = asyncio.create_task(kernel.follow(events, {1: handle}))
    async with asyncio.timeout(5):
        await all_of_them.wait()
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    return handled


def test_handlers_get_their_events_a_few_at_a_time() -> None:
    ring = _ring(65536)
    with _told_by_datagram(ring, bytes(_EVENT)) as tell:
        events = kernel.Events(os.dup(ring))
        try:
            begun = time.monotonic()
            assert len(asyncio.run(_handled(tell, events, 50))) == 50
            assert time.monotonic() - begun > 0.1, "nothing bounds what a flood of events costs"
        finally:
            events.close()
            os.close(ring)


def test_the_ring_is_pinned_and_its_losses_are_counted(shared: Bed) -> None:
    events = kernel.Events.open(shared.settings.pin_dir)
    try:
        assert events.read(1) == []
        assert shared.pins.counters()["events_lost"] == 0
    finally:
        events.close()


def test_a_ring_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(kernel.KernelError, match="cannot open the ring buffer"):
        kernel.Events.open(tmp_path)


def test_an_event_has_no_gap() -> None:
    assert sum(ctypes.sizeof(kind) for _name, kind in abi.Event._fields_) == abi.EVENT_BYTES
