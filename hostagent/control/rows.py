"""What the control store keeps, a row each: sessions and approvals."""

from __future__ import annotations

import enum

import msgspec


class SessionState(enum.StrEnum):
    """`interrupted`: a process died before the session's last record was written."""

    OPEN = "open"
    CLOSED = "closed"
    INTERRUPTED = "interrupted"


class Outcome(enum.StrEnum):
    """What can come of an approval."""

    PENDING = "pending"
    APPROVED = "approved"
    DENIED = "denied"
    EXPIRED = "expired"
    WITHDRAWN = "withdrawn"


class SessionRow(msgspec.Struct, frozen=True, kw_only=True):
    """One session. Times are microseconds since the epoch, 0 for not yet. `recording` is relative to the directory of
    recordings; `records` and `digest` (hex) are its end as far as the host knows. `root_uid` is the user of the
    lineage's root, -1 where it is not known."""

    id: str
    state: SessionState = SessionState.OPEN
    opened_us: int
    closed_us: int = 0
    chain: str
    root_uid: int
    target: str
    peer: str
    dialled: str
    database: str = ""
    recording: str
    records: int
    digest: str
    operations: int = 0
    denied: int = 0
    refusal: str = ""
    reason: str = ""


class ApprovalRow(msgspec.Struct, frozen=True, kw_only=True):
    """One question to a human. Times are microseconds since the epoch, 0 for not yet."""

    id: str
    session: str
    operation: int
    hop: str
    rule: str
    preview: str
    asked_us: int
    deadline_us: int
    decided_us: int = 0
    outcome: Outcome = Outcome.PENDING
    by: str = ""
    reason: str = ""
