"""No secret of a command line is written down, and what is none stays readable."""

from __future__ import annotations

import pytest

from hostagent.attribution.secrecy import recordable_arguments


@pytest.mark.parametrize(
    ("argv", "recorded"),
    [
        (("psql", "postgresql://app:hunter2@db/shop"), ("psql", "postgresql://app:<secret>@db/shop")),
        (("psql", "host=db password=hunter2 dbname=shop"), ("psql", "host=db password=<secret> dbname=shop")),
        (("psql", "host=db password='hunter 2' user=a"), ("psql", "host=db password=<secret> user=a")),
        (("env", "PGPASSWORD=hunter2", "psql"), ("env", "PGPASSWORD=<secret>", "psql")),
        (("tool", "--password", "hunter2", "go"), ("tool", "--password", "<secret>", "go")),
        (("tool", "--api-key=hunter2"), ("tool", "--api-key=<secret>")),
        (("sh", "-c", 'export DB_PASSWORD="hunter2"; run'), ("sh", "-c", "export DB_PASSWORD=<secret>; run")),
        (("run", '{"DB_TOKEN": "hunter2"}'), ("run", '{"DB_TOKEN": <secret>}')),
    ],
)
def test_a_secret_is_replaced(argv: tuple[str, ...], recorded: tuple[str, ...]) -> None:
    assert recordable_arguments(argv) == recorded


@pytest.mark.parametrize(
    "argv",
    [
        ("python3", "agent_a.py", "read"),
        ("psql", "host=db dbname=shop", "-c", "SELECT 1"),
        ("git", "clone", "https://git.example/a/b.git"),
        ("pass", "show", "x"),
    ],
)
def test_what_is_no_secret_stays(argv: tuple[str, ...]) -> None:
    assert recordable_arguments(argv) == argv
