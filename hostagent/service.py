"""Answers what the workers ask: who connected, with which credential, may it go on, whose cancel key is this.

The workers read hostile bytes, so what they say is checked against what was handed out: a worker may speak only for its
own open sessions, and only an attributed, unrefused session gets a credential. A worker that asks out of turn is ended.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, assert_never

import msgspec
import structlog

from hostagent.attribution import Attribution, Refused
from hostagent.attribution.secrecy import recordable
from hostagent.cancels import CancelTable, CancelTableFull, Holder
from hostagent.certificates import HostAuthority, serving_leaf
from hostagent.control.approvals import Approvals
from hostagent.control.sessions import Sessions
from hostagent.credentials import Source
from hostagent.errors import OperatorError
from hostagent.policies import ActivePolicy
from hostagent.workers import WorkerProcess
from proxy import ports
from proxy.model import Chain, Endpoint, Target
from proxy.recording import AuditUnavailable

log = structlog.get_logger()

HINT_UNATTRIBUTED = "run it below the runner's own processes on this host, or ask its operators (`hopgate doctor`)"
HINT_NO_TARGET = "ask the owners of the policy to add this address to a target"


class Misconduct(Exception):
    """A worker asked for what it has no right to."""


@dataclass(frozen=True, slots=True)
class _OpenSession:
    worker: int
    target: Target | None
    dialled: Endpoint
    chain: Chain | None
    refused: bool


@dataclass(frozen=True, slots=True)
class _Cancelling:
    """A cancel request on its way: who asked, under which request, and the worker that has the session."""

    worker: WorkerProcess
    request: int
    owner: int


class Service:
    """`exempt(worker, source)` lets the kernel side learn which process image mustered; `visited` takes what a worker
    says of a target, and is false when it was not asked; `alert(what, by)` takes what a worker has operators know;
    `no_target` is told that somebody who is known dialled what is no target."""

    def __init__(
        self,
        *,
        policy: ActivePolicy,
        attribution: Attribution,
        sessions: Sessions,
        approvals: Approvals,
        source: Source,
        authority: HostAuthority,
        cancels: CancelTable,
        exempt: Callable[[WorkerProcess, ports.Mustered], None],
        find_worker: Callable[[int], WorkerProcess | None],
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        visited: Callable[[WorkerProcess, ports.TargetVisited], bool],
        alert: Callable[[str, str], None],
        no_target: Callable[[], None] = lambda: None,
    ) -> None:
        self._policy = policy
        self._attribution = attribution
        self._sessions = sessions
        self._approvals = approvals
        self._source = source
        self._authority = authority
        self._cancels = cancels
        self._exempt = exempt
        self._find_worker = find_worker
        self._spawn = spawn
        self._visited = visited
        self._alert = alert
        self._no_target = no_target
        self._open: dict[str, _OpenSession] = {}
        self._cancel_numbers = itertools.count(1)
        self._cancelling: dict[int, _Cancelling] = {}

    @property
    def open_sessions(self) -> int:
        return len(self._open)

    def handle(self, worker: WorkerProcess, message: ports.FromWorker) -> None:
        """Answers one message. Raises `Misconduct`: the worker has to be ended."""
        match message:
            case ports.Mustered():
                self._exempt(worker, message)
            case ports.Attribute():
                self._attribute(worker, message)
            case ports.FetchSecret():
                self._spawn(self._secret(worker, message, self._attributed(worker, message.session)))
            case ports.FetchCertificate():
                self._certificate(worker, message)
            case ports.Hold():
                self._own(worker, message.session)
                self._spawn(self._hold(worker, message))
            case ports.RegisterCancelKey():
                self._cancel_key(worker, message)
            case ports.PassCancel():
                self._pass_cancel(worker, message)
            case ports.WithdrawHold():
                if message.approval in worker.approvals:
                    self._approvals.withdraw(message.approval, message.why)
            case ports.SessionClosed():
                self._closed(worker, message)
            case ports.CancelDone(cancel=cancel):
                self._cancelled(worker.pid, cancel)
            case ports.TargetVisited(visit=visit):
                if not self._visited(worker, message):
                    raise Misconduct(f"it is back from visit `{visit}`, for which it was not sent")
            case ports.Alert(session=session, text=text):
                opened = self._own(worker, session)
                who = str(opened.chain) if opened.chain is not None else "nobody known"
                self._alert(text, f"session {session}, {who}")
            case _:
                assert_never(message)

    @property
    def addresses_in_use(self) -> frozenset[str]:
        """The addresses that open sessions have dialled."""
        return frozenset(opened.dialled.address for opened in self._open.values())

    def forget(self, worker: WorkerProcess) -> None:
        """A worker is gone: its open sessions are closed from their recordings."""
        for approval in list(worker.approvals):
            self._approvals.withdraw(approval, "the worker died")
        for session in sorted(worker.sessions):
            self._open.pop(session, None)
            self._cancels.release(session)
            self._sessions.interrupt(session, f"worker died: {worker.why}")
        worker.sessions.clear()
        for cancel in [each for each, asked in self._cancelling.items() if asked.owner == worker.pid]:
            self._cancelled(worker.pid, cancel)

    # --- who is it ----------------------------------------------------------------------------------------------------

    def _attribute(self, worker: WorkerProcess, request: ports.Attribute) -> None:
        policy = self._policy.compiled
        outcome = self._attribution.attribute(request.peer, request.dialled)
        chain, refusal, hint = (
            (recordable(outcome), "", "") if isinstance(outcome, Chain) else (None, _why(outcome), HINT_UNATTRIBUTED)
        )
        target = policy.target_at(request.dialled)
        if not refusal and target is None:
            refusal, hint = f"{request.dialled} is no target of the policy on this host", HINT_NO_TARGET
            self._no_target()
        protocol = target.protocol if target else policy.protocol_at(request.dialled.port) or ""
        try:
            opened = self._sessions.open(
                peer=request.peer,
                dialled=request.dialled,
                target=target.name if target else "",
                protocol=protocol,
                chain=chain,
                policy_version=policy.version,
                refusal=refusal,
            )
        except AuditUnavailable as error:
            log.error("connection refused: it cannot be recorded", dialled=str(request.dialled), why=str(error))
            worker.channel.send(ports.Refused(id=request.id, message=f"it cannot be recorded: {error}"))
            return
        if refusal:
            log.warning("connection refused", session=opened.id, dialled=str(request.dialled), why=refusal)
        worker.sessions.add(opened.id)
        self._open[opened.id] = _OpenSession(worker.pid, target, request.dialled, chain, bool(refusal))
        try:
            worker.channel.send(
                ports.Attributed(
                    id=request.id,
                    session=opened.id,
                    chain=chain,
                    target=target.name if target else "",
                    protocol=protocol,
                    refusal=refusal,
                    hint=hint,
                    records=opened.records,
                    digest=opened.digest,
                ),
                [opened.fd],
            )
        finally:
            os.close(opened.fd)

    def _own(self, worker: WorkerProcess, session: str) -> _OpenSession:
        opened = self._open.get(session)
        if opened is None or opened.worker != worker.pid:
            raise Misconduct(f"it spoke for session `{session}`, which it does not have")
        return opened

    def _attributed(self, worker: WorkerProcess, session: str) -> Target:
        opened = self._own(worker, session)
        if opened.refused or opened.target is None:
            raise Misconduct(f"it asked a secret for session `{session}`, which was refused")
        return opened.target

    # --- what it gets -------------------------------------------------------------------------------------------------

    async def _secret(self, worker: WorkerProcess, request: ports.FetchSecret, target: Target) -> None:
        try:
            credential = await self._source.credential(target.credential)
        except OperatorError as error:
            log.error("no credential", session=request.session, target=target.name, why=str(error))
            message = f"the gateway has no credential for target `{target.name}`"
            worker.channel.send(
                ports.Refused(
                    id=request.id, message=message, hint="the runner's operators find the reason in hopgate's log"
                )
            )
            return
        secret = ports.Secret(id=request.id, user=credential.user, password=credential.password)
        if not credential.certificate:
            worker.channel.send(secret)
            return
        descriptor = memory_file("client certificate", credential.certificate)
        try:
            worker.channel.send(msgspec.structs.replace(secret, certificate=True), [descriptor])
        finally:
            os.close(descriptor)

    def _certificate(self, worker: WorkerProcess, request: ports.FetchCertificate) -> None:
        if request.session:
            opened = self._own(worker, request.session)
            target, dialled = opened.target, opened.dialled
        else:
            # for what could not be recorded; a name that is no target's is only for a session that we have opened
            dialled = request.dialled or Endpoint("", 0)
            target = self._policy.compiled.target_at(dialled)
            if target is None:
                worker.channel.send(ports.Refused(id=request.id, message=f"{dialled} is no target"))
                return
        if target is not None:
            # what was dialled may be one of a whole network
            name, addresses = target.server_name, [dialled.address, *(each.address for each in target.endpoints)]
        else:
            name, addresses = dialled.address, [dialled.address]
        self._spawn(self._show_certificate(worker, request, target.serving if target else "", name, addresses))

    async def _show_certificate(
        self, worker: WorkerProcess, request: ports.FetchCertificate, serving: str, name: str, addresses: list[str]
    ) -> None:
        try:
            if serving:
                leaf = serving_leaf((await self._source.credential(serving)).certificate)
            else:
                leaf = self._authority.leaf(name, addresses)
        except OperatorError as error:
            log.error("no certificate", session=request.session, why=str(error))
            worker.channel.send(ports.Refused(id=request.id, message=str(error)))
            return
        descriptor = memory_file("certificate", leaf.pem)
        try:
            worker.channel.send(ports.Certificate(id=request.id, not_after_s=leaf.not_after_s), [descriptor])
        finally:
            os.close(descriptor)

    def _cancel_key(self, worker: WorkerProcess, request: ports.RegisterCancelKey) -> None:
        target = self._attributed(worker, request.session)
        try:
            key = self._cancels.register(Holder(worker.pid, request.session, target.name))
        except CancelTableFull as error:
            log.error("login refused", session=request.session, why=str(error))
            worker.channel.send(
                ports.Refused(id=request.id, message=str(error), hint="close sessions that are not needed")
            )
            return
        worker.channel.send(ports.CancelKey(id=request.id, key=key))

    def _pass_cancel(self, worker: WorkerProcess, request: ports.PassCancel) -> None:
        target = self._attributed(worker, request.session)
        holder = self._cancels.find(request.key)
        owner = self._find_worker(holder.worker) if holder is not None else None
        if holder is None or owner is None or holder.target != target.name:
            worker.channel.send(ports.CancelPassed(id=request.id, found=False))
            return
        cancel = next(self._cancel_numbers)
        self._cancelling[cancel] = _Cancelling(worker, request.id, owner.pid)
        owner.channel.send(ports.CancelSession(session=holder.session, cancel=cancel))

    def _cancelled(self, owner: int, cancel: int) -> None:
        asked = self._cancelling.get(cancel)
        if asked is None or asked.owner != owner:
            raise Misconduct(f"it dealt with cancel request `{cancel}`, which it was not given")
        del self._cancelling[cancel]
        asked.worker.channel.send(ports.CancelPassed(id=asked.request, found=True))

    # --- what it waits for, and its end -------------------------------------------------------------------------------

    async def _hold(self, worker: WorkerProcess, request: ports.Hold) -> None:
        worker.approvals.add(request.approval)
        try:
            decided = await self._approvals.hold(
                approval=request.approval,
                session=request.session,
                operation=request.operation,
                hop=request.hop,
                rule=request.rule,
                preview=request.preview,
                timeout_s=request.timeout_s,
            )
        except OperatorError as error:
            log.error("hold refused", session=request.session, why=str(error))
            worker.channel.send(ports.Refused(id=request.id, message=str(error)))
            return
        finally:
            worker.approvals.discard(request.approval)
        worker.channel.send(
            ports.HoldDecided(id=request.id, outcome=decided.outcome, by=decided.by, reason=decided.reason)
        )

    def _closed(self, worker: WorkerProcess, message: ports.SessionClosed) -> None:
        self._own(worker, message.session)
        del self._open[message.session]
        worker.sessions.discard(message.session)
        self._cancels.release(message.session)
        self._sessions.close(
            message.session,
            records=message.records,
            digest=message.digest,
            operations=message.operations,
            denied=message.denied,
            reason=message.reason,
        )


def memory_file(name: str, content: bytes) -> int:
    """A descriptor of an anonymous file in memory with this content; the caller owns it."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC)
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]
    return descriptor


def _why(refused: Refused) -> str:
    return f"this connection could not be attributed to a process: {refused.reason}"
