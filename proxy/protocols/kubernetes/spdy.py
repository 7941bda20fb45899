"""SPDY/3.1 frames (draft-mbelshe-httpbis-spdy-00; Chromium's "SPDY Protocol - Draft 3.1"), read and written anew.

Blocks of headers are compressed with a state that lasts as long as the connection, one for each direction. What is left
out or put in would break that state for the other side, so every block is decompressed here and compressed again by a
state of our own; and what was read is then what is sent. Frames with data are handed on in the pieces that come in,
each as a frame of its own.

Stricter than the draft: names of headers are in lower case, each once; a block decompresses to exactly what it
announces; no stream is unidirectional, associated, or opened by the server; lengths of control frames are exact.
"""

from __future__ import annotations

import zlib
from typing import Final, assert_never

import msgspec

from proxy.protocols.base import Buffer, PeerViolation, Side

VERSION: Final = 3
MAX_CONTROL = 16 * 1024
"""Bytes of a control frame."""
MAX_HEADERS = 4 * 1024
"""Bytes that a block of headers may become when it is decompressed."""
MAX_NAMES = 32
"""Headers in a block."""

_SYN_STREAM: Final = 1
_SYN_REPLY: Final = 2
_RST_STREAM: Final = 3
_SETTINGS: Final = 4
_PING: Final = 6
_GOAWAY: Final = 7
_HEADERS: Final = 8
_WINDOW_UPDATE: Final = 9
_CONTROL = 0x80000000
_STREAM = 0x7FFFFFFF
_FIN = 1
_CLEAR_SETTINGS = 1
_HEADER = 8

CANCEL: Final = 5
"""Status of RST_STREAM: the stream is no longer wanted."""

# Section 2.6.10.1: words that blocks often hold, each with its length in front, and text that they often hold.
_WORDS = (
    "options,head,post,put,delete,trace,accept,accept-charset,accept-encoding,accept-language,accept-ranges,age,allow,"
    "authorization,cache-control,connection,content-base,content-encoding,content-language,content-length,"
    "content-location,content-md5,content-range,content-type,date,etag,expect,expires,from,host,if-match,"
    "if-modified-since,if-none-match,if-range,if-unmodified-since,last-modified,location,max-forwards,pragma,"
    "proxy-authenticate,proxy-authorization,range,referer,retry-after,server,te,trailer,transfer-encoding,upgrade,"
    "user-agent,vary,via,warning,www-authenticate,method,get,status,200 OK,version,HTTP/1.1,url,public,set-cookie,"
    "keep-alive,origin"
)
_TEXT = (
    "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505"
    "203 Non-Authoritative Information204 No Content301 Moved Permanently400 Bad Request401 Unauthorized403 Forbidden"
    "404 Not Found500 Internal Server Error501 Not Implemented503 Service Unavailable"
    "Jan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, GMT"
    "chunked,text/html,image/png,image/jpg,image/gif,application/xml,application/xhtml+xml,text/plain,"
    "text/javascript,publicprivatemax-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0."
)
DICTIONARY: Final = b"".join(len(word).to_bytes(4) + word.encode() for word in _WORDS.split(",")) + _TEXT.encode()

Pairs = tuple[tuple[str, str], ...]
"""Headers, as Latin-1 text."""


class SynStream(msgspec.Struct, frozen=True):
    """The client opens a stream."""

    stream: int
    headers: Pairs
    final: bool = False
    priority: int = 0


class SynReply(msgspec.Struct, frozen=True):
    """The server takes it."""

    stream: int
    headers: Pairs = ()
    final: bool = False


class Headers(msgspec.Struct, frozen=True):
    stream: int
    headers: Pairs
    final: bool = False


class Reset(msgspec.Struct, frozen=True, gc=False):
    """RST_STREAM: the stream is over, both ways."""

    stream: int
    status: int = CANCEL


class WindowUpdate(msgspec.Struct, frozen=True, gc=False):
    """`stream` is 0 for the connection's own window."""

    stream: int
    delta: int


class Data(msgspec.Struct, frozen=True, gc=False):
    stream: int
    data: bytes
    final: bool = False


class Unbound(msgspec.Struct, frozen=True, gc=False):
    """A frame of the whole connection (SETTINGS, PING, GOAWAY), as it came."""

    raw: bytes


Frame = SynStream | SynReply | Headers | Reset | WindowUpdate | Data | Unbound


class Reader:
    """Takes one side's bytes apart."""

    def __init__(self, side: Side) -> None:
        self._side = side
        self._kept = b""
        self._inflate = zlib.decompressobj(zdict=DICTIONARY)
        self._stream = 0
        self._final = False
        self._left = 0

    def feed(self, data: Buffer) -> list[Frame]:
        """Raises `PeerViolation`."""
        frames: list[Frame] = []
        buffer = self._kept + data if self._kept else bytes(data)
        at = 0
        while at < len(buffer):
            if self._left:
                piece = buffer[at : at + self._left]
                at += len(piece)
                self._left -= len(piece)
                frames.append(Data(self._stream, piece, self._final and not self._left))
                continue
            if len(buffer) < at + _HEADER:
                break
            word = int.from_bytes(buffer[at : at + 4])
            flags, length = buffer[at + 4], int.from_bytes(buffer[at + 5 : at + 8])
            if not word & _CONTROL:
                at += _HEADER
                self._begin_data(word, flags, length, frames)
                continue
            if length > MAX_CONTROL:
                raise self._violation(f"a control frame of `{length}` bytes exceeds `{MAX_CONTROL}`")
            end = at + _HEADER + length
            if len(buffer) < end:
                break
            frames.append(self._control(word, flags, buffer[at:end]))
            at = end
        self._kept = buffer[at:]
        return frames

    def _begin_data(self, stream: int, flags: int, length: int, frames: list[Frame]) -> None:
        if flags & ~_FIN:
            raise self._violation(f"flags `{flags}` on data")
        self._stream, self._final, self._left = stream, bool(flags & _FIN), length
        if not length:
            frames.append(Data(stream, b"", self._final))

    def _control(self, word: int, flags: int, raw: bytes) -> Frame:
        version, kind, body = word >> 16 & 0x7FFF, word & 0xFFFF, raw[_HEADER:]
        if version != VERSION:
            raise self._violation(f"version `{version}` and not `{VERSION}`")
        final = bool(flags & _FIN)
        allowed = _FIN if kind in (_SYN_STREAM, _SYN_REPLY, _HEADERS) else _CLEAR_SETTINGS if kind == _SETTINGS else 0
        if flags & ~allowed:
            raise self._violation(f"flags `{flags}` on a control frame of type `{kind}`")
        match kind:
            case 1:
                self._expect(kind, len(body) >= 10, body)
                if int.from_bytes(body[4:8]) & _STREAM or body[9]:
                    raise self._violation("a stream that is associated with another, or has a credential slot")
                return SynStream(_stream(body), self._headers(body[10:]), final, body[8] >> 5)
            case 2:
                self._expect(kind, len(body) >= 4, body)
                return SynReply(_stream(body), self._headers(body[4:]), final)
            case 8:
                self._expect(kind, len(body) >= 4, body)
                return Headers(_stream(body), self._headers(body[4:]), final)
            case 3:
                self._expect(kind, len(body) == 8, body)
                status = int.from_bytes(body[4:])
                if not status:
                    raise self._violation("a stream is reset with status `0`")
                return Reset(_stream(body), status)
            case 9:
                self._expect(kind, len(body) == 8, body)
                delta = int.from_bytes(body[4:]) & _STREAM
                if not delta:
                    raise self._violation("a window grows by `0`")
                return WindowUpdate(_stream(body), delta)
            case 4:
                self._expect(kind, len(body) >= 4 and len(body) == 4 + 8 * int.from_bytes(body[:4]), body)
                return Unbound(raw)
            case 6:
                self._expect(kind, len(body) == 4, body)
                return Unbound(raw)
            case 7:
                self._expect(kind, len(body) == 8, body)
                return Unbound(raw)
            case _:
                raise self._violation(f"a control frame of type `{kind}`, which SPDY/3.1 does not have")

    def _expect(self, kind: int, whole: bool, body: bytes) -> None:
        if not whole:
            raise self._violation(f"a control frame of type `{kind}` with `{len(body)}` bytes")

    def _headers(self, block: bytes) -> Pairs:
        try:
            text = self._inflate.decompress(block, MAX_HEADERS + 1)
        except zlib.error as error:
            raise self._violation("a block of headers cannot be decompressed") from error
        if len(text) > MAX_HEADERS or self._inflate.unconsumed_tail:
            raise self._violation(f"a block of headers exceeds `{MAX_HEADERS}` bytes")
        if self._inflate.eof:
            raise self._violation("a block of headers ends the compression")
        count = int.from_bytes(text[:4])
        if len(text) < 4 or count > MAX_NAMES:
            raise self._violation(f"a block of `{count}` headers, or none")
        at = 4
        words: list[str] = []
        for _ in range(2 * count):
            end = at + 4 + int.from_bytes(text[at : at + 4])
            if len(text) < at + 4 or len(text) < end:
                raise self._violation("a block of headers ends inside one")
            words.append(text[at + 4 : end].decode("latin-1"))
            at = end
        if at != len(text):
            raise self._violation("a block of headers holds more than it announces")
        names = words[::2]
        if len(set(names)) != count or not all(names) or any(name != name.lower() for name in names):
            raise self._violation("a block of headers names one twice, with capitals, or not at all")
        return tuple(zip(names, words[1::2], strict=True))

    def _violation(self, message: str) -> PeerViolation:
        return PeerViolation(f"SPDY: {message}", self._side)


class Writer:
    """Writes frames to one side, in the order in which they are to be sent."""

    def __init__(self) -> None:
        # a window that holds the dictionary: what is compressed is too little for more
        self._deflate = zlib.compressobj(wbits=11, memLevel=1, zdict=DICTIONARY)

    def write(self, frame: Frame) -> bytes:
        match frame:
            case Data():
                flags = _FIN if frame.final else 0
                return b"%b%c%b%b" % (frame.stream.to_bytes(4), flags, len(frame.data).to_bytes(3), frame.data)
            case SynStream():
                head = frame.stream.to_bytes(4) + b"\0\0\0\0" + bytes((frame.priority << 5, 0))
                return _control(_SYN_STREAM, frame.final, head + self._block(frame.headers))
            case SynReply():
                return _control(_SYN_REPLY, frame.final, frame.stream.to_bytes(4) + self._block(frame.headers))
            case Headers():
                return _control(_HEADERS, frame.final, frame.stream.to_bytes(4) + self._block(frame.headers))
            case Reset():
                return _control(_RST_STREAM, False, frame.stream.to_bytes(4) + frame.status.to_bytes(4))
            case WindowUpdate():
                return _control(_WINDOW_UPDATE, False, frame.stream.to_bytes(4) + frame.delta.to_bytes(4))
            case Unbound():
                return frame.raw
            case _:
                assert_never(frame)

    def _block(self, headers: Pairs) -> bytes:
        words = [word.encode("latin-1") for pair in headers for word in pair]
        text = len(headers).to_bytes(4) + b"".join(len(word).to_bytes(4) + word for word in words)
        return self._deflate.compress(text) + self._deflate.flush(zlib.Z_SYNC_FLUSH)


def _control(kind: int, final: bool, body: bytes) -> bytes:
    return b"%b%c%b%b" % ((_CONTROL | VERSION << 16 | kind).to_bytes(4), int(final), len(body).to_bytes(3), body)


def _stream(body: bytes) -> int:
    return int.from_bytes(body[:4]) & _STREAM
