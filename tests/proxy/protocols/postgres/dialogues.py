"""Whole PostgreSQL sessions in bytes, for the conformance suite and the playbooks: no server needed."""

from __future__ import annotations

import hashlib
import struct

from proxy.model import ColumnMask, Decision, Endpoint, Operation, Ruling, Target, TlsMode
from proxy.protocols.base import Login, Side
from proxy.protocols.postgres import Machine, messages
from tests.proxy.protocols.conformance import Dialogue

C, S = Side.CLIENT, Side.SERVER
KEY = b"\0\0\0\7seed"
PASSWORD = "the only password"
READY = b"Z\0\0\0\5I"
SYNC = b"S\0\0\0\4"
OK = messages.frame(b"R", b"\0\0\0\0")


def ruling(operation: Operation) -> Ruling:
    """Denies what says so, and what could not be classified."""
    if operation.unclassified or "forbidden" in operation.text:
        return Ruling(Decision.DENY, (), "denied by rule `no`", "ask", "v1")
    return Ruling(Decision.ALLOW, (), "", "", "v1")


def login(tls_mode: TlsMode = TlsMode.DISABLE, masks: tuple[ColumnMask, ...] = ()) -> Login:
    target = Target("db", "postgresql", (Endpoint("192.0.2.1", 5432),), tls_mode, "db.test", "", "db")
    return Login(target, "app", PASSWORD, "shop", "nonce-0123456789", KEY, masks)


MASKS = (ColumnMask("public", "customers", "ssn", "redact", lambda value: b"***" + value[-1:]),)


def startup(*pairs: tuple[str, str]) -> bytes:
    return messages.startup([("user", "me"), ("database", "shop"), *pairs])


def status(name: str, value: str) -> bytes:
    return messages.frame(b"S", name.encode() + b"\0" + value.encode() + b"\0")


def tag(text: str) -> bytes:
    return messages.frame(b"C", text.encode() + b"\0")


def row(*values: bytes | None) -> bytes:
    parts = [struct.pack(">i", -1) if v is None else struct.pack(">i", len(v)) + v for v in values]
    return messages.frame(b"D", struct.pack(">H", len(values)), *parts)


def description(*columns: tuple[str, int, int, int, int]) -> bytes:
    """Columns as (name, table, attribute, type, format)."""
    parts = [
        name.encode() + b"\0" + struct.pack(">IhIhih", table, attribute, kind, -1, -1, code)
        for name, table, attribute, kind, code in columns
    ]
    return messages.frame(b"T", struct.pack(">H", len(columns)), *parts)


SETTINGS = status("client_encoding", "UTF8") + status("standard_conforming_strings", "on")
WELCOME = SETTINGS + messages.frame(b"K", b"\0\0\1\2\3\4\5\6") + READY
PLAIN_LOGIN = ((C, startup(("application_name", "a"), ("client_encoding", "UTF8"))), (S, OK + WELCOME))
CATALOG = (
    description(("?column?", 0, 0, 25, 0))
    + row(b"pg_catalog")
    + tag("SELECT 1")
    + description(*[(name, 0, 0, 25, 0) for name in "abcd"])
    + row(b"masked", b"0", b"20000", b"2")
    + row(b"derived", b"20010", b"public".hex().encode(), b"shown".hex().encode())
    + row(b"known", b"20000:3,20010:2,20020:1", None, None)
    + row(b"text", b"25,1043", None, None)
    + tag("SELECT 4")
    + READY
)
MASKED_LOGIN = (*PLAIN_LOGIN, (S, CATALOG))

MD5_SALT = b"salt"
CLEARTEXT = messages.frame(b"R", struct.pack(">I", 3))
MD5 = messages.frame(b"R", struct.pack(">I", 5), MD5_SALT)
MD5_ANSWER = (
    b"md5" + hashlib.md5(hashlib.md5(PASSWORD.encode() + b"app").hexdigest().encode() + MD5_SALT).hexdigest().encode()
)


def bind(portal: str, statement: str, *, binary: bool = False, value: bytes | None = None) -> bytes:
    values = struct.pack(">HH", 0, 0) if value is None else struct.pack(">HHi", 0, 1, len(value)) + value
    formats = struct.pack(">HH", 1, 1) if binary else struct.pack(">H", 0)
    return messages.frame(b"B", portal.encode() + b"\0" + statement.encode() + b"\0", values, formats)


def pipeline(text: str, *, binary: bool = False, value: bytes | None = None) -> bytes:
    return (
        messages.parse(b"", text)
        + bind("", "", binary=binary, value=value)
        + messages.describe(b"P", b"")
        + messages.execute(b"")
        + SYNC
    )


def error(code: str, message: str) -> bytes:
    return messages.error(code, message)


ONE = description(("a", 0, 0, 23, 0)) + row(b"1") + tag("SELECT 1")
DONE = b"1\0\0\0\4" + b"2\0\0\0\4"
SSN = description(("id", 20000, 1, 23, 0), ("ssn", 20000, 2, 25, 0))

PLAIN_STEPS = (
    *PLAIN_LOGIN,
    (C, messages.query("SELECT 1")),
    (S, messages.notice("n") + ONE + READY),
    (C, messages.query("SELECT forbidden")),
    (S, error("42601", "syntax error") + READY),
    (C, messages.query("") + messages.query("SELECT 1; SELECT 1")),
    (S, b"I\0\0\0\4" + READY + ONE + ONE + READY),
    (C, pipeline("SELECT 1", value=b"v" * 300) + pipeline("SELECT forbidden")),
    (S, DONE + ONE + READY + error("42601", "syntax error") + READY),
    (C, pipeline("SELECT 1/0") + pipeline("SELECT 1")),
    (S, b"1\0\0\0\4" + error("22012", "division by zero") + READY + DONE + ONE + READY),
    (C, messages.parse(b"s", "SELECT 2") + messages.describe(b"S", b"s") + b"H\0\0\0\4"),
    (S, b"1\0\0\0\4" + messages.frame(b"t", b"\0\0") + description(("a", 0, 0, 23, 0))),
    (C, bind("p", "s") + messages.execute(b"p") + messages.frame(b"C", b"Ss\0") + messages.frame(b"C", b"Pp\0") + SYNC),
    (S, b"2\0\0\0\4" + row(b"2") + tag("SELECT 1") + b"3\0\0\0\4" * 2 + READY),
    (C, messages.query("COPY t FROM STDIN")),
    (S, messages.frame(b"G", b"\0\0\1\0\0")),
    (C, messages.frame(b"d", b"x" * 500) + messages.frame(b"d", b"y\n") + b"c\0\0\0\4"),
    (S, tag("COPY 2") + READY),
    (C, messages.query("COPY t TO STDOUT")),
    (S, messages.frame(b"H", b"\0\0\1\0\0") + messages.frame(b"d", b"x" * 500) + b"c\0\0\0\4" + tag("COPY 1") + READY),
    (C, messages.frame(b"F", struct.pack(">IHHH", 1, 0, 0, 0))),
    (S, error("42601", "syntax error") + messages.frame(b"A", b"\0\0\0\1c\0p\0") + READY),
    (C, b"X\0\0\0\4"),
)

MASKED_STEPS = (
    *MASKED_LOGIN,
    (C, messages.query("SELECT id, ssn FROM customers")),
    (S, SSN + row(b"1", b"secret1") + row(b"2", None) + row(b"3", b"secret3" * 90) + tag("SELECT 3") + READY),
    (C, messages.parse(b"", "SELECT id, ssn FROM customers") + bind("", "") + messages.execute(b"") + SYNC),
    (S, DONE + SSN + row(b"1", b"secret1") + tag("SELECT 1") + READY),
    (C, pipeline("SELECT id, ssn FROM customers", binary=True)),
    (S, b"1\0\0\0\4" + messages.frame(b"t", b"\0\0") + SSN),
    (S, error("26000", "prepared statement does not exist") + READY),
    (C, messages.query("SELECT s FROM shown")),
    (S, description(("s", 20010, 2, 25, 0), ("n", 20010, 1, 23, 0)) + row(b"secret", b"7") + tag("SELECT 1") + READY),
    (C, messages.query("SELECT 1")),
    (S, messages.frame(b"E", b"SERROR\0VERROR\0C22000\0Mm\0Dsecret\0Wsecret\0Hh\0\0") + READY),
    (C, messages.query("SELECT a FROM newer")),
    (S, description(("a", 20030, 1, 25, 0)) + row(b"secret")),
)

DIALOGUES = (
    Dialogue("plain", Machine, login(), PLAIN_STEPS),
    Dialogue("masked", Machine, login(masks=MASKS), MASKED_STEPS),
    Dialogue(
        "tls",
        Machine,
        login(TlsMode.REQUIRE),
        (
            (C, struct.pack(">II", 8, messages.GSSENC_REQUEST)),
            (C, messages.SSL_REQUEST_PACKET),
            *PLAIN_LOGIN[:1],
            (S, b"S"),
            (S, MD5),
            (S, OK + WELCOME),
            (C, messages.query("SELECT 1")),
            (S, ONE + READY),
        ),
        offer_tls=True,
    ),
    Dialogue("cancel", Machine, login(), ((C, struct.pack(">II", 16, messages.CANCEL_REQUEST) + KEY),)),
)
