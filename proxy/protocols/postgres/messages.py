"""PostgreSQL messages, protocol 3.0: the bounds, the builders, and readers for the few messages that are looked into.

Source: PostgreSQL manual, "Frontend/Backend Protocol", "Message Formats". A message is one type byte, a length that
counts itself and not the type, and a body; only the start-up packets have no type byte.

Blind spot: bodies that nobody needs to look into are never checked here; the server checks its own input.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable

MAX_STARTUP = 10_000
"""Bytes of one start-up packet; the server's own limit (MAX_STARTUP_PACKET_LENGTH)."""
MAX_NEGOTIATIONS = 4
"""SSLRequest and GSSENCRequest packets before the StartupMessage; a client has use for two."""
MAX_STATEMENT = 16 * 1024 * 1024
"""Bytes of one Query, Parse or FunctionCall, and of a Bind whose result formats have to be known."""
MAX_NAME = 63
"""Bytes of a statement's or portal's name. The server compares no more than these (NAMEDATALEN - 1), so a longer name
would be the alias of another."""
MAX_CONTROL = 1024
"""Bytes of Describe, Execute, Close, Sync, Flush, Terminate and CopyDone: a name and a few numbers."""
MAX_FRAME = 0x3FFFFFFF
"""Bytes of a message that is passed on without being kept (PQ_LARGE_MESSAGE_LIMIT)."""
MAX_KEPT = 1024 * 1024
"""Bytes of the client that are kept while a question is open, beyond the message that raised it."""
MAX_REPLY = 1024 * 1024
"""Bytes of a server message that has to be looked into (errors, tags, row descriptions, …)."""
MAX_MASKED_ROW = 64 * 1024 * 1024
"""Bytes of one DataRow that holds a masked column, which has to be whole before it is masked."""
MAX_LOGIN = 256 * 1024
"""Bytes of all the server's messages from the start-up to the first ReadyForQuery."""
MAX_CATALOG = 16 * 1024 * 1024
"""Bytes of the server's answer to the catalog query: about a million relations."""
MAX_PENDING = 16_384
"""Messages passed on and not yet replied to. More than a server can leave unsent: its output buffer is 8 KiB, the
shortest reply 5 bytes, so it always makes progress."""
MAX_PREPARED = 8_192
"""Prepared statements of one session, and portals of one transaction."""
MAX_PREPARED_BYTES = 64 * 1024 * 1024
"""Text of all prepared statements of one session."""

PROTOCOL_3_0 = 196_608
CANCEL_REQUEST = 80_877_102
SSL_REQUEST = 80_877_103
GSSENC_REQUEST = 80_877_104

SSL_REQUEST_PACKET = struct.pack(">II", 8, SSL_REQUEST)
FLUSH = b"H\x00\x00\x00\x04"
AUTHENTICATION_OK = b"R\x00\x00\x00\x08\x00\x00\x00\x00"

_LENGTH = struct.Struct(">I")


class Malformed(Exception):
    """A body does not have the form that its type promises."""


def frame(kind: bytes, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return kind + _LENGTH.pack(len(body) + 4) + body


def cstring(text: bytes) -> bytes:
    """Raises ValueError for a NUL inside: what follows it would be read as something else."""
    if 0 in text:
        raise ValueError("a NUL byte inside a protocol string")
    return text + b"\0"


def startup(parameters: Iterable[tuple[str, str]]) -> bytes:
    """StartupMessage. Raises ValueError for a NUL inside a name or value."""
    body = b"".join(cstring(name.encode()) + cstring(value.encode()) for name, value in parameters)
    return struct.pack(">II", len(body) + 9, PROTOCOL_3_0) + body + b"\0"


def query(text: str) -> bytes:
    return frame(b"Q", cstring(text.encode()))


def parse(name: bytes, text: str) -> bytes:
    return frame(b"P", cstring(name), cstring(text.encode()), b"\0\0")


def bind(portal: bytes, statement: bytes) -> bytes:
    return frame(b"B", cstring(portal), cstring(statement), b"\0\0\0\0\0\0")


def describe(what: bytes, name: bytes) -> bytes:
    """`what` is `S` for a statement, `P` for a portal."""
    return frame(b"D", what, cstring(name))


def execute(portal: bytes) -> bytes:
    return frame(b"E", cstring(portal), b"\0\0\0\0")


def backend_key_data(key: bytes) -> bytes:
    return frame(b"K", key)


def negotiate_protocol_version(options: Iterable[bytes]) -> bytes:
    """We speak 3.0 and know none of these `_pq_.` options. The number is the full version, as servers send it."""
    names = [cstring(name) for name in options]
    return frame(b"v", struct.pack(">II", PROTOCOL_3_0, len(names)), *names)


def _fields(severity: str, code: str, message: str, hint: str) -> bytes:
    fields = [("S", severity), ("V", severity), ("C", code), ("M", message)]
    if hint:
        fields.append(("H", hint))
    body = b"".join(tag.encode() + text.replace("\0", " ").encode("utf-8", "replace") + b"\0" for tag, text in fields)
    return body + b"\0"


def error(code: str, message: str, hint: str = "", *, severity: str = "ERROR") -> bytes:
    return frame(b"E", _fields(severity, code, message, hint))


def notice(message: str, hint: str = "") -> bytes:
    return frame(b"N", _fields("NOTICE", "00000", message, hint))


def response_fields(body: bytes) -> dict[str, bytes]:
    """The fields of an ErrorResponse or NoticeResponse, by their one-letter type. Raises `Malformed`."""
    if not body.endswith(b"\0"):
        raise Malformed("error fields do not end")
    return {chr(field[0]): field[1:] for field in body.split(b"\0") if field}


def without_values(kind: bytes, body: bytes) -> bytes:
    """The response again, without the fields in which a server quotes values or the statements of functions: detail,
    context, and the internal query and its position."""
    kept = [field for field in body.split(b"\0") if field and field[0] not in b"DWqp"]
    return frame(kind, *(field + b"\0" for field in kept), b"\0")


def read_cstring(data: bytes, start: int, end: int) -> tuple[bytes, int]:
    """A string and the offset behind it. Raises `Malformed` when it does not end before `end`."""
    stop = data.find(0, start, end)
    if stop < 0:
        raise Malformed("a string does not end")
    return data[start:stop], stop + 1


def read_startup(body: bytes) -> list[tuple[bytes, bytes]]:
    """The parameters of a StartupMessage, behind its version. Raises `Malformed`."""
    if not body.endswith(b"\0"):
        raise Malformed("start-up parameters do not end")
    if body == b"\0":
        return []
    if not body.endswith(b"\0\0"):
        raise Malformed("start-up parameters do not end in an empty name")
    parts = body[:-2].split(b"\0")
    if len(parts) % 2:
        raise Malformed("a start-up parameter has no value")
    pairs = list(zip(parts[::2], parts[1::2], strict=True))
    if any(not name for name, _ in pairs):
        raise Malformed("bytes behind the last start-up parameter")
    return pairs


def result_formats(data: bytes, start: int, end: int) -> tuple[int, ...]:
    """The result format codes of a Bind whose names end at `start`. Raises `Malformed`."""
    try:
        (formats,) = struct.unpack_from(">H", data, start)
        position = start + 2 + 2 * formats
        (parameters,) = struct.unpack_from(">H", data, position)
        position += 2
        for _ in range(parameters):
            (size,) = struct.unpack_from(">i", data, position)
            if size < -1:
                raise Malformed("a Bind parameter has a negative length")
            position += 4 + max(size, 0)
            if position > end:
                raise Malformed("a Bind parameter exceeds its message")
        (results,) = struct.unpack_from(">H", data, position)
        position += 2
        if position + 2 * results != end:
            raise Malformed("the result formats of a Bind do not end with it")
        codes: tuple[int, ...] = struct.unpack_from(f">{results}H", data, position)
    except struct.error:
        raise Malformed("a Bind ends early") from None
    return codes
