"""SPDY between two sides, plain or inside binary WebSocket messages: `SpdyRelay`, and its table of streams.

    SYN_STREAM (client) ---> open ---> each side ends its half (FIN) ---> gone
                               \\----> either side resets it ------------> gone

A stream has two numbers: the client's, and the one under which the server is told of it. Servers refuse a number that
is lower than an earlier one, and a stream that waits for a ruling is overtaken by others.

What comes for a stream that is gone is dropped, as both ends do. SETTINGS, PING, GOAWAY and the connection's own window
pass, and so do WebSocket's pings, pongs and close frames. Towards the server a WebSocket frame is masked with the key
that the client chose for its own last one.

Blind spot: the number in the server's GOAWAY stays the server's; clients of Kubernetes do not look at it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import msgspec

from proxy.protocols.base import Buffer, PeerViolation, Send, Side
from proxy.protocols.kubernetes import spdy, websocket
from proxy.protocols.kubernetes.spdy import Data, Frame, Headers, Reset, SynReply, SynStream, Unbound, WindowUpdate

MAX_STREAMS = 2048
"""Streams that are open at a time."""

STREAM_TYPE: Final = "streamtype"
PORT: Final = "port"
REQUEST_ID: Final = "requestid"
_TELLING = frozenset({STREAM_TYPE, PORT, REQUEST_ID})

OTHER: Final = {Side.CLIENT: Side.SERVER, Side.SERVER: Side.CLIENT}


class Stream:
    """`kind` is the `streamType` that it was opened with; `headers` are those that tell what it is for. `ended` are the
    sides that will send no more on it; `reset` says that one of them broke it off. `numbers` are what each side calls
    it; the server has none before it is told of it."""

    __slots__ = ("ended", "headers", "kind", "numbers", "replied", "reset")

    def __init__(self, frame: SynStream) -> None:
        self.numbers = {Side.CLIENT: frame.stream}
        self.headers = {name: value for name, value in frame.headers if name in _TELLING}
        self.kind = self.headers.get(STREAM_TYPE, "")
        self.ended: set[Side] = set()
        self.reset = False
        self.replied = False

    @property
    def gone(self) -> bool:
        return self.reset or len(self.ended) == 2


class SpdyRelay:
    """Reads what comes, holds it against the table of streams, and writes what is to go on."""

    def __init__(self, *, in_websocket: bool) -> None:
        self._readers = {side: spdy.Reader(side) for side in Side}
        self._writers = {side: spdy.Writer() for side in Side}
        self._outer = {side: websocket.Reader(side) for side in Side} if in_websocket else None
        self._streams: dict[Side, dict[int, Stream]] = {side: {} for side in Side}
        self._last = {Side.CLIENT: 0, Side.SERVER: -1}
        self._out: dict[Side, bytearray] = {side: bytearray() for side in Side}
        self._wrapped: dict[Side, bytearray] = {side: bytearray() for side in Side}

    def read(self, side: Side, data: Buffer) -> Iterator[tuple[Stream, Frame]]:
        """The frames that belong to open streams; what is to become of each is for the caller to say, before it takes
        the next one. Raises `PeerViolation`."""
        for payload in self._unwrap(side, data):
            for frame in self._readers[side].feed(payload):
                if isinstance(frame, Unbound) or (isinstance(frame, WindowUpdate) and not frame.stream):
                    self._out[OTHER[side]] += self._writers[OTHER[side]].write(frame)
                    continue
                stream = self._hold_against(side, frame)
                if stream is not None:
                    yield stream, frame
                    self._forget_if_gone(stream)

    def write(self, side: Side, stream: Stream, frame: Frame) -> None:
        """The next frame for that side, whatever number it has. The first that the server gets is the one that opens
        the stream."""
        if isinstance(frame, SynStream):
            number = self._last[side] = self._last[side] + 2
            stream.numbers[side] = number
            if not stream.gone:
                self._streams[side][number] = stream
        number = stream.numbers[side]
        assert not isinstance(frame, Unbound)
        if frame.stream != number:
            frame = msgspec.structs.replace(frame, stream=number)
        self._out[side] += self._writers[side].write(frame)

    def end(self, stream: Stream, side: Side) -> None:
        """Nothing of that side will come for this stream: it was never told of it."""
        stream.ended.add(side)
        self._forget_if_gone(stream)

    def take(self) -> list[Send]:
        """What is to be sent by now."""
        for side in Side:
            self._wrap(side)
        sends = [Send(side, bytes(data)) for side, data in self._wrapped.items() if data]
        for data in self._wrapped.values():
            data.clear()
        return sends

    def _unwrap(self, side: Side, data: Buffer) -> Iterator[Buffer]:
        if self._outer is None:
            yield data
            return
        for piece in self._outer[side].feed(data):
            if piece.control:
                self._wrap(OTHER[side])
                self._wrapped[OTHER[side]] += piece.raw
            elif piece.opcode == websocket.TEXT:
                raise PeerViolation("a text message, where SPDY comes in binary ones", side)
            else:
                yield piece.payload

    def _wrap(self, side: Side) -> None:
        data = self._out[side]
        if data:
            if self._outer is None:
                self._wrapped[side] += data
            else:
                key = self._outer[Side.CLIENT].key if side is Side.SERVER else b""
                self._wrapped[side] += websocket.frame(websocket.BINARY, bytes(data), key)
            data.clear()

    def _hold_against(self, side: Side, frame: Frame) -> Stream | None:
        """The frame's stream; None when the frame is to be dropped."""
        assert not isinstance(frame, Unbound)
        if isinstance(frame, SynStream):
            return self._open(side, frame)
        if frame.stream == 0 or frame.stream > self._last[side] or not frame.stream % 2:
            raise PeerViolation(f"SPDY: stream `{frame.stream}` was never opened", side)
        stream = self._streams[side].get(frame.stream)
        if stream is None:
            return None
        match frame:
            case Reset():
                stream.reset = True
                return stream
            case WindowUpdate():
                return stream
            case SynReply():
                if side is Side.CLIENT or stream.replied:
                    raise PeerViolation(f"SPDY: a reply on stream `{frame.stream}` that nobody waits for", side)
                stream.replied = True
            case Headers():
                if any(name in _TELLING for name, _ in frame.headers):
                    raise PeerViolation("SPDY: headers that would change what a stream is for", side)
        if side in stream.ended:
            if isinstance(frame, Data) and not frame.data:
                return None
            raise PeerViolation(f"SPDY: something follows the end of stream `{frame.stream}`", side)
        if frame.final:
            stream.ended.add(side)
        return stream

    def _open(self, side: Side, frame: SynStream) -> Stream:
        if side is Side.SERVER:
            raise PeerViolation("SPDY: the server opens a stream", side)
        if frame.stream <= self._last[side] or not frame.stream % 2:
            raise PeerViolation(f"SPDY: stream `{frame.stream}` is opened after `{self._last[side]}`", side)
        if len(self._streams[side]) >= MAX_STREAMS:
            raise PeerViolation(f"SPDY: more than `{MAX_STREAMS}` streams are open", side)
        self._last[side] = frame.stream
        stream = self._streams[side][frame.stream] = Stream(frame)
        if frame.final:
            stream.ended.add(side)
        return stream

    def _forget_if_gone(self, stream: Stream) -> None:
        if stream.gone:
            for side, number in stream.numbers.items():
                self._streams[side].pop(number, None)
