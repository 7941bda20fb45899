"""Approvals that are waiting for a human, and what comes of them.

    pending --decide--> approved | denied
       |----deadline--> expired
       \\----withdraw, cancelled wait, daemon restart--> withdrawn

An approval counts only when the store has it; every other outcome counts even when the store does not answer, because
it opens nothing. Lives in the daemon's event loop; nothing here waits for a disk longer than one small transaction.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from hostagent.control.rows import ApprovalRow, Outcome
from hostagent.control.store import Store, StoreUnavailable
from hostagent.errors import OperatorError
from proxy.ports import APPROVAL_LETTERS

MAX_PENDING = 1024
MAX_TIMEOUT_S = 86_400.0
MAX_PREVIEW = 4096
MAX_WORDS = 512
"""Characters of a reason or a name."""
_ID = re.compile(rf"H-[{APPROVAL_LETTERS}]{{6}}")

log = structlog.get_logger()


class ApprovalRefused(OperatorError):
    """There can be no such approval, or it cannot be decided (any more). The message says why."""


@dataclass(frozen=True, slots=True)
class Decided:
    """`by` is who decided (login name and uid), or `hopgate`."""

    outcome: Outcome
    by: str
    reason: str


@dataclass(slots=True)
class _Pending:
    row: ApprovalRow
    decided: asyncio.Future[Decided]
    deadline: asyncio.TimerHandle


class Approvals:
    """`clock` gives nanoseconds since the epoch."""

    def __init__(
        self, store: Store, *, clock: Callable[[], int] = time.time_ns, max_pending: int = MAX_PENDING
    ) -> None:
        self._store = store
        self._clock = clock
        self._max_pending = max_pending
        self._pending: dict[str, _Pending] = {}

    @property
    def pending(self) -> list[ApprovalRow]:
        """What waits, oldest first."""
        return [each.row for each in self._pending.values()]

    def recover(self) -> int:
        """At daemon start: whoever waited for what is still pending is gone. Raises `StoreUnavailable`."""
        return self._store.withdraw_pending(decided_us=self._now_us(), reason="the host agent died")

    async def hold(
        self, *, session: str, approval: str, operation: int, hop: str, rule: str, preview: str, timeout_s: float
    ) -> Decided:
        """Waits until the approval is decided, withdrawn or expired; cancelling the wait withdraws it.

        Raises `ApprovalRefused` when the id is malformed or was used before, the timeout is out of range, or too many
        wait; `StoreUnavailable` when it cannot be written down.
        """
        pending = self._ask(session, approval, operation, hop, rule, preview, timeout_s)
        try:
            return await pending.decided
        finally:
            if not pending.decided.done() or pending.decided.cancelled():
                self._end(pending, Decided(Outcome.WITHDRAWN, "hopgate", "nobody waits for it any more"))

    def decide(self, approval: str, *, approved: bool, by: str, reason: str) -> ApprovalRow:
        """Decides a pending approval, and gives what was decided. Raises `ApprovalRefused`, and `StoreUnavailable` when
        an approval cannot be written down: then it is still pending."""
        name = approval.strip().upper()
        pending = self._pending.get(name)
        if pending is None:
            raise ApprovalRefused(self._why_not(name))
        decided = Decided(Outcome.APPROVED if approved else Outcome.DENIED, by[:MAX_WORDS], reason[:MAX_WORDS])
        if approved and not self._write(name, decided):
            raise ApprovalRefused(f"approval `{name}` is not pending in the control store: it stays as it is")
        self._end(pending, decided, written=approved)
        return pending.row

    def withdraw(self, approval: str, why: str) -> None:
        """Does nothing when it is not pending."""
        pending = self._pending.get(approval)
        if pending is not None:
            self._end(pending, Decided(Outcome.WITHDRAWN, "hopgate", why[:MAX_WORDS]))

    def withdraw_session(self, session: str, why: str) -> None:
        """Withdraws all that this session waits for."""
        for pending in [each for each in self._pending.values() if each.row.session == session]:
            self._end(pending, Decided(Outcome.WITHDRAWN, "hopgate", why[:MAX_WORDS]))

    def _ask(
        self, session: str, approval: str, operation: int, hop: str, rule: str, preview: str, timeout_s: float
    ) -> _Pending:
        if not _ID.fullmatch(approval):
            raise ApprovalRefused(f"`{approval[:64]}` is no approval id")
        if not 0 < timeout_s <= MAX_TIMEOUT_S:
            raise ApprovalRefused(f"approval `{approval}` has timeout `{timeout_s:g}` s: at most `{MAX_TIMEOUT_S:g}`")
        if len(self._pending) >= self._max_pending:
            raise ApprovalRefused(f"`{self._max_pending}` approvals are pending: no more are taken")
        asked_us = self._now_us()
        row = ApprovalRow(
            id=approval,
            session=session,
            operation=operation,
            hop=hop[:MAX_WORDS],
            rule=rule[:MAX_WORDS],
            preview=preview[:MAX_PREVIEW],
            asked_us=asked_us,
            deadline_us=asked_us + int(timeout_s * 1_000_000),
        )
        if approval in self._pending or not self._store.add_approval(row):
            raise ApprovalRefused(f"approval id `{approval}` was used before")
        loop = asyncio.get_running_loop()
        pending = _Pending(row, loop.create_future(), loop.call_later(timeout_s, self._expire, approval))
        self._pending[approval] = pending
        return pending

    def _expire(self, approval: str) -> None:
        pending = self._pending.get(approval)
        if pending is not None:
            self._end(pending, Decided(Outcome.EXPIRED, "hopgate", "nobody decided in time"))

    def _end(self, pending: _Pending, decided: Decided, *, written: bool = False) -> None:
        if self._pending.pop(pending.row.id, None) is None:
            return
        pending.deadline.cancel()
        if not pending.decided.done():
            pending.decided.set_result(decided)
        if not written:
            try:
                self._write(pending.row.id, decided)
            except StoreUnavailable as error:
                log.error("approval not written down", approval=pending.row.id, outcome=decided.outcome, why=str(error))

    def _write(self, approval: str, decided: Decided) -> bool:
        return self._store.decide_approval(
            approval, outcome=decided.outcome, decided_us=self._now_us(), by=decided.by, reason=decided.reason
        )

    def _why_not(self, approval: str) -> str:
        if not _ID.fullmatch(approval):
            return f"`{approval[:64]}` is no approval id: `hopgate approvals` lists what is pending"
        known = self._store.approval(approval)
        if known is None:
            return f"no approval `{approval}` is known: `hopgate approvals` lists what is pending"
        by = f" by {known.by}" if known.by else ""
        return f"approval `{approval}` is {known.outcome}{by} and can no longer be decided"

    def _now_us(self) -> int:
        return self._clock() // 1000
