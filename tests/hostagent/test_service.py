"""What a worker gets that says what it should not: a worker reads hostile bytes, so it may be anybody's."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest

from hostagent.attribution import Attribution, Refused
from hostagent.cancels import CancelTable
from hostagent.certificates import open_authority
from hostagent.control.approvals import Approvals
from hostagent.control.rows import SessionState
from hostagent.control.sessions import Sessions
from hostagent.control.store import Store
from hostagent.credentials import CredentialFiles
from hostagent.policies import ActivePolicy
from hostagent.service import Misconduct, Service
from hostagent.workers import WorkerProcess
from proxy import ports
from proxy.model import Chain, Endpoint, Hop, ProcessImage

SHOP, LEDGER = Endpoint("192.0.2.10", 5432), Endpoint("192.0.2.11", 5432)
NO_TARGET = Endpoint("192.0.2.99", 5432)
CLIENT = Endpoint("192.0.2.1", 40000)
PASSWORD = "service-secret-41d0"
POLICY = """
agents:
  job: {exe: /bin/sh}
targets:
  shop: {protocol: postgresql, addresses: "192.0.2.10:5432", server_name: shop.example, credential: shop}
  ledger: {protocol: postgresql, addresses: "192.0.2.11:5432", server_name: ledger.example, credential: none}
rules:
  - {name: reads, agents: job, targets: "*", statements: select, decision: allow}
"""
CHAIN = Chain(
    hops=(Hop("job", (1,)),),
    lineage=(ProcessImage(1, 100, 5, 1000, 2049, 77, "/bin/sh", "sh", ("sh",), False, "/jobs"),),
)


class SentMessages:
    """The end of a channel that only remembers. Descriptors are closed, as a worker would."""

    def __init__(self) -> None:
        self.messages: list[msgspec.Struct] = []
        self.contents: list[bytes] = []

    def send(self, message: msgspec.Struct, descriptors: tuple[int, ...] = ()) -> None:
        self.messages.append(message)
        self.contents += [
            os.pread(each, 1 << 16, 0)
            for each in descriptors
            if os.readlink(f"/proc/self/fd/{each}").startswith("/memfd")
        ]


@dataclass
class FakeWorker:
    pid: int
    why: str = "signal 9"
    channel: SentMessages = field(default_factory=SentMessages)
    sessions: set[str] = field(default_factory=set)
    approvals: set[str] = field(default_factory=set)


class FixedAttribution:
    """Everybody is the chain, unless somebody has to be refused."""

    def __init__(self) -> None:
        self.outcome: Chain | Refused = CHAIN

    def attribute(self, _peer: Endpoint, _dialled: Endpoint) -> Chain | Refused:
        return self.outcome


class Desk:
    """A service with everything real but the kernel and the workers."""

    def __init__(self, directory: Path, loop: asyncio.AbstractEventLoop) -> None:
        for name in ("policy.d", "credentials"):
            (directory / name).mkdir()
        (directory / "policy.d" / "policy.yaml").write_text(POLICY)
        credential = directory / "credentials" / "shop"
        credential.touch(0o600)
        credential.write_text(f"user: shop_app\npassword: {PASSWORD}\n")
        policy = ActivePolicy(directory / "policy.d", bytes(32))
        policy.reload()
        self.loop = loop
        self.store = Store.create(directory / "control.sqlite")
        self.recordings = directory / "recordings"
        self.approvals = Approvals(self.store)
        self.attribution = FixedAttribution()
        self.cancels = CancelTable()
        self.workers = {pid: FakeWorker(pid) for pid in (1001, 1002)}
        self.mustered: list[int] = []
        self.visits: set[int] = set()
        self.alerts: list[tuple[str, str]] = []
        self._ids = iter(range(1, 1000))
        self.service = Service(
            policy=policy,
            attribution=cast(Attribution, self.attribution),
            sessions=Sessions(self.store, self.recordings, host="test"),
            approvals=self.approvals,
            source=CredentialFiles(directory / "credentials"),
            authority=open_authority(directory),
            cancels=self.cancels,
            exempt=lambda worker, _message: self.mustered.append(worker.pid),
            find_worker=lambda pid: cast(WorkerProcess, self.workers.get(pid)),
            spawn=self._spawn,
            visited=lambda _worker, message: message.visit in self.visits,
            alert=lambda what, by: self.alerts.append((what, by)),
        )

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return self.loop.create_task(work)

    def handle(self, worker: FakeWorker, message: ports.FromWorker) -> Any:
        """Handles one message; gives what was sent to this worker because of it, or None."""
        before = len(worker.channel.messages)
        self.service.handle(cast(WorkerProcess, worker), message)
        self.settle()
        sent = worker.channel.messages[before:]
        return sent[-1] if sent else None

    def settle(self) -> None:
        for _ in range(3):
            self.loop.run_until_complete(asyncio.sleep(0))

    def open(self, worker: FakeWorker, dialled: Endpoint = SHOP) -> str:
        reply = self.handle(worker, ports.Attribute(id=self.next_id(), peer=CLIENT, dialled=dialled))
        assert isinstance(reply, ports.Attributed)
        return reply.session

    def next_id(self) -> int:
        return next(self._ids)

    def state(self, session: str) -> SessionState:
        row = self.store.session(session)
        assert row is not None
        return row.state


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    loop = asyncio.new_event_loop()
    made = Desk(tmp_path, loop)
    yield made
    for task in asyncio.all_tasks(loop):
        task.cancel()
    made.settle()
    loop.close()
    made.store.close()


@pytest.fixture
def mine(desk: Desk) -> FakeWorker:
    return desk.workers[1001]


@pytest.fixture
def other(desk: Desk) -> FakeWorker:
    return desk.workers[1002]


def about(kind: str, session: str) -> ports.FromWorker:
    """One message of each kind that speaks for a session."""
    made: dict[str, ports.FromWorker] = {
        "secret": ports.FetchSecret(id=901, session=session),
        "certificate": ports.FetchCertificate(id=902, session=session, dialled=SHOP),
        "hold": ports.Hold(
            id=903, session=session, approval="H-222222", operation=1, hop="job", rule="r", preview="", timeout_s=60
        ),
        "cancel key": ports.RegisterCancelKey(id=904, session=session),
        "pass cancel": ports.PassCancel(id=905, session=session, key=bytes(8)),
        "closed": ports.SessionClosed(session=session, records=1, digest="", operations=0, denied=0, reason="x"),
        "alert": ports.Alert(session=session, text="x"),
    }
    return made[kind]


def test_what_a_worker_has_operators_know_is_said_with_its_session(desk: Desk, mine: FakeWorker) -> None:
    session = desk.open(mine)
    desk.handle(mine, ports.Alert(session=session, text="the recording cannot be written"))
    assert desk.alerts == [("the recording cannot be written", f"session {session}, job")]


def test_a_worker_that_is_back_from_where_it_was_not_sent_has_to_end(desk: Desk, mine: FakeWorker) -> None:
    desk.visits.add(4)
    desk.handle(mine, ports.TargetVisited(visit=4, reached=True, what="it takes connections"))
    with pytest.raises(Misconduct, match="visit `5`"):
        desk.handle(mine, ports.TargetVisited(visit=5, reached=True, what="it takes connections"))


KINDS = ("secret", "certificate", "hold", "cancel key", "pass cancel", "closed", "alert")


@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_that_speaks_for_anothers_session_has_to_end(
    desk: Desk, mine: FakeWorker, other: FakeWorker, kind: str
) -> None:
    session = desk.open(other)
    desk.open(mine)
    with pytest.raises(Misconduct, match=session):
        desk.handle(mine, about(kind, session))
    assert len(mine.channel.messages) == 1
    assert desk.approvals.pending == [] and len(desk.cancels) == 0
    assert desk.state(session) is SessionState.OPEN
    assert desk.service.open_sessions == 2


@pytest.mark.parametrize("session", ["19700101-000000-000000", "../../etc/shadow", "x" * 1000])
@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_that_speaks_for_a_session_that_is_none_has_to_end(
    desk: Desk, mine: FakeWorker, kind: str, session: str
) -> None:
    with pytest.raises(Misconduct):
        desk.handle(mine, about(kind, session))
    assert mine.channel.messages == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_session_that_is_closed_gives_no_rights_any_more(desk: Desk, mine: FakeWorker, kind: str) -> None:
    session = desk.open(mine)
    desk.handle(mine, about("closed", session))
    with pytest.raises(Misconduct):
        desk.handle(mine, about(kind, session))


@pytest.mark.parametrize("kind", ["secret", "cancel key", "pass cancel"])
@pytest.mark.parametrize("why", ["unattributed", "no target"])
def test_a_refused_session_gets_no_secret_and_no_key(desk: Desk, mine: FakeWorker, kind: str, why: str) -> None:
    if why == "unattributed":
        desk.attribution.outcome = Refused("nobody knows")
    session = desk.open(mine, SHOP if why == "unattributed" else NO_TARGET)
    opened = mine.channel.messages[-1]
    assert isinstance(opened, ports.Attributed) and opened.refusal and opened.hint
    with pytest.raises(Misconduct, match="refused"):
        desk.handle(mine, about(kind, session))


def test_an_attributed_session_gets_the_secret_of_its_own_target(desk: Desk, mine: FakeWorker) -> None:
    got = desk.handle(mine, about("secret", desk.open(mine)))
    assert isinstance(got, ports.Secret)
    assert (got.id, got.user, got.password) == (901, "shop_app", PASSWORD)
    assert PASSWORD not in repr(got)
    got = desk.handle(mine, about("secret", desk.open(mine, LEDGER)))
    assert isinstance(got, ports.Refused)
    assert "`ledger`" in got.message and str(desk.recordings.parent) not in got.message


def test_a_certificate_without_a_session_is_for_targets_only(desk: Desk, mine: FakeWorker) -> None:
    def fetch(dialled: Endpoint | None) -> Any:
        return desk.handle(mine, ports.FetchCertificate(id=9, session="", dialled=dialled))

    assert isinstance(fetch(SHOP), ports.Certificate)
    assert b"BEGIN CERTIFICATE" in mine.channel.contents[-1]
    for dialled in (NO_TARGET, Endpoint("shop.example", 5432), None):
        assert isinstance(fetch(dialled), ports.Refused)
    assert len(mine.channel.contents) == 1


def test_a_refused_session_gets_a_certificate_to_be_told_so(desk: Desk, mine: FakeWorker) -> None:
    session = desk.open(mine, NO_TARGET)
    assert isinstance(desk.handle(mine, about("certificate", session)), ports.Certificate)


def test_a_worker_withdraws_its_own_holds_only(desk: Desk, mine: FakeWorker, other: FakeWorker) -> None:
    assert desk.handle(other, about("hold", desk.open(other))) is None
    (pending,) = desk.approvals.pending
    desk.handle(mine, ports.WithdrawHold(approval=pending.id, why="mine now"))
    assert [each.id for each in desk.approvals.pending] == [pending.id]
    # asking under the same id gives no hold on it either
    answer = desk.handle(mine, about("hold", desk.open(mine)))
    assert isinstance(answer, ports.Refused) and "used before" in answer.message
    desk.handle(mine, ports.WithdrawHold(approval=pending.id, why="mine now"))
    assert [each.id for each in desk.approvals.pending] == [pending.id]
    desk.handle(other, ports.WithdrawHold(approval=pending.id, why="the client left"))
    assert desk.approvals.pending == []


def test_a_cancel_reaches_only_a_session_at_the_same_target(desk: Desk, mine: FakeWorker, other: FakeWorker) -> None:
    session = desk.open(other)
    key = desk.handle(other, about("cancel key", session)).key

    def cancel(dialled: Endpoint, shown: bytes) -> object:
        return desk.handle(mine, ports.PassCancel(id=1, session=desk.open(mine, dialled), key=shown))

    assert cancel(LEDGER, key) == ports.CancelPassed(id=1, found=False)
    assert cancel(SHOP, bytes(8)) == ports.CancelPassed(id=1, found=False)
    assert not any(isinstance(message, ports.CancelSession) for message in other.channel.messages)
    # whoever asked is told only when the server has taken it: a late one would meet the next statement
    assert cancel(SHOP, key) is None
    passed = other.channel.messages[-1]
    assert isinstance(passed, ports.CancelSession) and passed.session == session
    with pytest.raises(Misconduct, match="cancel request"):
        desk.handle(mine, ports.CancelDone(cancel=passed.cancel))
    desk.handle(other, ports.CancelDone(cancel=passed.cancel))
    assert mine.channel.messages[-1] == ports.CancelPassed(id=1, found=True)


def test_a_cancel_is_over_when_the_worker_of_its_session_dies(desk: Desk, mine: FakeWorker, other: FakeWorker) -> None:
    key = desk.handle(other, about("cancel key", desk.open(other))).key
    desk.handle(mine, ports.PassCancel(id=1, session=desk.open(mine), key=key))
    desk.service.forget(other)
    assert mine.channel.messages[-1] == ports.CancelPassed(id=1, found=True)


def test_what_cannot_be_recorded_opens_no_session(desk: Desk, mine: FakeWorker) -> None:
    desk.recordings.write_text("no directory")
    answer = desk.handle(mine, ports.Attribute(id=7, peer=CLIENT, dialled=SHOP))
    assert isinstance(answer, ports.Refused)
    assert answer.id == 7 and answer.message.startswith("it cannot be recorded: ")
    assert desk.service.open_sessions == 0 and mine.sessions == set()


def test_a_worker_that_lies_about_the_end_of_a_recording_leaves_it_interrupted(desk: Desk, mine: FakeWorker) -> None:
    session = desk.open(mine)
    desk.handle(
        mine,
        ports.SessionClosed(session=session, records=9, digest="0" * 64, operations=0, denied=0, reason="all fine"),
    )
    assert desk.state(session) is SessionState.INTERRUPTED


def test_the_sessions_of_a_worker_that_is_gone_are_interrupted_and_hold_nothing(
    desk: Desk, mine: FakeWorker, other: FakeWorker
) -> None:
    gone, held, kept = desk.open(mine), desk.open(mine), desk.open(other)
    for session, worker in ((gone, mine), (kept, other)):
        desk.handle(worker, about("cancel key", session))
    desk.handle(mine, about("hold", held))
    desk.service.forget(cast(WorkerProcess, mine))
    desk.settle()
    assert [desk.state(session) for session in (gone, held, kept)] == [
        SessionState.INTERRUPTED,
        SessionState.INTERRUPTED,
        SessionState.OPEN,
    ]
    assert desk.approvals.pending == [] and len(desk.cancels) == 1
    assert desk.service.open_sessions == 1
    with pytest.raises(Misconduct):
        desk.handle(mine, about("secret", gone))
