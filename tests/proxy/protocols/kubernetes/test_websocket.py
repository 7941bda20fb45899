"""WebSocket frames: read as they come, and refused when they are not what RFC 6455 says."""

from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.protocols.base import PeerViolation, Side
from proxy.protocols.kubernetes.websocket import (
    MAX_PAYLOAD,
    ChannelReader,
    Reader,
    frame,
    mask,
)
from tests.proxy.protocols.conformance import cut_at
from tests.proxy.protocols.kubernetes.tunnels import CLIENT, KEY, SERVER, client_ws, messages, ws


@given(st.binary(max_size=300), st.binary(min_size=4, max_size=4), st.integers(0, 300))
def test_masking_in_pieces_is_masking(data: bytes, key: bytes, at: int) -> None:
    whole = bytes(byte ^ key[index % 4] for index, byte in enumerate(data))
    assert mask(data, key) == whole
    assert mask(data[:at], key) + mask(data[at:], key, len(data[:at])) == whole


@pytest.mark.parametrize("size", [0, 1, 125, 126, 65535, 65536])
@pytest.mark.parametrize("key", [b"", KEY])
def test_written_frames_are_what_others_write(size: int, key: bytes) -> None:
    payload = bytes(index % 251 for index in range(size))
    assert frame(2, payload, key) == ws(payload, key=key)


PAYLOADS = st.lists(st.tuples(st.sampled_from([1, 2, 9, 10]), st.binary(max_size=100)), max_size=6)


@given(PAYLOADS, st.lists(st.integers(0, 700), max_size=12))
def test_any_chunking_reads_the_same(payloads: list[tuple[int, bytes]], cuts: list[int]) -> None:
    for side, key in ((CLIENT, KEY), (SERVER, b"")):
        data = b"".join(ws(payload, opcode=opcode, key=key) for opcode, payload in payloads)
        reader = Reader(side)
        pieces = [piece for chunk in cut_at(data, cuts) for piece in reader.feed(chunk)]
        assert b"".join(piece.raw for piece in pieces) == data
        read: list[tuple[int, bytes]] = []
        for piece in pieces:
            if piece.begins:
                read.append((piece.opcode, b""))
            read[-1] = (piece.opcode, read[-1][1] + piece.payload)
        assert read == payloads
        assert not reader.amid


@given(st.sampled_from(Side), st.binary(max_size=200))
def test_arbitrary_bytes_raise_nothing_else(side: Side, data: bytes) -> None:
    reader = Reader(side)
    try:
        passed = b"".join(piece.raw for piece in reader.feed(data))
    except PeerViolation as violation:
        assert violation.side is side
    else:
        assert data.startswith(passed)


HOSTILE = {
    "a client does not mask": (CLIENT, ws(b"\0x")),
    "a server masks": (SERVER, ws(b"\1x", key=KEY)),
    "reserved bit 1": (SERVER, ws(b"\1x", first=0xC0)),
    "reserved bit 3": (CLIENT, ws(b"\0x", first=0x90, key=KEY)),
    "opcode 3": (SERVER, ws(b"x", opcode=3)),
    "opcode 11": (SERVER, ws(b"x", opcode=11)),
    "a fragmented ping": (SERVER, ws(b"x", opcode=9, first=0)),
    "a ping of 126 bytes": (SERVER, ws(b"x" * 126, opcode=9)),
    "a close of one byte": (SERVER, ws(b"x", opcode=8)),
    "something after close": (SERVER, ws(b"\x03\xe8", opcode=8) + ws(b"\1x")),
    "a continuation of nothing": (SERVER, ws(b"x", opcode=0)),
    "a message inside another": (SERVER, ws(b"\1x", first=0) + ws(b"\1x")),
    "a long form of 5": (SERVER, b"\x82\x7e\0\x05\1xxxx"),
    "a longer form of 300": (SERVER, b"\x82\x7f\0\0\0\0\0\0\x01\x2c" + b"\1" * 300),
    "a length of 2^63": (SERVER, b"\x82\x7f\x80\0\0\0\0\0\0\0"),
    "a length above the limit": (SERVER, b"\x82\x7f" + (MAX_PAYLOAD + 1).to_bytes(8)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_websocket_is_refused(name: str) -> None:
    side, data = HOSTILE[name]
    for chunks in ([data], [data[i : i + 1] for i in range(len(data))]):
        reader = Reader(side)
        with pytest.raises(PeerViolation) as raised:
            for chunk in chunks:
                reader.feed(chunk)
        assert raised.value.side is side


def test_a_large_frame_is_not_collected() -> None:
    reader = Reader(CLIENT)
    header = b"\x82\xff" + MAX_PAYLOAD.to_bytes(8) + KEY
    reader.feed(header + b"\x11")
    for _ in range(64):
        assert sum(len(piece.raw) for piece in reader.feed(b"x" * 65536)) == 65536
    assert len(reader._kept) == 0


@given(st.lists(st.tuples(st.integers(0, 4), st.binary(max_size=60)), max_size=5), st.lists(st.integers(0, 500)))
def test_channels_are_told_apart(sent: list[tuple[int, bytes]], cuts: list[int]) -> None:
    for in_base64 in (False, True):
        data = b"".join(
            client_ws(
                b"%d" % channel + base64.b64encode(text) if in_base64 else bytes((channel,)) + text,
                opcode=1 if in_base64 else 2,
            )
            for channel, text in sent
        )
        reader = ChannelReader(CLIENT, base64=in_base64)
        read: list[tuple[int, bytes]] = []
        begins = True
        raw = b""
        for chunk in (chunk for part in cut_at(data, cuts) for chunk in reader.feed(part)):
            if begins:
                read.append((chunk.channel, b""))
            read[-1] = (chunk.channel, read[-1][1] + chunk.data)
            begins = chunk.ends
            raw += chunk.raw
        assert read == sent
        assert raw == data


@pytest.mark.parametrize(
    "data",
    [
        client_ws(b"0Zm9v!"),
        client_ws(b"0Zm9"),
        client_ws(b"0Zg==Zg=="),
        client_ws(b"0Zg=="[:4]),
        client_ws(b"/Zm9v"),
        client_ws(b"0Zm 9v"),
    ],
)
def test_what_is_no_base64_is_refused(data: bytes) -> None:
    for chunks in ([data], [data[i : i + 1] for i in range(len(data))]):
        reader = ChannelReader(CLIENT, base64=True)
        with pytest.raises(PeerViolation):
            for chunk in chunks:
                reader.feed(chunk)


def test_a_fragmented_message_of_a_channel_is_refused() -> None:
    """An API server would take the second fragment for a message of the channel that its first byte names."""
    reader = ChannelReader(CLIENT, base64=False)
    with pytest.raises(PeerViolation, match="in fragments"):
        reader.feed(ws(b"\0abc", key=KEY, first=0) + ws(b"\2def", opcode=0, key=KEY))


def test_empty_messages_belong_to_no_channel() -> None:
    (chunk,) = ChannelReader(SERVER, base64=False).feed(ws(b""))
    assert (chunk.channel, chunk.data, chunk.ends) == (-1, b"", True)
    assert messages(chunk.raw) == [(2, b"")]
