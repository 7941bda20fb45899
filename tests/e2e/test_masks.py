"""A masked value leaves in no form. The clear ones hold a word that is searched for in every byte a client received."""

from __future__ import annotations

import struct

import pytest

from proxy.recording.records import Completed
from tests.e2e.shop import CLEAR, Shop

SALARIES = (b"918273", b"918274", struct.pack(">i", 918273), struct.pack(">i", 918274))
MASKED = ("a***@example.com", "g***@example.com", "u***@example.com")

SHOWN = [
    "SELECT name, email, card, code, salary FROM customers ORDER BY id",
    "SELECT * FROM customers",
    "SELECT email AS name, card AS x FROM customers",
    "SELECT c.* FROM customers c JOIN orders o ON o.customer = c.id",
    "SELECT c.email, o.status FROM orders o LEFT JOIN customers c ON c.id = o.customer",
    "WITH w AS (SELECT id, email FROM customers) SELECT * FROM w",
    "SELECT s.mail FROM (SELECT email AS mail FROM customers) s",
    "SELECT l.email FROM orders o, LATERAL (SELECT email FROM customers WHERE id = o.customer) l",
    "TABLE customers",
    "UPDATE customers SET name = name WHERE id = 1 RETURNING email, card",
    "INSERT INTO customers (id, name, email, card) VALUES (77, 'new', 'q', 'r') ON CONFLICT DO NOTHING RETURNING *",
    "DELETE FROM customers WHERE id = 77 RETURNING *",
]
DENIED = [
    "SELECT lower(email) FROM customers",
    "SELECT email || '' FROM customers",
    "SELECT salary + 0 FROM customers",
    "SELECT email::varchar FROM customers",
    "SELECT id FROM customers WHERE email LIKE 'ada%'",
    "SELECT id FROM customers ORDER BY card",
    "SELECT count(*) FROM customers GROUP BY card",
    "SELECT max(card) FROM customers",
    "SELECT DISTINCT card FROM customers",
    "SELECT (SELECT email FROM customers WHERE id = 1)",
    "SELECT email FROM customers UNION SELECT status FROM orders",
    "SELECT customers FROM customers",
    "SELECT row_to_json(c) FROM customers c",
    "SELECT c::text FROM customers c",
    "SELECT (c).email FROM customers c",
    "SELECT o.id FROM orders o JOIN customers c ON c.card = o.status",
    "SELECT x FROM customers AS c(a, b, x)",
    "SELECT CASE WHEN salary > 5 THEN 1 ELSE 0 END FROM customers",
    "SELECT string_agg(card, ',') FROM customers",
    "SELECT rank() OVER (ORDER BY salary) FROM customers",
    "COPY customers TO STDOUT",
    "COPY (SELECT email FROM customers) TO STDOUT",
    "COPY customers (card) TO STDOUT (FORMAT BINARY)",
    "CREATE TABLE public.stolen AS SELECT * FROM customers",
    "SELECT * INTO public.stolen FROM customers",
    "INSERT INTO notes SELECT id, email FROM customers",
    "UPDATE customers SET name = card",
    "UPDATE orders SET status = c.email FROM customers c WHERE c.id = customer",
    "INSERT INTO customers VALUES (1, 'a', 'b', 'c') ON CONFLICT (id) DO UPDATE SET name = customers.card",
    "DO $$ BEGIN RAISE '%', (SELECT email FROM customers LIMIT 1); END $$",
    "EXPLAIN ANALYZE SELECT id FROM customers WHERE card = 'x'",
    "SELECT query_to_xml('select * from customers', true, true, '')",
    "SELECT mail FROM contacts WHERE mail LIKE 'a%'",
    "SELECT * FROM pg_stats",
]


def assert_clean(received: bytes) -> None:
    assert CLEAR not in received
    assert CLEAR.hex().encode() not in received
    for salary in SALARIES:
        assert salary not in received


def test_the_words_are_there_for_who_may_see_them(shop: Shop) -> None:
    done, received = shop.recorded("full", ["psql", "-X", "-c", SHOWN[0]])
    assert done.returncode == 0
    assert CLEAR in received
    assert SALARIES[0] in received


@pytest.mark.parametrize("hops", ["masked", ["full", "masked"], ["masked", "full"]], ids=str)
def test_psql_sees_masks_in_every_form_that_is_traced(shop: Shop, hops: str | list[str]) -> None:
    script = "BEGIN;\n" + "".join(f"{statement};\n" for statement in SHOWN)
    script += (
        "DECLARE c CURSOR FOR SELECT email, card FROM customers ORDER BY id;\nFETCH 2 FROM c;\nFETCH ALL FROM c;\n"
    )
    script += "DECLARE s SCROLL CURSOR WITH HOLD FOR SELECT * FROM customers;\nMOVE 1 IN s;\nFETCH BACKWARD 1 FROM s;\n"
    script += "PREPARE p AS SELECT email FROM customers WHERE id = $1;\nEXECUTE p (1);\n"
    script += "\\set FETCH_COUNT 2\nSELECT email, card FROM customers;\n\\unset FETCH_COUNT\nROLLBACK;\n"
    done, received = shop.recorded(hops, ["psql", "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1"], stdin=script)
    assert (done.returncode, done.stderr) == (0, "")
    assert_clean(received)
    for value in (*MASKED, "***"):
        assert value in done.stdout
    assert done.stdout.splitlines()[0].split("|")[:3] == ["Ada", MASKED[0], "***"]
    first = done.stdout.splitlines()[0].split("|")
    assert len(first[3]) == 16 and set(first[3]) <= set("0123456789abcdef")
    assert first[4] == ""


@pytest.mark.parametrize("how", ["simple", "extended"])
def test_psycopg_sees_masks(shop: Shop, how: str) -> None:
    for statement in SHOWN[:9]:
        done, received = shop.recorded("masked", shop.python("psycopg_client.py", "run", statement, how))
        assert done.returncode == 0, done.stderr
        assert "no error" in done.stdout
        assert "***" in done.stdout
        assert_clean(received)


def test_what_cannot_be_traced_is_denied(shop: Shop) -> None:
    script = "\\set VERBOSITY verbose\n" + "".join(f"{statement};\n" for statement in DENIED) + "SELECT 'alive';\n"
    done, received = shop.recorded("masked", ["psql", "-X", "-q", "-A", "-t"], stdin=script)
    assert done.stdout == "alive\n"
    assert done.stderr.count("ERROR:  42501") == len(DENIED), done.stderr
    assert_clean(received)


def test_the_extended_protocol_denies_the_same(shop: Shop) -> None:
    for statement in (each for each in DENIED if not each.startswith("COPY")):
        received = shop.wire("masked", f"P::{statement}", "B:::", "D:P:", "E::0", "S", "Q:SELECT 'alive'")
        assert_clean(received)
        assert b"C42501\0" in received, statement
        assert b"alive" in received


@pytest.mark.parametrize(
    "steps",
    [
        ("P:s:{}", "B::s:1", "E::0", "S"),
        ("P:s:{}", "D:S:s", "B::s:1", "E::0", "S"),
        ("P:s:{}", "S", "B::s:0111", "D:P:", "E::1", "E::0", "S"),
        ("P:s:{}", "B:a:s:", "E:a:1", "H", "E:a:0", "S"),
        ("P:s:{}", "B:a:s:", "B:b:s:1", "E:a:0", "E:b:0", "S"),
        ("P:s:SELECT 1", "P:t:{}", "B::t:1", "E::0", "S"),
        ("P::{}", "B:::1", "S", "B:::", "E::0", "S", "P::{}", "B:::", "E::0", "S"),
        ("Q:{}", "P::{}", "B:::", "E::0", "S"),
        ("Q:BEGIN", "Q:DECLARE c BINARY CURSOR FOR {}", "Q:FETCH ALL FROM c", "S"),
        ("Q:BEGIN", "Q:DECLARE c CURSOR FOR {}", "P::FETCH 1 FROM c", "B:::1", "E::0", "S"),
        ("Q:BEGIN", "Q:DECLARE c CURSOR FOR {}", "E:c:0", "S"),
        ("P:s:{}", "B::s:1", "D:P:", "S"),
    ],
    ids=str,
)
def test_no_order_of_messages_shows_a_clear_value(shop: Shop, steps: tuple[str, ...]) -> None:
    statement = "SELECT name, email, card, salary FROM customers"
    received = shop.wire("masked", *(step.format(statement) for step in steps))
    assert len(received) > 300
    assert_clean(received)


def test_asyncpg_is_denied_and_gets_nothing(shop: Shop) -> None:
    program = shop.python(
        "asyncpg_client.py", "run", "SELECT name, email FROM customers", "SELECT name FROM customers ORDER BY id"
    )
    done, received = shop.recorded("masked", program)
    assert done.returncode == 0, done.stderr
    denied, allowed, _, alive = done.stdout.splitlines()
    assert "42501" in denied
    assert "binary format" in denied
    assert "Ada" in allowed
    assert "alive" in alive
    assert_clean(received)


def test_psycopg_in_binary_is_denied_and_gets_nothing(shop: Shop) -> None:
    program = shop.python("psycopg_client.py", "run", "SELECT name, email FROM customers", "binary")
    done, received = shop.recorded("masked", program)
    assert "binary format" in done.stdout
    assert "alive" in done.stdout
    assert_clean(received)


def test_views_over_a_masked_table_are_masked_in_all_columns(shop: Shop) -> None:
    script = "SELECT mail FROM contacts;\nSELECT name FROM names;\nSELECT id FROM names ORDER BY id;\n"
    done, received = shop.recorded("masked", ["psql", "-X", "-q", "-A", "-t"], stdin=script)
    assert done.stdout == "***\n" * 6
    assert "sees public.names masked" in done.stderr
    assert_clean(received)


def test_errors_do_not_quote_masked_values(shop: Shop) -> None:
    script = "\\set VERBOSITY verbose\n\\set SHOW_CONTEXT always\n"
    script += "UPDATE customers SET email = 'grace-clear' || 'text@example.com' WHERE id = 1;\n"
    script += "UPDATE customers SET name = NULL WHERE id = 1;\n"
    script += "INSERT INTO customers SELECT 90, 'x', 'e', 'c' FROM customers;\n"
    script += "SELECT 'alive';\n"
    done, received = shop.recorded("masked", ["psql", "-X", "-q", "-A", "-t"], stdin=script)
    assert done.stdout == "alive\n"
    assert "23505" in done.stderr
    assert "23502" in done.stderr
    assert "DETAIL" not in done.stderr
    assert_clean(received)


def test_a_table_made_after_login_cannot_show_what_was_copied(shop: Shop) -> None:
    """Made by somebody else meanwhile: a relation that the session's catalog does not know ends the session."""
    with shop.start("masked", shop.python("psycopg_client.py", "wait_for_end"), PGSSLMODE="disable") as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == '{"ready": true}\n'
        shop.server.run_sql("SET ROLE shop_app; CREATE TABLE leaked AS SELECT email FROM customers", database="shop")
        try:
            process.stdin.write("SELECT email FROM leaked\n")
            process.stdin.close()
            seen = process.stdout.read()
        finally:
            shop.server.run_sql("DROP TABLE leaked", database="shop")
    assert CLEAR.decode() not in seen
    assert "the catalog changed" in seen


def test_the_recording_says_what_was_masked_and_holds_no_row(shop: Shop) -> None:
    shop.psql("masked", SHOWN[0])
    records = shop.records(shop.last_session("masked"))
    (completed,) = [record for record in records if isinstance(record, Completed)]
    assert completed.rows == 3
    assert "public.customers.email:partial" in completed.masked
    assert CLEAR.decode() not in str(records)
