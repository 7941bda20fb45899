"""What both sides of a tunnel write, made by hand from the specifications, and a session without sockets around it."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from proxy.model import Decision, Reason, RequestFacts, Ruling
from proxy.protocols.base import AskRuling, Command, Completed, Observed, Send, Side
from proxy.protocols.kubernetes.requests import Head
from proxy.protocols.kubernetes.spdy import DICTIONARY
from proxy.protocols.kubernetes.streams import Tunnel, offered, open_tunnel

CLIENT, SERVER = Side.CLIENT, Side.SERVER
KEY = b"\x11\x22\x33\x44"
ALLOW = Ruling(Decision.ALLOW, (Reason("agent", "rule", Decision.ALLOW, ""),), "", "", "v1")
DENY = Ruling(Decision.DENY, (Reason("agent", "rule", Decision.DENY, ""),), "denied for agent", "ask the owners", "v1")
ID = 7


def facts(subresource: str, *, ports: tuple[int, ...] = (), command: tuple[str, ...] = ()) -> RequestFacts:
    return RequestFacts(
        verb="create",
        path=f"/api/v1/namespaces/shop/pods/web/{subresource}",
        resource="pods",
        version="v1",
        subresource=subresource,
        namespace="shop",
        name="web",
        ports=ports,
        command=command,
    )


def head(upgrade: str, *pairs: tuple[str, str]) -> Head:
    return Head("POST", "/api/v1/namespaces/shop/pods/web/exec", (("upgrade", upgrade), *pairs))


def tunnel(
    subresource: str,
    upgrade: str,
    protocol: str,
    *,
    ports: tuple[int, ...] = (),
    record_input: bool = False,
) -> Tunnel:
    """The tunnel that a server opens which chooses the only protocol that it is offered."""
    name = "X-Stream-Protocol-Version" if upgrade.startswith("SPDY") else "Sec-WebSocket-Protocol"
    request = offered(head(upgrade, *([(name.lower(), protocol)] if protocol else [])))
    answer = [(name.encode(), protocol.encode())] if protocol else []
    numbers = iter(range(ID + 1, 100_000))
    return open_tunnel(
        ID,
        facts(subresource, ports=ports),
        request,
        upgrade.encode(),
        answer,
        lambda: next(numbers),
        record_input=record_input,
    )


@dataclass
class Session:
    """Carries a tunnel's commands out: what was sent to each side, what was recorded, what was asked."""

    tunnel: Tunnel
    rule: Callable[[int], Ruling | None] = lambda port: ALLOW
    sent: dict[Side, bytearray] = field(default_factory=lambda: {side: bytearray() for side in Side})
    observed: list[Observed] = field(default_factory=list)
    asked: list[AskRuling] = field(default_factory=list)
    open: list[AskRuling] = field(default_factory=list)
    completed: list[Completed] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.carry_out(self.tunnel.begin())

    def feed(self, side: Side, *data: bytes) -> None:
        for each in data:
            buffer = bytearray(each)
            self.carry_out(self.tunnel.receive(side, memoryview(buffer)))
            buffer[:] = b"\xee" * len(buffer)

    def end(self, side: Side = CLIENT) -> None:
        self.carry_out(self.tunnel.eof(side))
        assert self.tunnel.closed
        assert not self.tunnel.receive(CLIENT, b"more")
        assert not self.tunnel.eof(SERVER)

    def answer(self, ruling: Ruling) -> None:
        """Answers the open question."""
        ask = self.open.pop(0)
        self.carry_out(self.tunnel.answer(ask, ruling))

    def carry_out(self, commands: Sequence[Command]) -> None:
        for command in commands:
            match command:
                case Send(side, data):
                    self.sent[side] += data
                case Observed():
                    self.observed.append(command)
                case AskRuling():
                    assert not self.open, "one question at a time"
                    self.asked.append(command)
                    self.open.append(command)
                    ruling = self.rule(command.operation.requests[0].ports[0])
                    if ruling is not None:
                        self.answer(ruling)
                case Completed():
                    self.completed.append(command)
                case _:
                    raise AssertionError(command)

    def seen(self, channel: str) -> bytes:
        return b"".join(each.data for each in self.observed if each.channel == channel)

    def take(self, side: Side) -> bytes:
        data = bytes(self.sent[side])
        self.sent[side].clear()
        return data


# --- WebSocket --------------------------------------------------------------------------------------------------------


def ws(payload: bytes, *, opcode: int = 2, key: bytes = b"", first: int = 0x80) -> bytes:
    """A frame; `key` masks it; `first` are the bits beside the opcode."""
    size = len(payload)
    bit = 0x80 if key else 0
    if size < 126:
        header = bytes((first | opcode, bit | size))
    elif size < 1 << 16:
        header = struct.pack(">BBH", first | opcode, bit | 126, size)
    else:
        header = struct.pack(">BBQ", first | opcode, bit | 127, size)
    masked = bytes(byte ^ key[index % 4] for index, byte in enumerate(payload)) if key else payload
    return header + key + masked


def client_ws(payload: bytes, *, opcode: int = 2) -> bytes:
    return ws(payload, opcode=opcode, key=KEY)


def messages(data: bytes) -> list[tuple[int, bytes]]:
    """Opcode and payload of whole, unfragmented frames of either side."""
    found = []
    while data:
        assert data[0] & 0xF0 == 0x80
        size, at = data[1] & 0x7F, 2
        if size == 126:
            size, at = int.from_bytes(data[2:4]), 4
        elif size == 127:
            size, at = int.from_bytes(data[2:10]), 10
        key = data[at : at + 4] if data[1] & 0x80 else b""
        at += len(key)
        payload = data[at : at + size]
        assert len(payload) == size
        found.append((data[0] & 0xF, bytes(b ^ key[i % 4] for i, b in enumerate(payload)) if key else payload))
        data = data[at + size :]
    return found


# --- SPDY -------------------------------------------------------------------------------------------------------------


def control(kind: int, body: bytes, *, flags: int = 0, version: int = 3) -> bytes:
    return struct.pack(">HHI", 0x8000 | version, kind, flags << 24 | len(body)) + body


def data_frame(stream: int, data: bytes, *, final: bool = False) -> bytes:
    return struct.pack(">II", stream, (1 << 24 if final else 0) | len(data)) + data


def block(pairs: Iterable[tuple[str, str]]) -> bytes:
    """A block of headers before it is compressed."""
    pairs = list(pairs)
    words = [word.encode() for pair in pairs for word in pair]
    return struct.pack(">I", len(pairs)) + b"".join(struct.pack(">I", len(word)) + word for word in words)


class Speaker:
    """One side that speaks SPDY, with a state of compression as its library has it."""

    def __init__(self) -> None:
        self._deflate = zlib.compressobj(9, zdict=DICTIONARY)

    def compress(self, text: bytes) -> bytes:
        return self._deflate.compress(text) + self._deflate.flush(zlib.Z_SYNC_FLUSH)

    def syn_stream(self, stream: int, *, flags: int = 0, **headers: object) -> bytes:
        text = self.compress(block((name, str(value)) for name, value in headers.items()))
        return control(1, struct.pack(">IIBB", stream, 0, 0, 0) + text, flags=flags)

    def syn_reply(self, stream: int) -> bytes:
        return control(2, struct.pack(">I", stream) + self.compress(block(())))

    def pair(self, stream: int, port: int, request: str) -> bytes:
        """Both streams of one connection, as kubectl opens them."""
        return (
            self.syn_stream(stream, streamtype="error", port=port, requestid=request)
            + data_frame(stream, b"", final=True)
            + self.syn_stream(stream + 2, streamtype="data", port=port, requestid=request)
        )


def reset(stream: int, status: int = 5) -> bytes:
    return control(3, struct.pack(">II", stream, status))


class Listener:
    """The same for what it hears: its frames as tuples."""

    def __init__(self) -> None:
        self._inflate = zlib.decompressobj(zdict=DICTIONARY)

    def hear(self, data: bytes) -> list[tuple[object, ...]]:
        heard: list[tuple[object, ...]] = []
        while data:
            word, flags_length = struct.unpack(">II", data[:8])
            flags, length = flags_length >> 24, flags_length & 0xFFFFFF
            body, data = data[8 : 8 + length], data[8 + length :]
            assert len(body) == length
            if not word & 0x80000000:
                heard.append(("data", word, body, bool(flags & 1)))
                continue
            assert word >> 16 == 0x8003
            match word & 0xFFFF:
                case 1:
                    heard.append(("syn", int.from_bytes(body[:4]), self._pairs(body[10:])))
                case 2:
                    heard.append(("reply", int.from_bytes(body[:4])))
                    self._pairs(body[4:])
                case 3:
                    heard.append(("reset", int.from_bytes(body[:4])))
                case kind:
                    heard.append((kind, body))
        return heard

    def _pairs(self, text: bytes) -> dict[str, str]:
        text = self._inflate.decompress(text)
        words = []
        at = 4
        while at < len(text):
            size = int.from_bytes(text[at : at + 4])
            words.append(text[at + 4 : at + 4 + size].decode())
            at += 4 + size
        assert len(words) == 2 * int.from_bytes(text[:4])
        return dict(zip(words[::2], words[1::2], strict=True))


def joined(frames: Iterable[tuple[object, ...]]) -> list[tuple[object, ...]]:
    """The same with neighbouring data of one stream in one piece: how it was cut means nothing."""
    out: list[tuple[object, ...]] = []
    for frame in frames:
        last = out[-1] if out else ()
        if frame[0] == "data" and last[:2] == frame[:2] and not last[3]:
            assert isinstance(last[2], bytes) and isinstance(frame[2], bytes)
            out[-1] = ("data", frame[1], last[2] + frame[2], frame[3])
        else:
            out.append(frame)
    return out
