"""Playbooks of the PostgreSQL machine: bytes in, commands out, no server."""

from __future__ import annotations

import struct

import pytest

from proxy.model import TlsMode
from proxy.protocols import registry
from proxy.protocols.base import (
    AskCancel,
    AskLogin,
    AskRuling,
    Authenticated,
    Cancelled,
    ClientSecured,
    Close,
    Command,
    Completed,
    Connect,
    Learned,
    PeerViolation,
    Refusal,
    Send,
    StartTls,
    UpstreamFailed,
    UpstreamReady,
)
from proxy.protocols.postgres import Machine, messages
from tests.proxy.protocols.conformance import play
from tests.proxy.protocols.postgres.dialogues import (
    CATALOG,
    CLEARTEXT,
    DIALOGUES,
    DONE,
    KEY,
    MASKS,
    MD5,
    MD5_ANSWER,
    OK,
    ONE,
    PASSWORD,
    READY,
    SETTINGS,
    SYNC,
    WELCOME,
    C,
    S,
    bind,
    error,
    login,
    pipeline,
    row,
    ruling,
    startup,
    status,
    tag,
)

SSL = messages.SSL_REQUEST_PACKET
GSS = struct.pack(">II", 8, messages.GSSENC_REQUEST)


def fields(command: Command) -> dict[str, bytes]:
    assert isinstance(command, Send) and command.side is C and bytes(command.data[:1]) in (b"E", b"N")
    return messages.response_fields(bytes(command.data[5:]))


def logged_in(masks: bool = False) -> Machine:
    machine, transcript = play(DIALOGUES[1] if masks else DIALOGUES[0], ruling, steps=3 if masks else 2)
    assert not transcript.closed
    return machine


# --- start-up ---------------------------------------------------------------------------------------------------------


def test_the_registry_finds_the_protocol_and_its_port() -> None:
    assert registry.find("postgresql") is Machine
    assert registry.find("gopher") is None
    assert registry.protocol_of_port(5432) == "postgresql"
    assert registry.protocol_of_port(70) is None
    assert "postgresql" in registry.names()


def test_encryption_is_answered_in_any_order() -> None:
    machine = Machine(offer_tls=False)
    assert machine.receive(C, GSS) == [Send(C, b"N")]
    assert machine.receive(C, SSL) == [Send(C, b"N")]
    (ask,) = machine.receive(C, startup())
    assert ask == AskLogin("me", "shop", ())
    machine = Machine(offer_tls=True)
    assert machine.receive(C, SSL) == [Send(C, b"S"), StartTls(C)]
    assert machine.notify(ClientSecured()) == []
    assert machine.receive(C, SSL + GSS) == [Send(C, b"N"), Send(C, b"N")]
    assert machine.receive(C, startup(("replication", "false")))[-1] == Close(
        "replication connections do not pass the gateway"
    )


def test_bytes_in_front_of_a_handshake_are_a_violation() -> None:
    for early in (True, False):
        machine = Machine(offer_tls=True)
        with pytest.raises(PeerViolation, match="in front of its TLS handshake") as violation:
            if early:
                machine.receive(C, SSL + startup())
            else:
                machine.receive(C, SSL)
                machine.receive(C, b"x")
        assert violation.value.side is C
    machine = Machine(offer_tls=False)
    machine.receive(C, startup())
    machine.answer(AskLogin("me", "shop", ()), login(TlsMode.VERIFY_FULL))
    assert machine.notify(UpstreamReady()) == [Send(S, SSL)]
    with pytest.raises(PeerViolation, match="behind its answer to SSLRequest") as violation:
        machine.receive(S, b"S" + error("00000", "injected"))
    assert violation.value.side is S


def test_what_is_no_start_up_packet_is_refused() -> None:
    for packet in (
        SSL * 5,
        struct.pack(">I", 7),
        struct.pack(">I", messages.MAX_STARTUP + 1),
        struct.pack(">II", 8, 2 << 16),
        struct.pack(">II", 12, messages.CANCEL_REQUEST) + b"four",
        struct.pack(">II", 9, messages.PROTOCOL_3_0) + b"x",
        struct.pack(">II", 12, messages.PROTOCOL_3_0) + b"a\0b\0",
    ):
        with pytest.raises(PeerViolation):
            Machine(offer_tls=False).receive(C, packet)
    (direct,) = Machine(offer_tls=True).receive(C, b"\x16\x03\x01\x02\x00\x01")
    assert isinstance(direct, Close) and "direct TLS is not spoken" in direct.reason


def test_a_newer_minor_version_and_unknown_options_are_negotiated() -> None:
    body = b"_pq_.magic\0on\0user\0me\0\0"
    packet = struct.pack(">II", len(body) + 8, messages.PROTOCOL_3_0 + 2) + body
    offer, ask = Machine(offer_tls=False).receive(C, packet)
    assert offer == Send(C, b"v" + struct.pack(">III", 23, messages.PROTOCOL_3_0, 1) + b"_pq_.magic\0")
    assert ask == AskLogin("me", "me", ())


def test_a_cancel_request_asks_and_closes() -> None:
    machine = Machine(offer_tls=False)
    assert machine.receive(C, struct.pack(">II", 16, messages.CANCEL_REQUEST) + KEY) == [AskCancel(KEY)]
    assert machine.answer(AskCancel(KEY), Cancelled()) == [Close("the cancel request was dealt with")]


def test_refusal_is_told_at_the_first_point_and_asks_nothing() -> None:
    machine = Machine(offer_tls=False, refusal=Refusal("no agent", "use one"))
    assert machine.receive(C, GSS + SSL) == [Send(C, b"N"), Send(C, b"N")]
    told, closed = machine.receive(C, startup(("anything", "x")))
    assert fields(told) == {"S": b"FATAL", "V": b"FATAL", "C": b"28000", "M": b"no agent", "H": b"use one"}
    assert closed == Close("no agent")
    machine = Machine(offer_tls=False, refusal=Refusal("no agent"))
    assert machine.receive(C, struct.pack(">II", 16, messages.CANCEL_REQUEST) + KEY) == [Close("no agent")]


def test_a_refused_login_is_told() -> None:
    machine = Machine(offer_tls=False)
    (ask,) = machine.receive(C, startup())
    told, closed = machine.answer(ask, Refusal("not for you", "ask"))
    assert fields(told)["M"] == b"not for you" and fields(told)["C"] == b"28000"
    assert closed == Close("not for you")


# --- the login at the server ------------------------------------------------------------------------------------------


def at_login(mode: TlsMode = TlsMode.DISABLE, *pairs: tuple[str, str]) -> Machine:
    machine = Machine(offer_tls=False)
    (ask,) = machine.receive(C, startup(*pairs))
    assert machine.answer(ask, login(mode)) == [Connect()]
    if mode is TlsMode.DISABLE:
        settings = [(name.lower(), value) for name, value in pairs if name != "options"]
        (first,) = machine.notify(UpstreamReady())
        assert first == Send(S, messages.startup([("user", "app"), ("database", "shop"), *settings]))
    return machine


def test_the_client_is_welcomed_with_our_key_only_when_the_server_let_us_in() -> None:
    machine = at_login(TlsMode.DISABLE, ("application_name", "a"), ("DateStyle", "ISO"))
    assert machine.unanswered
    assert machine.receive(C, messages.query("SELECT 1")) == []
    assert machine.receive(S, CLEARTEXT) == [Send(S, messages.frame(b"p", PASSWORD.encode() + b"\0"))]
    assert machine.receive(S, OK + SETTINGS) == []
    entered, welcome, ask = machine.receive(S, WELCOME[len(SETTINGS) :])
    assert entered == Authenticated(
        b"\0\0\1\2\3\4\5\6", (("client_encoding", "UTF8"), ("standard_conforming_strings", "on"))
    )
    assert welcome == Send(C, OK + SETTINGS + messages.backend_key_data(KEY) + READY)
    assert isinstance(ask, AskRuling) and ask.operation.text == "SELECT 1"


def test_md5_is_answered() -> None:
    assert at_login().receive(S, MD5) == [Send(S, messages.frame(b"p", MD5_ANSWER + b"\0"))]


@pytest.mark.parametrize("kind", [2, 6, 7, 9, 99])
def test_other_methods_are_refused(kind: int) -> None:
    told, _ = at_login().receive(S, messages.frame(b"R", struct.pack(">I", kind)))
    assert b"authentication method `%d`" % kind in fields(told)["M"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        struct.pack(">I", 5) + b"abc",
        struct.pack(">I", 11) + b"r=x",
        struct.pack(">I", 12) + b"v=x",
    ],
)
def test_a_broken_exchange_is_a_violation(body: bytes) -> None:
    with pytest.raises(PeerViolation):
        at_login().receive(S, messages.frame(b"R", body))


def sasl(kind: int, body: bytes) -> bytes:
    return messages.frame(b"R", struct.pack(">I", kind), body)


def test_a_scram_server_has_to_prove_itself() -> None:
    hello = sasl(10, b"SCRAM-SHA-256\0\0")
    first = b"r=nonce-0123456789server,s=c2FsdHNhbHRzYWx0c2FsdA==,i=%d"
    for continuation in (
        [sasl(11, first % 10_000_000)],
        [sasl(11, b"r=other,s=c2FsdHNhbHRzYWx0c2FsdA==,i=4096")],
        [sasl(11, b"\xff\xff,i=4096")],
        [sasl(11, first % 4096), sasl(12, b"v=bm90IHRoZSBzaWduYXR1cmU=")],
        [sasl(11, first % 4096), OK],
        [OK],
    ):
        machine = at_login()
        machine.receive(S, hello)
        with pytest.raises(PeerViolation):
            for message in continuation:
                machine.receive(S, message)
    told, _ = at_login().receive(S, sasl(10, b"SCRAM-SHA-256-PLUS\0OAUTHBEARER\0\0"))
    assert b"no SASL mechanism" in fields(told)["M"]


def test_a_server_that_quotes_the_password_is_not_quoted() -> None:
    machine = at_login()
    machine.receive(S, CLEARTEXT)
    told, closed = machine.receive(S, error("28P01", f"wrong password `{PASSWORD}`"))
    assert fields(told)["M"] == b"gateway could not log in to target `db`: wrong password `<redacted>`"
    assert fields(told)["C"] == b"28000"
    assert PASSWORD not in repr((told, closed))


def test_what_fails_on_the_way_is_told() -> None:
    machine = at_login(TlsMode.REQUIRE)
    told, _ = machine.notify(UpstreamFailed("nobody listens at 192.0.2.1:5432"))
    assert fields(told)["C"] == b"08006" and b"192.0.2.1" in fields(told)["M"]
    for answer in (b"N", b"E" + error("XX000", "trust me")[1:]):
        machine = at_login(TlsMode.REQUIRE)
        machine.notify(UpstreamReady())
        told, _ = machine.receive(S, answer)
        assert b"TLS" in fields(told)["M"] and b"trust me" not in fields(told)["M"]
    told, _ = at_login().eof(S)
    assert b"closed the connection during the login" in fields(told)["M"]
    told, _ = at_login().receive(S, OK + SETTINGS.replace(b"UTF8", b"BIG5") + WELCOME[len(SETTINGS) :])[-2:]
    assert b"client encoding `BIG5`" in fields(told)["M"]


def test_prefer_goes_on_in_plain_and_allow_starts_so() -> None:
    machine = at_login(TlsMode.PREFER)
    machine.notify(UpstreamReady())
    (first,) = machine.receive(S, b"N")
    assert isinstance(first, Send) and b"user\0app\0" in bytes(first.data)
    (first,) = at_login(TlsMode.ALLOW).notify(UpstreamReady())
    assert isinstance(first, Send) and b"user\0app\0" in bytes(first.data)


def test_the_canceller_takes_the_servers_key_over_tls() -> None:
    assert at_login().canceller() is None
    machine = logged_in()
    canceller = machine.canceller()
    assert canceller is not None
    assert canceller.begin() == [Connect()]
    cancel = struct.pack(">II", 16, messages.CANCEL_REQUEST) + b"\0\0\1\2\3\4\5\6"
    assert canceller.notify(UpstreamReady()) == [Send(S, cancel), Close("the cancel request was passed on")]


def test_a_visit_goes_as_far_as_a_login_would_begin_and_shows_nothing() -> None:
    target = login(TlsMode.VERIFY_FULL).target
    visit = registry.visit("postgresql")
    assert visit is not None
    machine = visit(target)
    assert machine.begin() == [Connect()]
    assert machine.notify(UpstreamReady()) == [Send(S, messages.SSL_REQUEST_PACKET)]
    assert machine.receive(S, b"S") == [StartTls(S)]
    assert machine.notify(UpstreamReady(b"binding")) == [Close("")]
    plain = visit(target)
    plain.begin()
    plain.notify(UpstreamReady())
    (close,) = plain.receive(S, b"N")
    assert isinstance(close, Close) and "does not offer it" in close.reason


# --- the session ------------------------------------------------------------------------------------------------------


def test_a_query_is_asked_about_released_and_completed() -> None:
    machine = logged_in()
    text = messages.query("SELECT 1")
    (ask,) = machine.receive(C, text)
    assert ask.operation.text == "SELECT 1" and machine.unanswered
    assert machine.answer(ask, ruling(ask.operation)) == [Send(S, text)]
    assert machine.receive(S, ONE + READY) == [Send(C, ONE + READY), Completed(1, "SELECT 1", 1)]
    assert not machine.unanswered


def test_one_operation_is_shared_by_all_who_say_the_same() -> None:
    asks = [logged_in().receive(C, messages.query("SELECT 'shared'"))[0] for _ in range(2)]
    assert asks[0].operation is asks[1].operation


def test_a_denied_query_is_replaced_and_so_is_the_servers_error() -> None:
    machine = logged_in()
    (ask,) = machine.receive(C, messages.query("SELECT forbidden"))
    assert machine.answer(ask, ruling(ask.operation)) == [Send(S, messages.query("hopgate denied operation 1"))]
    told, done = machine.receive(S, error("42601", "syntax error") + b"Z\0\0\0\5E")
    assert told == Send(C, messages.error("42501", "denied by rule `no`", "ask") + b"Z\0\0\0\5E")
    assert done == Completed(1, error="42501 denied by rule `no`")


def test_a_server_that_runs_the_replacement_is_cut_off() -> None:
    for reply in (tag("SELECT 1"), READY, ONE):
        machine = logged_in()
        (ask,) = machine.receive(C, messages.query("SELECT forbidden"))
        machine.answer(ask, ruling(ask.operation))
        with pytest.raises(PeerViolation) as violation:
            machine.receive(S, reply)
        assert violation.value.side is S


def test_a_denial_that_meets_an_earlier_error_is_dropped() -> None:
    machine = logged_in()
    (ask,) = machine.receive(C, messages.parse(b"", "SELECT 1") + pipeline("SELECT forbidden"))
    *_, second = machine.answer(ask, ruling(ask.operation))
    assert machine.receive(S, error("42P01", "m"))[-1] == Completed(1, error="42P01 m")
    commands = machine.answer(second, ruling(second.operation))
    assert commands == [Completed(2, error="not run: an earlier message of the pipeline failed"), Send(S, SYNC)]
    assert machine.receive(S, READY) == [Send(C, READY)]


def test_hold_notices_come_between_messages() -> None:
    machine = logged_in()
    (ask,) = machine.receive(C, messages.query("SELECT 1"))
    (told,) = machine.notice("waits", "approve it")
    assert fields(told)["M"] == b"waits" and fields(told)["S"] == b"NOTICE"
    machine.answer(ask, ruling(ask.operation))
    whole = row(b"x" * 100)
    machine.receive(S, whole[:50])
    assert machine.notice("later") == []
    rest, told = machine.receive(S, whole[50:])
    assert rest == Send(C, whole[50:]) and fields(told)["M"] == b"later"


def test_farewell_is_said_where_it_can_be_read() -> None:
    machine = logged_in()
    (ask,) = machine.receive(C, messages.query("SELECT 1"))
    machine.answer(ask, ruling(ask.operation))
    told, done, closed = machine.farewell("the host shuts down", "come back")
    assert fields(told) == {
        "S": b"FATAL",
        "V": b"FATAL",
        "C": b"57P01",
        "M": b"the host shuts down",
        "H": b"come back",
    }
    assert done == Completed(1, error="no outcome: the host shuts down") and closed == Close("the host shuts down")
    machine = logged_in()
    machine.receive(S, row(b"x" * 100)[:50])
    assert [type(command) for command in machine.farewell("the host shuts down")] == [Close]
    machine = Machine(offer_tls=True)
    machine.receive(C, SSL)
    assert machine.farewell("the host shuts down") == [Close("the host shuts down")]


def test_a_statement_over_the_bound_ends_the_session() -> None:
    machine = logged_in()
    told, closed = machine.receive(C, b"Q" + struct.pack(">I", messages.MAX_STATEMENT + 1))
    assert fields(told)["C"] == b"54000" and isinstance(closed, Close)


def test_copied_data_and_parameters_are_not_kept() -> None:
    machine = logged_in()
    (ask,) = machine.receive(C, messages.parse(b"", "INSERT INTO t VALUES ($1)"))
    machine.answer(ask, ruling(ask.operation))
    head = bind("", "", value=b"v" * 100_000)[:200]
    assert machine.receive(C, head) == [Send(S, head)]
    assert machine.receive(C, b"v" * 1000) == [Send(S, b"v" * 1000)]


def test_a_terminate_goes_on_and_closes() -> None:
    assert logged_in().receive(C, b"X\0\0\0\4") == [Send(S, b"X\0\0\0\4"), Close("the client ended the session")]


def test_a_sync_inside_of_a_copy_that_fails_ends_the_session() -> None:
    machine = logged_in()
    (ask,) = machine.receive(C, messages.query("COPY t FROM STDIN"))
    machine.answer(ask, ruling(ask.operation))
    machine.receive(S, messages.frame(b"G", b"\0\0\0"))
    assert machine.receive(C, SYNC) == []
    told, *_, closed = machine.receive(S, error("22P04", "bad copy"))
    assert fields(told)["C"] == b"08P01" and isinstance(closed, Close)


# --- masks ------------------------------------------------------------------------------------------------------------


def test_the_client_waits_until_the_catalog_is_known() -> None:
    machine = Machine(offer_tls=False)
    (ask,) = machine.receive(C, startup())
    machine.answer(ask, login(masks=MASKS))
    machine.notify(UpstreamReady())
    entered, catalog = machine.receive(S, OK + WELCOME)
    assert isinstance(entered, Authenticated)
    assert isinstance(catalog, Send) and catalog.side is S and b"WITH RECURSIVE" in bytes(catalog.data)
    learned, welcome = machine.receive(S, CATALOG)
    assert learned == Learned((("public", "shown"),))
    assert isinstance(welcome, Send) and welcome.side is C


@pytest.mark.parametrize(
    "answer",
    [
        error("42501", "permission denied for pg_class") + READY,
        tag("SELECT 1") + READY,
        CATALOG.replace(b"20000:3", b"20000-3"),
        CATALOG.replace(b"masked", b"maskad"),
    ],
)
def test_a_catalog_that_cannot_be_read_ends_the_login(answer: bytes) -> None:
    machine = Machine(offer_tls=False)
    (ask,) = machine.receive(C, startup())
    machine.answer(ask, login(masks=MASKS))
    machine.notify(UpstreamReady())
    machine.receive(S, OK + WELCOME)
    try:
        told, closed = machine.receive(S, answer)
    except PeerViolation as violation:
        assert violation.side is S
    else:
        assert b"the catalog cannot be read" in fields(told)["M"] and isinstance(closed, Close)


def test_a_row_without_a_description_is_never_forwarded() -> None:
    machine = logged_in(masks=True)
    (ask,) = machine.receive(C, messages.query("SELECT id, ssn FROM customers"))
    machine.answer(ask, ruling(ask.operation))
    told, _, closed = machine.receive(S, row(b"1", b"secret"))
    assert b"columns are not known" in fields(told)["M"] and isinstance(closed, Close)


def test_an_execute_brings_its_own_describe_and_hides_the_reply() -> None:
    machine = logged_in(masks=True)
    (ask,) = machine.receive(C, messages.parse(b"", "SELECT 1") + bind("", "") + messages.execute(b"") + SYNC)
    *_, again = machine.answer(ask, ruling(ask.operation))
    describe, released = machine.answer(again, ruling(again.operation))
    assert describe == Send(S, messages.describe(b"P", b""))
    assert released == Send(S, messages.execute(b"") + SYNC)
    assert machine.receive(S, DONE + ONE + READY)[0] == Send(C, DONE + ONE[ONE.index(b"D\0\0\0") :] + READY)


def test_parameters_that_are_reported_later_are_followed() -> None:
    machine = logged_in()
    told, closed = machine.receive(S, status("client_encoding", "BIG5"))
    assert b"client encoding `BIG5`" in fields(told)["M"] and isinstance(closed, Close)
