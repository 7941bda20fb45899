"""Messages over a `SOCK_SEQPACKET` Unix socket with descriptors by SCM_RIGHTS: one end in a worker, one in the host
agent.

Order is kept and no message is dropped: what the socket does not take at once waits in a bounded queue; a peer that
lets the queue overflow is treated as gone. Blind spot: it knows nothing of requests and replies.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import msgspec

from proxy.ports import MAX_MESSAGE

MAX_QUEUED = 4096
"""Messages that wait for a peer that does not read."""
MAX_DESCRIPTORS = 4

_encoder = msgspec.msgpack.Encoder()

M = TypeVar("M")


class Channel(Generic[M]):
    """`on_message(message, descriptors)` owns the descriptors; `on_closed(why)` is called once."""

    def __init__(
        self,
        sock: socket.socket,
        decoder: msgspec.msgpack.Decoder[M],
        on_message: Callable[[M, list[int]], None],
        on_closed: Callable[[str], None],
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._decoder = decoder
        self._on_message = on_message
        self._on_closed = on_closed
        self._queue: deque[tuple[bytes, list[int]]] = deque()
        self._loop = asyncio.get_running_loop()
        self._open = True
        self._loop.add_reader(sock, self._readable)

    def send(self, message: msgspec.Struct, descriptors: Sequence[int] = ()) -> None:
        """Sends one message. The descriptors are duplicated where they have to wait: the caller keeps its own."""
        if not self._open:
            return
        data = _encoder.encode(message)
        if len(data) > MAX_MESSAGE:
            raise ValueError(f"message `{type(message).__name__}` of `{len(data)}` bytes exceeds `{MAX_MESSAGE}`")
        if self._queue:
            self._enqueue(data, descriptors)
            return
        try:
            self._write(data, descriptors)
        except BlockingIOError:
            self._enqueue(data, descriptors)
            self._loop.add_writer(self._sock, self._writable)
        except OSError as error:
            self.close(f"peer is gone: {error.strerror}")

    def finish(self, why: str) -> None:
        """The peer has ended: takes what it had still sent, and closes."""
        if self._open:
            self._readable()
        self.close(why)

    def close(self, why: str) -> None:
        """Closes the channel; `on_closed` hears of it. Idempotent."""
        if not self._open:
            return
        self._open = False
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        for _, descriptors in self._queue:
            _close_all(descriptors)
        self._queue.clear()
        self._sock.close()
        self._on_closed(why)

    def _enqueue(self, data: bytes, descriptors: Sequence[int]) -> None:
        if len(self._queue) >= MAX_QUEUED:
            self.close(f"peer left `{MAX_QUEUED}` messages unread")
            return
        self._queue.append((data, [os.dup(descriptor) for descriptor in descriptors]))

    def _write(self, data: bytes, descriptors: Sequence[int]) -> None:
        if descriptors:
            socket.send_fds(self._sock, [data], descriptors)
        else:
            self._sock.send(data)

    def _writable(self) -> None:
        while self._queue:
            data, descriptors = self._queue[0]
            try:
                self._write(data, descriptors)
            except BlockingIOError:
                return
            except OSError as error:
                self.close(f"peer is gone: {error.strerror}")
                return
            self._queue.popleft()
            _close_all(descriptors)
        self._loop.remove_writer(self._sock)

    def _readable(self) -> None:
        while self._open:
            try:
                data, descriptors, flags, _ = socket.recv_fds(
                    self._sock, MAX_MESSAGE + 1, MAX_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
                )
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self.close(f"peer is gone: {error.strerror}")
                return
            if not data:
                _close_all(descriptors)
                self.close("peer closed")
                return
            if flags & socket.MSG_TRUNC:
                _close_all(descriptors)
                self.close("peer sent an oversized message")
                return
            if flags & socket.MSG_CTRUNC:
                # this process is at its limit of descriptors: who needs one finds that there is none
                _close_all(descriptors)
                descriptors = []
            try:
                message = self._decoder.decode(data)
            except (msgspec.DecodeError, msgspec.ValidationError) as error:
                _close_all(descriptors)
                self.close(f"peer sent a malformed message: {error}")
                return
            self._on_message(message, descriptors)


def _close_all(descriptors: Sequence[int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def decoder(union: Any) -> msgspec.msgpack.Decoder[Any]:
    """A strict decoder for one direction's union of messages (`ports.FromWorker`, `ports.ToWorker`)."""
    return msgspec.msgpack.Decoder(union)
