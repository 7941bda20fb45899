"""WebSocket frames (RFC 6455), read strictly and as they come, and written; and the channels that Kubernetes puts in.

    header ---> payload (handed on in the pieces that come in) ---> header
       \\--> a control frame is handed on whole
       \\--> close: nothing may follow it from that side

A frame's payload is not collected: a command's input may be one frame of many megabytes. Extensions are never agreed
on, so the reserved bits are zero; the client masks and the server does not; lengths take their shortest form.

Blind spot: text is not held against UTF-8, since Kubernetes' clients send bytes in text frames.
"""

from __future__ import annotations

import binascii
from typing import Final

import msgspec

from proxy.protocols.base import Buffer, PeerViolation, Side

CONTINUATION: Final = 0
TEXT: Final = 1
BINARY: Final = 2
CLOSE: Final = 8
PING: Final = 9
PONG: Final = 10

MAX_PAYLOAD = 32 * 1024 * 1024
"""Bytes of one frame. An API server's own WebSocket library takes no more."""
MAX_CONTROL_PAYLOAD = 125

_FINAL = 0x80
_RESERVED = 0x70
_OPCODE = 0x0F
_MASKED = 0x80
_LENGTH = 0x7F
_LENGTH_16 = 126
_LENGTH_64 = 127


class Piece(msgspec.Struct, frozen=True, gc=False):
    """Part of a frame. `raw` is as it came, header included; `payload` is unmasked. `begins` and `ends` are about the
    frame, `final` says that the frame ends its message. A frame without payload is one piece."""

    opcode: int
    final: bool
    begins: bool
    ends: bool
    raw: bytes
    payload: bytes

    @property
    def control(self) -> bool:
        return self.opcode >= CLOSE


class Reader:
    """Takes one side's bytes apart. `key` is the masking key of the last frame with data, empty for the server's."""

    def __init__(self, side: Side) -> None:
        self.closed = False
        self.key = b""
        self._side = side
        self._masked = side is Side.CLIENT
        self._kept = b""
        self._opcode = -1
        self._final = True
        self._left = 0
        self._offset = 0
        self._fragmented = False

    @property
    def amid(self) -> bool:
        """True inside the payload of a frame with data."""
        return self._opcode >= 0

    def feed(self, data: Buffer) -> list[Piece]:
        """Raises `PeerViolation`."""
        pieces: list[Piece] = []
        buffer = self._kept + data if self._kept else bytes(data)
        at = 0
        while at < len(buffer):
            if self._opcode >= 0:
                raw = buffer[at : at + self._left]
                pieces.append(self._piece(b"", raw))
                at += len(raw)
                continue
            size = self._header_size(buffer, at)
            if not size or len(buffer) < at + size:
                break
            opcode, final, length = self._read_header(buffer, at, size)
            if opcode >= CLOSE:
                if len(buffer) < at + size + length:
                    break
                pieces.append(self._control(opcode, buffer[at : at + size], buffer[at + size : at + size + length]))
                at += size + length
                continue
            if length and len(buffer) == at + size:
                # a header goes with the first byte of its payload, which says what it is for
                break
            self._fragmented = not final
            self._opcode, self._final, self._left, self._offset = opcode, final, length, 0
            if self._masked:
                self.key = buffer[at + size - 4 : at + size]
            header = buffer[at : at + size]
            raw = buffer[at + size : at + size + length]
            pieces.append(self._piece(header, raw))
            at += size + len(raw)
        self._kept = buffer[at:]
        return pieces

    def _piece(self, header: bytes, raw: bytes) -> Piece:
        payload = mask(raw, self.key, self._offset) if self._masked else raw
        self._left -= len(raw)
        self._offset += len(raw)
        piece = Piece(self._opcode, self._final, bool(header), not self._left, header + raw, payload)
        if piece.ends:
            self._opcode = -1
        return piece

    def _control(self, opcode: int, header: bytes, raw: bytes) -> Piece:
        payload = mask(raw, header[-4:]) if self._masked else raw
        if opcode == CLOSE:
            if len(payload) == 1:
                raise self._violation("a close frame of one byte")
            self.closed = True
        return Piece(opcode, True, True, True, header + raw, payload)

    def _header_size(self, buffer: bytes, at: int) -> int:
        """Zero while it cannot be told."""
        if self.closed:
            raise self._violation("something follows its close frame")
        if len(buffer) < at + 2:
            return 0
        if buffer[at] & _RESERVED:
            raise self._violation("reserved bits are set, and no extension was agreed on")
        if bool(buffer[at + 1] & _MASKED) is not self._masked:
            raise self._violation(f"a frame is {'not ' if self._masked else ''}masked")
        length = buffer[at + 1] & _LENGTH
        extended = 2 if length == _LENGTH_16 else 8 if length == _LENGTH_64 else 0
        return 2 + extended + (4 if self._masked else 0)

    def _read_header(self, buffer: bytes, at: int, size: int) -> tuple[int, bool, int]:
        first, second = buffer[at], buffer[at + 1]
        opcode, final = first & _OPCODE, bool(first & _FINAL)
        length = short = second & _LENGTH
        if short >= _LENGTH_16:
            width = 2 if short == _LENGTH_16 else 8
            length = int.from_bytes(buffer[at + 2 : at + 2 + width])
            if length < (_LENGTH_16 if width == 2 else 1 << 16):
                raise self._violation(f"the length `{length}` is not in its shortest form")
        if opcode >= CLOSE:
            if opcode > PONG:
                raise self._violation(f"opcode `{opcode}` is none of WebSocket's")
            if not final or length > MAX_CONTROL_PAYLOAD:
                raise self._violation(f"a control frame of `{length}` bytes, or in fragments")
        elif opcode > BINARY:
            raise self._violation(f"opcode `{opcode}` is none of WebSocket's")
        elif (opcode == CONTINUATION) is not self._fragmented:
            raise self._violation("a continuation of no message, or a message inside another")
        if length > MAX_PAYLOAD:
            raise self._violation(f"a frame of `{length}` bytes exceeds `{MAX_PAYLOAD}`")
        return opcode, final, length

    def _violation(self, message: str) -> PeerViolation:
        return PeerViolation(f"WebSocket: {message}", self._side)


def mask(data: bytes, key: bytes, offset: int = 0) -> bytes:
    """Masks or unmasks (RFC 6455, section 5.3) what stands `offset` bytes after the payload's begin."""
    if not data:
        return data
    turn = offset % 4
    key = key[turn:] + key[:turn]
    size = len(data)
    pad = (key * (size // 4 + 1))[:size]
    return (int.from_bytes(data) ^ int.from_bytes(pad)).to_bytes(size)


def frame(opcode: int, payload: bytes, key: bytes = b"") -> bytes:
    """A whole message in one frame; with `key` it is masked, as a client's has to be."""
    size = len(payload)
    masked = _MASKED if key else 0
    if size < _LENGTH_16:
        header = bytes((_FINAL | opcode, masked | size))
    elif size < 1 << 16:
        header = bytes((_FINAL | opcode, masked | _LENGTH_16)) + size.to_bytes(2)
    else:
        header = bytes((_FINAL | opcode, masked | _LENGTH_64)) + size.to_bytes(8)
    return header + (key + mask(payload, key) if key else payload)


class Chunk(msgspec.Struct, frozen=True, gc=False):
    """Part of a message of a channel. `channel` is -1 for what belongs to none (a control frame, an empty message);
    `ends` says that the message does."""

    channel: int
    data: bytes
    raw: bytes
    ends: bool


class ChannelReader:
    """Takes apart what Kubernetes' channel protocols send (k8s.io/streaming, package wsstream): each message is a byte
    that names the channel, and data; in the base64 protocols a digit, and data in base64.

    Messages are not fragmented: an API server takes every fragment for a message of its own, and would then read
    another channel than is read here.
    """

    def __init__(self, side: Side, *, base64: bool) -> None:
        self._reader = Reader(side)
        self._side = side
        self._base64 = base64
        self._channel = -1
        self._undecoded = b""
        self._padded = False

    @property
    def closed(self) -> bool:
        """True after that side's close frame."""
        return self._reader.closed

    def feed(self, data: Buffer) -> list[Chunk]:
        """Raises `PeerViolation`."""
        return [self._chunk(piece) for piece in self._reader.feed(data)]

    def _chunk(self, piece: Piece) -> Chunk:
        if piece.control:
            return Chunk(-1, b"", piece.raw, True)
        if not piece.final:
            raise PeerViolation("a message of a channel is in fragments: send it in one frame", self._side)
        data = piece.payload
        if piece.begins:
            if not data:
                return Chunk(-1, b"", piece.raw, True)
            self._channel = data[0] - (ord("0") if self._base64 else 0)
            if self._channel < 0:
                raise PeerViolation(f"a message of channel `{data[:1]!r}`", self._side)
            data = data[1:]
            self._undecoded, self._padded = b"", False
        if self._base64:
            data = self._decode(data, piece.ends)
        return Chunk(self._channel, data, piece.raw, piece.ends)

    def _decode(self, text: bytes, ends: bool) -> bytes:
        text = self._undecoded + text
        whole = len(text) // 4 * 4
        text, self._undecoded = text[:whole], text[whole:]
        try:
            data = binascii.a2b_base64(text, strict_mode=True)
        except binascii.Error as error:
            raise PeerViolation("a message that is no base64", self._side) from error
        if (self._padded and text) or (ends and self._undecoded):
            raise PeerViolation("a message whose base64 is not whole", self._side)
        self._padded = self._padded or text.endswith(b"=")
        return data
