"""The PostgreSQL machine against a real server: logins, denials compared with a server's own errors, masks, copies,
cancels."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.model import ColumnMask, Operation, OperationKind, Ruling, TlsMode
from proxy.protocols.base import AskRuling, Authenticated, Completed, Learned, Refusal
from proxy.protocols.postgres import messages
from tests.lab.postgres import PostgresServer, postgres
from tests.proxy.protocols.pump import ALLOW, Pump, RawClient, deny, running

SYNC = b"S\0\0\0\4"
FLUSH = b"H\0\0\0\4"
SCHEMA = """
CREATE TABLE customers (id int PRIMARY KEY, name text, ssn varchar(11), born date, note text);
INSERT INTO customers SELECT i, 'name ' || i, '123-45-' || (1000 + i), date '2000-01-01' + i, NULL
  FROM generate_series(1, 3) i;
CREATE TABLE plain (a int, b text);
CREATE VIEW shown AS SELECT id, upper(ssn) AS s FROM customers;
CREATE MATERIALIZED VIEW shown_twice AS SELECT * FROM shown;
CREATE TABLE people (ssn text, at int) PARTITION BY RANGE (at);
CREATE TABLE people_1 PARTITION OF people FOR VALUES FROM (0) TO (10);
INSERT INTO people VALUES ('123-45-9999', 1);
CREATE EXTENSION IF NOT EXISTS citext;
"""


def eventually(holds: Callable[[], bool]) -> None:
    """The gateway's thread may still be busy with what comes after the bytes that the client has."""
    deadline = time.monotonic() + 5
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def clear(value: bytes) -> bytes:
    return b"###-" + value[-4:]


MASKS = (
    ColumnMask("public", "customers", "ssn", "partial", clear),
    ColumnMask("public", "customers", "born", "redact", lambda value: b"***"),
    ColumnMask("public", "people", "ssn", "partial", clear),
)


def no_forbidden(operation: Operation) -> Ruling:
    if operation.unclassified:
        return deny(f"unclassified: {operation.unclassified}")
    if "forbidden_at_execute" in operation.text:
        return deny() if operation.kind is OperationKind.EXECUTE else ALLOW
    return deny() if "forbidden" in operation.text else ALLOW


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with postgres(auth="trust") as started:
        started.run_sql(SCHEMA)
        yield started


@pytest.fixture
def gateway(server: PostgresServer) -> Iterator[Pump]:
    with running(Pump(server, judge=no_forbidden)) as pump:
        yield pump
    assert pump.violations == []


@pytest.fixture
def masked(server: PostgresServer) -> Iterator[Pump]:
    with running(Pump(server, judge=no_forbidden, masks=MASKS)) as pump:
        yield pump
    assert pump.violations == []


def connect(pump: Pump, **options: object) -> psycopg.Connection:
    where = {"host": "127.0.0.1", "port": pump.port, "user": "me", "dbname": "postgres", "connect_timeout": 10}
    return psycopg.connect(autocommit=True, **where, **options)


# --- login ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("auth", ["scram-sha-256", "md5", "password"])
@pytest.mark.parametrize("tls", [False, True])
def test_every_login_method_works_and_the_client_is_asked_for_nothing(auth: str, tls: bool) -> None:
    with postgres(auth=auth, tls=tls) as started:
        mode = TlsMode.VERIFY_FULL if tls else TlsMode.DISABLE
        with running(Pump(started, tls_mode=mode, offer_tls=tls)) as pump, connect(pump) as connection:
            assert connection.execute("SELECT current_user").fetchone() == ("postgres",)
            assert connection.pgconn.ssl_in_use is tls
            assert not connection.pgconn.used_password
            used = connection.execute("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()").fetchone()
            assert used == (tls,)
        with running(Pump(started, tls_mode=mode, password="wrong-word")) as pump:
            with pytest.raises(psycopg.OperationalError, match="gateway could not log in to target `db`") as refused:
                connect(pump)
            assert "wrong-word" not in str(refused.value)
            assert pump.of(Authenticated) == []


def test_scram_binds_to_the_server_certificate() -> None:
    with postgres(auth="scram-sha-256") as started:
        with running(Pump(started, tls_mode=TlsMode.VERIFY_FULL)) as pump:
            connect(pump).close()
        # Bound to another certificate: the server sees the difference only because it is told.
        with (
            running(Pump(started, tls_mode=TlsMode.VERIFY_FULL, binding=b"\1" * 32)) as pump,
            pytest.raises(psycopg.OperationalError, match="SCRAM channel binding check failed"),
        ):
            connect(pump)


@pytest.mark.parametrize(
    ("mode", "works"),
    [
        (TlsMode.DISABLE, True),
        (TlsMode.ALLOW, True),
        (TlsMode.PREFER, True),
        (TlsMode.REQUIRE, False),
        (TlsMode.VERIFY_CA, False),
        (TlsMode.VERIFY_FULL, False),
    ],
)
def test_a_server_without_tls_is_refused_where_the_mode_demands_it(mode: TlsMode, works: bool) -> None:
    with postgres(tls=False) as started, running(Pump(started, tls_mode=mode)) as pump:
        if works:
            connect(pump).close()
        else:
            with pytest.raises(psycopg.OperationalError, match=f"has to be spoken to with TLS \\(`{mode}`\\)"):
                connect(pump)


def test_a_server_certificate_is_checked_as_the_mode_says() -> None:
    with postgres() as started:
        for mode, options, works in (
            (TlsMode.REQUIRE, {"ca_path": started.other_ca_path}, True),
            (TlsMode.VERIFY_CA, {"server_name": "other.test"}, True),
            (TlsMode.VERIFY_CA, {"ca_path": started.other_ca_path}, False),
            (TlsMode.VERIFY_FULL, {"server_name": "other.test"}, False),
        ):
            with running(Pump(started, tls_mode=mode, **options)) as pump:
                if works:
                    connect(pump).close()
                else:
                    with pytest.raises(psycopg.OperationalError, match="TLS with target `db` failed"):
                        connect(pump)
    with (
        postgres(expired=True) as started,
        running(Pump(started, tls_mode=TlsMode.VERIFY_FULL)) as pump,
        pytest.raises(psycopg.OperationalError, match="expired"),
    ):
        connect(pump)


def test_server_errors_of_the_login_reach_the_client(gateway: Pump) -> None:
    with pytest.raises(psycopg.OperationalError, match=r'gateway could not .* database "nowhere" does not exist'):
        psycopg.connect(host="127.0.0.1", port=gateway.port, user="me", dbname="nowhere", connect_timeout=10)


def test_start_up_parameters_are_passed_or_refused(gateway: Pump) -> None:
    with connect(gateway, application_name="app", options="-c statement_timeout=7s --geqo=off") as connection:
        names = ("application_name", "statement_timeout", "geqo")
        shown = [connection.execute(f"SHOW {name}").fetchone() for name in names]
        assert shown == [("app",), ("7s",), ("off",)]
    for options in ("-c search_path=evil", "-c role=postgres", "-c session_authorization=x", "-f", "-c nothing"):
        with pytest.raises(psycopg.OperationalError, match=r"does not pass the gateway|has no value"):
            connect(gateway, options=options)
    with pytest.raises(psycopg.OperationalError, match="replication connections do not pass"):
        connect(gateway, replication="database")
    with pytest.raises(psycopg.OperationalError, match="client encoding `SJIS` does not pass"):
        connect(gateway, client_encoding="SJIS")


def test_refusal_mode_says_why_in_plain_and_in_tls(server: PostgresServer) -> None:
    refusal = Refusal("no agent", "start it from an agent")
    for offer_tls in (False, True):
        with running(Pump(server, refusal=refusal, offer_tls=offer_tls)) as pump:
            with pytest.raises(psycopg.OperationalError, match=r"(?s)no agent.*start it from an agent"):
                connect(pump, sslmode="require" if offer_tls else "prefer")
            assert pump.keys == {}


# --- denials, compared with the server's own errors -------------------------------------------------------------------


def query(text: str) -> bytes:
    return messages.query(text)


def parse(name: str, text: str) -> bytes:
    return messages.parse(name.encode(), text)


def bind(portal: str, statement: str) -> bytes:
    return messages.bind(portal.encode(), statement.encode())


def close(what: bytes, name: str) -> bytes:
    return messages.frame(b"C", what, name.encode() + b"\0")


def execute(portal: str, rows: int = 0) -> bytes:
    return messages.frame(b"E", portal.encode() + b"\0", struct.pack(">I", rows))


BROKEN = "hopgate denied"
END = query("SELECT 'the end'")


def converse(client: RawClient, script: list[bytes]) -> list[tuple[str, bytes]]:
    """Sends everything at once, then a Sync, ROLLBACK and a last Query; the messages up to the end of that."""
    client.send(b"".join(script) + SYNC + query("ROLLBACK") + END)
    seen: list[tuple[str, bytes]] = []
    while not seen or seen[-1][0] != "":
        seen.append(client.read())
        if seen[-1][0] == "Z" and any(kind == "D" and b"the end" in body for kind, body in seen):
            break
    return seen


def comparable(seen: list[tuple[str, bytes]]) -> list[tuple[str, bytes]]:
    """Without the texts of errors, which differ on purpose."""
    return [(kind, b"" if kind in "EN" else body) for kind, body in seen]


def codes(seen: list[tuple[str, bytes]]) -> list[str]:
    return [messages.response_fields(body)["C"].decode() for kind, body in seen if kind == "E"]


def both(server: PostgresServer, gateway: Pump, script: list[tuple[bytes, bytes]]) -> list[tuple[str, bytes]]:
    """Runs the first of each pair through the gateway and the second on the server; they have to leave the same
    messages."""
    through = RawClient("127.0.0.1", gateway.port)
    direct = RawClient(server.host, server.port, user="postgres")
    try:
        seen = converse(through, [first for first, _ in script])
        expected = converse(direct, [second for _, second in script])
        assert comparable(seen) == comparable(expected)
        for ours, theirs in zip(codes(seen), codes(expected), strict=True):
            assert ours in ("42501", theirs)
        return seen
    finally:
        through.close()
        direct.close()


def same(*parts: bytes) -> list[tuple[bytes, bytes]]:
    return [(part, part) for part in parts]


DENIED_QUERY = (query("SELECT forbidden"), query(BROKEN))
DENIED_PARSE = (parse("", "SELECT forbidden"), parse("", BROKEN))
DENIED_EXECUTE = (execute("denied"), execute("no such portal"))
FUNCTION_CALL = (messages.frame(b"F", struct.pack(">IHHH", 1, 0, 0, 0)), query(BROKEN))
ONE = same(parse("", "SELECT 1"), bind("", ""), messages.describe(b"P", b""), execute(""))
TO_DENY = same(parse("d", "SELECT 'forbidden_at_execute'"), bind("denied", "d"))

SCRIPTS = {
    "in a transaction": [
        *same(query("BEGIN")),
        DENIED_QUERY,
        *same(query("SELECT 1"), query("ROLLBACK"), query("SELECT 2")),
    ],
    "outside of one": [DENIED_QUERY, *same(query("SELECT 1"))],
    "a failed transaction": [*same(query("BEGIN"), query("SELECT 1/0")), DENIED_QUERY, *same(query("COMMIT"))],
    "several statements": [
        (query("SELECT 1; SELECT forbidden"), query(f"SELECT 1; {BROKEN}")),
        *same(query("SELECT 1")),
    ],
    "Parse in a pipeline": [*ONE, DENIED_PARSE, *ONE, *same(SYNC), *ONE, *same(SYNC)],
    "Parse after an error": [
        *same(parse("", "SELECT 1/0"), bind("", ""), execute("")),
        DENIED_PARSE,
        *ONE,
        *same(SYNC),
    ],
    "Parse and Flush": [DENIED_PARSE, *same(FLUSH, SYNC), *ONE, *same(SYNC)],
    "Execute": [*ONE, *TO_DENY, DENIED_EXECUTE, *ONE, *same(SYNC), *ONE],
    "Execute in a transaction": [*same(query("BEGIN")), *TO_DENY, DENIED_EXECUTE, *same(SYNC, query("COMMIT"))],
    "Execute after an error": [*TO_DENY, *same(execute("nothing")), DENIED_EXECUTE, *same(SYNC), *ONE],
    "FunctionCall": [*same(query("BEGIN")), FUNCTION_CALL, *same(query("ROLLBACK")), FUNCTION_CALL],
    "FunctionCall in a pipeline": [*ONE, FUNCTION_CALL, *ONE, *same(SYNC)],
    "Query in a pipeline": [*ONE, DENIED_QUERY, *ONE, *same(SYNC)],
    "an implicit transaction": [
        *same(parse("", "INSERT INTO plain VALUES (1)"), bind("", ""), execute("")),
        DENIED_PARSE,
        *same(SYNC, query("SELECT count(*) FROM plain")),
    ],
    "a copy": [
        *same(query("COPY plain FROM STDIN"), b"d\0\0\0\x081\tx\n", b"c\0\0\0\4"),
        DENIED_QUERY,
        *same(query("DELETE FROM plain")),
    ],
    "a copy by Execute, with a Sync before it": [
        *same(
            parse("", "COPY plain FROM STDIN"),
            bind("", ""),
            execute(""),
            SYNC,
            b"d\0\0\0\x081\tx\n",
            b"c\0\0\0\4",
            SYNC,
        ),
        DENIED_QUERY,
        *same(query("DELETE FROM plain")),
    ],
    "a copy that the client breaks off": [
        *same(
            query("COPY plain FROM STDIN"), b"d\0\0\0\x081\tx\n", b"f\0\0\0\5\0", query("SELECT count(*) FROM plain")
        ),
        DENIED_QUERY,
    ],
    "a copy that fails": [
        *same(query("COPY plain FROM STDIN"), b"d\0\0\0\x08z\tx\n", b"c\0\0\0\4", query("SELECT count(*) FROM plain"))
    ],
    "suspended portals": [
        *same(
            query("BEGIN"), parse("s", "SELECT generate_series(1, 5)"), bind("p", "s"), execute("p", 2), execute("p", 2)
        ),
        *TO_DENY,
        DENIED_EXECUTE,
        *same(execute("p", 2), SYNC, query("ROLLBACK")),
    ],
    "empty statements": same(query(""), parse("", ""), bind("", ""), execute(""), SYNC),
    "names that are taken away": [
        *same(parse("n", "SELECT 1"), close(b"S", "n"), bind("", "n"), SYNC, parse("n", "SELECT 2"), SYNC),
        *same(query("DEALLOCATE n"), parse("n", "SELECT 3"), bind("p", "n"), execute("p"), close(b"P", "p"), SYNC),
        *same(query("DISCARD ALL"), parse("n", "SELECT 4"), parse("n", "SELECT 5"), SYNC),
    ],
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_denial_leaves_what_an_error_of_the_server_leaves(server: PostgresServer, gateway: Pump, name: str) -> None:
    seen = both(server, gateway, SCRIPTS[name])
    denied = sum(first != second for first, second in SCRIPTS[name])
    assert codes(seen).count("42501") <= denied
    for kind, body in seen:
        if kind == "E" and b"C42501\0" in body and b"unclassified" not in body:
            assert messages.response_fields(body)["M"] == b"denied by rule `no`"
            assert messages.response_fields(body)["H"] == b"ask the security team"
    # every operation that was asked about has exactly one outcome, told after the bytes that tell the client
    asked = [ask.id for ask in gateway.of(AskRuling)]
    eventually(lambda: sorted(completed.id for completed in gateway.of(Completed)) == asked)


MENU = [
    *same(query("BEGIN"), query("COMMIT"), query("SELECT 1"), query("SELECT 1; SELECT 1/0; SELECT 2")),
    *same(query("INSERT INTO plain VALUES (1); COMMIT; SELECT 3"), query("syntax error"), SYNC, SYNC, SYNC, FLUSH),
    *same(parse("", "SELECT 1"), parse("a", "SELECT $1::int"), parse("a", "SELECT 'x'"), parse("", "SELECT 1/0")),
    *same(bind("", ""), bind("p", "a"), bind("", "a"), bind("q", "missing"), messages.describe(b"S", b"a")),
    *same(messages.describe(b"P", b"p"), messages.describe(b"P", b""), execute(""), execute("p", 1), execute("")),
    *same(close(b"S", "a"), close(b"P", "p"), query("DEALLOCATE ALL"), parse("c", "COMMIT"), bind("", "c")),
    DENIED_QUERY,
    DENIED_PARSE,
    (parse("a", "SELECT forbidden"), parse("a", BROKEN)),
    FUNCTION_CALL,
]


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(script=st.lists(st.sampled_from(MENU), max_size=25))
def test_any_pipeline_ends_as_on_the_server(
    server: PostgresServer, gateway: Pump, script: list[tuple[bytes, bytes]]
) -> None:
    server.run_sql("TRUNCATE plain") if len(script) == 25 else None
    both(server, gateway, script)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(script=st.lists(st.sampled_from(MENU), max_size=25))
def test_any_pipeline_ends_as_on_the_server_in_a_session_with_masks(
    server: PostgresServer, masked: Pump, script: list[tuple[bytes, bytes]]
) -> None:
    both(server, masked, script)


def test_sql_cannot_execute_what_the_protocol_prepared(gateway: Pump) -> None:
    client = RawClient("127.0.0.1", gateway.port)
    client.send(parse("held", "SELECT 'forbidden_at_execute'") + SYNC)
    assert [kind for kind, _ in client.until_ready()] == ["1", "Z"]
    for text in ("EXECUTE held", 'EXPLAIN ANALYZE EXECUTE "held"', "SELECT 1; EXECUTE held"):
        client.send(query(text))
        assert codes(client.until_ready()) == ["42501"]
    # nor while the Parse is on its way, even if a Close that will be skipped follows
    client.send(
        parse("other", "SELECT 'forbidden_at_execute'")
        + SYNC
        + parse("", "SELECT 1 FROM nowhere")
        + close(b"S", "other")
        + SYNC
        + query("EXECUTE other")
    )
    assert codes(client.until_ready(3)) == ["42P01", "42501"]
    client.send(query("PREPARE mine AS SELECT 7") + query("EXECUTE mine"))
    assert ("C", b"SELECT 1\0") in client.until_ready(2)
    # and the protocol cannot execute what SQL prepared, or a cursor that SQL declared
    client.send(bind("", "mine") + execute("") + SYNC)
    client.send(query("BEGIN; DECLARE c CURSOR FOR SELECT 1") + execute("c") + SYNC)
    assert codes(client.until_ready(3)) == ["42501", "42501"]
    client.close()


def test_what_the_server_skipped_does_not_change_what_a_name_stands_for(gateway: Pump) -> None:
    client = RawClient("127.0.0.1", gateway.port)
    client.send(parse("s", "SELECT 'forbidden_at_execute'") + SYNC)
    client.until_ready()
    # the Close and the Parse are skipped: the name still stands for what must not run
    client.send(bind("", "missing") + close(b"S", "s") + parse("s", "SELECT 'harmless'") + SYNC)
    assert codes(client.until_ready()) == ["26000"]
    client.send(bind("", "s") + execute("") + SYNC)
    seen = client.until_ready()
    assert codes(seen) == ["42501"] and not any(kind == "D" for kind, _ in seen)
    # the same in one piece, when all is judged before a reply is there
    client.send(bind("", "missing") + close(b"S", "s") + parse("s", "SELECT 'harmless'") + SYNC)
    client.send(bind("", "s") + execute("") + SYNC)
    assert not any(b"forbidden" in body for kind, body in client.until_ready(2) if kind == "D")
    client.close()


def test_a_name_that_sql_may_have_given_to_another_statement_is_not_trusted(gateway: Pump) -> None:
    client = RawClient("127.0.0.1", gateway.port)
    for text in ("DEALLOCATE s", "DEALLOCATE ALL", "SELECT 1; DEALLOCATE s; PREPARE s AS SELECT 'other'"):
        client.send(parse("s", "SELECT 'mine'") + SYNC)
        assert codes(client.until_ready()) == []
        client.send(query(text) + query("PREPARE s AS SELECT 'other'") + bind("", "s") + execute("") + SYNC)
        seen = client.until_ready(3)
        assert "42501" in codes(seen) and not any(b"other" in body for kind, body in seen if kind == "D")
        client.send(query("DEALLOCATE ALL"))
        client.until_ready()
    client.close()


def test_names_that_could_stand_for_others_end_the_session(gateway: Pump) -> None:
    for name in ("x" * 64, "é"):
        client = RawClient("127.0.0.1", gateway.port)
        client.send(parse(name, "SELECT 1") + SYNC)
        assert codes(client.until_ready()) == ["42622"]
        client.close()


def test_text_that_the_server_reads_otherwise_is_unclassified(gateway: Pump) -> None:
    client = RawClient("127.0.0.1", gateway.port)
    trick = query("SELECT '\\'; SELECT 1; --'")
    client.send(trick)
    assert codes(client.until_ready()) == []
    client.send(query("SET standard_conforming_strings = off") + trick)
    assert codes(client.until_ready(2)) == ["42501"]
    client.send(trick)
    assert codes(client.until_ready()) == ["42501"]
    client.send(query("SET standard_conforming_strings = on"))
    client.until_ready()
    client.send(trick)
    assert codes(client.until_ready()) == []
    client.send(query("SET client_encoding = 'LATIN1'"))
    client.until_ready()
    client.send(messages.frame(b"Q", "SELECT 'é'".encode("latin-1") + b"\0"))
    assert codes(client.until_ready()) == []
    assert gateway.of(AskRuling)[-1].operation.text == "SELECT 'é'"
    client.send(query("SET client_encoding = 'SJIS'") + query("SELECT 1"))
    assert codes(client.until_ready(2)) == ["0A000"]
    client.close()


def test_a_denied_operation_can_be_found_in_the_servers_log(server: PostgresServer, gateway: Pump) -> None:
    with connect(gateway) as connection, pytest.raises(psycopg.errors.InsufficientPrivilege):
        connection.execute("SELECT forbidden")
    assert "hopgate denied operation" in server.log()
    assert "forbidden" not in server.log()


def test_completions_carry_tags_rows_and_errors(gateway: Pump) -> None:
    with connect(gateway) as connection:
        connection.execute("SELECT * FROM generate_series(1, 7)")
        connection.execute("SELECT %s::int", (1,), prepare=True)
        with pytest.raises(psycopg.errors.DivisionByZero):
            connection.execute("SELECT 1/0")
    completed = gateway.of(Completed)
    assert (completed[0].tag, completed[0].rows, completed[0].error) == ("SELECT 7", 7, "")
    assert ("SELECT 1", 1) in [(c.tag, c.rows) for c in completed]
    assert "22012 division by zero" in [c.error for c in completed]


# --- masks ------------------------------------------------------------------------------------------------------------


def test_masks_hold_in_simple_and_extended_protocol(masked: Pump) -> None:
    with connect(masked) as connection:
        expected = [(1, "###-1001", None), (2, "###-1002", None)]
        text = "SELECT id, ssn AS x, born FROM customers WHERE id < 3 ORDER BY id"
        assert connection.execute(text).fetchall() == expected
        assert connection.execute(f"SELECT * FROM ({text}) q").fetchall() == expected
        bound = "SELECT id, ssn, born FROM customers WHERE id < %s ORDER BY 1"
        assert connection.execute(bound, (3,)).fetchall() == expected
        returned = connection.execute("UPDATE customers SET note = 'n' WHERE id = 1 RETURNING ssn, note").fetchone()
        assert returned == ("###-1001", "n")
        with connection.transaction():
            connection.execute("DECLARE c CURSOR FOR SELECT ssn FROM customers ORDER BY id")
            assert connection.execute("FETCH 2 FROM c").fetchall() == [("###-1001",), ("###-1002",)]
    assert masked.of(Learned)[0].derived == (
        ("public", "people_1"),
        ("public", "shown"),
        ("public", "shown_twice"),
    )
    labels = {label for completed in masked.of(Completed) for label in completed.masked}
    assert labels == {"public.customers.ssn:partial", "public.customers.born:redact"}


def test_execute_without_describe_is_masked(masked: Pump) -> None:
    client = RawClient("127.0.0.1", masked.port)
    for parts in (
        [parse("s", "SELECT ssn, id FROM customers ORDER BY id"), bind("", "s"), execute(""), SYNC],
        [bind("", "s"), execute("", 1), execute("", 1), SYNC],
        [bind("", "s"), messages.describe(b"P", b""), execute(""), SYNC],
    ):
        client.send(b"".join(parts))
        seen = client.until_ready()
        rows = [body for kind, body in seen if kind == "D"]
        assert rows and all(b"###-100" in row and b"123-45" not in row for row in rows)
        assert [kind for kind, _ in seen].count("T") == (messages.describe(b"P", b"") in parts)
    client.close()


def test_derived_relations_are_masked_in_all_columns(masked: Pump) -> None:
    with connect(masked) as connection:
        assert connection.execute("SELECT id, s FROM shown").fetchall() == [(None, "***")] * 3
        assert connection.execute("SELECT id, s FROM shown_twice").fetchall() == [(None, "***")] * 3
        assert connection.execute("SELECT ssn, at FROM people").fetchall() == [("###-9999", 1)]
        assert connection.execute("SELECT ssn, at FROM people_1").fetchall() == [("***", None)]


def test_a_masked_column_in_binary_is_denied_and_the_session_goes_on(masked: Pump) -> None:
    with connect(masked) as connection:
        for prepare in (False, True):
            with pytest.raises(psycopg.errors.InsufficientPrivilege, match=r"`ssn` .* in binary format") as denied:
                connection.execute("SELECT id, ssn FROM customers", prepare=prepare, binary=True)
            assert denied.value.diag.message_hint == "ask for the text format: masks work on text only"
        assert connection.execute("SELECT id FROM customers ORDER BY 1", binary=True).fetchall() == [(1,), (2,), (3,)]
    assert "asked for in binary" in masked.of(AskRuling)[1].operation.unclassified
    client = RawClient("127.0.0.1", masked.port)
    # one message string, everything pipelined, the columns never described
    binary = messages.frame(b"B", b"\0b\0", struct.pack(">HHHH", 0, 0, 1, 1))
    client.send(parse("b", "SELECT ssn FROM customers") + binary + execute("") + SYNC + binary + execute("") + SYNC)
    seen = client.until_ready(2)
    assert codes(seen) == ["42501", "42501"] and not any(kind == "D" for kind, _ in seen)
    client.send(binary + execute("") + query("SELECT 1") + SYNC)
    assert codes(client.until_ready()) == ["42501"]
    # the server is skipping already: no columns are learned, nothing is lost
    client.send(parse("c", "SELECT 1") + bind("", "missing"))
    client.send(
        messages.frame(b"B", b"\0c\0", struct.pack(">HHHH", 0, 0, 1, 1)) + execute("") + SYNC + query("SELECT 2")
    )
    seen = client.until_ready(2)
    assert codes(seen) == ["26000"] and seen[-1] == ("Z", b"I")
    client.send(query("BEGIN; DECLARE k BINARY CURSOR FOR SELECT ssn FROM customers") + query("FETCH k"))
    seen = client.until_ready(2)
    assert codes(seen) == ["42501"] and not any(b"123-45" in body for _, body in seen) and seen[-1][0] == ""
    client.close()


def test_asyncpg_works_in_a_session_with_masks(masked: Pump) -> None:
    import asyncio

    import asyncpg

    async def run() -> None:
        connection = await asyncpg.connect(f"postgres://me@127.0.0.1:{masked.port}/postgres", ssl=False)
        assert [tuple(row) for row in await connection.fetch("SELECT id, name FROM customers WHERE id = $1", 2)] == [
            (2, "name 2")
        ]
        with pytest.raises(asyncpg.exceptions.InsufficientPrivilegeError):
            await connection.fetch("SELECT born FROM customers WHERE id = $1", 2)
        # asyncpg asks for text in text where it can
        assert await connection.fetchval("SELECT id FROM customers WHERE id = 3") == 3
        await connection.close()

    asyncio.run(run())


def test_a_changed_catalog_ends_the_session_before_a_row(server: PostgresServer, masked: Pump) -> None:
    for change, text in (
        ("CREATE TABLE newer AS SELECT ssn FROM customers", "SELECT * FROM newer"),
        ("ALTER TABLE plain ADD COLUMN c text DEFAULT '123-45-6789'", "SELECT c FROM plain"),
    ):
        client = RawClient("127.0.0.1", masked.port)
        server.run_sql(change)
        client.send(query(text))
        seen = client.until_ready()
        assert [kind for kind, _ in seen] == ["E", ""]
        assert b"FATAL" in seen[0][1] and b"the catalog changed" in seen[0][1] and b"123-45" not in seen[0][1]
        client.close()
        with connect(masked) as connection:
            connection.execute(text)
    server.run_sql("DROP TABLE newer; ALTER TABLE plain DROP COLUMN c")


def test_a_statement_that_means_another_table_later_is_masked_by_what_it_means(
    server: PostgresServer, masked: Pump
) -> None:
    server.run_sql("CREATE SCHEMA s1; CREATE TABLE s1.customers (ssn varchar(11))")
    server.run_sql("INSERT INTO s1.customers VALUES ('open')")
    try:
        client = RawClient("127.0.0.1", masked.port)
        client.send(query("SET search_path = s1"))
        client.send(parse("x", "SELECT ssn FROM customers") + messages.describe(b"S", b"x"))
        client.send(bind("", "x") + execute("") + SYNC)
        assert any(b"open" in body for kind, body in client.until_ready(2) if kind == "D")
        client.send(query("SET search_path = public") + bind("", "x") + execute("") + SYNC)
        rows = [body for kind, body in client.until_ready(2) if kind == "D"]
        assert len(rows) == 3 and all(b"###-" in row for row in rows)
        client.close()
    finally:
        server.run_sql("DROP SCHEMA s1 CASCADE")


def test_errors_and_notices_lose_what_quotes_values(masked: Pump) -> None:
    with connect(masked) as connection:
        with pytest.raises(psycopg.errors.UniqueViolation) as failed:
            connection.execute("INSERT INTO customers (id) VALUES (1)")
        assert failed.value.diag.message_detail is None
        assert failed.value.diag.constraint_name == "customers_pkey"
        notices: list[tuple[str | None, ...]] = []
        connection.add_notice_handler(
            lambda notice: notices.append((notice.message_primary, notice.message_detail, notice.context))
        )
        connection.execute("DO $$ BEGIN RAISE NOTICE 'n' USING DETAIL = '123-45-1001'; END $$")
        assert notices == [("n", None, None)]


def test_a_large_result_streams_through_a_mask(masked: Pump) -> None:
    with connect(masked) as connection:
        text = "SELECT c.ssn, repeat('x', 3000) FROM customers c, generate_series(1, 2000)"
        rows = connection.execute(text).fetchall()
        assert len(rows) == 6000 and {row[0] for row in rows} == {"###-1001", "###-1002", "###-1003"}


# --- copy, cancel, the end --------------------------------------------------------------------------------------------


def test_copy_passes_both_ways(gateway: Pump) -> None:
    with connect(gateway) as connection:
        connection.execute("TRUNCATE plain")
        with connection.cursor().copy("COPY plain FROM STDIN") as copy:
            for number in range(5000):
                copy.write_row((number, "x" * 100))
        assert connection.execute("SELECT count(*) FROM plain").fetchone() == (5000,)
        with connection.cursor().copy("COPY plain TO STDOUT") as copy:
            assert sum(1 for _ in copy.rows()) == 5000
        with pytest.raises(RuntimeError), connection.cursor().copy("COPY plain FROM STDIN") as copy:
            copy.write_row((1, "x"))
            raise RuntimeError("the client gives up")
        assert connection.execute("SELECT count(*) FROM plain").fetchone() == (5000,)
        connection.execute("TRUNCATE plain")
    assert ("COPY 5000", 5000) in [(completed.tag, completed.rows) for completed in gateway.of(Completed)]


@pytest.mark.parametrize("mode", [TlsMode.DISABLE, TlsMode.REQUIRE])
def test_a_cancel_request_with_our_key_cancels_at_the_server(server: PostgresServer, mode: TlsMode) -> None:
    with running(Pump(server, tls_mode=mode)) as pump, connect(pump) as connection:
        server_key = pump.of(Authenticated)[0].cancel_key
        ours = next(iter(pump.keys))
        assert server_key != ours and connection.pgconn.backend_pid == struct.unpack(">i", ours[:4])[0]

        def cancel() -> None:
            # a wrong key first: it cancels nothing, and is not told so
            for key in (b"12345678", ours):
                with socket.create_connection(("127.0.0.1", pump.port), timeout=10) as sock:
                    sock.sendall(struct.pack(">II", 16, messages.CANCEL_REQUEST) + key)
                    assert sock.recv(1) == b""

        timer = threading.Timer(0.3, cancel)
        timer.start()
        started = time.monotonic()
        with pytest.raises(psycopg.errors.QueryCanceled):
            connection.execute("SELECT pg_sleep(8)")
        assert time.monotonic() - started < 7
        timer.join()
        assert connection.execute("SELECT 1").fetchone() == (1,)


def test_the_servers_end_reaches_the_client(server: PostgresServer, gateway: Pump) -> None:
    with connect(gateway) as connection:
        pid = connection.execute("SELECT pg_backend_pid()").fetchone()
        assert pid is not None
        server.run_sql(f"SELECT pg_terminate_backend({pid[0]})")
        with pytest.raises(psycopg.errors.AdminShutdown):
            connection.execute("SELECT 1")


def test_sqlalchemy_and_psql_work(server: PostgresServer, gateway: Pump) -> None:
    import subprocess

    import sqlalchemy

    engine = sqlalchemy.create_engine(f"postgresql+psycopg://me@127.0.0.1:{gateway.port}/postgres")
    with engine.connect() as connection:
        assert connection.execute(sqlalchemy.text("SELECT :a + 1"), {"a": 1}).scalar() == 2
        assert "customers" in sqlalchemy.inspect(connection).get_table_names()
    engine.dispose()
    script = "\\d customers\nSELECT forbidden;\nSELECT 'on';\n"
    done = subprocess.run(
        [server.binaries / "psql", "-X", "-h", "127.0.0.1", "-p", str(gateway.port), "-U", "me", "postgres"],
        input=script,
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    assert "customers_pkey" in done.stdout and "on" in done.stdout and "denied by rule `no`" in done.stderr
