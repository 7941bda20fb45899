"""HTTP/1.1 between hostile peers (RFC 9110, RFC 9112): heads through h11, bodies through strict framing of our own.

A head is collected here up to its blank line, looked at for what two readers could read differently, and read by an
h11 connection of its own, but for final answers that are written so plainly that h11 could read nothing else; what is
sent on is written anew from what was read, never the peer's bytes, and held against the same rules once more. Bodies
are taken apart and framed anew as they come, piece by piece, with nothing kept but the place inside a chunk.

Stricter than the RFC asks, since every client and server of Kubernetes writes plainly: line ends are CR LF, no control
characters, no folded lines, one Content-Length of digits and never beside Transfer-Encoding, the only transfer coding
is `chunked`, no chunk extensions, HTTP/1.1 requests in origin form.

Trailers are checked, bounded and dropped. Interim answers are dropped too (`Expect` is dealt with on this side).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Final

import h11

from proxy.protocols.kubernetes.requests import Head

MAX_HEAD: Final = 64 * 1024
"""Bytes of a head."""
MAX_TRAILERS: Final = 8 * 1024
"""Bytes of a trailer section."""
MAX_HEADERS: Final = 256
KNOWN_HEADS: Final = 256
"""Clients' heads that are kept with what was read from them, the latest, each of …"""
KNOWN_HEAD: Final = 4 * 1024
"""… at most so many bytes. They hold what the client sent as its credential, which is none here."""
METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"

_MAX_SIZE_LINE = 18
"""Sixteen hex digits and the line's end."""
_UNREADABLE = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|(?<!\r)\n|\r[^\n]|\r\n[ \t]")
_TEXT = bytes(byte for byte in range(256) if byte == 0x09 or (byte >= 0x20 and byte != 0x7F))
_SIZE = re.compile(rb"[0-9A-Fa-f]{1,16}")
_PATH = re.compile(r"/[\x21-\x7e]*")
_DIGITS = re.compile(r"[0-9]{1,18}")
_HOST = re.compile(r"[A-Za-z0-9._~-]+(:[0-9]{1,5})?|\[[0-9A-Fa-f:.]+\](:[0-9]{1,5})?")
_STATUS_LINE = re.compile(rb"HTTP/1\.1 ([2-5][0-9][0-9]) ([\x21-\x7e]*(?: [\x21-\x7e]+)*)\r\n")
_PLAIN_HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+): ([\x21-\x7e]+(?: [\x21-\x7e]+)*)\r\n")
_FRAMING_NAMES = frozenset((b"content-length", b"transfer-encoding"))
_FRAMED = re.compile(rb"(?i:content-length): [0-9]{1,18}|(?i:transfer-encoding): chunked")
_LENGTH_LINE = re.compile(rb"\r\ncontent-length:[ \t]*([^\r]*?)[ \t]*(?=\r)", re.I)

_OPTIONS_OF_CONNECTION = frozenset({"close", "keep-alive", "upgrade", "te"})
"""What a client may name in `Connection`. Anything else would take a header away that was judged (RFC 9110, 7.6.1)."""
_HOP_BY_HOP = frozenset(
    {
        "connection",
        "content-length",
        "expect",
        "http2-settings",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
_CREDENTIALS = frozenset({"authorization", "cookie", "forwarded", "via", "x-real-ip"})
_CREDENTIAL_PREFIXES = ("x-remote-", "x-forwarded-")
"""What a front proxy says of its client (Kubernetes, "Authenticating Proxy"): nobody but the gateway may say it."""
_SERVERS_OWN = frozenset({"alt-svc", "authentication-info", "set-cookie", "www-authenticate"})
"""What a server says to whoever logs in to it, or of other ways to it: the client does neither."""

_UNSENT = frozenset(name.encode() for name in _HOP_BY_HOP | _SERVERS_OWN)
"""What of a server's headers does not go on."""

Headers = list[tuple[bytes, bytes]]

_ASKED = {method: h11.Request(method=method, target="/", headers=[("Host", "x")]) for method in METHODS}
_UPGRADING = h11.Request(method="GET", target="/", headers=[("Host", "x"), ("Connection", "upgrade"), ("Upgrade", "x")])
"""What h11 has to know of a request to read its answers."""


class Malformed(Exception):
    """A head or body that is not understood. `status` is what a client is told."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class HeadReader:
    """Collects one head after the other; keeps nothing between them."""

    __slots__ = ("_kept", "_seen")

    def __init__(self) -> None:
        self._kept: bytearray | None = None
        self._seen = 0

    def __bool__(self) -> bool:
        """Whether a head has begun and is not whole."""
        return self._kept is not None

    def feed(self, data: bytes) -> tuple[bytes, bytes] | None:
        """The head and what came behind it, or None when it is not whole. Raises `Malformed`."""
        kept: bytes | bytearray = data
        if self._kept is not None:
            self._kept += data
            kept = self._kept
        start = max(0, self._seen - 3)
        end = kept.find(b"\r\n\r\n", start, MAX_HEAD)
        stop = end + 4 if end >= 0 else min(len(kept), MAX_HEAD)
        if end < 0 or not _plain(kept[:stop]):
            wrong = _UNREADABLE.search(kept, start, stop)
            if wrong is not None:
                raise Malformed(f"the head has {_name(wrong[0])}")
        if end < 0:
            if len(kept) >= MAX_HEAD:
                raise Malformed(f"the head has more than `{MAX_HEAD}` bytes", 431)
            if self._kept is None:
                self._kept = bytearray(data)
            self._seen = len(kept)
            return None
        self._kept, self._seen = None, 0
        return bytes(kept[:stop]), bytes(kept[stop:])


def _plain(head: bytes | bytearray) -> bool:
    """Whether a whole head has nothing that `_UNREADABLE` would find: a tenth of its time, which every head takes."""
    lines = head.count(b"\r\n")
    return head.translate(None, _TEXT) == b"\r\n" * lines and b"\r\n " not in head and b"\r\n\t" not in head


def _name(wrong: bytes) -> str:
    if wrong[:2] == b"\r\n":
        return "a folded line"
    if wrong[:1] in (b"\r", b"\n"):
        return "a line that does not end with CR and LF"
    return f"the control character `{wrong[0]:#04x}`"


# --- requests ---------------------------------------------------------------------------------------------------------


def read_request(raw: bytes) -> tuple[Head, Framing]:
    """A client's head, and how its body is framed. Raises `Malformed`."""
    head, chunked, length = _known_request(raw) if len(raw) <= KNOWN_HEAD else _request(raw)
    return head, Chunks() if chunked else Length(length)


def _request(raw: bytes) -> tuple[Head, bool, int]:
    """The head, whether its body is in chunks, and otherwise how long it is."""
    request = _read(h11.Connection(h11.SERVER, MAX_HEAD), raw)
    assert isinstance(request, h11.Request)
    head = Head(
        method=request.method.decode("latin-1"),
        target=request.target.decode("latin-1"),
        headers=tuple((name.decode("latin-1"), value.decode("latin-1")) for name, value in request.headers),
    )
    if request.http_version != b"1.1":
        raise Malformed(f"HTTP/{request.http_version.decode()} is not spoken here: use HTTP/1.1")
    if head.method not in METHODS:
        raise Malformed(f"the method `{head.method[:32]}` is not served here", 405)
    if not head.target.startswith("/"):
        raise Malformed("the request target is no path: absolute, authority and asterisk forms are not served here")
    if "#" in head.target:
        raise Malformed("the request target has a fragment")
    if not _HOST.fullmatch(head.values("host")[0]):
        raise Malformed("the `Host` header is not a host and a port")
    for option in _words(head.values("connection")):
        if option not in _OPTIONS_OF_CONNECTION:
            raise Malformed(f"the `Connection` header names `{option[:64]}`, which would take it away")
    if any(word != "100-continue" for word in _words(head.values("expect"))):
        raise Malformed("the `Expect` header asks for more than `100-continue`", 417)
    framing = _framing(request.headers, raw)
    return head, isinstance(framing, Chunks), framing.left if isinstance(framing, Length) else 0


_known_request = lru_cache(maxsize=KNOWN_HEADS)(_request)
"""Whoever polls asks in the same bytes again: reading them is a third of what a request costs."""


def wants_continue(head: Head) -> bool:
    """Whether the client waits for a word before it sends the body (RFC 9110, 10.1.1)."""
    return bool(head.values("expect"))


def closes(head: Head) -> bool:
    """Whether the client wants no more than one answer."""
    return "close" in _words(head.values("connection"))


def upgrades(head: Head) -> bool:
    """Whether the client offers another protocol for this connection."""
    return bool(head.values("upgrade")) or "upgrade" in _words(head.values("connection"))


def forwarded(head: Head) -> Headers:
    """What of the client's headers goes to the server: nothing that concerns this hop alone, or says who it is."""
    return [
        (name.encode("latin-1"), value.encode("latin-1"))
        for name, value in head.headers
        if name not in _HOP_BY_HOP and not _withheld(name)
    ]


def write_request(method: str, target: str, headers: Headers) -> bytes:
    """A head for the server. Raises `ValueError` for what no head can hold."""
    if not _PATH.fullmatch(target):
        raise ValueError("a request target is no path")
    return _written(f"{method} {target} HTTP/1.1".encode("latin-1"), headers)


# --- answers ----------------------------------------------------------------------------------------------------------


class Answer:
    """A server's head. `framing` is None where there is no body; `last` says that the server takes no more requests;
    `upgrade` is the protocol that it turns to."""

    __slots__ = ("framing", "headers", "last", "reason", "status", "upgrade")

    def __init__(
        self, status: int, reason: bytes, headers: Headers, framing: Framing | None, last: bool, upgrade: bytes
    ) -> None:
        self.status = status
        self.reason = reason
        self.headers = headers
        self.framing = framing
        self.last = last
        self.upgrade = upgrade

    def value(self, name: bytes) -> str:
        """The first value of a header, or an empty string."""
        return next((value.decode("latin-1") for key, value in self.headers if key.lower() == name), "")

    @property
    def line(self) -> str:
        """`200 OK`."""
        return f"{self.status} {self.reason.decode('latin-1')}".rstrip()


class AnswerReader:
    """Reads the heads that answer one request, the interim ones and the final one. A final one that is written as
    plainly as an API server does is read here, which takes a quarter of the time; every other one by h11."""

    __slots__ = ("_connection", "_upgrade", "method")

    def __init__(self, method: str, *, upgrade: bool = False) -> None:
        self.method = method
        self._upgrade = upgrade
        self._connection: h11.Connection | None = None

    def read(self, raw: bytes) -> Answer:
        """An answer, final or interim, as it may go on to the client. Raises `Malformed`."""
        status, reason, last, pairs = _plain_answer(raw) or self._by_h11(raw)
        lower = [(name.lower(), value) for name, value in pairs]
        framing: Framing | None = _framing(lower, raw)
        named = set(_words(value.decode("latin-1") for name, value in lower if name == b"connection"))
        last = last or "close" in named
        if status < 200 or self.method == "HEAD" or status in (204, 304):
            framing = None
        elif framing is None:
            framing, last = UntilClose(), True
        dropped = _UNSENT | {name.encode("latin-1") for name in named} if named else _UNSENT
        headers = [pair for pair, (name, _) in zip(pairs, lower, strict=True) if name not in dropped]
        if isinstance(framing, Length) or (framing is None and status >= 200 and status != 204):
            headers += [(b"Content-Length", value) for name, value in lower if name == b"content-length"]
        upgrade = b", ".join(value for name, value in lower if name == b"upgrade")
        return Answer(status, reason, headers, framing, last, upgrade)

    def _by_h11(self, raw: bytes) -> _Head:
        if self._connection is None:
            self._connection = h11.Connection(h11.CLIENT, MAX_HEAD)
            self._connection.send(_UPGRADING if self._upgrade else _ASKED[self.method])
        response = _read(self._connection, raw)
        assert isinstance(response, h11.Response | h11.InformationalResponse)
        pairs = response.headers.raw_items()
        return response.status_code, bytes(response.reason), response.http_version != b"1.1", pairs


_Head = tuple[int, bytes, bool, Headers]
"""Status, reason, whether the server speaks an older HTTP, and the headers with their names as they were written."""


def _plain_answer(raw: bytes) -> _Head | None:
    """A final head in which no two readers could see different things, whose body is framed by one header at most; None
    for any other. h11 reads the same from it."""
    line = _STATUS_LINE.match(raw)
    if line is None:
        return None
    pairs = _PLAIN_HEADER.findall(raw, line.end())
    if len(pairs) > MAX_HEADERS or line.end() + sum(len(name) + len(value) + 4 for name, value in pairs) + 2 != len(
        raw
    ):
        return None
    framed = [pair for pair in pairs if pair[0].lower() in _FRAMING_NAMES]
    if len(framed) > 1 or (framed and not _FRAMED.fullmatch(b"%b: %b" % framed[0])):
        return None
    return int(line[1]), line[2], False, pairs


def write_answer(status: int, reason: bytes, headers: Headers, *, chunked: bool = False, last: bool = False) -> bytes:
    """A head for the client; `last` says that the connection ends with it. Raises `ValueError` for what no head can
    hold."""
    if chunked:
        headers = [*headers, (b"Transfer-Encoding", b"chunked")]
    if last:
        headers = [*headers, (b"Connection", b"close")]
    return _written(b"HTTP/1.1 %d %b" % (status, reason), headers)


def write_switch(headers: Headers, upgrade: bytes) -> bytes:
    """The head that turns the connection into another protocol (RFC 9110, 15.2.2)."""
    switched = [(b"Connection", b"Upgrade"), (b"Upgrade", upgrade)]
    return _written(b"HTTP/1.1 101 Switching Protocols", headers + switched)


# --- bodies -----------------------------------------------------------------------------------------------------------


class Length:
    """A body of so many bytes."""

    __slots__ = ("left",)
    chunked = False

    def __init__(self, length: int) -> None:
        self.left = length

    @property
    def done(self) -> bool:
        return not self.left

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """What of the data is the body, and what is behind it."""
        left = self.left
        if len(data) <= left:
            self.left = left - len(data)
            return data, b""
        self.left = 0
        return data[:left], data[left:]

    def eof(self) -> bool:
        """Whether the body may end with the connection, here."""
        return self.done


class UntilClose:
    """A body that ends with the connection: an answer only."""

    __slots__ = ("done",)
    chunked = True

    def __init__(self) -> None:
        self.done = False

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        return data, b""

    def eof(self) -> bool:
        self.done = True
        return True


class Chunks:
    """A body in chunks (RFC 9112, 7.1): bytes of size lines, line ends and trailers are kept until they are whole."""

    __slots__ = ("_kept", "_left", "_next", "_trailer", "done")
    chunked = True

    def __init__(self) -> None:
        self.done = False
        self._left = 0
        self._kept = b""
        self._trailer = 0
        self._next: Callable[[bytes, int], int] = self._size

    def feed(self, data: bytes) -> tuple[bytes, bytes]:
        """What of the data is the body, and what is behind it. Raises `Malformed`."""
        pieces = []
        at = 0
        if self._kept:
            data = self._kept + data
            self._kept = b""
        end = len(data)
        while at < end and not self.done:
            if self._left:
                piece = data[at : at + self._left]
                pieces.append(piece)
                at += len(piece)
                self._left -= len(piece)
                continue
            after = self._next(data, at)
            if after < 0:
                self._kept = data[at:]
                at = end
            else:
                at = after
        return (pieces[0] if len(pieces) == 1 else b"".join(pieces)), data[at:] if self.done else b""

    def eof(self) -> bool:
        return self.done

    def _size(self, data: bytes, at: int) -> int:
        found = data.find(b"\r\n", at, at + _MAX_SIZE_LINE)
        size = data[at:found] if found >= 0 else data[at : at + _MAX_SIZE_LINE].removesuffix(b"\r")
        if not _SIZE.fullmatch(size):
            raise Malformed("the size of a chunk is no plain hexadecimal number")
        if found < 0:
            return -1
        self._left = int(size, 16)
        self._next = self._end if self._left else self._trailers
        return found + 2

    def _end(self, data: bytes, at: int) -> int:
        end = data[at : at + 2]
        if end not in (b"\r\n", b"\r"):
            raise Malformed("a chunk is longer than its size says")
        if len(end) < 2:
            return -1
        self._next = self._size
        return at + 2

    def _trailers(self, data: bytes, at: int) -> int:
        """One line of the trailer section; an empty one ends the body."""
        found = data.find(b"\r\n", at, at + MAX_TRAILERS)
        line = data[at:] if found < 0 else data[at : found + 2]
        if self._trailer + len(line) > MAX_TRAILERS:
            raise Malformed(f"the trailers have more than `{MAX_TRAILERS}` bytes", 431)
        if _UNREADABLE.search(line) or line[:1] in (b" ", b"\t"):
            raise Malformed("a trailer has a character that does not belong there")
        if found < 0:
            return -1
        if found == at:
            self.done = True
        elif not re.match(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:", line):
            raise Malformed("a trailer is no header")
        self._trailer += len(line)
        return found + 2


Framing = Length | Chunks | UntilClose


def chunk(data: bytes) -> bytes:
    """One chunk; nothing for no data, which would end the body."""
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""


LAST_CHUNK: Final = b"0\r\n\r\n"


# --- both -------------------------------------------------------------------------------------------------------------


def _read(connection: h11.Connection, raw: bytes) -> h11.Request | h11.Response | h11.InformationalResponse:
    if raw.count(b"\r\n") > MAX_HEADERS + 2:
        raise Malformed(f"the head has more than `{MAX_HEADERS}` headers", 431)
    try:
        connection.receive_data(raw)
        event = connection.next_event()
    except h11.RemoteProtocolError as error:
        raise Malformed(str(error)[:200], error.error_status_hint) from None
    if not isinstance(event, h11.Request | h11.Response | h11.InformationalResponse):
        raise Malformed("the head is not understood")
    return event


def _written(line: bytes, headers: Headers) -> bytes:
    raw = b"".join([line, b"\r\n", *[b"%b: %b\r\n" % header for header in headers], b"\r\n"])
    if raw.count(b"\r\n") != len(headers) + 2 or not _plain(raw):
        # not quoted: it may hold a credential
        raise ValueError("a head would be more than what it is to say")
    return raw


def _framing(headers: Iterable[tuple[bytes, bytes]], raw: bytes) -> Length | Chunks | None:
    """How the body that follows a head is framed, by its headers alone (RFC 9112, 6.3)."""
    chunked = any(name == b"transfer-encoding" for name, _ in headers)
    lengths = [found.decode("latin-1") for found in _LENGTH_LINE.findall(raw)]
    if len(lengths) > 1 or any(not _DIGITS.fullmatch(length) for length in lengths):
        raise Malformed("the `Content-Length` is not one number")
    if chunked and lengths:
        raise Malformed("there are both `Content-Length` and `Transfer-Encoding`")
    if chunked:
        return Chunks()
    return Length(int(lengths[0])) if lengths else None


def _words(values: Iterable[str]) -> list[str]:
    return [word for value in values for each in value.split(",") if (word := each.strip().lower())]


def _withheld(name: str) -> bool:
    plain = name.replace("_", "-")
    if plain != name and (plain in _HOP_BY_HOP or plain.startswith("impersonate-")):
        return True
    return plain in _CREDENTIALS or plain.startswith(_CREDENTIAL_PREFIXES)
