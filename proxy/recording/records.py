"""The records of a session, and the chain that binds them.

A recording is one append-only file. Each line is `<64 hex digits> <json>\\n`, where the digits are the link

    link[n] = sha256(link[n-1] || json[n])        link[0] = sha256("hopgate recording 1\\n" || session id)

so a line cannot be changed, dropped, moved or put into another session's file without breaking every link after it. The
first record is `Opened`; nothing follows `Closed`. Times (`at_us`) are microseconds of the wall clock since the epoch.

Blind spot: who can write the file can also rebuild the whole chain. The index keeps the last link of every session that
ended, and that is what shows such a forgery.
"""

from __future__ import annotations

import hashlib

import msgspec

from proxy.model import Chain, Endpoint

FORMAT = 1
MAX_LINE = 64 * 1024 * 1024
"""Bytes of one line, at most. A longer record is refused by the writer and not read by the reader."""

LINE_OVERHEAD = 66
"""Bytes of a line beside its JSON: 64 digits, a space, a newline."""

_SEED = b"hopgate recording 1\n"


class AuditUnavailable(Exception):
    """It cannot be recorded, so it may not happen. The message says where and why, for operators."""


def seed(session: str) -> bytes:
    """link[0]: what the first record of this session is chained to."""
    return hashlib.sha256(_SEED + session.encode()).digest()


class _Record(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="is", omit_defaults=True, forbid_unknown_fields=True
):
    at_us: int


class Opened(_Record, frozen=True, kw_only=True, tag="opened"):
    """Who: written by the host agent before a worker gets the file. `chain` is None where it is not known; `refusal` is
    empty, or says why this connection may not go on."""

    session: str
    format: int
    host: str
    peer: Endpoint
    dialled: Endpoint
    target: str
    protocol: str
    policy: str
    chain: Chain | None
    refusal: str = ""


class HopReason(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """What one hop got, and by which rule."""

    hop: str
    rule: str
    decision: str
    text: str = ""


class Login(_Record, frozen=True, kw_only=True, tag="login"):
    """The role and database that the client asked for, and whether it may; `parameters` are its other start-up
    parameters. Written before a credential is fetched."""

    user: str
    database: str
    parameters: tuple[tuple[str, str], ...] = ()
    decision: str
    reasons: tuple[HopReason, ...]
    policy: str


class _Judged(_Record, frozen=True, kw_only=True):
    op: int
    kind: str
    phase: str
    text: str
    statements: tuple[str, ...]
    unclassified: str = ""
    decision: str
    reasons: tuple[HopReason, ...]
    policy: str


class Ruled(_Judged, frozen=True, kw_only=True, tag="ruled"):
    """What the client asked (`op` numbers the session's operations) and the last word on it, with one reason a hop,
    root first. Written before the operation is released or denied."""


class Held(_Judged, frozen=True, kw_only=True, tag="held"):
    """The same, when a human is asked first. Written before the human is; `ruled` follows unless the client leaves."""

    approval: str


class Decided(_Record, frozen=True, kw_only=True, tag="decided"):
    """What came of the approval: `approved`, `denied`, `expired` or `withdrawn`."""

    op: int
    approval: str
    outcome: str
    by: str = ""
    reason: str = ""


class Completed(_Record, frozen=True, kw_only=True, tag="completed"):
    """Operation `op` ended, `duration_us` microseconds after its ruling was recorded. `masked` names what was masked;
    `error` is SQLSTATE and primary message."""

    op: int
    duration_us: int = 0
    tag: str = ""
    rows: int = 0
    error: str = ""
    masked: tuple[str, ...] = ()


class Observed(_Record, frozen=True, kw_only=True, tag="observed"):
    """Bytes that went through the running operation `op`, written before they were sent on. `channel` is `stdin`,
    `stdout`, `stderr` or `resize` (then `data` is `COLUMNSxROWS`). In JSON `data` is base64."""

    op: int
    channel: str
    data: bytes


class Alert(_Record, frozen=True, kw_only=True, tag="alert"):
    """Something the operators have to know."""

    text: str


class Closed(_Record, frozen=True, kw_only=True, tag="closed"):
    """The session ended in good order. `denied` counts operations that were denied, by policy or after a hold."""

    reason: str
    operations: int
    denied: int


Record = Opened | Login | Ruled | Held | Decided | Completed | Observed | Alert | Closed

_encode = msgspec.json.Encoder().encode


def encode(record: Record | str) -> bytes:
    """JSON of one record or string. What is no Unicode (a lone surrogate) is written as the text of its escape."""
    try:
        return _encode(record)
    except UnicodeEncodeError:
        return _encode(_unicode_only(msgspec.to_builtins(record)))


def _unicode_only(value: object) -> object:
    match value:
        case str():
            return value.encode("utf-8", "backslashreplace").decode()
        case dict():
            return {name: _unicode_only(inner) for name, inner in value.items()}
        case list() | tuple():
            return [_unicode_only(inner) for inner in value]
        case _:
            return value


def link(previous: bytes, data: bytes) -> bytes:
    """The next link of the chain (32 bytes)."""
    return hashlib.sha256(previous + data).digest()


def line(digest: bytes, data: bytes) -> bytes:
    return b"%b %b\n" % (digest.hex().encode(), data)
