"""`hopgate approvals`, `approve` and `deny`: what waits for a human, and the human's word."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hostagent.cli.options import DEFAULT_CONFIG, Config, Json, settings

_Approval = Annotated[str, typer.Argument(metavar="APPROVAL", help="Id of the approval, e.g. H-7KQ3F9.")]
_Reason = Annotated[str, typer.Option("--reason", help="Why; goes into the recording and to the client.")]


def approvals(
    config: Config = DEFAULT_CONFIG,
    past: Annotated[bool, typer.Option("--all", help="Also those that are decided, newest first.")] = False,
    as_json: Json = False,
) -> None:
    """List the operations that wait for approval."""
    import msgspec

    from hostagent.cli import terminal
    from hostagent.control import client, messages
    from hostagent.control.store import opened
    from proxy.recording.replay import visible

    given = settings(config)
    if past:
        with opened(given.store_path) as store:
            rows = store.approvals()
    else:
        answer = client.ask(given.control_socket, messages.ListApprovals(), messages.PendingApprovals)
        rows = list(answer.pending)
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(rows)).decode())
        return
    terminal.table(
        ("APPROVAL", "OUTCOME", "UNTIL (UTC)", "HOP", "RULE", "SESSION", "OPERATION"),
        [
            (
                row.id,
                f"{row.outcome} by {row.by}" if row.by else row.outcome,
                terminal.moment(row.deadline_us),
                row.hop,
                row.rule,
                row.session,
                row.preview.partition("\n")[0],
            )
            for row in rows
        ],
    )
    if past:
        return
    for row in rows:
        lines = row.preview.split("\n")
        if len(lines) > 1:
            # indented, so that what an agent wrote does not look like one of ours
            print(f"\n{row.id} in full:", *(f"  {visible(line)}" for line in lines), sep="\n")


def approve(approval: _Approval, reason: _Reason = "", config: Config = DEFAULT_CONFIG) -> None:
    """Let an operation that waits go on."""
    _decide(approval, True, reason, config)


def deny(approval: _Approval, reason: _Reason = "", config: Config = DEFAULT_CONFIG) -> None:
    """Deny an operation that waits."""
    _decide(approval, False, reason, config)


def _decide(approval: str, approved: bool, reason: str, config: Path) -> None:
    from hostagent.control import client, messages
    from proxy.recording.replay import visible

    request: messages.Approve | messages.Deny
    if approved:
        request = messages.Approve(approval=approval, reason=reason)
    else:
        request = messages.Deny(approval=approval, reason=reason)
    answer = client.ask(settings(config).control_socket, request, messages.ApprovalDecided)
    row = answer.approval
    first, line_end, _ = row.preview.partition("\n")
    print(f"{answer.outcome} {row.id} by {answer.by}: {visible(first)}{' …' if line_end else ''}")
