"""What is told of a session afterwards, and what a changed policy does to one that is open."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.e2e.shop import Shop, policy_text


def test_sessions_and_replay_tell_who_did_what(shop: Shop) -> None:
    script = "SELECT id FROM orders WHERE status = 'paid';\nDROP TABLE orders;\nSELECT 1/0;\n"
    shop.psql(["full", "limited"], script, PGAPPNAME="the job")
    session = shop.last_session("full > limited")
    assert (session.operations, session.denied, session.target, session.database) == (3, 1, "shop", "shop")
    listed = shop.gateway.cli("sessions", "--limit", "5").stdout
    assert session.id in listed
    assert "full > limited" in listed
    told = shop.gateway.cli("replay", session.id).stdout
    for text in (
        "chain: full > limited",
        "env HOP=limited psql",
        "user=shop_app database=shop",
        "application_name=the job",
        "SELECT id FROM orders WHERE status = 'paid'",
        "limited: allow by limited-reads",
        "full: allow by full-everything",
        "SELECT 2, 2 rows",
        "limited: deny by limited-drops-nothing",
        "error 22012 division by zero",
        "3 operations, 1 denied",
    ):
        assert text in told, told


@contextmanager
def open_session(shop: Shop) -> Iterator[subprocess.Popen[str]]:
    with shop.start("changing", shop.python("psycopg_client.py", "wait_for_end")) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == '{"ready": true}\n'
        yield process


def ask(process: subprocess.Popen[str], statement: str) -> str:
    """What the client says about the statement, up to the word that it failed or did not, or to the end."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(f"{statement}\n")
    process.stdin.flush()
    lines = []
    while not lines or not (lines[-1].startswith(('"no error"', '{"error"')) or not lines[-1]):
        lines.append(process.stdout.readline())
    return "".join(lines)


@pytest.fixture
def restored(shop: Shop) -> Iterator[None]:
    yield
    shop.reload(policy_text())


CHANGING = (
    "  - {name: changing-reads, agents: changing, targets: shop, statements: select, "
    'relations: "public.*", decision: allow}\n'
)


def test_a_new_rule_holds_in_sessions_that_are_open(shop: Shop, restored: None) -> None:
    with open_session(shop) as process:
        assert "no error" in ask(process, "SELECT * FROM orders")
        assert "no rule allows it" in ask(process, "DELETE FROM notes")
        shop.reload(policy_text() + CHANGING.replace("changing-reads", "changing-stops").replace("allow}", "deny}"))
        shop.until(lambda: "changing-stops" in ask(process, "SELECT * FROM orders"), "the new rule")
        shop.reload(policy_text())
        shop.until(lambda: "no error" in ask(process, "SELECT * FROM orders"), "the old rule")
        process.communicate(timeout=20)


def test_a_session_whose_masks_changed_is_ended(shop: Shop, restored: None) -> None:
    mask = "  - name: changing-masks\n    agents: changing\n    targets: shop\n"
    mask += "    masks: [{column: public.customers.email, method: redact}]\n"
    with open_session(shop) as process, open_session(shop) as idle:
        assert "cleartext" in ask(process, "SELECT email FROM customers")
        shop.reload(policy_text() + mask)
        seen = shop.until(
            lambda: line if "no error" not in (line := ask(process, "SELECT email FROM customers")) else "", "the end"
        )
        assert "the policy changed for this target" in seen
        assert "cleartext" not in seen
        assert "no error" not in ask(idle, "SELECT 1")
        process.communicate(timeout=20)
        idle.communicate(timeout=20)
    done = shop.psql("changing", "SELECT email FROM customers")
    assert done.stdout == "***\n" * 3


def test_an_agent_that_lost_everything_is_sent_away(shop: Shop, restored: None) -> None:
    with open_session(shop) as process:
        shop.reload(policy_text().replace(CHANGING, ""))
        seen = shop.until(lambda: line if "no error" not in (line := ask(process, "SELECT 1")) else "", "the end")
        assert "the policy changed: this chain may no longer use this target" in seen
        process.communicate(timeout=20)


def test_a_bad_policy_changes_nothing(shop: Shop, restored: None) -> None:
    shop.gateway.write_policy(
        policy_text() + "  - {name: broken, agents: nobody-known, targets: shop, statements: select, decision: allow}\n"
    )
    done = shop.gateway.cli("reload", check=False)
    assert done.returncode == 1
    assert "nobody-known" in done.stderr
    assert shop.psql("full", "SELECT 1").stdout == "1\n"


def test_all_recordings_hold(shop: Shop) -> None:
    done = shop.gateway.cli("audit", "verify")
    assert "all hold" in done.stdout
    assert int(done.stdout.split()[0]) >= 5
