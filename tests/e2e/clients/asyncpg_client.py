"""What asyncpg sees: `asyncpg_client.py SCENARIO`. The connection is told by libpq's own variables."""

import asyncio
import contextlib
import datetime
import decimal
import io
import os
import sys
import uuid
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
from transcript import say


def show(rows: list[asyncpg.Record]) -> None:
    say([[list(row.keys()), repr(tuple(row.values()))] for row in rows])


@contextlib.asynccontextmanager
async def failing() -> AsyncIterator[None]:
    try:
        yield
        say("no error")
    except asyncpg.PostgresError as error:
        say(error=type(error).__name__, told=error.as_dict())
    except (asyncpg.InterfaceError, TimeoutError) as error:
        say(error=type(error).__name__, told=str(error))


async def queries() -> None:
    connection = await asyncpg.connect()
    try:
        connection.add_log_listener(lambda _, message: say(notice=message.as_dict()))
        show(await connection.fetch("SELECT 1 AS one, 'é' AS e, NULL AS n, 1.5::numeric, true"))
        say(await connection.execute("SELECT 1; CREATE TABLE public.made (a int); DROP TABLE public.made"))
        say(await connection.execute("DROP TABLE IF EXISTS public.missing"))
        for value in (
            1,
            "🎈",
            b"\x00\xff",
            decimal.Decimal("1.20"),
            uuid.UUID(int=7),
            datetime.date(2024, 2, 29),
            [1, None],
        ):
            kind = {int: "int", str: "text", bytes: "bytea", decimal.Decimal: "numeric", uuid.UUID: "uuid"}.get(
                type(value)
            )
            kind = kind or ("date" if isinstance(value, datetime.date) else "int[]")
            show(await connection.fetch(f"SELECT $1::{kind} AS v", value))
        show(
            await connection.fetch("SELECT ROW(1, 'x')::pair AS p, 'happy'::mood AS m, ARRAY[ROW(2, 'y')::pair] AS ps")
        )
        say(await connection.fetchval("SELECT count(*) FROM customers"))
        statement = await connection.prepare("SELECT name FROM customers WHERE id = $1")
        say([str(parameter) for parameter in statement.get_parameters()], [str(a) for a in statement.get_attributes()])
        for number in range(3):
            show(await statement.fetch(number))
        say(await statement.executemany([(1,), (2,)]))
        say(await connection.executemany("INSERT INTO notes VALUES ($1, $2)", [(n, f"n{n}") for n in range(500)]))
        say(await connection.fetchmany("DELETE FROM notes WHERE id = $1 RETURNING body", [(1,), (2,)]) and "deleted")
        say(await connection.execute("DELETE FROM notes"))
        say(connection.get_server_version()[:2], connection.get_settings().application_name)
    finally:
        await connection.close()


async def transactions() -> None:
    connection = await asyncpg.connect()
    try:
        async with failing(), connection.transaction():
            await connection.execute("INSERT INTO notes VALUES (1, 'a')")
            async with failing(), connection.transaction():
                await connection.execute("INSERT INTO notes VALUES (2, 'b')")
                await connection.execute("SELECT 1/0")
            show(await connection.fetch("SELECT * FROM notes"))
            async for row in connection.cursor("SELECT generate_series(1, 120) AS n", prefetch=50):
                if row["n"] % 40 == 0:
                    say(row["n"])
            cursor = await connection.cursor("SELECT generate_series(1, 10)")
            say(await cursor.forward(3), (await cursor.fetchrow())[0])
            await connection.execute("INSERT INTO notes VALUES (1, 'again')")
        show(await connection.fetch("SELECT count(*) FROM notes"))
        async with failing():
            await connection.execute("BEGIN; SELECT 1/0")
        say(connection.is_in_transaction())
        async with failing():
            await connection.fetch("SELECT $1::int", 1)
        await connection.execute("ROLLBACK")
        async with failing():
            await connection.fetch("SELECT * FROM missing WHERE a = $1", 1)
        async with connection.transaction(isolation="serializable", readonly=True):
            show(await connection.fetch("SHOW transaction_isolation"))
    finally:
        await connection.close()


async def copies() -> None:
    connection = await asyncpg.connect()
    try:
        records = [(number, "ü" * (number % 50) if number % 3 else None) for number in range(5000)]
        say(await connection.copy_records_to_table("notes", records=records))
        for form in ("text", "csv", "binary"):
            out = io.BytesIO()
            say(await connection.copy_from_query("SELECT * FROM notes ORDER BY id", output=out, format=form))
            say(len(out.getvalue()), sum(out.getvalue()))
            say(await connection.execute("DELETE FROM notes"))
            out.seek(0)
            say(await connection.copy_to_table("notes", source=out, format=form))
        async with failing():
            await connection.copy_records_to_table("notes", records=[(1, "there already")])
        async with failing():
            await connection.copy_to_table("notes", source=io.BytesIO(b"x\ty\n"))

        async def broken() -> AsyncIterator[bytes]:
            yield b"90001\tok\n"
            raise KeyError("source")

        with contextlib.suppress(KeyError):
            await connection.copy_to_table("notes", source=broken())
        say(await connection.fetchval("SELECT count(*) FROM notes"))
        say(await connection.execute("TRUNCATE notes"))
    finally:
        await connection.close()


async def cancels() -> None:
    connection = await asyncpg.connect()
    other = await asyncpg.connect()
    try:
        with contextlib.suppress(TimeoutError):
            await connection.fetch("SELECT pg_sleep(30)", timeout=0.3)
        show(await connection.fetch("SELECT 1"))
        task = asyncio.ensure_future(connection.fetch("SELECT pg_sleep(30)"))
        await asyncio.sleep(0.3)
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        show(await connection.fetch("SELECT 2"))
        heard: asyncio.Queue[Any] = asyncio.Queue()
        await connection.add_listener("news", lambda _, pid, channel, payload: heard.put_nowait((channel, payload)))
        await other.execute("NOTIFY news, 'früh'")
        say(await asyncio.wait_for(heard.get(), 5))
    finally:
        await connection.close()
        await other.close()


async def pool() -> None:
    async with asyncpg.create_pool(min_size=5, max_size=20) as made:

        async def work(number: int) -> int:
            async with made.acquire() as connection, connection.transaction():
                return int(await connection.fetchval("SELECT $1::int * 2", number))

        say(sum(await asyncio.gather(*(work(number) for number in range(400)))))
        async with made.acquire() as connection:
            await connection.execute("SET application_name = 'mine'")
        async with made.acquire() as connection:
            say(await connection.fetchval("SELECT current_setting('application_name')"))


async def crowd(count: str) -> None:
    """Many connections at once, each with a server process of its own."""
    connections = await asyncio.gather(*(asyncpg.connect(timeout=60) for _ in range(int(count))))
    try:
        pids = await asyncio.gather(*(connection.fetchval("SELECT pg_backend_pid()") for connection in connections))
        say(len(set(pids)))
        values = await asyncio.gather(
            *(each.fetchval("SELECT $1::int", number) for number, each in enumerate(connections))
        )
        say(values == list(range(int(count))))
    finally:
        await asyncio.gather(*(connection.close() for connection in connections))


async def secured(name: str, ca: str) -> None:
    """verify-full, against the name or address that was dialled."""
    import ssl

    context = ssl.create_default_context(cafile=ca)
    connection = await asyncpg.connect(host=name, ssl=context)
    say(await connection.fetchval("SELECT 1"))
    await connection.close()


async def run(*statements: str) -> None:
    connection = await asyncpg.connect(host=[os.environ["PGHOST"]])  # in a list: its own reading splits IPv6 addresses
    try:
        for statement in statements:
            async with failing():
                show(await connection.fetch(statement))
        show(await connection.fetch("SELECT 'alive' AS a"))
    finally:
        await connection.close()


if __name__ == "__main__":
    asyncio.run(globals()[sys.argv[1]](*sys.argv[2:]))
