"""What a client sees through the gateway is what it sees without one: rows, types, tags, notices, errors, transaction
status. Each scenario leaves the database as it found it."""

from __future__ import annotations

import base64
import re
import signal
import time
from pathlib import Path

import pytest

from proxy.recording.records import Completed
from tests.e2e.shop import DATABASE, SERVER_NAME, Shop

PSYCOPG = ("queries", "parameters", "prepared", "transactions", "errors", "pipelines", "many", "cursors", "copies")
PSYCOPG += ("notifications", "cancels", "large", "texts", "settings", "asynchronous")
SCENARIOS = [("psycopg_client.py", name) for name in PSYCOPG]
SCENARIOS += [("asyncpg_client.py", name) for name in ("queries", "transactions", "copies", "cancels", "pool")]
SCENARIOS += [("sqlalchemy_client.py", name) for name in ("mapped", "reflected", "pooled")]


@pytest.mark.parametrize(
    ("program", "scenario"), SCENARIOS, ids=[f"{program[:-3]}-{name}" for program, name in SCENARIOS]
)
def test_a_driver_sees_the_same_with_and_without_the_gateway(shop: Shop, program: str, scenario: str) -> None:
    direct = shop.tell("full", program, scenario, direct=True)
    through = shop.tell("full", program, scenario)
    assert through == direct
    assert len(direct) >= 1


PSQL = r"""
\set VERBOSITY verbose
SELECT 1 AS one, 'é' AS e; SELECT 2 \; SELECT 3;
\d customers
\dt
\dT+ mood
\df no_such*
\l shop
\conninfo
SELECT id AS found FROM orders WHERE status = 'stale' \gset
SELECT :found + 1;
SELECT name, email FROM customers WHERE id = 1 \gdesc
PREPARE p (int) AS SELECT name FROM customers WHERE id = $1;
EXECUTE p (2);
DEALLOCATE p;
EXECUTE p (2);
BEGIN;
SAVEPOINT a;
SELECT 1/0;
SELECT 'fails';
ROLLBACK TO a;
SELECT 'goes on';
COMMIT;
\set ON_ERROR_ROLLBACK on
BEGIN;
SELECT 1/0;
SELECT 'saved by psql';
COMMIT;
COPY notes FROM STDIN;
1	one
2	zwei ü
3	\N
\.
COPY notes TO STDOUT;
\copy (SELECT * FROM notes ORDER BY id) TO 'notes.csv' CSV HEADER
\copy (SELECT * FROM notes ORDER BY id) TO 'notes.bin' BINARY
DELETE FROM notes;
\copy notes FROM 'notes.csv' CSV HEADER
DELETE FROM notes;
\copy notes FROM 'notes.bin' BINARY
SELECT count(*), sum(length(body)) FROM notes;
COPY notes FROM STDIN;
1	there already
\.
COPY notes FROM STDIN;
not a number	x
\.
SELECT 'after copy';
\set FETCH_COUNT 10
SELECT generate_series(1, 35);
\unset FETCH_COUNT
BEGIN;
DECLARE c CURSOR FOR SELECT generate_series(1, 100);
FETCH 2 FROM c;
MOVE 90 IN c;
FETCH ALL FROM c;
CLOSE c;
COMMIT;
LISTEN news;
NOTIFY news, 'once';
UNLISTEN *;
DO $$ BEGIN RAISE WARNING 'watch out' USING DETAIL = 'the detail'; END $$;
INSERT INTO customers (id, name, email, card) VALUES (1, 'a', 'b', 'c');
SELECT * FROM missing;
SHOW DateStyle;
SET statement_timeout = '100ms';
SELECT pg_sleep(10);
RESET ALL;
TRUNCATE notes;
\x
SELECT * FROM orders ORDER BY id;
"""


def test_psql_sees_the_same_with_and_without_the_gateway(shop: Shop) -> None:
    seen = []
    for direct in (True, False):
        done = shop.psql("full", f"\\cd {shop.work}\n{PSQL}", "-e", "-q", direct=direct)
        # who sent a notification is told by its server process, which is another each time
        seen.append((re.sub(r"PID \d+", "PID", done.stdout), done.stderr))
    assert seen[1] == seen[0]
    assert "goes on" in seen[0][0]
    assert "saved by psql" in seen[0][0]
    assert "after copy" in seen[0][0]


@pytest.mark.parametrize("mode", ["disable", "prefer", "require", "verify-full"])
@pytest.mark.parametrize("address", DATABASE)
def test_every_client_connects_in_every_sslmode(shop: Shop, mode: str, address: str) -> None:
    secured = {"PGSSLROOTCERT": str(shop.directory / "gateway-ca.pem")} if mode == "verify-full" else {}
    told = {"PGHOST": address, "PGSSLMODE": mode, **secured}
    assert shop.psql("full", "SELECT inet_server_addr()", **told).stdout == f"{address}\n"
    for program in ("psycopg_client.py", "asyncpg_client.py", "sqlalchemy_client.py"):
        assert "alive" in str(shop.tell("full", program, "run", "SELECT 1", **told)[-2:])


def test_verify_full_holds_the_gateway_to_the_name_and_the_authority(shop: Shop) -> None:
    ca, other = str(shop.directory / "gateway-ca.pem"), str(shop.directory / "server-ca.pem")
    by_name = ["psql", "-X", "-A", "-t", "-c", "SELECT 1", "sslmode=verify-full"]
    good = shop.run(
        "full", [*by_name[:-1], f"host={SERVER_NAME} hostaddr={DATABASE[0]} sslmode=verify-full"], PGSSLROOTCERT=ca
    )
    assert (good.stdout, good.stderr) == ("1\n", "")
    wrong = shop.run(
        "full", [*by_name[:-1], f"host=other.example hostaddr={DATABASE[0]} sslmode=verify-full"], PGSSLROOTCERT=ca
    )
    assert wrong.returncode == 2
    assert 'does not match host name "other.example"' in wrong.stderr
    stranger = shop.run("full", by_name, PGSSLROOTCERT=other)
    assert stranger.returncode == 2
    assert "certificate verify failed" in stranger.stderr
    assert shop.tell("full", "asyncpg_client.py", "secured", DATABASE[0], ca) == [1]


def test_the_role_that_a_client_names_is_not_the_one_it_gets(shop: Shop) -> None:
    done = shop.psql("full", "SELECT current_user", PGUSER="postgres", PGPASSWORD="not looked at")
    assert (done.stdout, done.stderr) == ("shop_app\n", "")


def test_an_interrupt_in_psql_cancels_the_statement(shop: Shop) -> None:
    with shop.start("full", ["psql", "-X", "-q", "-A", "-t"]) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("SELECT 'here';\nSELECT pg_sleep(60);\nSELECT 'goes on';\n")
        process.stdin.flush()
        assert process.stdout.readline() == "here\n"
        time.sleep(0.5)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.stdin.close()
        rest = process.stdout.read()
        assert time.monotonic() - began < 10
    assert "canceling statement due to user request" in rest


def test_what_was_asked_before_the_end_is_answered_and_recorded(shop: Shop) -> None:
    done = shop.run("full", shop.python("wire.py", "Q:SELECT 'one'", "Q:SELECT 'two'", "X"))
    assert base64.b64decode(done.stdout).count(b"SELECT 1\0") == 2
    records = shop.records(shop.last_session("full"))
    assert [record.tag for record in records if isinstance(record, Completed)] == ["SELECT 1", "SELECT 1"]


def test_two_hundred_connections_at_once(shop: Shop) -> None:
    assert shop.tell("full", "asyncpg_client.py", "crowd", "200") == [200, True]


def test_a_statement_too_long_to_classify_is_denied_and_the_session_goes_on(shop: Shop) -> None:
    done = shop.psql("full", f"SELECT length('{'x' * 1_100_000}');\nSELECT 'alive';\n")
    assert done.stdout == "alive\n"
    assert "cannot be classified" in done.stderr


def test_what_is_no_sql_is_denied_with_the_code_of_a_syntax_error(shop: Shop) -> None:
    done = shop.psql("full", "\\set VERBOSITY verbose\nSELEKT 1;\nSELECT 'alive';\n")
    assert done.stdout == "alive\n"
    assert "42601" in done.stderr
    assert "syntax error" in done.stderr


@pytest.mark.parametrize(
    ("hops", "statement"),
    [
        ("full", "SELECT repeat('x', 1000) FROM generate_series(1, 200000)"),
        ("masked", "SELECT c.email, repeat('x', 1000) FROM customers c, generate_series(1, 30000)"),
    ],
)
@pytest.mark.parametrize("pause_s", ["0", "2"])
def test_a_large_result_does_not_grow_the_worker(shop: Shop, hops: str, statement: str, pause_s: str) -> None:
    for pid in shop.worker_pids():
        Path(f"/proc/{pid}/clear_refs").write_text("5")
    (seen,) = shop.tell(hops, "psycopg_client.py", "stream", statement, pause_s)
    assert seen["size"] == 1000 * seen["rows"] >= 90_000_000
    assert max(peak_rss_kib(pid) for pid in shop.worker_pids()) < 200 * 1024


def peak_rss_kib(pid: int) -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1])
