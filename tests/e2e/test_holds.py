"""A held statement waits for a human: approved, denied, too late, cancelled, or left alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from hostagent import alerts
from hostagent.declarations import INITIAL_PID_NAMESPACE
from proxy.recording.records import Completed, Decided
from tests.e2e.shop import Shop

UPDATE = "UPDATE orders SET status = 'refunded' WHERE id = 1"


@pytest.fixture(autouse=True)
def untouched(shop: Shop) -> Iterator[None]:
    yield
    shop.await_none_pending()
    shop.server.run_sql("UPDATE orders SET status = 'paid' WHERE id = 1", database="shop")


def status(shop: Shop) -> str:
    return shop.server.run_sql("SELECT status FROM orders WHERE id = 1", database="shop").strip()


@contextmanager
def holding(shop: Shop, *how: str, statement: str = UPDATE) -> Iterator[subprocess.Popen[str]]:
    with shop.start("held", shop.python("psycopg_client.py", "run", statement, *how)) as process:
        yield process


def outcomes(shop: Shop) -> list[str]:
    """Of the newest session that asked for something: a cancel request is a session too."""
    records = shop.records(shop.last_session("held", operations=1))
    return [record.outcome for record in records if isinstance(record, Decided)]


def test_the_command_line_approves(shop: Shop) -> None:
    with holding(shop) as process:
        (waiting,) = shop.await_pending()
        assert status(shop) == "paid"
        listed = shop.gateway.cli("approvals").stdout
        assert waiting.id in listed
        assert "held-updates" in listed
        assert f"approved {waiting.id}" in shop.gateway.cli("approve", waiting.id, "--reason", "it is a refund").stdout
        said = process.communicate(timeout=20)[0]
    assert f"held for approval {waiting.id}" in said
    assert '"tag": "UPDATE 1"' in said
    assert status(shop) == "refunded"
    assert outcomes(shop) == ["approved"]


def test_the_command_line_denies(shop: Shop) -> None:
    with holding(shop) as process:
        (waiting,) = shop.await_pending()
        shop.gateway.cli("deny", waiting.id, "--reason", "not on a Friday")
        said = process.communicate(timeout=20)[0]
    assert '"sqlstate": "42501"' in said
    assert "not on a Friday" in said
    assert "'alive'" in said
    assert status(shop) == "paid"
    assert outcomes(shop) == ["denied"]


@pytest.mark.skipif(
    os.stat("/proc/self/ns/pid").st_ino != INITIAL_PID_NAMESPACE, reason="here a caller's lineage cannot be told"
)
def test_an_agent_that_is_root_cannot_approve_and_that_is_alerted(shop: Shop) -> None:
    approve = [sys.executable, "-I", "-m", "hostagent.cli", "approve"]
    with holding(shop) as process:
        (waiting,) = shop.await_pending()
        done = shop.gateway.run(["env", "HOP=held", *approve, waiting.id, "--config", str(shop.gateway.config)])
        assert done.returncode == 1 and "agents may not approve" in done.stderr
        assert [row.id for row in shop.pending()] == [waiting.id]
        shop.decide(waiting.id, False)
        process.communicate(timeout=20)
    (path,) = (shop.gateway.state_dir / "alerts").iterdir()
    tried = [alert for alert in alerts.read(path) if alert.what == "an agent tried to approve"]
    assert [alert.by.split(", ")[1] for alert in tried] == ["held"]


def test_time_denies(shop: Shop) -> None:
    with holding(shop, statement="DELETE FROM orders WHERE id = 3") as process:
        said = process.communicate(timeout=20)[0]
    assert '"sqlstate": "42501"' in said
    assert "expired" in said
    assert "'alive'" in said
    assert outcomes(shop) == ["expired"]


@pytest.mark.parametrize("how", [("extended",), ("transaction",), ("extended", "transaction")], ids=str)
def test_a_hold_in_a_transaction_and_in_the_extended_protocol(shop: Shop, how: tuple[str, ...]) -> None:
    for approved in (True, False):
        with holding(shop, *how) as process:
            (waiting,) = shop.await_pending()
            shop.decide(waiting.id, approved)
            said = process.communicate(timeout=20)[0]
        assert ('"tag": "UPDATE 1"' in said) is approved
        assert ('"sqlstate": "42501"' in said) is not approved
        assert ('"status": "INERROR"' in said) is ("transaction" in how and not approved)
        assert "'alive'" in said
    assert outcomes(shop) == ["denied"]


def test_a_cancel_withdraws(shop: Shop) -> None:
    done = shop.tell("held", "psycopg_client.py", "cancel_held", UPDATE)
    assert "cancelled by the client" in str(done)
    assert "57014" in str(done)
    assert "'alive'" in str(done)
    assert shop.pending() == ()
    assert "held-updates" not in shop.gateway.cli("approvals").stdout
    assert outcomes(shop) == ["cancelled"]
    assert status(shop) == "paid"


def test_a_disconnect_withdraws(shop: Shop) -> None:
    with holding(shop) as process:
        (waiting,) = shop.await_pending()
        process.kill()
        shop.await_none_pending()
    late = shop.gateway.cli("approve", waiting.id, check=False)
    assert late.returncode == 1
    assert status(shop) == "paid"
    assert outcomes(shop) == ["withdrawn"]


def test_two_sessions_wait_each_for_itself(shop: Shop) -> None:
    with holding(shop) as one:
        (first,) = shop.await_pending()
        with holding(shop, statement="UPDATE orders SET status = 'second' WHERE id = 1") as other:
            (second,) = (row for row in shop.await_pending(2) if row.id != first.id)
            shop.decide(second.id, True)
            assert '"tag": "UPDATE 1"' in other.communicate(timeout=20)[0]
            assert status(shop) == "second"
            assert [row.id for row in shop.pending()] == [first.id]
        shop.decide(first.id, False)
        assert '"sqlstate": "42501"' in one.communicate(timeout=20)[0]
    assert status(shop) == "second"


def test_psql_shows_what_it_waits_for(shop: Shop) -> None:
    with shop.start("held", ["psql", "-X", "-q", "-c", UPDATE]) as process:
        (waiting,) = shop.await_pending()
        shop.decide(waiting.id, True)
        said = process.communicate(timeout=20)[0]
    assert re.search(rf"NOTICE:  held for approval {waiting.id}: .*held-updates", said)
    assert f"HINT:  somebody on the runner has to say `hopgate approve {waiting.id}` within 60 s" in said


def test_a_driver_that_pipelines_waits_in_place(shop: Shop) -> None:
    with shop.start(
        "held", shop.python("wire.py", "Q:SELECT 'before'", f"Q:{UPDATE}", "Q:SELECT status FROM orders WHERE id = 1")
    ) as process:
        (waiting,) = shop.await_pending()
        shop.decide(waiting.id, True)
        assert process.communicate(timeout=20)[0]
    assert status(shop) == "refunded"
    tags = [record.tag for record in shop.records(shop.last_session("held")) if isinstance(record, Completed)]
    assert tags == ["SELECT 1", "UPDATE 1", "SELECT 1"]
