"""Holds the recordings against the index: every session's file is there, is whole, and ends as the index knows; every
file belongs to a session.

Safe beside a running daemon: sessions that are open are verified as far as they go.

Blind spot: index and recordings lie on the same host. Who can write both can make them agree; keep copies elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hostagent.control.rows import SessionRow, SessionState
from hostagent.control.sessions import SUFFIX
from hostagent.control.store import Store
from proxy.recording import State, verify


@dataclass(frozen=True, slots=True)
class Finding:
    """`line` is 0 where the file as a whole is meant. A `fault` fails the audit; other findings are for information."""

    session: str
    path: str
    line: int
    reason: str
    fault: bool


@dataclass(frozen=True, slots=True)
class Report:
    """`sessions`, `records` count what was verified."""

    sessions: int
    records: int
    findings: tuple[Finding, ...]

    @property
    def holds(self) -> bool:
        return not any(finding.fault for finding in self.findings)


def verify_all(store: Store, recordings: Path) -> Report:
    """Verifies everything. Raises `StoreUnavailable`."""
    # Files are listed before rows are read: a session that opens meanwhile is then only missed, never called unknown.
    files = sorted(_files(recordings))
    rows = {row.recording: row for row in store.sessions()}
    findings: list[Finding] = []
    records = 0
    for row in sorted(rows.values(), key=lambda each: each.id):
        count, found = _verify(row, recordings, store)
        records += count
        findings += found
    for name in files:
        if name not in rows and store.session(Path(name).stem) is None:
            reason = "is in the recordings' directory and not in the index"
            findings.append(Finding(Path(name).stem if name.endswith(SUFFIX) else "", name, 0, reason, True))
    return Report(len(rows), records, tuple(findings))


def _verify(row: SessionRow, recordings: Path, store: Store) -> tuple[int, list[Finding]]:
    if row.state is SessionState.OPEN:
        row = store.session(row.id) or row
    growing = row.state is SessionState.OPEN
    try:
        verdict = verify(
            recordings / row.recording,
            session=row.id,
            expected_digest=row.digest,
            expected_records=row.records,
            growing=growing,
        )
    except OSError as error:
        return 0, [Finding(row.id, row.recording, 0, f"cannot be read: {error.strerror}", True)]
    if verdict.state is State.BROKEN:
        return verdict.records, [Finding(row.id, row.recording, verdict.line, verdict.reason, True)]
    if verdict.state is State.TORN and not growing:
        fault = row.state is SessionState.CLOSED
        return verdict.records, [Finding(row.id, row.recording, verdict.line, verdict.reason, fault)]
    if row.state is SessionState.CLOSED and not verdict.closed:
        return verdict.records, [Finding(row.id, row.recording, verdict.records, "does not close the session", True)]
    return verdict.records, []


def _files(recordings: Path) -> Iterator[str]:
    """Everything in the directory that is no directory, relative to it."""
    for path in recordings.rglob("*"):
        if not path.is_dir() or path.is_symlink():
            yield str(path.relative_to(recordings))
