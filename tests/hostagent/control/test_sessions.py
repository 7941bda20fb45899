"""Sessions, their index and their audit, on real files and a real store."""

from __future__ import annotations

import os
import sqlite3
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostagent.control.audit import verify_all
from hostagent.control.rows import SessionRow, SessionState
from hostagent.control.sessions import OpenSession, RecordingUnavailable, Sessions, recording_path
from hostagent.control.store import Store, StoreUnavailable
from proxy.model import Chain, Decision, Endpoint, Hop, Operation, OperationKind, Phase, ProcessImage, Reason, Ruling
from proxy.recording import AuditUnavailable, RulingPieces, State, Writer, verify

PEER = Endpoint("127.0.0.1", 40000)
DIALLED = Endpoint("192.0.2.7", 5432)
CHAIN = Chain(
    hops=(Hop("agent-a", (1,)),),
    lineage=(ProcessImage(1, 100, 5, 1000, 2049, 77, "/usr/bin/python3", "python3", ("python3",), False, "/jobs"),),
)
ALLOW = Ruling(Decision.ALLOW, (Reason("agent-a", "read", Decision.ALLOW, ""),), "", "", "v1")
DENY = Ruling(Decision.DENY, (Reason("agent-a", "read", Decision.DENY, ""),), "", "", "v1")
SELECT = Operation("postgres", OperationKind.QUERY, Phase.EXECUTE, "SELECT 1", "SELECT 1", ())
START_NS = 1_795_000_000_000_000_000


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store.create(tmp_path / "state" / "control.sqlite")
    yield made
    made.close()


@pytest.fixture
def sessions(store: Store, tmp_path: Path) -> Sessions:
    return Sessions(store, tmp_path / "state" / "recordings", host="runner-1")


def opened(sessions: Sessions, **changes: object) -> OpenSession:
    given = {
        "peer": PEER,
        "dialled": DIALLED,
        "target": "orders",
        "protocol": "postgres",
        "chain": CHAIN,
        "policy_version": "v1",
        **changes,
    }
    return sessions.open(**given)  # type: ignore[arg-type]


def writer(session: OpenSession) -> Writer:
    return Writer(
        session.fd, session.id, session.records, bytes.fromhex(session.digest), lambda: START_NS, RulingPieces()
    )


def lived(sessions: Sessions, *, end: bool = True) -> OpenSession:
    """A session with a login and two operations."""
    session = opened(sessions)
    recording = writer(session)
    recording.login("app", "shop", (), ALLOW)
    recording.ruled(1, SELECT, ALLOW)
    recording.ruled(2, SELECT, DENY)
    if end:
        recording.closed("the client disconnected", 2, 1)
    recording.close()
    if end:
        sessions.close(
            session.id,
            records=recording.records,
            digest=recording.digest.hex(),
            operations=2,
            denied=1,
            reason="the client disconnected",
        )
    return session


def recovered(sessions: Sessions, store: Store) -> list[SessionRow]:
    """What a daemon does with the sessions of one that died."""
    left_open = sessions.recover()
    for session in left_open:
        sessions.interrupt(session, "the host agent died")
    return [row for session in left_open if (row := store.session(session)) is not None]


def test_a_session_is_recorded_and_indexed_before_a_worker_gets_it(sessions: Sessions, store: Store) -> None:
    session = opened(sessions)
    try:
        verdict = verify(session.path, session=session.id, expected_digest=session.digest, expected_records=1)
        assert verdict.state is State.INTACT
        row = store.session(session.id)
        assert row is not None
        assert (row.state, row.chain, row.root_uid, row.target, row.peer, row.records) == (
            SessionState.OPEN, "agent-a", 1000, "orders", "127.0.0.1:40000", 1
        )  # fmt: skip
        assert row.digest == session.digest
        assert sessions.recordings / row.recording == session.path == recording_path(sessions.recordings, session.id)
    finally:
        os.close(session.fd)


def test_files_are_for_root_only_and_append_only(sessions: Sessions, store: Store) -> None:
    session = opened(sessions)
    assert stat.S_IMODE(session.path.stat().st_mode) == 0o600
    assert stat.S_IMODE(session.path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o600
    for beside in store.path.parent.glob("control.sqlite-*"):
        assert stat.S_IMODE(beside.stat().st_mode) == 0o600
    before = session.path.read_bytes()
    os.lseek(session.fd, 0, os.SEEK_SET)
    os.write(session.fd, b"x")
    assert session.path.read_bytes() == before + b"x"
    with pytest.raises(OSError):
        os.read(session.fd, 1)
    os.close(session.fd)


def test_a_refused_and_unattributed_connection_is_a_session_too(sessions: Sessions, store: Store) -> None:
    session = opened(sessions, chain=None, refusal="no record", target="")
    os.close(session.fd)
    row = store.session(session.id)
    assert row is not None
    assert (row.chain, row.root_uid, row.refusal) == ("", -1, "no record")


def test_ids_sort_by_time(store: Store, tmp_path: Path) -> None:
    now = [START_NS]
    sessions = Sessions(store, tmp_path / "recordings", host="h", clock=lambda: now[0])
    ids = []
    for _ in range(5):
        session = opened(sessions)
        os.close(session.fd)
        ids.append(session.id)
        now[0] += 1_000_000_000
    assert ids == sorted(ids)
    assert ids[0].startswith("20261118-110640-")
    assert [row.id for row in store.sessions()] == ids[::-1]


def test_a_closed_session_is_indexed_with_its_end(sessions: Sessions, store: Store) -> None:
    session = lived(sessions)
    row = store.session(session.id)
    assert row is not None
    assert (row.state, row.operations, row.denied, row.records, row.database, row.reason) == (
        SessionState.CLOSED, 2, 1, 5, "shop", "the client disconnected"
    )  # fmt: skip
    assert row.closed_us >= row.opened_us
    report = verify_all(store, sessions.recordings)
    assert (report.holds, report.sessions, report.records, report.findings) == (True, 1, 5, ())


def test_closing_twice_or_something_unknown_changes_nothing(sessions: Sessions, store: Store) -> None:
    session = lived(sessions)
    before = store.session(session.id)
    sessions.close(session.id, records=9, digest="00", operations=9, denied=9, reason="again")
    sessions.close("20261124-104512-000000", records=9, digest="00", operations=9, denied=9, reason="again")
    sessions.interrupt(session.id, "again")
    assert store.session(session.id) == before


def test_a_worker_that_lies_about_the_end_is_not_believed(sessions: Sessions, store: Store) -> None:
    session = lived(sessions, end=False)
    sessions.close(session.id, records=99, digest="ab" * 32, operations=0, denied=0, reason="bye")
    row = store.session(session.id)
    assert row is not None
    assert (row.state, row.records, row.operations, row.denied) == (SessionState.INTERRUPTED, 4, 2, 1)
    assert verify_all(store, sessions.recordings).holds


def test_a_dead_workers_session_is_taken_as_it_stands(sessions: Sessions, store: Store) -> None:
    session = lived(sessions, end=False)
    with session.path.open("ab") as file:
        file.write(b"0011")
    sessions.interrupt(session.id, "worker died: signal 9")
    row = store.session(session.id)
    assert row is not None
    assert (row.state, row.records, row.operations, row.denied, row.database) == (
        SessionState.INTERRUPTED, 4, 2, 1, "shop"
    )  # fmt: skip
    assert row.reason == "worker died: signal 9; recording was torn at line 5"
    report = verify_all(store, sessions.recordings)
    assert report.holds
    assert [(finding.line, finding.fault) for finding in report.findings] == [(5, False)]


def test_a_killed_host_agent_recovers_its_sessions(tmp_path: Path) -> None:
    """A process that opens sessions and writes into them is killed with -9 in the middle, three times over."""
    state = tmp_path / "state"
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_sessions as t
from pathlib import Path
store = t.Store.create(Path({str(state)!r}) / "control.sqlite")
sessions = t.Sessions(store, Path({str(state)!r}) / "recordings", host="h")
kept = []
number = 0
while True:
    session = t.opened(sessions)
    recording = t.writer(session)
    kept.append(recording)
    for _ in range(5):
        number += 1
        recording.ruled(number, t.SELECT, t.ALLOW)
        print(session.id, recording.records, flush=True)
"""
    told: dict[str, int] = {}
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(23)]
            process.kill()
            lines += process.stdout.readlines()
        for each in lines:
            if each.endswith("\n"):
                session, records = each.split()
                told[session] = int(records)
    store = Store.create(state / "control.sqlite")
    try:
        sessions = Sessions(store, state / "recordings", host="h")
        rows = recovered(sessions, store)
        assert {row.id for row in rows} >= set(told)
        for row in rows:
            assert row.state is SessionState.INTERRUPTED
            assert row.records >= told.get(row.id, 1)
            assert row.operations == row.records - 1
        report = verify_all(store, state / "recordings")
        assert report.holds, report.findings
        assert report.sessions == len(rows)
        assert sessions.recover() == []
    finally:
        store.close()


def test_a_header_that_was_written_and_not_indexed_is_taken_in(sessions: Sessions, store: Store) -> None:
    indexed, lost, empty = opened(sessions), opened(sessions), opened(sessions)
    for session in (indexed, lost, empty):
        os.close(session.fd)
    with sqlite3.connect(store.path) as connection:
        connection.execute("DELETE FROM sessions WHERE id IN (?, ?)", (lost.id, empty.id))
    connection.close()
    empty.path.write_bytes(empty.path.read_bytes()[:40])
    assert {row.id for row in recovered(sessions, store)} == {indexed.id, lost.id}
    assert not empty.path.exists()
    assert verify_all(store, sessions.recordings).holds


def test_a_start_does_not_ask_for_every_recording_there_is(
    sessions: Sessions, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(40):
        lived(sessions)
    asked: list[str] = []
    one_by_one = Store.session
    monkeypatch.setattr(Store, "session", lambda self, session: asked.append(session) or one_by_one(self, session))
    assert sessions.recover() == []
    assert asked == []


def test_the_audit_finds_what_was_done_to_files(sessions: Sessions, store: Store) -> None:
    names = ["good", "changed", "cut", "gone", "torn", "rebuilt", "swapped", "other", "unindexed"]
    made = {name: lived(sessions) for name in names}
    changed = bytearray(made["changed"].path.read_bytes())
    changed[changed.index(b"SELECT 1")] ^= 1
    made["changed"].path.write_bytes(changed)
    lines = made["cut"].path.read_bytes().splitlines(keepends=True)
    made["cut"].path.write_bytes(b"".join(lines[:-1]))
    made["gone"].path.unlink()
    made["torn"].path.write_bytes(made["torn"].path.read_bytes()[:-10])
    again = lived(sessions)
    made["rebuilt"].path.write_bytes(again.path.read_bytes())
    one, two = made["swapped"].path.read_bytes(), made["other"].path.read_bytes()
    made["swapped"].path.write_bytes(two)
    made["other"].path.write_bytes(one)
    with sqlite3.connect(store.path) as connection:
        connection.execute("DELETE FROM sessions WHERE id = ?", (made["unindexed"].id,))
    connection.close()
    stray = sessions.recordings / "notes.txt"
    stray.write_text("x")
    report = verify_all(store, sessions.recordings)
    found = {finding.session: finding for finding in report.findings if finding.fault}
    bad = {made[name].id for name in names if name != "good"}
    assert found.keys() == bad | {""}
    assert found[made["changed"].id].line == 3
    assert found[made["cut"].id].line == 5
    assert found[made["torn"].id].line == 5
    assert "cannot be read" in found[made["gone"].id].reason
    assert "is of session" in found[made["rebuilt"].id].reason
    assert "not in the index" in found[made["unindexed"].id].reason
    assert not report.holds


def test_open_sessions_are_audited_as_far_as_they_go(sessions: Sessions, store: Store) -> None:
    session = lived(sessions, end=False)
    with session.path.open("ab") as file:
        file.write(b"00")
    assert verify_all(store, sessions.recordings).findings == ()
    session.path.write_bytes(lived(sessions).path.read_bytes())
    assert not verify_all(store, sessions.recordings).holds


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB of the test's own."""
    mount = tmp_path / "disk"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)], check=True)
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)


def test_a_full_disk_for_recordings_means_no_access(store: Store, tiny_disk: Path) -> None:
    sessions = Sessions(store, tiny_disk / "recordings", host="h")
    kept = []
    with pytest.raises(RecordingUnavailable, match=r"cannot be written|can be made|could be written") as raised:
        for _ in range(100):
            kept.append(opened(sessions))  # noqa: PERF401 - what came before the failure counts
    assert isinstance(raised.value, AuditUnavailable)
    assert str(tiny_disk) in str(raised.value)
    for session in kept:
        os.close(session.fd)
    assert {row.id for row in store.sessions()} == {session.id for session in kept}
    assert len(list((tiny_disk / "recordings").glob("*/*.hgr"))) == len(kept)
    assert verify_all(store, sessions.recordings).holds


def test_a_full_disk_for_the_index_means_no_access(tiny_disk: Path, tmp_path: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=1m", str(tiny_disk)], check=True)
    store = Store.create(tiny_disk / "control.sqlite")
    try:
        sessions = Sessions(store, tmp_path / "recordings", host="h")
        with pytest.raises(RecordingUnavailable, match="control store"):
            for _ in range(10_000):
                os.close(opened(sessions, refusal="x" * 4000).fd)
        files = {path.stem for path in (tmp_path / "recordings").glob("*/*.hgr")}
        assert files == {row.id for row in store.sessions()}
    finally:
        store.close()


def test_a_store_that_cannot_be_used_says_why(tmp_path: Path) -> None:
    path = tmp_path / "control.sqlite"
    with pytest.raises(StoreUnavailable, match="has not run with this state_dir"):
        Store.open_existing(path)
    path.write_bytes(b"not a database at all, but long enough to be looked at" * 100)
    path.chmod(0o600)
    with pytest.raises(StoreUnavailable, match="does not answer"):
        Store.open_existing(path)
    path.unlink()
    Store.create(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE schema_version SET version = 99")
    connection.close()
    with pytest.raises(StoreUnavailable, match="has schema `99`, this version needs `1`"):
        Store.create(path)
    path.chmod(0o644)
    with pytest.raises(StoreUnavailable, match="chmod 600"):
        Store.open_existing(path)


def test_the_end_of_a_session_outlives_a_store_that_does_not_answer(sessions: Sessions, store: Store) -> None:
    session = lived(sessions, end=False)
    with sqlite3.connect(store.path) as connection:
        connection.execute("ALTER TABLE sessions RENAME TO elsewhere")
    connection.close()
    sessions.interrupt(session.id, "worker died")
    with sqlite3.connect(store.path) as connection:
        connection.execute("ALTER TABLE elsewhere RENAME TO sessions")
    connection.close()
    assert [row.id for row in recovered(sessions, store)] == [session.id]


def test_the_store_serves_threads_and_other_processes(sessions: Sessions, store: Store) -> None:
    session = lived(sessions)
    other = Store.open_existing(store.path)
    seen: list[object] = []
    thread = threading.Thread(target=lambda: seen.append(store.session(session.id)))
    thread.start()
    thread.join()
    assert seen == [other.session(session.id)] != [None]
    other.close()


def test_a_refused_session_ends_where_it_begins_and_its_audit_holds(store: Store, sessions: Sessions) -> None:
    for chain in (CHAIN, None):
        session = sessions.refuse(
            peer=PEER, dialled=DIALLED, protocol="mysql", chain=chain, policy_version="v1", refusal="is no target"
        )
        row = store.session(session)
        assert row is not None
        assert (row.state, row.records, row.refusal, row.target) == (SessionState.CLOSED, 2, "is no target", "")
        assert row.chain == ("" if chain is None else str(chain))
    report = verify_all(store, sessions.recordings)
    assert report.holds and (report.sessions, report.records) == (2, 4)
