"""Approvals: what a human can do about one operation, and everything that ends the wait."""

from __future__ import annotations

import asyncio
import math
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostagent.control.approvals import ApprovalRefused, Approvals, Decided
from hostagent.control.rows import Outcome
from hostagent.control.store import Store, StoreUnavailable
from proxy.ports import new_approval_id

ID = "H-7KQ3F9"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store.create(tmp_path / "control.sqlite")
    yield made
    made.close()


def held(approvals: Approvals, approval: str = ID, **changes: object) -> asyncio.Task[Decided]:
    given = {
        "session": "20261124-104512-7f3a9c",
        "approval": approval,
        "operation": 7,
        "hop": "agent-b",
        "rule": "updates",
        "preview": "UPDATE t SET a = 1",
        "timeout_s": 30.0,
        **changes,
    }
    return asyncio.ensure_future(approvals.hold(**given))  # type: ignore[arg-type]


def outcome(store: Store, approval: str = ID) -> tuple[Outcome, str, str]:
    row = store.approval(approval)
    assert row is not None
    return row.outcome, row.by, row.reason


@pytest.mark.parametrize("approved", [True, False])
def test_a_human_decides(store: Store, approved: bool) -> None:
    async def run() -> None:
        approvals = Approvals(store)
        waiting = held(approvals)
        await asyncio.sleep(0)
        assert [row.id for row in approvals.pending] == [ID]
        assert outcome(store)[0] is Outcome.PENDING
        row = approvals.decide(" h-7kq3f9 ", approved=approved, by="root (uid 0)", reason="fine")
        assert (row.preview, row.operation) == ("UPDATE t SET a = 1", 7)
        expected = Outcome.APPROVED if approved else Outcome.DENIED
        assert await waiting == Decided(expected, "root (uid 0)", "fine")
        assert outcome(store) == (expected, "root (uid 0)", "fine")
        assert approvals.pending == []
        with pytest.raises(ApprovalRefused, match=f"is {expected} by root"):
            approvals.decide(ID, approved=True, by="x", reason="")

    asyncio.run(run())


def test_nobody_decides_in_time(store: Store) -> None:
    async def run() -> None:
        approvals = Approvals(store)
        assert (await held(approvals, timeout_s=0.02)).outcome is Outcome.EXPIRED
        assert outcome(store)[0] is Outcome.EXPIRED
        with pytest.raises(ApprovalRefused, match="expired"):
            approvals.decide(ID, approved=True, by="x", reason="")

    asyncio.run(run())


def test_a_withdrawn_approval_cannot_be_decided(store: Store) -> None:
    async def run() -> None:
        approvals = Approvals(store)
        one, two, three = held(approvals), held(approvals, "H-AAAAAA"), held(approvals, "H-BBBBBB", session="other")
        await asyncio.sleep(0)
        approvals.withdraw(ID, "the client cancelled")
        assert await one == Decided(Outcome.WITHDRAWN, "hopgate", "the client cancelled")
        approvals.withdraw_session("other", "it left")
        assert (await three).outcome is Outcome.WITHDRAWN
        two.cancel()
        with pytest.raises(asyncio.CancelledError):
            await two
        assert approvals.pending == []
        for approval in (ID, "H-AAAAAA", "H-BBBBBB"):
            assert outcome(store, approval)[0] is Outcome.WITHDRAWN
            with pytest.raises(ApprovalRefused, match="withdrawn"):
                approvals.decide(approval, approved=True, by="x", reason="")
        approvals.withdraw("H-CCCCCC", "unknown")

    asyncio.run(run())


@pytest.mark.parametrize(
    ("approval", "timeout_s"),
    [
        ("", 1.0),
        ("H-7KQ3F", 1.0),
        ("H-7KQ3F1", 1.0),
        ("h-7kq3f9", 1.0),
        ("H-7KQ3F9\n", 1.0),
        ("X" * 10_000, 1.0),
        (ID, 0.0),
        (ID, -1.0),
        (ID, 1e9),
        (ID, math.nan),
        (ID, math.inf),
    ],
)
def test_a_worker_cannot_ask_for_what_makes_no_sense(store: Store, approval: str, timeout_s: float) -> None:
    async def run() -> None:
        with pytest.raises(ApprovalRefused) as raised:
            await held(Approvals(store), approval, timeout_s=timeout_s)
        assert len(str(raised.value)) < 200

    asyncio.run(run())
    assert store.approvals() == []


def test_an_id_is_used_once(store: Store) -> None:
    async def run() -> None:
        approvals = Approvals(store)
        first = held(approvals)
        await asyncio.sleep(0)
        with pytest.raises(ApprovalRefused, match="used before"):
            await held(approvals)
        approvals.decide(ID, approved=False, by="x", reason="")
        assert (await first).outcome is Outcome.DENIED
        with pytest.raises(ApprovalRefused, match="used before"):
            await held(approvals)

    asyncio.run(run())


def test_the_number_of_pending_approvals_and_their_size_is_bounded(store: Store) -> None:
    async def run() -> None:
        approvals = Approvals(store, max_pending=3)
        waiting = [held(approvals, f"H-AAAAA{letter}", preview="x" * 100_000, hop="h" * 100_000) for letter in "ABC"]
        await asyncio.sleep(0)
        with pytest.raises(ApprovalRefused, match="`3` approvals are pending"):
            await held(approvals)
        assert all(len(row.preview) == 4096 and len(row.hop) == 512 for row in approvals.pending)
        approvals.withdraw("H-AAAAAB", "")
        again = held(approvals)
        await asyncio.sleep(0)
        assert len(approvals.pending) == 3
        for each in (*waiting, again):
            each.cancel()
        await asyncio.gather(*waiting, again, return_exceptions=True)

    asyncio.run(run())


def test_what_waited_when_the_host_agent_died_is_withdrawn(store: Store) -> None:
    async def run() -> None:
        dead = held(Approvals(store))
        await asyncio.sleep(0)
        restarted = Approvals(store)
        assert restarted.recover() == 1
        assert outcome(store) == (Outcome.WITHDRAWN, "hopgate", "the host agent died")
        with pytest.raises(ApprovalRefused, match="withdrawn"):
            restarted.decide(ID, approved=True, by="x", reason="")
        dead.cancel()
        await asyncio.gather(dead, return_exceptions=True)

    asyncio.run(run())


def test_no_approval_counts_that_is_not_written_down(store: Store) -> None:
    def rename(old: str, new: str) -> None:
        with sqlite3.connect(store.path) as connection:
            connection.execute(f"ALTER TABLE {old} RENAME TO {new}")
        connection.close()

    async def run() -> None:
        approvals = Approvals(store)
        waiting, denied = held(approvals), held(approvals, "H-AAAAAA")
        await asyncio.sleep(0)
        rename("approvals", "elsewhere")
        with pytest.raises(StoreUnavailable):
            approvals.decide(ID, approved=True, by="x", reason="")
        assert not waiting.done()
        with pytest.raises(StoreUnavailable):
            await held(approvals, "H-BBBBBB")
        approvals.decide("H-AAAAAA", approved=False, by="x", reason="")
        assert (await denied).outcome is Outcome.DENIED
        rename("elsewhere", "approvals")
        approvals.decide(ID, approved=True, by="x", reason="")
        assert (await waiting).outcome is Outcome.APPROVED

    asyncio.run(run())


def test_ids_that_workers_make_are_taken(store: Store) -> None:
    async def run() -> None:
        approvals = Approvals(store)
        waiting = held(approvals, new_approval_id(lambda below: below - 1))
        await asyncio.sleep(0)
        assert len(approvals.pending) == 1
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

    asyncio.run(run())
