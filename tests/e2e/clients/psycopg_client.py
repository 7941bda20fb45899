"""What psycopg 3 sees: `psycopg_client.py SCENARIO`. The connection is told by libpq's own variables."""

import asyncio
import contextlib
import datetime
import decimal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import psycopg
from psycopg import sql
from psycopg.pq import TransactionStatus
from psycopg.types.json import Jsonb
from transcript import say

FIELDS = ("severity", "sqlstate", "message_primary", "message_detail", "message_hint", "statement_position", "context")
FIELDS += ("internal_query", "schema_name", "table_name", "column_name", "constraint_name")


def told(diagnostic: psycopg.errors.Diagnostic) -> dict[str, Any]:
    return {field: value for field in FIELDS if (value := getattr(diagnostic, field)) is not None}


def connect(**options: Any) -> psycopg.Connection:
    connection = psycopg.connect(**options)
    connection.add_notice_handler(lambda diagnostic: say(notice=told(diagnostic)))
    return connection


def show(cursor: psycopg.Cursor) -> None:
    """Everything that the results of one execution say, and where the transaction stands."""
    while True:
        columns = [(column.name, column.type_code, column._fmod, column._fsize) for column in cursor.description or ()]
        rows = [repr(row) for row in cursor.fetchall()] if cursor.description else []
        say(tag=cursor.statusmessage, count=cursor.rowcount, columns=columns, rows=rows)
        if not cursor.nextset():
            break
    say(status=cursor.connection.info.transaction_status.name)


@contextlib.contextmanager
def failing(connection: psycopg.Connection) -> Iterator[None]:
    try:
        yield
        say("no error")
    except psycopg.Error as error:
        shown = told(error.diag) if error.sqlstate else str(error)
        say(error=type(error).__name__, told=shown, status=connection.info.transaction_status.name)


def queries() -> None:
    with connect(autocommit=True) as connection:
        show(connection.execute("SELECT 1 AS one, 'é', NULL, 1.50::numeric, true"))
        show(connection.execute("SELECT 1; SELECT 'b' AS b; SET application_name = 'x'; SELECT 3"))
        show(connection.execute(""))
        show(connection.execute("SELECT id, name FROM customers ORDER BY id"))
        show(connection.execute("SELECT * FROM orders WHERE false"))
        show(connection.execute("SELECT current_setting('application_name'), current_user, current_database()"))
        show(connection.execute("VALUES (1, 'a'), (2, 'b')"))
        show(connection.execute("SHOW server_version"))
        say(connection.info.server_version, connection.info.encoding, connection.info.parameter_status("TimeZone"))


def parameters() -> None:
    values = [1, 2**40, 1.5, decimal.Decimal("12.30"), "Ünïcode 🎈 '\"\\", b"\x00\xff", True, None, uuid.UUID(int=7)]
    values += [datetime.date(2024, 2, 29), datetime.datetime(2024, 2, 29, 1, 2, 3, tzinfo=datetime.UTC), [1, 2, None]]
    values += [datetime.timedelta(days=1, seconds=3), Jsonb({"a": [1, "ü"]}), ["x", 'y"z'], float("inf")]
    with connect(autocommit=True) as connection:
        for binary in (False, True):
            for value in values:
                show(connection.execute("SELECT %s AS v", [value], binary=binary))
                show(connection.execute("SELECT %b AS v" if value is not None else "SELECT %t", [value], binary=binary))
        show(connection.execute("SELECT %(a)s::int + %(b)s", {"a": 1, "b": 2}))
        show(connection.execute("SELECT ROW(1, 'x')::pair, 'happy'::mood, '[1,3)'::int4range, ARRAY['sad']::mood[]"))
        show(
            connection.execute(sql.SQL("SELECT {} FROM {}").format(sql.Identifier("name"), sql.Identifier("customers")))
        )


def prepared() -> None:
    with connect(autocommit=True) as connection:
        for number in range(8):
            show(connection.execute("SELECT %s::int + 1", [number], prepare=number > 1))
        show(connection.execute("SELECT count(*) FROM pg_prepared_statements"))
        connection.prepared_max = 2
        for number in range(6):
            show(connection.execute(f"SELECT {number} + %s::int", [number], prepare=True))
        show(connection.execute("PREPARE p (int) AS SELECT $1 * 2"))
        show(connection.execute("EXECUTE p (21)"))
        show(connection.execute("DEALLOCATE p"))
        with failing(connection):
            connection.execute("EXECUTE p (21)")
        show(connection.execute("DEALLOCATE ALL"))
        with failing(connection):
            connection.execute("SELECT 1 + %s::int", [1], prepare=True)
            connection.execute("SELECT 1 + %s::int", [1], prepare=True)
        show(connection.execute("DISCARD ALL"))


def transactions() -> None:
    with connect() as connection:
        show(connection.execute("INSERT INTO notes VALUES (1, 'a')"))
        with connection.transaction():
            show(connection.execute("INSERT INTO notes VALUES (2, 'b') RETURNING *"))
        with failing(connection), connection.transaction():
            connection.execute("INSERT INTO notes VALUES (3, 'c')")
            connection.execute("INSERT INTO notes VALUES (2, 'again')")
        show(connection.execute("SELECT * FROM notes ORDER BY id"))
        with failing(connection):
            connection.execute("SELECT 1/0")
        with failing(connection):
            connection.execute("SELECT 1")
        connection.rollback()
        show(connection.execute("SELECT count(*) FROM notes"))
        connection.commit()
        show(connection.execute("SAVEPOINT s"))
        show(connection.execute("INSERT INTO notes VALUES (4, 'd')"))
        show(connection.execute("ROLLBACK TO s"))
        show(connection.execute("RELEASE s"))
        connection.commit()
        connection.isolation_level = psycopg.IsolationLevel.SERIALIZABLE
        connection.read_only = True
        with failing(connection):
            connection.execute("INSERT INTO notes VALUES (5, 'e')")
        connection.rollback()
        connection.read_only = None
        with connection.transaction(force_rollback=True):
            show(connection.execute("INSERT INTO notes VALUES (6, 'f')"))
        show(connection.execute("SELECT count(*) FROM notes"))


def errors() -> None:
    bad = ["SELECT nothing FROM customers", "SELECT * FROM missing", "SELECT 1/0", "SELECT 'x'::int"]
    bad += ["INSERT INTO customers (id, name, email, card) VALUES (1, 'a', 'b', 'c')", "SELECT 1; SELECT 1/0; SELECT 2"]
    bad += [
        "INSERT INTO orders VALUES (9, 99, 'x')",
        "INSERT INTO notes VALUES (NULL)",
        "DO $$ BEGIN RAISE 'own %', 7; END $$",
    ]
    bad += [
        "DO $$ BEGIN RAISE NOTICE 'said' USING DETAIL = 'more', HINT = 'less'; END $$",
        "ROLLBACK",
        "BEGIN; BEGIN; COMMIT",
    ]
    bad += [
        "DROP TABLE IF EXISTS missing",
        "CREATE TABLE made (a int); CREATE VIEW seen AS SELECT a FROM made",
        "DROP TABLE made CASCADE",
    ]
    with connect(autocommit=True) as connection:
        for statement in bad:
            with failing(connection):
                show(connection.execute(statement))
            with failing(connection):
                show(
                    connection.execute(statement, prepare=True, binary=True)
                    if ";" not in statement
                    else connection.execute("SELECT 1")
                )
        with failing(connection):
            connection.execute("SELECT %s::int", ["x"])


def pipelines() -> None:
    with connect(autocommit=True) as connection:
        with connection.pipeline():
            cursors = [connection.execute("SELECT %s::int", [number]) for number in range(50)]
        for cursor in cursors:
            show(cursor)
        with failing(connection), connection.pipeline() as pipeline:
            good = connection.execute("INSERT INTO notes VALUES (%s, 'kept')", [11])
            pipeline.sync()
            connection.execute("SELECT 1/%s::int", [0])
            connection.execute("INSERT INTO notes VALUES (%s, 'skipped')", [12])
        show(good)
        show(connection.execute("SELECT * FROM notes"))
        connection.execute("DELETE FROM notes")
    with connect() as connection, connection.pipeline():
        with failing(connection), connection.transaction():
            connection.execute("INSERT INTO notes VALUES (%s, 'a')", [1])
            show(connection.execute("SELECT * FROM notes"))
            connection.execute("INSERT INTO notes VALUES (%s, 'a')", [1])
        show(connection.execute("SELECT count(*) FROM notes"))


def many() -> None:
    with connect(autocommit=True) as connection, connection.cursor() as cursor:
        cursor.executemany("INSERT INTO notes VALUES (%s, %s)", [(number, f"n{number}") for number in range(300)])
        say(cursor.rowcount, cursor.statusmessage)
        cursor.executemany("DELETE FROM notes WHERE id = %s RETURNING body", [(1,), (2,), (-1,)], returning=True)
        show(cursor)
        with failing(connection):
            cursor.executemany("INSERT INTO notes VALUES (%s, %s)", [(900, "x"), (5, "again"), (901, "y")])
        show(connection.execute("SELECT count(*), max(id) FROM notes"))
        show(connection.execute("TRUNCATE notes"))


def cursors() -> None:
    with connect() as connection:
        with connection.cursor("c", scrollable=True) as cursor:
            cursor.execute("SELECT generate_series(1, %s)", [1000])
            say(cursor.fetchone(), len(cursor.fetchmany(100)), cursor.rownumber)
            cursor.scroll(-50)
            say(cursor.fetchmany(3))
            cursor.itersize = 70
            say(sum(row[0] for row in cursor))
        with connection.cursor("b", binary=True) as cursor:
            cursor.execute("SELECT id, name FROM customers ORDER BY id")
            say([repr(row) for row in cursor])
        with connection.cursor() as cursor:
            say(sum(row[0] for row in cursor.stream("SELECT generate_series(1, 5000)")))
        with failing(connection), connection.cursor("e") as cursor:
            cursor.execute("SELECT 1/(3 - generate_series(1, 5))")
            cursor.fetchall()
        connection.rollback()
        with connection.cursor("h", withhold=True) as cursor:
            cursor.execute("SELECT 7")
            connection.commit()
            say(cursor.fetchall())


def copies() -> None:
    with connect(autocommit=True) as connection, connection.cursor() as cursor:
        with cursor.copy("COPY notes FROM STDIN") as copy:
            for number in range(2000):
                copy.write_row((number, f"tab\tüñ {number}" if number % 3 else None))
        say(cursor.statusmessage, cursor.rowcount)
        with cursor.copy("COPY notes (id, body) FROM STDIN (FORMAT BINARY)") as copy:
            copy.set_types(["int4", "text"])
            for number in range(2000, 3000):
                copy.write_row((number, "x" * 1000))
        say(cursor.statusmessage)
        for how in ("", "(FORMAT BINARY)", "(FORMAT CSV, HEADER)"):
            with cursor.copy(f"COPY (SELECT * FROM notes ORDER BY id) TO STDOUT {how}") as copy:
                data = b"".join(bytes(block) for block in copy)
            say(len(data), hash(data) and sum(data), cursor.statusmessage)
        with cursor.copy("COPY notes TO STDOUT") as copy:
            say(sum(1 for _ in copy.rows()))
        with failing(connection), cursor.copy("COPY notes FROM STDIN") as copy:
            copy.write(b"9001\tok\nnot a number\tbad\n")
        with failing(connection), cursor.copy("COPY notes FROM STDIN") as copy:
            copy.write(b"1\tthere already\n" * 5000)
        with contextlib.suppress(KeyError), cursor.copy("COPY notes FROM STDIN") as copy:
            copy.write(b"9002\tok\n")
            raise KeyError
        say(connection.info.transaction_status.name)
        with failing(connection), cursor.copy("COPY missing TO STDOUT"):
            pass
        show(connection.execute("SELECT count(*) FROM notes"))
        show(connection.execute("TRUNCATE notes"))


def notifications() -> None:
    with connect(autocommit=True) as connection, connect(autocommit=True) as other:
        connection.execute("LISTEN news")
        other.execute("NOTIFY news, 'früh'")
        other.execute("SELECT pg_notify('news', %s)", ["late"])
        for notify in connection.notifies(timeout=5, stop_after=2):
            say(notify.channel, notify.payload)
        connection.execute("UNLISTEN *")


def cancels() -> None:
    with connect(autocommit=True) as connection:
        for cancel in (connection.cancel, connection.cancel_safe):
            timer = threading.Timer(0.3, cancel)
            timer.start()
            began = time.monotonic()
            with failing(connection):
                connection.execute("SELECT pg_sleep(30)")
            say(time.monotonic() - began < 10)
            timer.join()
            show(connection.execute("SELECT 1"))
        connection.execute("SET statement_timeout = '200ms'")
        with failing(connection):
            connection.execute("SELECT pg_sleep(30)")
        connection.execute("RESET statement_timeout")
        show(connection.execute("SELECT 1"))


def large() -> None:
    text = "ü" * 3_000_000
    with connect(autocommit=True) as connection:
        say(connection.execute("SELECT length(%s)", [text]).fetchone())
        say(connection.execute("SELECT %s", [text]).fetchone() == (text,))
        say(
            connection.execute("SELECT %b", [b"\x00\xfe" * 10_000_000], binary=True).fetchone()
            == (b"\x00\xfe" * 10_000_000,)
        )
        say(connection.execute(f"SELECT length('{text[:900_000]}')").fetchone())
        say(len(connection.execute("SELECT generate_series(1, 100000), 'abc'").fetchall()))
        say(connection.execute("SELECT count(*) FROM unnest(%s::int[])", [list(range(100_000))]).fetchone())
        wide = connection.execute(f"SELECT {', '.join(['%s'] * 1600)}", list(range(1600))).fetchone()
        say(wide == tuple(range(1600)))


def texts() -> None:
    with connect(autocommit=True) as connection:
        show(connection.execute('CREATE TABLE public."Tïsch" ("Spältchen" text, "a b" int)'))
        show(connection.execute('INSERT INTO public."Tïsch" VALUES (%s, 1) RETURNING *', ["日本語 \U0001f600"]))
        show(connection.execute('SELECT * FROM "Tïsch" WHERE "Spältchen" LIKE \'日%%\'', []))
        show(connection.execute("SELECT E'\\u00e9', U&'\\00e9', $$ü$$, 'it''s'"))
        show(connection.execute('DROP TABLE public."Tïsch"'))
    with connect(autocommit=True, client_encoding="latin1") as connection:
        show(connection.execute("SELECT 'é', %s", ["ü"]))
        with failing(connection):
            show(connection.execute("SELECT chr(8364)"))
        connection.execute("SET client_encoding TO 'UTF8'")
        show(connection.execute("SELECT 'é', chr(8364)"))


def settings() -> None:
    with connect(
        application_name="my job", options="-c statement_timeout=12345 -c DateStyle=German", autocommit=True
    ) as connection:
        show(connection.execute("SELECT current_setting('application_name'), current_setting('statement_timeout')"))
        show(connection.execute("SHOW DateStyle"))
        say(connection.info.parameter_status("application_name"), connection.info.parameter_status("DateStyle"))
        show(connection.execute("SET application_name TO 'other'"))
        say(connection.info.parameter_status("application_name"))


def asynchronous() -> None:
    async def run() -> None:
        async with await psycopg.AsyncConnection.connect(autocommit=True) as connection:
            cursor = await connection.execute("SELECT %s", ["async"])
            say(await cursor.fetchall())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(connection.execute("SELECT pg_sleep(30)"), 0.3)
            cursor = await connection.execute("SELECT 1")
            say(await cursor.fetchall())

    asyncio.run(run())


def run(statement: str, *how: str) -> None:
    """One statement, and whether the session goes on: for holds and denials. `how`: extended, transaction, binary."""
    with connect(autocommit="transaction" not in how) as connection:
        say(ready=True)
        with failing(connection):
            binary = "binary" in how
            show(connection.execute(statement, prepare=True if "extended" in how else None, binary=binary))
        if connection.info.transaction_status is TransactionStatus.INERROR:
            connection.rollback()
        show(connection.execute("SELECT 'alive'"))


def cancel_held(statement: str) -> None:
    """Cancels the statement once it is held."""
    with connect(autocommit=True) as connection:
        connection.add_notice_handler(lambda diagnostic: threading.Timer(0.2, connection.cancel).start())
        with failing(connection):
            connection.execute(statement)
        show(connection.execute("SELECT 'alive'"))


def wait_for_end() -> None:
    """Stays in a session until somebody else ends it, a statement for each line of standard input."""
    with connect(autocommit=True) as connection:
        say(ready=True)
        for line in sys.stdin:
            with failing(connection):
                show(connection.execute(line))


def denials(denied: str) -> None:
    """A denied statement wherever a statement can stand; `notes` is empty before and after."""
    with connect(autocommit=True) as connection:
        with failing(connection):
            connection.execute(denied)
        with failing(connection):
            connection.execute(denied, prepare=True)
        with failing(connection):
            connection.execute(f"INSERT INTO notes VALUES (1, 'undone'); {denied}; INSERT INTO notes VALUES (2, 'no')")
        show(connection.execute("SELECT count(*) FROM notes"))
        with failing(connection), connection.transaction():
            connection.execute("INSERT INTO notes VALUES (3, 'undone')")
            with failing(connection):
                connection.execute(denied)
            with failing(connection):
                connection.execute("SELECT 1")
            connection.execute("SELECT 2")
        with connection.transaction():
            with failing(connection), connection.transaction():
                connection.execute(denied)
            show(connection.execute("SELECT 'the savepoint saved it'"))
        results = []
        with failing(connection), connection.pipeline() as pipeline:
            results.append(connection.execute("SELECT %s::int", [1]))
            pipeline.sync()
            connection.execute(denied)
            results.append(connection.execute("SELECT %s::int", [2]))
        show(results[0])
        show(connection.execute("SELECT count(*) FROM notes"))
        with failing(connection):
            connection.execute("PREPARE d AS DELETE FROM orders")
        with failing(connection), connection.cursor() as cursor:
            cursor.executemany(denied.replace("%", "%%"), [(), ()])
        show(connection.execute("SELECT 'alive', %s", ["yes"]))


def stream(statement: str, pause: str = "0") -> None:
    """Reads a large result row by row, after a pause in which nothing is read."""
    with connect(autocommit=True) as connection, connection.cursor() as cursor:
        rows = size = 0
        for row in cursor.stream(statement):
            if not rows:
                time.sleep(float(pause))
            rows += 1
            size += len(row[-1])
        say(rows=rows, size=size)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
