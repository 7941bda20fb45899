"""Exec and attach: bytes pass between the client and a process in a container, and are recorded before they go on.

`Observation` is the record of one command, whatever the protocol; `SpdyTerminal` and `ChannelTerminal` are the tunnels.

What is recorded: output, changes of the terminal's size, and input when that is wanted. After `MAX_OBSERVED` bytes the
recording goes on with sizes only, and the end says so, with a digest of each channel. An input that is not recorded has
no digest: a short one (a password that was typed) could be found by trying.

Blind spot: what the bytes do to a terminal, or to the container, is not looked into.
"""

from __future__ import annotations

import hashlib
from typing import Final

import msgspec

from proxy.protocols.base import AskRuling, Buffer, Command, Completed, Observed, PeerViolation, Reply, Send, Side
from proxy.protocols.kubernetes.relay import OTHER, SpdyRelay
from proxy.protocols.kubernetes.spdy import Data, SynStream
from proxy.protocols.kubernetes.websocket import ChannelReader, Chunk

MAX_OBSERVED = 16 * 1024 * 1024
"""Bytes of one command that are recorded; each record counts for `_RECORD` more, so that tiny ones are bounded too."""
MAX_STATUS = 64 * 1024
"""Bytes of the status that ends a command."""
MAX_ERROR = 1024
"""Characters of an error that are recorded."""
MAX_RESIZE = 1024
"""Bytes of a message about the terminal's size."""
_RECORD = 96

STDIN: Final = "stdin"
STDOUT: Final = "stdout"
STDERR: Final = "stderr"
ERROR: Final = "error"
RESIZE: Final = "resize"
_BY_NUMBER = (STDIN, STDOUT, STDERR, ERROR, RESIZE)
_CLOSE_CHANNEL = 255
_SENDER = {
    STDIN: Side.CLIENT,
    RESIZE: Side.CLIENT,
    STDOUT: Side.SERVER,
    STDERR: Side.SERVER,
    ERROR: Side.SERVER,
}

UNENDED = "the connection ended before the command did"


class _Cause(msgspec.Struct):
    reason: str = ""
    message: str = ""


class _Details(msgspec.Struct):
    causes: list[_Cause] | None = None


class _Status(msgspec.Struct):
    """The parts of a `Status` (v1) that tell how a command ended."""

    status: str = ""
    reason: str = ""
    message: str = ""
    details: _Details | None = None


class _Tally:
    """One channel: how many bytes, how many of them recorded."""

    __slots__ = ("digest", "recorded", "size")

    def __init__(self) -> None:
        self.size = 0
        self.recorded = 0
        self.digest = hashlib.sha256()


class Observation:
    """What one command showed and how it ended. `structured` says that it ends with a `Status` and not with text."""

    def __init__(self, id: int, *, structured: bool, record_input: bool) -> None:
        self._id = id
        self._structured = structured
        self._record_input = record_input
        self._tallies: dict[str, _Tally] = {}
        self._waiting: list[tuple[str, bytearray]] = []
        self._status = bytearray()
        self._size = bytearray()
        self._room = MAX_OBSERVED
        self._ended = False

    def see(self, side: Side, channel: str, data: bytes) -> None:
        """Bytes of a channel. Raises `PeerViolation`."""
        if not data:
            return
        if _SENDER[channel] is not side:
            raise PeerViolation(f"data on `{channel}`, which is the other side's to send", side)
        if channel == RESIZE:
            self._resize(data)
        elif channel == ERROR:
            if len(self._status) + len(data) > MAX_STATUS:
                raise PeerViolation(f"a status of more than `{MAX_STATUS}` bytes", side)
            self._status += data
        else:
            tally = self._tallies.setdefault(channel, _Tally())
            tally.size += len(data)
            if channel != STDIN or self._record_input:
                tally.digest.update(data)
                tally.recorded += self._record(channel, data)

    def take(self) -> list[Command]:
        """What is to be recorded by now."""
        observed: list[Command] = [Observed(self._id, channel, bytes(data)) for channel, data in self._waiting]
        self._waiting.clear()
        return observed

    def finish(self) -> list[Command]:
        """How it ended: told once, as soon as the server has said its last, since the client may then just go away."""
        if self._ended:
            return []
        self._ended = True
        code, error = self._outcome()
        parts = [f"exit {code}"] if code else []
        for channel, tally in self._tallies.items():
            if channel == STDIN and not self._record_input:
                parts.append(f"{channel} {tally.size} bytes not recorded")
            elif tally.recorded < tally.size:
                told = f"{channel} {tally.size} bytes, of which {tally.recorded} are recorded"
                parts.append(f"{told}, sha256 {tally.digest.hexdigest()}")
        return [Completed(self._id, "; ".join(parts), error=error)]

    def _record(self, channel: str, data: bytes) -> int:
        """How many of the bytes there is room for."""
        joins = bool(self._waiting) and self._waiting[-1][0] == channel
        kept = data[: max(self._room - (0 if joins else _RECORD), 0)]
        if kept:
            self._room -= len(kept)
            if joins:
                self._waiting[-1][1].extend(kept)
            else:
                self._room -= _RECORD
                self._waiting.append((channel, bytearray(kept)))
        return len(kept)

    def _resize(self, data: bytes) -> None:
        """The client sends JSON objects, one behind the other."""
        *texts, rest = (self._size + data).split(b"}")
        self._size = rest.lstrip()
        for text in texts:
            try:
                size = msgspec.json.decode(text + b"}", type=dict[str, int])
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                raise PeerViolation("a terminal's size that is none", Side.CLIENT) from error
            folded = {name.lower(): number for name, number in size.items()}
            columns, rows = folded.get("width", 0), folded.get("height", 0)
            if not (0 <= columns < 1 << 16 and 0 <= rows < 1 << 16):
                raise PeerViolation(f"a terminal of `{columns}` columns and `{rows}` rows", Side.CLIENT)
            if self._room >= _RECORD:
                self._room -= _RECORD
                self._waiting.append((RESIZE, bytearray(f"{columns}x{rows}".encode())))
        if len(self._size) > MAX_RESIZE:
            raise PeerViolation(f"a terminal's size of more than `{MAX_RESIZE}` bytes", Side.CLIENT)

    def _outcome(self) -> tuple[str, str]:
        """Exit code and error, each empty where there is none."""
        if not self._status:
            return ("", UNENDED) if self._structured else ("", "")
        text = self._status.decode("utf-8", "backslashreplace")[:MAX_ERROR]
        if not self._structured:
            return "", text
        try:
            status = msgspec.json.decode(self._status, type=_Status)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return "", text
        if status.status == "Success":
            return "0", ""
        causes = (status.details.causes if status.details else None) or []
        for cause in causes:
            if cause.reason == "ExitCode" and cause.message.isascii() and cause.message.isdigit():
                return cause.message[:10], ""
        return "", (status.message or status.reason or text)[:MAX_ERROR]


class SpdyTerminal:
    """Exec and attach over SPDY: the client opens a stream for each channel, and says in its headers for which."""

    unanswered = False

    def __init__(self, observation: Observation) -> None:
        self.closed = False
        self._observation = observation
        self._relay = SpdyRelay(in_websocket=False)
        self._opened: set[str] = set()
        self._unended: set[str] = set()

    def begin(self) -> list[Command]:
        return []

    def receive(self, side: Side, data: Buffer) -> list[Command]:
        if self.closed:
            return []
        for stream, frame in self._relay.read(side, data):
            match frame:
                case SynStream():
                    if stream.kind not in _SENDER or stream.kind in self._opened:
                        raise PeerViolation(f"a stream for `{stream.kind[:32]}`, or a second one", side)
                    self._opened.add(stream.kind)
                    if _SENDER[stream.kind] is Side.SERVER:
                        self._unended.add(stream.kind)
                case Data():
                    self._observation.see(side, stream.kind, frame.data)
            self._relay.write(OTHER[side], stream, frame)
            if stream.reset or Side.SERVER in stream.ended:
                self._unended.discard(stream.kind)
        ended = ERROR in self._opened and not self._unended
        return [*self._observation.take(), *self._relay.take(), *(self._observation.finish() if ended else ())]

    def answer(self, ask: AskRuling, reply: Reply) -> list[Command]:
        return []

    def eof(self, side: Side) -> list[Command]:
        if self.closed:
            return []
        self.closed = True
        return self._observation.finish()


class ChannelTerminal:
    """Exec and attach over WebSocket: what comes is passed on as it is, once it has been read."""

    unanswered = False

    def __init__(self, observation: Observation, *, base64: bool, half_close: bool) -> None:
        self.closed = False
        self._observation = observation
        self._half_close = half_close
        self._readers = {side: ChannelReader(side, base64=base64) for side in Side}
        self._closing = b""

    def begin(self) -> list[Command]:
        return []

    def receive(self, side: Side, data: Buffer) -> list[Command]:
        if self.closed:
            return []
        out = bytearray()
        for chunk in self._readers[side].feed(data):
            if chunk.channel >= 0:
                self._see(side, chunk)
            out += chunk.raw
        ended = self._readers[Side.SERVER].closed
        sends = [Send(OTHER[side], bytes(out))] if out else []
        return [*self._observation.take(), *sends, *(self._observation.finish() if ended else ())]

    def answer(self, ask: AskRuling, reply: Reply) -> list[Command]:
        return []

    def eof(self, side: Side) -> list[Command]:
        if self.closed:
            return []
        self.closed = True
        return self._observation.finish()

    def _see(self, side: Side, chunk: Chunk) -> None:
        if chunk.channel == _CLOSE_CHANNEL and self._half_close and side is Side.CLIENT:
            self._closing += chunk.data
            if len(self._closing) > 1 or (chunk.ends and not self._closing):
                raise PeerViolation("the end of a channel is told in two bytes", side)
            if chunk.ends:
                if self._closing[0] >= len(_BY_NUMBER):
                    raise PeerViolation(f"the end of channel `{self._closing[0]}`, which there is not", side)
                self._closing = b""
            return
        if chunk.channel >= len(_BY_NUMBER):
            raise PeerViolation(f"a message of channel `{chunk.channel}`, which there is not", side)
        channel = _BY_NUMBER[chunk.channel]
        if _SENDER[channel] is not side:
            raise PeerViolation(f"a message of channel `{channel}`, which is the other side's", side)
        self._observation.see(side, channel, chunk.data)
