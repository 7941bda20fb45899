"""Reads the ring buffer that the kernel programs tell the host agent by: mapped memory, no library.

Events come in order, each once. While nobody reads, the ring keeps what it has room for, and the programs count the
rest (`events_lost` of `Pins.counters`). There is one reader: a second one takes from the first.

Blind spot: what is read is ordered as x86-64 orders loads. Hosts that reorder them may show an entry before all of it
is written; the processor has then to run ahead over some hundred instructions of the interpreter.

Source: kernel/bpf/ringbuf.c (positions, header of an entry).
"""

from __future__ import annotations

import asyncio
import ipaddress
import mmap
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

import msgspec

from hostagent.kernel import abi, bpf
from hostagent.kernel.settings import KernelError
from proxy.model import Endpoint

TAKEN_MAX = 8
PAUSE_S = 0.02

_BUSY, _DISCARDED = 1 << 31, 1 << 30
_HEADER = struct.Struct("=II")


class Event(msgspec.Struct, frozen=True):
    """`type` is one of `abi.EVENTS`, and says what `detail` is; `node` is the process image and `tgid` the process, 0
    when not known; `netns` and `socket` are the kernel's cookies; `time_ns` is CLOCK_MONOTONIC."""

    type: int
    detail: int
    node: int
    tgid: int
    netns: int
    socket: int
    time_ns: int
    source: Endpoint | None
    dest: Endpoint | None


class Events:
    """The reader's end of the ring. `fileno` can be waited for: it is readable as long as there is something."""

    def __init__(self, ring: int) -> None:
        """Takes over the descriptor. Raises `OSError`."""
        self._fd = ring
        try:
            self._bytes = bpf.map_entries(ring)
            page = mmap.PAGESIZE
            # the kernel lets the reader's position be written, and nothing else; data is there twice, one after another
            self._position = mmap.mmap(ring, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            self._written = mmap.mmap(ring, page + 2 * self._bytes, mmap.MAP_SHARED, mmap.PROT_READ, offset=page)
        except BaseException:
            os.close(ring)
            raise

    @classmethod
    def open(cls, pins: Path) -> Self:
        """Raises `KernelError`."""
        try:
            return cls(bpf.object_get(pins / abi.RING))
        except OSError as error:
            raise KernelError(f"cannot open the ring buffer in `{pins}`: {error}; restart hopgate") from error

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        """Repeatable."""
        if self._fd >= 0:
            self._position.close()
            self._written.close()
            os.close(self._fd)
            self._fd = -1

    def read(self, limit: int) -> list[Event]:
        """At most `limit` of what is there."""
        found: list[Event] = []
        (at,) = abi.U64.unpack_from(self._position)
        while len(found) < limit and at < abi.U64.unpack_from(self._written)[0]:
            start = mmap.PAGESIZE + at % self._bytes
            (length, _page) = _HEADER.unpack_from(self._written, start)
            if length & _BUSY:
                break
            size = length & ~_DISCARDED
            if not length & _DISCARDED and size == abi.EVENT_BYTES:
                found.append(_event(self._written[start + _HEADER.size : start + _HEADER.size + size]))
            at += _HEADER.size + size + 7 & ~7
            abi.U64.pack_into(self._position, 0, at)
        return found


async def follow(events: Events, handlers: Mapping[int, Callable[[Event], None]]) -> None:
    """Gives each event to the handler of its type, until it is cancelled; no more than `TAKEN_MAX` in `PAUSE_S`,
    whatever somebody makes happen: the rest waits in the ring, or is lost there. What has no handler is passed over."""
    loop = asyncio.get_running_loop()
    while True:
        readable = asyncio.Event()
        loop.add_reader(events.fileno(), readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(events.fileno())
        for event in events.read(TAKEN_MAX):
            handler = handlers.get(event.type)
            if handler is not None:
                handler(event)
        await asyncio.sleep(PAUSE_S)


def _event(data: bytes) -> Event:
    read = abi.Event.from_buffer_copy(data)
    return Event(
        read.type,
        read.detail,
        read.node,
        read.tgid,
        read.netns,
        read.socket,
        read.time_ns,
        _endpoint(read.family, bytes(read.source), read.source_port),
        _endpoint(read.family, bytes(read.dest), read.dest_port),
    )


def _endpoint(family: int, packed: bytes, port: int) -> Endpoint | None:
    if not family:
        return None
    return Endpoint(str(ipaddress.ip_address(packed[: 4 if family == 4 else 16])), port)
