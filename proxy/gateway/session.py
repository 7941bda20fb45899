"""One client connection, from accept to close: owns both sockets, the protocol's machine, the judge and the recording.

    OPENING ---> SERVING ---> CLOSED
       who is it?   |  bytes -> machine -> commands -> here
                    |  AskRuling: judge.decide, *recorded*, then answered
                    +- a hold waits in a task of its own; the machine keeps the client's further bytes

Everything that the machine asks for is carried out in order. What waits for somebody (login, connect, handshake, hold)
runs in one task at a time, and the machine is told when it is over.

Blind spots: an idle session has no deadline; a client that stops reading keeps its buffers (bounded by the high-water
mark) until it goes away.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import sys
from collections import deque
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, Final, assert_never

import msgspec
import structlog

from proxy import ports
from proxy.gateway import secured, tls, upstream
from proxy.gateway.peer import Peer
from proxy.model import Decision, Endpoint, Operation, Reason, Ruling, Target
from proxy.protocols import base, registry
from proxy.protocols.base import Side
from proxy.recording import AuditUnavailable, Writer

if TYPE_CHECKING:
    from proxy.gateway.worker import Worker
    from proxy.policy.decide import Judge

log = structlog.get_logger()

BACKLOG = 1024 * 1024
"""Client bytes taken in while an answer is awaited; up to here a disconnect is noticed at once."""
LOGIN_TIMEOUT_S = 60.0
"""From accept to the end of the login, like the server's own `authentication_timeout`."""
FLUSH_TIMEOUT_S = 10.0
"""How long a closed session may take to deliver any of its last bytes."""
LINGER_S = 1.0
"""How long a client that has all of them may go on sending, and be heard by nobody, before it is reset: one in the
middle of an upload that was refused is to find the refusal."""
MESSAGE_TIMEOUT_S = 60.0
"""How long a client may take to end a message that it has begun."""
CREDENTIAL_FRESH_S = 30.0
"""How long a credential that is sent with every operation is used before it is asked for anew."""
PREVIEW_TIMEOUT_S = 10.0
"""How long a target may take to tell what would come of an operation that a human is about to be asked about."""
MAX_CERTIFICATE = 256 * 1024
"""Bytes of the gateway's TLS client certificate, key and chain."""
FLUSH_DELAY_S = 0.01
"""How long the record of what an operation came to may wait for company."""
# looked up once: members of an enum cost as much as a function call
_CLIENT: Final = Side.CLIENT
_HOLD: Final = Decision.HOLD
_DENY: Final = Decision.DENY
CANCELLED = "cancelled"
"""Outcome of a hold whose own client cancels it; the others are the host agent's (`ports.HoldDecided`)."""
HINT_AUDIT = "nothing runs unrecorded: tell the operators of this runner (`hopgate status`)"
HINT_TARGET = "tell the operators of this runner: the reason is in hopgate's log and in the session's recording"


class Session:
    """Made by the listener for each accepted connection."""

    __slots__ = (
        "_accepted",
        "_audit_lost",
        "_backlog",
        "_certificate",
        "_closing",
        "_commands",
        "_counted",
        "_deadline",
        "_derived",
        "_dialled",
        "_finished",
        "_flushing",
        "_held",
        "_preview",
        "_reaching",
        "_reason",
        "_running",
        "_secret",
        "_secret_until",
        "_task",
        "_unended",
        "client",
        "database",
        "denied",
        "id",
        "judge",
        "machine",
        "operations",
        "principals",
        "recording",
        "server",
        "target",
        "worker",
    )

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.id = ""
        self.client = Peer(self, Side.CLIENT)
        self.server: Peer | None = None
        self.principals: tuple[str, ...] = ()
        """Of the chain; that itself is the recording's, and large."""
        self.target: Target | None = None
        self.database = ""
        self.judge: Judge | None = None
        self.machine: base.Machine | None = None
        self.recording: Writer | None = None
        self.operations = 0
        self.denied = 0
        self._running: dict[int, Operation] = {}
        """Requests that were allowed and have not ended: a watch or a terminal lasts for hours."""
        self._accepted: socket.socket | None = None
        self._dialled = Endpoint("", 0)
        self._derived: tuple[tuple[str, str], ...] = ()
        self._task: asyncio.Task[None] | None = None
        self._held: tuple[base.AskRuling, Ruling] | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._unended: asyncio.TimerHandle | None = None
        self._preview: asyncio.Future[str] | None = None
        self._secret = ports.Secret(id=0, user="", password="")
        self._certificate = b""
        self._secret_until = 0.0
        self._audit_lost = ""
        self._backlog = 0
        self._commands: deque[base.Command] | None = None
        """Those that are being carried out."""
        self._flushing = False
        self._closing = False
        self._reason = ""
        self._reaching = False
        self._counted = False
        self._finished = False

    # --- opening ------------------------------------------------------------------------------------------------------

    def accepted(self, connection: socket.socket) -> None:
        """A client is there: nothing of it is read before it is known who it is."""
        if self.worker.full:
            log.warning("connection dropped", why="this worker has no room for more connections")
            connection.close()
            return
        self._counted = True
        self.worker.connections += 1
        self._accepted = connection
        self._deadline = asyncio.get_running_loop().call_later(LOGIN_TIMEOUT_S, self._login_expired)
        self._start(self._open(connection))

    async def _open(self, connection: socket.socket) -> None:
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            peer, self._dialled = self.worker.endpoints(connection)
        except OSError as error:
            log.error("connection dropped", why=tls.explain(error))
            self._drop()
            return
        try:
            attributed, descriptor = await self.worker.link.attribute(peer, self._dialled)
        except ports.Unavailable as error:
            await self._refuse_unrecorded(error)
            return
        self.id = attributed.session
        self.recording = Writer(
            descriptor, attributed.session, attributed.records, bytes.fromhex(attributed.digest), self.worker.clock
        )
        self.worker.opened(self)
        self.principals = attributed.chain.principals if attributed.chain is not None else ()
        self.target = self.worker.targets.get(attributed.target)
        refusal = None
        if attributed.refusal:
            refusal = base.Refusal(attributed.refusal, attributed.hint)
        elif self.target is None or not self.principals:
            refusal = base.Refusal(f"target `{attributed.target}` is not in the policy of this worker", "connect again")
        factory = registry.find(attributed.protocol)
        if factory is None:
            self._close(f"no protocol for {self._dialled}: {attributed.refusal or 'refused'}")
            return
        await self._admit(factory(offer_tls=self.worker.offer_tls, refusal=refusal))

    async def _admit(self, machine: base.Machine) -> None:
        """From now on the client is read: in plain, unless the machine begins with a TLS handshake."""
        self.machine = machine
        first = machine.begin()
        self._carry_out(first)
        if base.StartTls not in map(type, first) and self._accepted is not None:
            connection, self._accepted = self._accepted, None
            # what is read at once may end the session, and uvloop tells nobody of a transport whose maker is cancelled
            self._task = None
            await asyncio.get_running_loop().connect_accepted_socket(lambda: self.client, connection)

    async def _refuse_unrecorded(self, why: ports.Unavailable) -> None:
        """Without a recording there is no session: what is left is to say so, over TLS where a target was dialled."""
        log.error("connection refused", dialled=str(self._dialled), why=str(why))
        policy = self.worker.policy
        target = policy.target_at(self._dialled)
        factory = registry.find((target.protocol if target else policy.protocol_at(self._dialled.port)) or "")
        if factory is None:
            self._drop()
            return
        self.target = target
        await self._admit(
            factory(
                offer_tls=self.worker.offer_tls and target is not None,
                refusal=base.Refusal(f"no connection to {self._dialled}: {why}", why.hint or HINT_AUDIT),
            )
        )

    def _login_expired(self) -> None:
        limit = f"it has to be done in {LOGIN_TIMEOUT_S:g} s"
        if self._reaching and self.target is not None:
            late = f"target `{self.target.name}` at {self._dialled} did not finish the login in time: {limit}"
            self._note(late)
            self.farewell(late, HINT_TARGET)
        else:
            self.farewell("the login took too long", limit)

    # --- what the sockets tell ----------------------------------------------------------------------------------------

    def received(self, side: Side, data: bytes) -> None:
        """Bytes of one side; carries out what the machine makes of them."""
        machine = self.machine
        if machine is None or self._closing:
            return
        try:
            self._carry_out(machine.receive(side, data))
        except base.PeerViolation as violation:
            self._violated(violation)
            return
        if side is _CLIENT and machine.incomplete is not (self._unended is not None):
            self._watch_message(machine.incomplete)
        if side is _CLIENT:
            if machine.unanswered:
                self._backlog += len(data)
                if self._backlog > BACKLOG:
                    self.client.pause("backlog")
        elif self._backlog and not machine.unanswered:
            self._backlog = 0
            self.client.resume("backlog")

    def _watch_message(self, begun: bool) -> None:
        if self._unended is not None:
            self._unended.cancel()
            self._unended = None
        if begun and not self._closing:
            self._unended = asyncio.get_running_loop().call_later(MESSAGE_TIMEOUT_S, self._message_expired)

    def _message_expired(self) -> None:
        self.farewell("a message was begun and not ended", f"it has to be whole in {MESSAGE_TIMEOUT_S:g} s")

    def ended(self, side: Side) -> None:
        """One side will send no more."""
        if self.machine is None or self._closing:
            self._close(f"the {side.value} left")
            self._drop()
            return
        try:
            self._carry_out(self.machine.eof(side))
        except base.PeerViolation as violation:
            self._violated(violation)

    def lost(self, side: Side) -> None:
        """One side's socket is gone."""
        if not self._closing:
            # a reset comes without an end of file before it, and so does the end of TLS: what runs has to hear of it
            if self.machine is not None:
                self.ended(side)
            if side is Side.SERVER and self.server is None:
                return
            self._close(f"the {side.value} disconnected")
            if side is Side.CLIENT:
                # behind the last that goes to the server; nobody is left for what it still sends
                asyncio.get_running_loop().call_soon(self._drop)
        if self.client.closed and (self.server is None or self.server.closed):
            self._finish()

    def congested(self, side: Side) -> None:
        """Whether `side` takes what is written has changed: the other is read accordingly."""
        peer, other = (self.client, self.server) if side is _CLIENT else (self.server, self.client)
        if peer is None or other is None:
            return
        if peer.congested:
            other.pause("congestion")
        else:
            other.resume("congestion")

    def _violated(self, violation: base.PeerViolation) -> None:
        who, hint = f"the {violation.side.value}", ""
        if violation.side is Side.SERVER and self.target is not None:
            who, hint = f"target `{self.target.name}` at {self._dialled}", HINT_TARGET
        log.warning("peer violation", session=self.id, side=violation.side.value, what=str(violation))
        self._note(f"{who} broke the protocol: {violation}")
        self.farewell(f"{who} broke the protocol: {violation}", hint)

    # --- what the machine wants ---------------------------------------------------------------------------------------

    def _carry_out(self, commands: base.Commands) -> None:
        """One after the other: what a ruling leads to waits its turn, since a pipeline may ask for thousands."""
        if self._commands is not None:
            self._commands.extend(commands)
            return
        self._commands = deque(commands)
        try:
            while self._commands:
                self._carry_out_one(self._commands.popleft())
        finally:
            self._commands = None
            if self.server is not None:
                self.server.deliver()
            self.client.deliver()

    def _carry_out_one(self, command: base.Command) -> None:
        match command:
            case base.Send():
                peer = self.client if command.side is _CLIENT else self.server
                if peer is not None:
                    peer.send(command.data)
            case base.AskRuling():
                self._rule(command)
            case base.Completed():
                self._complete(command)
            case base.AskLogin():
                self._start(self._log_in(command))
            case base.AskCancel():
                self._start(self._pass_cancel(command))
            case base.AskCredential():
                self._show_credential(command)
            case base.Preview():
                if self._preview is not None and not self._preview.done():
                    self._preview.set_result(command.text)
            case base.Observed():
                self._observe(command)
            case base.Connect():
                self._start(self._connect())
            case base.Disconnect():
                self._disconnect()
            case base.StartTls(side, alpn):
                self._start_tls(side, alpn)
            case base.Authenticated():
                self._logged_in()
            case base.Learned(derived):
                self._derived = derived
                if self.judge is not None:
                    self.judge = self.judge.with_derived(derived)
            case base.Close(reason):
                self._close(reason)
            case _:
                assert_never(command)

    def _complete(self, done: base.Completed) -> None:
        """What an operation came to is written a little later, in one go with others: it has happened already."""
        self._running.pop(done.id, None)
        if self.recording is None or self._audit_lost:
            return
        self.recording.completed(done.id, done.tag, done.rows, done.error, done.masked)
        if not self._flushing:
            self._flushing = True
            asyncio.get_running_loop().call_later(FLUSH_DELAY_S, self._flush)

    def _observe(self, seen: base.Observed) -> None:
        """What goes through an operation is recorded first; what cannot be, goes nowhere."""
        if self.recording is None or self._closing:
            return
        try:
            self.recording.observed(seen.id, seen.channel, seen.data)
        except AuditUnavailable as error:
            self._lose_audit(error)
            if self._commands is not None:
                self._commands.clear()
            self.farewell(f"it cannot be recorded: {error}", HINT_AUDIT)

    def _flush(self) -> None:
        self._flushing = False
        if self.recording is None or self._finished or self._audit_lost:
            return
        try:
            self.recording.flush()
        except AuditUnavailable as error:
            self._lose_audit(error)

    def _answer(self, ask: base.Ask, reply: base.Reply) -> None:
        machine = self.machine
        if machine is None or self._closing:
            return
        try:
            self._carry_out(machine.answer(ask, reply))
        except base.PeerViolation as violation:
            self._violated(violation)
            return
        if self._backlog and not machine.unanswered:
            self._backlog = 0
            self.client.resume("backlog")

    def _notify(self, event: base.Event) -> None:
        if self.machine is None or self._closing:
            return
        try:
            self._carry_out(self.machine.notify(event))
        except base.PeerViolation as violation:
            self._violated(violation)

    # --- ruling -------------------------------------------------------------------------------------------------------

    def _rule(self, ask: base.AskRuling) -> None:
        """The statement is judged, the ruling is recorded, and only then the machine hears it."""
        self.operations += 1
        assert self.judge is not None
        ruling = self.judge.decide(ask.operation)
        if ruling.decision is _HOLD:
            self._start(self._hold(ask, ruling))
        else:
            self._answer_recorded(ask, ruling)

    def _answer_recorded(self, ask: base.AskRuling, ruling: Ruling) -> None:
        if self._audit_lost:
            ruling = _unrecordable(ruling, self._audit_lost)
        else:
            assert self.recording is not None
            try:
                self.recording.ruled(ask.id, ask.operation, ruling)
            except AuditUnavailable as error:
                self._lose_audit(error)
                ruling = _unrecordable(ruling, self._audit_lost)
        if ruling.decision is _DENY:
            self.denied += 1
        elif ask.operation.requests:
            self._running[ask.id] = ask.operation
        self._answer(ask, ruling)

    async def _hold(self, ask: base.AskRuling, ruling: Ruling) -> None:
        assert self.recording is not None
        approval = ports.new_approval_id(secrets.randbelow)
        holding = [reason for reason in ruling.reasons if reason.decision is Decision.HOLD]
        self._held = (ask, ruling)
        try:
            self.recording.held(ask.id, ask.operation, ruling, approval)
            preview = await self._look_ahead(ask)
            decided = await self.worker.link.hold(
                session=self.id,
                approval=approval,
                operation=ask.id,
                hop=", ".join(reason.hop for reason in holding),
                rule=", ".join(dict.fromkeys(reason.rule for reason in holding)),
                preview=preview,
                timeout_s=ruling.hold_timeout_s,
                asked=lambda: self._tell_held(approval, ruling),
            )
            outcome, by, why = decided.outcome, decided.by, decided.reason
        except AuditUnavailable as error:
            self._lose_audit(error)
            outcome, by, why = "denied", "hopgate", "it cannot be recorded"
        except ports.Unavailable as error:
            outcome, by, why = "denied", "hopgate", str(error)
        self._decided(approval, outcome, by, why)

    async def _look_ahead(self, ask: base.AskRuling) -> str:
        """What the human gets to see of what is held."""
        assert self.machine is not None
        preview: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._preview = preview
        self._carry_out(self.machine.preview(ask))
        try:
            async with asyncio.timeout(PREVIEW_TIMEOUT_S):
                return await preview
        except TimeoutError:
            return f"{ask.operation.recorded_text}\n(what would come of it was not told in {PREVIEW_TIMEOUT_S:g} s)"
        finally:
            self._preview = None

    def _tell_held(self, approval: str, ruling: Ruling) -> None:
        if self.machine is not None and not self._closing:
            message = f"held for approval {approval}: {ruling.message}"
            hint = f"somebody on the runner has to say `hopgate approve {approval}` within {ruling.hold_timeout_s:g} s"
            self._carry_out(self.machine.notice(message, hint))

    def _decided(self, approval: str, outcome: str, by: str, why: str) -> None:
        if self._held is None or self.recording is None:
            return
        ask, ruling = self._held
        self._held = None
        try:
            if not self._audit_lost:
                self.recording.decided(ask.id, approval, outcome, by, why)
        except AuditUnavailable as error:
            self._lose_audit(error)
        final = _after_hold(ruling, approval, outcome, by, why)
        if final.decision is Decision.ALLOW and self.judge is not None:
            # a human grants what a rule holds; what the policy denies by now is nobody's to grant
            now = self.judge.decide(ask.operation)
            final = now if now.decision is _DENY else final
        self._answer_recorded(ask, final)

    async def cancel(self) -> None:
        """Somebody with the right key cancels what this session runs, or waits for. Returns once the server knows."""
        if self._held is not None:
            if self._task is not None:
                self._task.cancel()
            self._task = None
            self._decided("", CANCELLED, "the client", "")
            return
        canceller = self.machine.canceller() if self.machine is not None else None
        if canceller is not None and self.target is not None:
            await upstream.cancel(canceller, self.target, self._dialled)

    def _lose_audit(self, error: AuditUnavailable) -> None:
        self._audit_lost = str(error)
        log.error("recording lost", session=self.id, why=str(error))
        self.worker.link.alert(self.id, f"the recording cannot be written: {error}")

    def _note(self, text: str) -> None:
        if self.recording is not None and not self._audit_lost and not self._finished:
            try:
                self.recording.alert(text)
            except AuditUnavailable as error:
                self._lose_audit(error)

    # --- login --------------------------------------------------------------------------------------------------------

    async def _log_in(self, ask: base.AskLogin) -> None:
        assert self.principals
        assert self.target is not None
        assert self.recording is not None
        policy = self.worker.policy
        ruling = policy.login(self.principals, self.target, ask.database)
        try:
            self.recording.login(ask.user, ask.database, ask.parameters, ruling)
        except AuditUnavailable as error:
            self._lose_audit(error)
            ruling = _unrecordable(ruling, self._audit_lost)
        if ruling.decision is not Decision.ALLOW:
            self.denied += 1
            self._answer(ask, base.Refusal(ruling.message, ruling.hint))
            return
        self.database = ask.database
        self.judge = policy.bind(self.principals, self.target, ask.database)
        try:
            secret = await self._fetch_secret()
            cancel_key = await self.worker.link.cancel_key(self.id) if ask.cancellable else b""
        except ports.Unavailable as error:
            self._note(f"login refused: {error}")
            self._answer(ask, base.Refusal(str(error), error.hint))
            return
        self._answer(
            ask,
            base.Login(
                target=self.target,
                user=secret.user,
                password=secret.password,
                database=ask.database,
                nonce=secrets.token_urlsafe(24),
                cancel_key=cancel_key,
                masks=self.judge.masks,
                field_masks=self.judge.field_masks,
            ),
        )

    async def _fetch_secret(self) -> ports.Secret:
        """Raises `ports.Unavailable`."""
        secret, descriptor = await self.worker.link.secret(self.id)
        # a token may have a kilobyte, and all sessions at a target the same
        self._secret = msgspec.structs.replace(secret, password=sys.intern(secret.password))
        if descriptor >= 0:
            try:
                self._certificate = os.pread(descriptor, MAX_CERTIFICATE, 0)
            finally:
                os.close(descriptor)
        self._secret_until = asyncio.get_running_loop().time() + CREDENTIAL_FRESH_S
        return self._secret

    def _show_credential(self, ask: base.AskCredential) -> None:
        if asyncio.get_running_loop().time() < self._secret_until:
            self._answer(ask, base.Credential(self._secret.password))
        else:
            # beside a hold, which may be what it is for
            self.worker.spawn(self._guard(self._renew_credential(ask)))

    async def _renew_credential(self, ask: base.AskCredential) -> None:
        try:
            secret = await self._fetch_secret()
        except ports.Unavailable as error:
            self._note(f"credential refused: {error}")
            self._answer(ask, base.Refusal(str(error), error.hint))
            return
        self._answer(ask, base.Credential(secret.password))

    def _logged_in(self) -> None:
        self._reaching = False
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    async def _pass_cancel(self, ask: base.AskCancel) -> None:
        try:
            found = await self.worker.link.pass_cancel(self.id, ask.key)
            self._note("cancel request passed on" if found else "cancel request with a key that no session has")
        except ports.Unavailable as error:
            self._note(f"cancel request not passed on: {error}")
        self._answer(ask, base.Cancelled())

    async def _connect(self) -> None:
        assert self.target is not None
        self._reaching = True
        self.server = Peer(self, Side.SERVER)
        if self.client.congested:
            self.server.pause("congestion")
        try:
            await upstream.dial(self.target, self._dialled, self.server)
        except upstream.UpstreamError as error:
            self._fail_upstream(error)
            return
        self._notify(base.UpstreamReady())

    def _disconnect(self) -> None:
        if self.server is not None:
            self.server.dropped = True
            self.server.abort()
            self.server = None
        self.client.resume("congestion")

    def _fail_upstream(self, error: upstream.UpstreamError) -> None:
        self._disconnect()
        self._note(str(error))
        self._notify(base.UpstreamFailed(str(error)))

    def _start_tls(self, side: Side, alpn: tuple[str, ...]) -> None:
        """What comes from now on is TLS, and what is inside waits until the machine knows that the handshake is
        done."""
        if side is _CLIENT:
            self.client.pause("tls")
            self._start(self._secure_client(alpn))
        else:
            assert self.server is not None
            self.server.pause("tls")
            self._start(self._secure_server(self.server, alpn))

    async def _secure_server(self, server: Peer, alpn: tuple[str, ...]) -> None:
        assert self.target is not None
        assert server.transport is not None
        raw, server.transport = server.transport, None
        try:
            binding = await upstream.secure(self.target, self._dialled, raw, server, alpn, self._certificate)
        except upstream.UpstreamError as error:
            self._fail_upstream(error)
            return
        self._notify(base.UpstreamReady(binding))
        server.resume("tls")

    async def _secure_client(self, alpn: tuple[str, ...]) -> None:
        try:
            name = self.target.name if self.target is not None else self._dialled.address
            context = await self.worker.serving_context(self.id, name, self._dialled, alpn)
            if self._accepted is None:
                await self.client.secure(context)
            else:
                connection, self._accepted = self._accepted, None
                await secured.accept(connection, self.client, context)
        except (OSError, ports.Unavailable) as error:
            why = f"no TLS with the client: {tls.explain(error)}"
            self._note(why)
            self._close(why)
            return
        self._notify(base.ClientSecured())
        self.client.resume("tls")

    # --- policy -------------------------------------------------------------------------------------------------------

    def policy_changed(self) -> None:
        """Rebinds to the worker's new policy; a session whose masks or target changed has to log in anew, and one in
        which a request runs that is denied by now ends."""
        if self.judge is None or not self.principals or self.target is None:
            return
        policy = self.worker.policy
        target = self.worker.targets.get(self.target.name)
        if target is None or policy.login(self.principals, target, self.database).decision is not Decision.ALLOW:
            self.farewell(
                "the policy changed: this chain may no longer use this target", "ask the owners of the policy"
            )
            return
        judge = policy.bind(self.principals, target, self.database)
        if judge.mask_signature != self.judge.mask_signature or not target.is_still(self.target):
            self.farewell("the policy changed for this target", "connect again")
            return
        self.judge = judge.with_derived(self._derived)
        for operation in self._running.values():
            ruling = self.judge.decide(operation)
            if ruling.decision is _DENY:
                self.farewell(f"the policy changed: {ruling.message}", ruling.hint)
                return

    # --- the end ------------------------------------------------------------------------------------------------------

    def farewell(self, message: str, hint: str) -> None:
        """Tells the client why, as far as its protocol can, and closes."""
        if self._closing:
            return
        if self.machine is not None:
            self._carry_out(self.machine.farewell(message, hint))
        self._close(message)

    def _close(self, reason: str) -> None:
        if self._closing:
            return
        self._closing = True
        self._reason = reason
        if self._reaching and self.target is not None:
            log.error("login failed", session=self.id, target=self.target.name, why=reason)
        for timer in (self._deadline, self._unended):
            if timer is not None:
                timer.cancel()
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()
        if self._held is not None:
            self._withdraw(reason)
        # behind what is delivered when this event is dealt with
        asyncio.get_running_loop().call_soon(self._close_peers)
        if self.client.closed and (self.server is None or self.server.closed):
            self._finish()

    def _close_peers(self) -> None:
        self._forget_accepted()
        for peer in (self.client, self.server):
            if peer is not None:
                peer.close()
        loop = asyncio.get_running_loop()
        loop.call_later(LINGER_S, self._see_off, self._undelivered(), loop.time() + FLUSH_TIMEOUT_S)

    def _withdraw(self, reason: str) -> None:
        assert self._held is not None
        ask, _ = self._held
        self._held = None
        if self.recording is not None and not self._audit_lost:
            try:
                self.recording.decided(ask.id, "", "withdrawn", "hopgate", reason)
            except AuditUnavailable as error:
                self._lose_audit(error)

    def _forget_accepted(self) -> None:
        """A client that was never read, or goes before it is."""
        if self._accepted is not None:
            self._accepted.close()
            self._accepted = None
            self.client.closed = True
            self._close("the client was not read")
            if self.server is None or self.server.closed:
                self._finish()

    def _drop(self) -> None:
        self._forget_accepted()
        for peer in (self.client, self.server):
            if peer is not None:
                peer.abort()

    def _see_off(self, undelivered: int, deadline: float) -> None:
        """A client that still takes something of what was sent gets time for the rest."""
        if self._finished:
            return
        loop = asyncio.get_running_loop()
        left = self._undelivered()
        if left < undelivered:
            deadline = loop.time() + FLUSH_TIMEOUT_S
        if left and loop.time() < deadline:
            loop.call_later(LINGER_S, self._see_off, left, deadline)
        else:
            self.end()

    def _undelivered(self) -> int:
        return self.client.unwritten() + (self.server.unwritten() if self.server is not None else 0)

    @property
    def delivered(self) -> bool:
        """Whether it is closed, and both peers have what was sent to them."""
        return self._closing and not self._undelivered()

    def end(self) -> None:
        """Whatever becomes of the sockets, the recording gets its end."""
        self._drop()
        self._finish()

    def _finish(self) -> None:
        """Both sockets are gone, or nobody waits for them: the recording is completed, and the host agent is told."""
        if self._finished:
            return
        self._finished = True
        self.worker.connections -= self._counted
        self.worker.closed(self)
        if self.recording is None:
            return
        reason = self._reason
        try:
            self.recording.closed(reason, self.operations, self.denied)
        except AuditUnavailable as error:
            self._lose_audit(error)
        self.worker.link.closed(
            ports.SessionClosed(
                session=self.id,
                records=self.recording.records,
                digest=self.recording.digest.hex(),
                operations=self.operations,
                denied=self.denied,
                reason=reason,
            )
        )
        self.recording.close()

    # --- the one task -------------------------------------------------------------------------------------------------

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        self._task = self.worker.spawn(self._guard(work))

    async def _guard(self, work: Coroutine[Any, Any, None]) -> None:
        """A fault of ours ends this session, closed and recorded, and no other."""
        try:
            await work
        except Exception as error:
            log.exception("session failed", session=self.id)
            self._note(f"internal error: {type(error).__name__}")
            self.farewell("internal error in the gateway", "tell the operators of this runner")
        finally:
            if self._task is asyncio.current_task():
                self._task = None


def _unrecordable(ruling: Ruling, why: str) -> Ruling:
    reason = Reason("hopgate", "[audit]", Decision.DENY, "it cannot be recorded")
    return Ruling(
        decision=Decision.DENY,
        reasons=(*ruling.reasons, reason),
        message=f"denied: it cannot be recorded: {why}",
        hint=HINT_AUDIT,
        policy_version=ruling.policy_version,
    )


def _after_hold(ruling: Ruling, approval: str, outcome: str, by: str, why: str) -> Ruling:
    """The final ruling on an operation that was held."""
    text = f"{outcome} by {by}" + (f": {why}" if why else "")
    granted = outcome == "approved"
    decision = Decision.ALLOW if granted else Decision.DENY
    rule = f"[approval {approval}]" if approval else "[approval]"
    return Ruling(
        decision=decision,
        reasons=(*ruling.reasons, Reason("hopgate", rule, decision, text)),
        message="" if granted else f"{ruling.message}: approval {text}",
        hint="" if granted else "ask again, and have somebody on the runner approve it in time",
        policy_version=ruling.policy_version,
        cancelled=outcome == CANCELLED,
        record_input=ruling.record_input,
    )
