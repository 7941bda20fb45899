"""A denied statement fails as if the server had refused it: SQLSTATE 42501, in place, and the session goes on."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.shop import Shop

DROP = "DROP TABLE orders"
MESSAGE = "target `shop`: agent `limited` may not drop-table orders (rule `limited-drops-nothing`)"
HINT = "tables stay: ask the owners of the shop"
DELETE = (
    "target `shop`: agent `limited` may not delete orders (no rule allows it)",
    "ask those who keep the policy for a rule that allows `delete` there",
)


def told(message: str, hint: str) -> dict[str, str]:
    return {"severity": "ERROR", "sqlstate": "42501", "message_primary": message, "message_hint": hint}


def test_a_denial_names_target_hop_and_rule(shop: Shop) -> None:
    done = shop.psql("limited", f"\\set VERBOSITY verbose\n{DROP};\nSELECT 'alive';\n")
    assert done.stdout == "alive\n"
    assert done.stderr == f"ERROR:  42501: {MESSAGE}\nHINT:  {HINT}\n"


def test_a_denial_is_a_server_error_wherever_it_stands(shop: Shop) -> None:
    denied = {"error": "InsufficientPrivilege", "told": told(MESSAGE, HINT)}
    idle, failed = denied | {"status": "IDLE"}, denied | {"status": "INERROR"}
    aborted = "current transaction is aborted, commands ignored until end of transaction block"
    in_failed = {
        "error": "InFailedSqlTransaction",
        "told": {"severity": "ERROR", "sqlstate": "25P02", "message_primary": aborted},
    }
    seen = shop.tell("limited", "psycopg_client.py", "denials", DROP)
    assert seen == [
        idle,  # simple
        idle,  # prepared
        idle,  # in a string of several statements, whose others are undone with it
        *rows("count", 20, ["(0,)"]),
        failed,  # in a transaction
        in_failed | {"status": "INERROR"},
        in_failed | {"status": "IDLE"},
        denied | {"status": "INTRANS"},  # behind a savepoint
        *rows("?column?", 25, ["('the savepoint saved it',)"], status="INTRANS"),
        idle,  # in a pipeline
        *rows("int4", 23, ["(1,)"]),
        *rows("count", 20, ["(0,)"]),
        idle | {"told": told(*DELETE)},  # by SQL's PREPARE
        idle,  # executemany
        *rows(("?column?", "?column?"), 25, ["('alive', 'yes')"]),
    ]


def rows(names: str | tuple[str, ...], kind: int, values: list[str], status: str = "IDLE") -> list[dict[str, Any]]:
    columns = [
        [name, kind, -1, {20: 8, 23: 4, 25: -1}[kind]] for name in ([names] if isinstance(names, str) else names)
    ]
    return [
        {"tag": f"SELECT {len(values)}", "count": len(values), "columns": columns, "rows": values},
        {"status": status},
    ]


@pytest.mark.parametrize("program", ["asyncpg_client.py", "sqlalchemy_client.py"])
def test_other_drivers_take_it_as_insufficient_privilege(shop: Shop, program: str) -> None:
    denial, alive = shop.tell("limited", program, "run", DROP)
    assert MESSAGE in str(denial)
    assert "42501" in str(denial)
    assert "alive" in str(alive)


def test_a_denial_leaves_what_a_syntax_error_leaves(shop: Shop) -> None:
    """Both are said before anything of the string has run."""
    forms = [
        "{};\nSELECT 'after';\n",
        "BEGIN;\n{};\nSELECT 'ignored';\nROLLBACK;\nSELECT 'after';\n",
        "BEGIN;\nSAVEPOINT a;\n{};\nROLLBACK TO a;\nSELECT 'in';\nCOMMIT;\n",
        "SELECT 'first' \\; {} \\; SELECT 'never';\nSELECT 'after';\n",
        "BEGIN \\; {} \\; COMMIT;\nSELECT 'after';\nROLLBACK;\n",
    ]
    for form in forms:
        denied = shop.psql("limited", form.format(DROP))
        refused = shop.psql("limited", form.format("DROP TABL orders"), direct=True)
        assert denied.stdout == refused.stdout
        assert "42601" not in denied.stderr
        assert MESSAGE in denied.stderr


def test_a_child_has_no_more_than_its_parents(shop: Shop) -> None:
    for hops in (["limited", "full"], ["full", "limited"]):
        done = shop.psql(hops, f"{DROP};\nSELECT count(*) FROM orders;\nSELECT count(*) FROM customers;\n")
        assert done.stdout == "3\n"
        assert done.stderr.count("agent `limited` may not") == 2


def test_nobody_comes_without_an_agent(shop: Shop) -> None:
    done = shop.psql([], "SELECT 1")
    assert done.returncode == 2
    assert done.stdout == ""
    assert "unattributed" in done.stderr


def test_another_database_is_refused_at_login(shop: Shop) -> None:
    done = shop.psql("full", "SELECT 1", PGDATABASE="postgres")
    assert done.returncode == 2
    assert "postgres" in done.stderr
    assert done.stdout == ""


def test_a_call_by_function_oid_is_denied(shop: Shop) -> None:
    received = shop.wire("full", "Q:SELECT 'before'", "F:1598", "Q:SELECT 'after'")
    assert b"before" in received
    assert b"C42501\0" in received
    assert b"function by OID only" in received
    assert b"after" in received
