"""SPDY/3.1 frames: read strictly, written anew with a compression of our own."""

from __future__ import annotations

import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.protocols.base import PeerViolation, Side
from proxy.protocols.kubernetes import spdy
from proxy.protocols.kubernetes.spdy import (
    DICTIONARY,
    Data,
    Frame,
    Headers,
    Reader,
    Reset,
    SynReply,
    SynStream,
    Unbound,
    WindowUpdate,
    Writer,
)
from tests.proxy.protocols.conformance import cut_at
from tests.proxy.protocols.kubernetes.tunnels import (
    CLIENT,
    SERVER,
    Listener,
    Speaker,
    block,
    control,
    data_frame,
    reset,
)


def test_the_dictionary_is_that_of_the_specification() -> None:
    assert len(DICTIONARY) == 1423
    assert zlib.adler32(DICTIONARY) == 0xE3C6A7C2


def test_frames_are_read() -> None:
    speaker = Speaker()
    ping = control(6, b"\0\0\0\1")
    settings = control(4, struct.pack(">III", 1, 4, 100))
    goaway = control(7, struct.pack(">II", 1, 0))
    data = b"".join(
        (
            speaker.syn_stream(1, streamtype="stdout"),
            speaker.syn_stream(3, flags=1, streamtype="error", port=80, requestid="0"),
            data_frame(1, b"hello"),
            data_frame(1, b"", final=True),
            reset(3, 1),
            control(9, struct.pack(">II", 1, 4096)),
            control(8, struct.pack(">I", 1) + speaker.compress(block([("x", "y")]))),
            ping,
            settings,
            goaway,
        )
    )
    assert Reader(CLIENT).feed(data) == [
        SynStream(1, (("streamtype", "stdout"),)),
        SynStream(3, (("streamtype", "error"), ("port", "80"), ("requestid", "0")), final=True),
        Data(1, b"hello"),
        Data(1, b"", final=True),
        Reset(3, 1),
        WindowUpdate(1, 4096),
        Headers(1, (("x", "y"),)),
        Unbound(ping),
        Unbound(settings),
        Unbound(goaway),
    ]


WORDS = st.text("abcdefghijklmnopqrstuvwxyz-", min_size=1, max_size=12)
PAIRS = st.dictionaries(WORDS, st.text(st.characters(max_codepoint=255), max_size=40), max_size=5).map(
    lambda pairs: tuple(pairs.items())
)
STREAM = st.integers(1, 0x7FFFFFFF)
FRAMES: st.SearchStrategy[Frame] = st.one_of(
    st.builds(SynStream, STREAM, PAIRS, st.booleans(), st.integers(0, 7)),
    st.builds(SynReply, STREAM, PAIRS, st.booleans()),
    st.builds(Headers, STREAM, PAIRS, st.booleans()),
    st.builds(Reset, STREAM, st.integers(1, 11)),
    st.builds(WindowUpdate, st.integers(0, 0x7FFFFFFF), st.integers(1, 0x7FFFFFFF)),
    st.builds(Data, STREAM, st.binary(min_size=1, max_size=50), st.booleans()),
)


def whole(frames: list[Frame]) -> list[Frame]:
    """Pieces of one frame in one; neighbours of the same stream too."""
    out: list[Frame] = []
    for frame in frames:
        last = out[-1] if out else None
        if isinstance(frame, Data) and isinstance(last, Data) and last.stream == frame.stream and not last.final:
            out[-1] = Data(frame.stream, last.data + frame.data, frame.final)
        else:
            out.append(frame)
    return out


@given(st.lists(FRAMES, max_size=8), st.lists(st.integers(0, 800), max_size=12))
def test_what_is_written_is_read_again_in_any_chunking(frames: list[Frame], cuts: list[int]) -> None:
    writer, reader = Writer(), Reader(CLIENT)
    data = b"".join(writer.write(frame) for frame in frames)
    read = [frame for chunk in cut_at(data, cuts) for frame in reader.feed(chunk)]
    assert whole(read) == whole(frames)


def test_what_is_written_is_understood_by_others() -> None:
    writer, listener = Writer(), Listener()
    for stream in range(1, 400, 2):
        pairs = (("streamtype", "data"), ("port", str(stream)), ("requestid", str(stream // 2)))
        assert listener.hear(writer.write(SynStream(stream, pairs))) == [("syn", stream, dict(pairs))]


@given(st.sampled_from(Side), st.binary(max_size=200))
def test_arbitrary_bytes_raise_nothing_else(side: Side, data: bytes) -> None:
    try:
        Reader(side).feed(data)
    except PeerViolation as violation:
        assert violation.side is side


@given(st.sampled_from([1, 2, 3, 4, 6, 7, 8, 9]), st.integers(0, 255), st.binary(max_size=60))
def test_arbitrary_bodies_raise_nothing_else(kind: int, flags: int, body: bytes) -> None:
    try:
        Reader(SERVER).feed(control(kind, body, flags=flags))
    except PeerViolation as violation:
        assert str(violation).startswith("SPDY: ")


def compressed(text: bytes, **options: int) -> bytes:
    deflate = zlib.compressobj(9, zdict=DICTIONARY)
    return deflate.compress(text) + deflate.flush(options.get("end", zlib.Z_SYNC_FLUSH))


def opening(text: bytes, *, flags: int = 0, associated: int = 0, slot: int = 0) -> bytes:
    return control(1, struct.pack(">IIBB", 1, associated, 0, slot) + text, flags=flags)


A_HEADER = block([("streamtype", "data")])
HOSTILE = {
    "a bomb": opening(compressed(struct.pack(">II", 1, 1 << 20) + b"a" * (1 << 20))),
    "a bomb of many frames' worth": opening(compressed(block([(f"x{i}", "a" * 1000) for i in range(8)]))),
    "more headers than allowed": opening(compressed(block([(f"x{i}", "") for i in range(40)]))),
    "two billion headers": opening(compressed(struct.pack(">I", 1 << 31))),
    "a header of two gigabytes": opening(compressed(struct.pack(">II", 1, 1 << 31) + b"abc")),
    "a header that ends early": opening(compressed(A_HEADER[:-2])),
    "more than it announces": opening(compressed(A_HEADER + b"\0\0\0\1x")),
    "an empty block": opening(b""),
    "not compressed": opening(A_HEADER),
    "another dictionary": opening(zlib.compressobj(9, zdict=b"abc").compress(A_HEADER)),
    "compression that ends": opening(compressed(A_HEADER, end=zlib.Z_FINISH)),
    "compression that was not flushed": opening(compressed(A_HEADER)[:-6]),
    "capitals": opening(compressed(block([("streamType", "data")]))),
    "a name twice": opening(compressed(block([("port", "80"), ("port", "5432")]))),
    "a name of nothing": opening(compressed(block([("", "80")]))),
    "unidirectional": opening(compressed(A_HEADER), flags=2),
    "associated": opening(compressed(A_HEADER), associated=1),
    "a credential slot": opening(compressed(A_HEADER), slot=1),
    "too short to open": control(1, b"\0\0\0\1"),
    "another version": control(6, b"\0\0\0\1", version=2),
    "a type there is not": control(5, b""),
    "a credential frame": control(10, b"\0" * 20),
    "a control frame of a megabyte": struct.pack(">HHI", 0x8003, 4, 1 << 20),
    "a reset of 12 bytes": control(3, b"\0\0\0\1\0\0\0\5xxxx"),
    "a reset with status 0": control(3, struct.pack(">II", 1, 0)),
    "a reset with flags": control(3, struct.pack(">II", 1, 5), flags=1),
    "settings that say too many": control(4, struct.pack(">I", 1 << 28)),
    "settings that say too few": control(4, struct.pack(">IIII", 0, 4, 100, 0)),
    "a ping of 3 bytes": control(6, b"\0\0\1"),
    "a goaway of 4 bytes": control(7, b"\0\0\0\1"),
    "a window that grows by nothing": control(9, struct.pack(">II", 1, 0)),
    "a window update of 4 bytes": control(9, b"\0\0\0\1"),
    "flags on data": struct.pack(">II", 1, 2 << 24),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_spdy_is_refused(name: str) -> None:
    data = HOSTILE[name]
    for chunks in ([data], [data[i : i + 1] for i in range(len(data))]):
        reader = Reader(CLIENT)
        with pytest.raises(PeerViolation):
            for chunk in chunks:
                reader.feed(chunk)


def test_a_bomb_spread_over_blocks_is_bounded_by_each() -> None:
    """Each block is within its bound; what is kept is the last one's."""
    speaker, reader = Speaker(), Reader(CLIENT)
    for stream in range(1, 2001, 2):
        (frame,) = reader.feed(speaker.syn_stream(stream, streamtype="data", x="a" * 3000))
        assert isinstance(frame, SynStream)
    assert len(reader._kept) == 0


def test_large_data_is_not_collected() -> None:
    reader = Reader(SERVER)
    reader.feed(struct.pack(">II", 1, (1 << 24) | 0xFFFFFF))
    for _ in range(16):
        (piece,) = reader.feed(b"x" * 65536)
        assert isinstance(piece, Data) and len(piece.data) == 65536 and not piece.final
    assert len(reader._kept) == 0
    assert spdy.MAX_CONTROL < 65536
