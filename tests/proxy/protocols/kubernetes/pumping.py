"""A small blocking gateway in front of a real API server: carries a machine's commands out over real sockets, TLS on
both sides, one thread a connection. For tests only: no policy but a function, no recording but a list."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from proxy.model import Decision, Endpoint, FieldMask, Operation, Ruling, Target, TlsMode
from proxy.protocols.base import (
    AskCredential,
    AskLogin,
    AskRuling,
    Authenticated,
    ClientSecured,
    Close,
    Command,
    Completed,
    Connect,
    Credential,
    Login,
    Machine,
    Observed,
    PeerViolation,
    Preview,
    Send,
    Side,
    StartTls,
    UpstreamFailed,
    UpstreamReady,
)
from proxy.protocols.kubernetes import Machine as KubernetesMachine
from tests.lab.kubernetes import KubernetesServer
from tests.lab.postgres import issue, make_authority
from tests.proxy.protocols.kubernetes.playing import ALLOW, APPROVED
from tests.proxy.protocols.pump import Wire


@dataclass
class Pump:
    """What the gateway under test does: `judge` rules, and `decide` is the human who is asked when it holds. `ca_path`
    is the root of the certificate that clients get."""

    server: KubernetesServer
    judge: Callable[[Operation], Ruling] = lambda operation: ALLOW
    decide: Callable[[Operation], Ruling] = lambda operation: APPROVED
    masks: tuple[FieldMask, ...] = ()
    token: str = ""
    port: int = 0
    ca_path: Path = Path()
    commands: list[Command] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    faults: list[BaseException] = field(default_factory=list)
    context: ssl.SSLContext | None = None
    _sockets: list[socket.socket] = field(default_factory=list)

    @property
    def endpoint(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    @property
    def previews(self) -> list[str]:
        return [command.text for command in self.commands if isinstance(command, Preview)]

    @property
    def done(self) -> list[Completed]:
        return [command for command in self.commands if isinstance(command, Completed)]

    @property
    def asked(self) -> list[Operation]:
        return [command.operation for command in self.commands if isinstance(command, AskRuling)]

    @property
    def login(self) -> Login:
        endpoint = Endpoint(self.server.host, self.server.port)
        ca, name = self.server.ca_pem.decode(), self.server.server_name
        target = Target("cluster", "kubernetes", (endpoint,), TlsMode.VERIFY_FULL, name, ca, "cred")
        return Login(target, "", "", "", "", b"", field_masks=self.masks)


class _Connection:
    def __init__(self, pump: Pump, client: socket.socket) -> None:
        self.pump = pump
        self.machine: Machine = KubernetesMachine(offer_tls=True)
        self.wires: dict[Side, Wire] = {Side.CLIENT: Wire(client)}
        self.closed = False

    def run(self) -> None:
        try:
            self.carry_out(self.machine.begin())
            while not self.closed:
                if self.step_early(Side.CLIENT) or self.step_early(Side.SERVER):
                    continue
                readable = [w.sock for s, w in self.wires.items() if s is Side.SERVER or not self.machine.unanswered]
                for sock in select.select(readable, [], [], 20)[0]:
                    for side in [side for side, wire in self.wires.items() if wire.sock is sock]:
                        data = self.wires[side].poll()
                        if data is not None:
                            self.step(side, data)
        except OSError:
            pass
        except BaseException as fault:
            self.pump.faults.append(fault)
        finally:
            for wire in self.wires.values():
                wire.sock.close()

    def step_early(self, side: Side) -> bool:
        """Takes what has come, encrypted, together with something else: no socket will announce it."""
        if side not in self.wires or self.closed or (side is Side.CLIENT and self.machine.unanswered):
            return False
        data = self.wires[side].decrypted()
        if data:
            self.step(side, data)
        return bool(data)

    def step(self, side: Side, data: bytes) -> None:
        if self.closed:
            return
        try:
            self.carry_out(self.machine.receive(side, data) if data else self.machine.eof(side))
        except PeerViolation as violation:
            self.pump.violations.append(f"{violation.side.value}: {violation}")
            self.carry_out(self.machine.farewell(str(violation)))

    def carry_out(self, commands: Sequence[Command]) -> None:
        pending = list(commands)
        while pending:
            command = pending.pop(0)
            if not isinstance(command, Send):
                self.pump.commands.append(command)
            pending += self.one(command)

    def one(self, command: Command) -> Sequence[Command]:
        pump, machine = self.pump, self.machine
        match command:
            case Send(side, data):
                self.wires[side].send(bytes(data))
            case AskRuling(_, operation):
                ruling = pump.judge(operation)
                if ruling.decision is not Decision.HOLD:
                    return machine.answer(command, ruling)
                self.held = command
                return machine.preview(command)
            case Preview():
                return machine.answer(self.held, pump.decide(self.held.operation))
            case AskLogin():
                return machine.answer(command, pump.login)
            case AskCredential():
                return machine.answer(command, Credential(pump.token or pump.server.token))
            case Connect():
                try:
                    sock = socket.create_connection((pump.server.host, pump.server.port), timeout=10)
                except OSError as error:
                    return machine.notify(UpstreamFailed(str(error)))
                sock.settimeout(None)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.wires[Side.SERVER] = Wire(sock)
                return machine.notify(UpstreamReady())
            case StartTls(Side.CLIENT):
                assert pump.context is not None
                self.wires[Side.CLIENT].handshake(pump.context, True, None)
                return machine.notify(ClientSecured())
            case StartTls(Side.SERVER, alpn):
                context = ssl.create_default_context(cadata=pump.server.ca_pem.decode())
                context.set_alpn_protocols(list(alpn))
                self.wires[Side.SERVER].handshake(context, False, pump.server.server_name)
                return machine.notify(UpstreamReady())
            case Close():
                self.closed = True
            case Completed() | Authenticated() | Observed():
                pass
        return ()


@contextlib.contextmanager
def running(pump: Pump) -> Iterator[Pump]:
    """Listens until the block ends; raises what went wrong inside."""
    with tempfile.TemporaryDirectory() as directory, socket.create_server(("127.0.0.1", 0)) as listener:
        authority = make_authority("gateway root")
        certificate, key = issue(authority, "localhost", ("127.0.0.1",))
        pump.ca_path = Path(directory) / "ca.pem"
        pump.ca_path.write_bytes(authority.pem)
        chain = Path(directory) / "chain.pem"
        chain.write_bytes(key + certificate)
        pump.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        pump.context.load_cert_chain(chain)
        pump.context.set_alpn_protocols(["http/1.1"])
        pump.port = listener.getsockname()[1]
        threads: list[threading.Thread] = []

        def accept() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                pump._sockets.append(client)
                threads.append(threading.Thread(target=_Connection(pump, client).run, daemon=True))
                threads[-1].start()

        acceptor = threading.Thread(target=accept, daemon=True)
        acceptor.start()
        try:
            yield pump
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            for client in pump._sockets:
                with contextlib.suppress(OSError):
                    client.shutdown(socket.SHUT_RDWR)
            acceptor.join(5)
            for thread in threads:
                thread.join(5)
    if pump.faults:
        raise pump.faults[0]
