"""What goes over the control socket: one request and one answer a connection, each a line of JSON."""

from __future__ import annotations

from typing import Any

import msgspec

from hostagent.control.rows import ApprovalRow

MAX_REQUEST = 16 * 1024
MAX_ANSWER = 16 * 1024 * 1024


class _Message(msgspec.Struct, frozen=True, kw_only=True, tag=True, tag_field="is"):
    pass


class Approve(_Message, frozen=True, kw_only=True):
    approval: str
    reason: str = ""


class Deny(_Message, frozen=True, kw_only=True):
    approval: str
    reason: str = ""


class ListApprovals(_Message, frozen=True, kw_only=True):
    """What is pending."""


class AskStatus(_Message, frozen=True, kw_only=True):
    pass


class Reload(_Message, frozen=True, kw_only=True):
    """Read the policies again."""


class VisitTargets(_Message, frozen=True, kw_only=True):
    """Have a worker try whether the targets can be reached."""


Request = Approve | Deny | ListApprovals | AskStatus | Reload | VisitTargets


class ApprovalDecided(_Message, frozen=True, kw_only=True):
    approval: ApprovalRow
    outcome: str
    by: str


class PendingApprovals(_Message, frozen=True, kw_only=True):
    pending: tuple[ApprovalRow, ...]


class Status(_Message, frozen=True, kw_only=True):
    """What the daemon says of itself, in its own words."""

    report: dict[str, Any]


class Reloaded(_Message, frozen=True, kw_only=True):
    """The version that is in force now."""

    policy: str


class Visit(msgspec.Struct, frozen=True):
    """`endpoint` is empty where a whole target could not be tried; then `reached` is None."""

    target: str
    endpoint: str
    reached: bool | None
    what: str


class TargetsVisited(_Message, frozen=True, kw_only=True):
    visits: tuple[Visit, ...]


class Failed(_Message, frozen=True, kw_only=True):
    """The request was understood and could not be met."""

    message: str


Answer = ApprovalDecided | PendingApprovals | Status | Reloaded | TargetsVisited | Failed
