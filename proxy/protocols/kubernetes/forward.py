"""Port-forwards: every connection that is opened inside one is asked about like a connection to that port.

    waiting ---> open ---> over         what comes for it waits; then it passes, and is counted
         \\-----> denied                 the client is told on the connection's error channel; the others go on

One question is asked at a time, in the order of the connections. What is recorded of a connection is its ruling, and at
its end the bytes that went each way, or the server's error.

`SpdyForward` is the protocol in which a connection is a pair of SPDY streams (`data`, `error`) with one `requestID`.
`ChannelForward` is the older one, in which the ports are named in the request and each has two channels of a WebSocket
connection (2i data, 2i+1 error), on which the server first sends the port; there the server dials before it hears of
our ruling on the connection, so the request's own ruling is what protects the port, and ours keeps the bytes apart.

Blind spots: the bytes inside a connection are not looked into; kubectl itself ends its whole port-forward when any
connection's error channel says something, be it our denial or the server's `connection refused`.
"""

from __future__ import annotations

import binascii
import enum
import re
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Final

from proxy.model import Decision, Operation, OperationKind, Phase, RequestFacts, Ruling
from proxy.protocols.base import AskRuling, Buffer, Command, Completed, PeerViolation, Reply, Send, Side
from proxy.protocols.kubernetes import websocket
from proxy.protocols.kubernetes.relay import OTHER, PORT, REQUEST_ID, SpdyRelay, Stream
from proxy.protocols.kubernetes.requests import PROTOCOL, told_inside
from proxy.protocols.kubernetes.spdy import Data, Frame, Headers, SynReply, SynStream
from proxy.protocols.kubernetes.websocket import ChannelReader, Chunk

MAX_CONNECTIONS = 1024
"""Connections inside one port-forward, at a time."""
MAX_KEPT = 256 * 1024
"""Bytes that wait for rulings before no more are read of the client; the server may not send more than this."""
MAX_REQUEST_ID = 128
MAX_ERROR = 1024
"""Bytes of an error that are recorded."""

DATA: Final = "data"
ERROR: Final = "error"
ABANDONED = "the client gave it up before it was ruled on"

_PORT = re.compile(r"[1-9][0-9]{0,4}")


class _State(enum.Enum):
    WAITING = enum.auto()
    OPEN = enum.auto()
    DENIED = enum.auto()


class _Connection:
    """One connection inside the port-forward: its state, and what is counted of it."""

    __slots__ = ("error", "id", "port", "received", "refusal", "sent", "state")

    def __init__(self, id: int, port: int) -> None:
        self.id = id
        self.port = port
        self.state = _State.WAITING
        self.refusal = ""
        self.sent = 0
        self.received = 0
        self.error = bytearray()

    def count(self, side: Side, data: bytes, *, error: bool) -> None:
        if error:
            self.error += data[: MAX_ERROR - len(self.error)]
        elif side is Side.CLIENT:
            self.sent += len(data)
        else:
            self.received += len(data)

    def completed(self) -> Completed:
        error = self.error.decode("utf-8", "backslashreplace")
        return Completed(self.id, f"{self.sent} bytes sent, {self.received} received", error=error)


class _Questions:
    """Asks about connections, one at a time."""

    def __init__(self, facts: RequestFacts, next_id: Callable[[], int]) -> None:
        self._facts = replace(facts, verb="create", subresource="portforward", body=None)
        self._next_id = next_id
        self._queue: deque[_Connection] = deque()
        self._asked: _Connection | None = None
        self.opened = 0

    def ask(self, port: int) -> _Connection:
        connection = _Connection(self._next_id(), port)
        self._queue.append(connection)
        return connection

    def take(self) -> list[Command]:
        """The next question, when none is open. It comes after what is to be sent: the answer may send more."""
        if self._asked is not None or not self._queue:
            return []
        self._asked = self._queue.popleft()
        facts = replace(self._facts, ports=(self._asked.port,))
        text = told_inside(facts)
        operation = Operation(
            protocol=PROTOCOL,
            kind=OperationKind.FORWARD,
            phase=Phase.EXECUTE,
            text=text,
            recorded_text=text,
            statements=(),
            once=True,
            requests=(facts,),
        )
        return [AskRuling(self._asked.id, operation)]

    def settle(self, ask: AskRuling, reply: Reply) -> _Connection:
        connection = self._asked
        assert connection is not None and connection.id == ask.id and isinstance(reply, Ruling)
        self._asked = None
        if reply.decision is Decision.ALLOW:
            connection.state = _State.OPEN
            self.opened += 1
        else:
            connection.state = _State.DENIED
            message = reply.message or "denied by the gateway"
            connection.refusal = f"{message} ({reply.hint})" if reply.hint else message
        return connection

    def told(self) -> str:
        return f"{self.opened} connection{'' if self.opened == 1 else 's'}"


class _Pair:
    """The streams of one connection. `kept` are its frames while it waits."""

    __slots__ = ("connection", "kept", "streams")

    def __init__(self, connection: _Connection) -> None:
        self.connection = connection
        self.streams: dict[str, Stream] = {}
        self.kept: list[tuple[Stream, Frame]] = []

    @property
    def over(self) -> bool:
        gone = [stream.gone for stream in self.streams.values()]
        return all(gone) and (len(gone) == 2 or any(stream.reset for stream in self.streams.values()))


class SpdyForward:
    """A port-forward over SPDY, plain or inside WebSocket messages."""

    def __init__(self, id: int, facts: RequestFacts, next_id: Callable[[], int], *, in_websocket: bool) -> None:
        self.closed = False
        self._id = id
        self._relay = SpdyRelay(in_websocket=in_websocket)
        self._questions = _Questions(facts, next_id)
        self._pairs: dict[str, _Pair] = {}
        self._kept = 0

    @property
    def unanswered(self) -> bool:
        return self._kept > MAX_KEPT

    def begin(self) -> list[Command]:
        return []

    def receive(self, side: Side, data: Buffer) -> list[Command]:
        if self.closed:
            return []
        commands: list[Command] = []
        for stream, frame in self._relay.read(side, data):
            pair = self._pair(stream)
            if side is Side.CLIENT:
                self._from_client(pair, stream, frame)
            else:
                self._from_server(pair, stream, frame)
            commands += self._end_if_over(pair, stream)
        return [*commands, *self._relay.take(), *self._questions.take()]

    def answer(self, ask: AskRuling, reply: Reply) -> list[Command]:
        if self.closed:
            return []
        connection = self._questions.settle(ask, reply)
        request, pair = next(item for item in self._pairs.items() if item[1].connection is connection)
        kept, pair.kept = pair.kept, []
        self._kept -= sum(_size(frame) for _, frame in kept)
        commands: list[Command] = []
        if any(stream.reset for stream in pair.streams.values()):
            if connection.state is _State.OPEN:
                commands.append(Completed(connection.id, error=ABANDONED))
            connection.state = _State.DENIED
            if pair.over:
                del self._pairs[request]
        else:
            for stream, frame in kept:
                self._from_client(pair, stream, frame)
            if kept:
                commands += self._end_if_over(pair, kept[-1][0])
        return [*commands, *self._relay.take(), *self._questions.take()]

    def eof(self, side: Side) -> list[Command]:
        if self.closed:
            return []
        self.closed = True
        self._kept = 0
        open_ones = (pair.connection for pair in self._pairs.values() if pair.connection.state is _State.OPEN)
        return [*(connection.completed() for connection in open_ones), Completed(self._id, self._questions.told())]

    def _pair(self, stream: Stream) -> _Pair:
        """The connection that a stream belongs to; the first of its streams makes it."""
        request = stream.headers.get(REQUEST_ID, "")
        pair = self._pairs.get(request)
        if pair is not None and pair.streams.get(stream.kind) is stream:
            return pair
        port = stream.headers.get(PORT, "")
        if not _PORT.fullmatch(port) or int(port) > 65535:
            raise PeerViolation(f"a stream for port `{port[:16]}`, which is none", Side.CLIENT)
        if not 0 < len(request) <= MAX_REQUEST_ID or "\0" in request:
            raise PeerViolation("a stream without `requestID`, or with one that is too long", Side.CLIENT)
        if stream.kind not in (DATA, ERROR):
            raise PeerViolation(f"a stream for `{stream.kind[:32]}` in a port-forward", Side.CLIENT)
        if pair is None:
            if len(self._pairs) >= MAX_CONNECTIONS:
                raise PeerViolation(f"more than `{MAX_CONNECTIONS}` connections", Side.CLIENT)
            pair = self._pairs[request] = _Pair(self._questions.ask(int(port)))
        elif stream.kind in pair.streams or int(port) != pair.connection.port:
            raise PeerViolation("two streams of one connection do the same, or go to different ports", Side.CLIENT)
        pair.streams[stream.kind] = stream
        return pair

    def _from_client(self, pair: _Pair, stream: Stream, frame: Frame) -> None:
        connection = pair.connection
        match connection.state:
            case _State.WAITING:
                pair.kept.append((stream, frame))
                self._kept += _size(frame)
            case _State.OPEN:
                if isinstance(frame, Data):
                    if frame.data and stream.kind == ERROR:
                        raise PeerViolation("data on an error stream, which is the server's", Side.CLIENT)
                    connection.count(Side.CLIENT, frame.data, error=False)
                self._relay.write(Side.SERVER, stream, frame)
            case _State.DENIED:
                if isinstance(frame, SynStream):
                    text = connection.refusal.encode() if stream.kind == ERROR else b""
                    self._relay.write(Side.CLIENT, stream, SynReply(frame.stream))
                    self._relay.write(Side.CLIENT, stream, Data(frame.stream, text, True))
                    self._relay.end(stream, Side.SERVER)

    def _from_server(self, pair: _Pair, stream: Stream, frame: Frame) -> None:
        if isinstance(frame, Data):
            pair.connection.count(Side.SERVER, frame.data, error=stream.kind == ERROR)
        self._relay.write(Side.CLIENT, stream, frame)

    def _end_if_over(self, pair: _Pair, stream: Stream) -> Iterable[Command]:
        if not pair.over or pair.connection.state is _State.WAITING:
            return ()
        del self._pairs[stream.headers[REQUEST_ID]]
        return (pair.connection.completed(),) if pair.connection.state is _State.OPEN else ()


def _size(frame: Frame) -> int:
    """What a frame that waits costs."""
    match frame:
        case Data():
            return 256 + len(frame.data)
        case SynStream() | Headers():
            return 256 + sum(len(name) + len(value) for name, value in frame.headers)
        case _:
            return 256


class _Port:
    """A connection of the older protocol: what each side sent while it waits, and how much of the port the server has
    told on each channel."""

    __slots__ = ("connection", "kept", "told")

    def __init__(self, connection: _Connection) -> None:
        self.connection = connection
        self.kept: dict[Side, list[Chunk]] = {side: [] for side in Side}
        self.told = {DATA: b"", ERROR: b""}


class ChannelForward:
    """A port-forward over channels of a WebSocket connection."""

    def __init__(self, id: int, facts: RequestFacts, next_id: Callable[[], int], *, base64: bool) -> None:
        self.closed = False
        self._id = id
        self._base64 = base64
        self._readers = {side: ChannelReader(side, base64=base64) for side in Side}
        self._questions = _Questions(facts, next_id)
        self._ports = [_Port(self._questions.ask(port)) for port in facts.ports]
        self._kept = dict.fromkeys(Side, 0)
        self._out: dict[Side, bytearray] = {side: bytearray() for side in Side}
        # what waits for the end of the message that is being passed on to that side
        self._later: dict[Side, bytearray] = {side: bytearray() for side in Side}
        self._amid = dict.fromkeys(Side, False)

    @property
    def unanswered(self) -> bool:
        return self._kept[Side.CLIENT] > MAX_KEPT

    def begin(self) -> list[Command]:
        return self._questions.take()

    def receive(self, side: Side, data: Buffer) -> list[Command]:
        if self.closed:
            return []
        for chunk in self._readers[side].feed(data):
            if chunk.channel < 0:
                self._out[OTHER[side]] += chunk.raw
            else:
                self._take_in(side, chunk)
        return [*self._take(), *self._questions.take()]

    def answer(self, ask: AskRuling, reply: Reply) -> list[Command]:
        if self.closed:
            return []
        connection = self._questions.settle(ask, reply)
        index, port = next(item for item in enumerate(self._ports) if item[1].connection is connection)
        for side in Side:
            kept, port.kept[side] = port.kept[side], []
            self._kept[side] -= sum(_cost(chunk) for chunk in kept)
            if connection.state is _State.OPEN and kept:
                self._put_between(OTHER[side], b"".join(chunk.raw for chunk in kept), kept[-1].ends)
        if connection.state is _State.DENIED:
            data, error = 2 * index, 2 * index + 1
            told = connection.port.to_bytes(2, "little")
            refusal = self._message(data, told) + self._message(error, told)
            self._put_between(Side.CLIENT, refusal + self._message(error, connection.refusal.encode()), True)
        return [*self._take(), *self._questions.take()]

    def eof(self, side: Side) -> list[Command]:
        if self.closed:
            return []
        self.closed = True
        self._kept = dict.fromkeys(Side, 0)
        open_ones = (port.connection for port in self._ports if port.connection.state is _State.OPEN)
        return [*(connection.completed() for connection in open_ones), Completed(self._id, self._questions.told())]

    def _take_in(self, side: Side, chunk: Chunk) -> None:
        index, odd = divmod(chunk.channel, 2)
        if index >= len(self._ports) or (odd and side is Side.CLIENT):
            raise PeerViolation(f"a message of channel `{chunk.channel}`, which is not that side's", side)
        port = self._ports[index]
        connection = port.connection
        data = chunk.data
        if side is Side.SERVER:
            data = self._after_port(port, ERROR if odd else DATA, data)
        connection.count(side, data, error=bool(odd))
        match connection.state:
            case _State.WAITING:
                port.kept[side].append(chunk)
                self._kept[side] += _cost(chunk)
                if side is Side.SERVER and self._kept[side] > MAX_KEPT:
                    raise PeerViolation(f"more than `{MAX_KEPT}` bytes for connections that are not ruled on", side)
            case _State.OPEN:
                self._put(OTHER[side], chunk.raw, chunk.ends)
            case _State.DENIED:
                pass

    def _after_port(self, port: _Port, kind: str, data: bytes) -> bytes:
        """What follows the two bytes with which the server says which port a channel is for."""
        missing = 2 - len(port.told[kind])
        if missing and data:
            port.told[kind] += data[:missing]
            expected = port.connection.port.to_bytes(2, "little")
            if not expected.startswith(port.told[kind]):
                raise PeerViolation(f"a channel for port `{port.connection.port}` begins with another", Side.SERVER)
        return data[missing:]

    def _put(self, side: Side, raw: bytes, ends: bool) -> None:
        """Passes on the next part of what the other side sends."""
        self._out[side] += raw
        self._amid[side] = not ends
        if ends:
            self._out[side] += self._later[side]
            self._later[side].clear()

    def _put_between(self, side: Side, raw: bytes, ends: bool) -> None:
        """The same for whole messages, the last of which may go on: it then is the one that is being sent."""
        if self._amid[side]:
            self._later[side] += raw
        else:
            self._put(side, raw, ends)

    def _message(self, channel: int, data: bytes) -> bytes:
        if self._base64:
            text = binascii.b2a_base64(data, newline=False)
            return websocket.frame(websocket.TEXT, bytes((ord("0") + channel,)) + text)
        return websocket.frame(websocket.BINARY, bytes((channel,)) + data)

    def _take(self) -> list[Command]:
        sends: list[Command] = [Send(side, bytes(out)) for side, out in self._out.items() if out]
        for out in self._out.values():
            out.clear()
        return sends


def _cost(chunk: Chunk) -> int:
    return 128 + len(chunk.raw)
