"""A small blocking gateway: carries a machine's commands out over real sockets, one thread a connection.

For tests only: no policy but a function, no recording but a list. TLS towards both sides goes through memory BIOs,
so that the machine sees plain bytes as it does in the product.
"""

from __future__ import annotations

import contextlib
import secrets
import select
import socket
import ssl
import struct
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes

from proxy.model import ColumnMask, Decision, Endpoint, Operation, Reason, Ruling, Target, TlsMode
from proxy.protocols import registry
from proxy.protocols.base import (
    AskCancel,
    AskLogin,
    AskRuling,
    Authenticated,
    Cancelled,
    ClientSecured,
    Close,
    Command,
    Completed,
    Connect,
    Learned,
    Login,
    Machine,
    PeerViolation,
    Refusal,
    Send,
    Side,
    StartTls,
    UpstreamFailed,
    UpstreamReady,
)
from tests.lab.postgres import PostgresServer, issue, make_authority

ALLOW = Ruling(Decision.ALLOW, (), "", "", "v1")


def deny(message: str = "denied by rule `no`", hint: str = "ask the security team") -> Ruling:
    return Ruling(Decision.DENY, (Reason("a", "no", Decision.DENY, message),), message, hint, "v1")


class Wire:
    """One side's socket, in plain or TLS."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.tls: ssl.SSLObject | None = None
        self._in = ssl.MemoryBIO()
        self._out = ssl.MemoryBIO()

    def handshake(self, context: ssl.SSLContext, server_side: bool, name: str | None) -> None:
        self.tls = context.wrap_bio(self._in, self._out, server_side=server_side, server_hostname=name)
        while True:
            try:
                self.tls.do_handshake()
                self._flush()
                return
            except ssl.SSLWantReadError:
                self._flush()
                data = self.sock.recv(65536)
                if not data:
                    raise ssl.SSLError("closed during the handshake") from None
                self._in.write(data)

    def _flush(self) -> None:
        if self._out.pending:
            self.sock.sendall(self._out.read())

    def send(self, data: bytes) -> None:
        if self.tls is None:
            self.sock.sendall(data)
        else:
            self.tls.write(data)
            self._flush()

    def receive(self) -> bytes:
        data = self.sock.recv(65536)
        if self.tls is None or not data:
            return data
        self._in.write(data)
        return self.decrypted() or self.receive()

    def poll(self) -> bytes | None:
        """What one read brings; None when that was nothing but TLS's own, and empty bytes at the end."""
        data = self.sock.recv(65536)
        if self.tls is None or not data:
            return data
        self._in.write(data)
        return self.decrypted() or None

    def decrypted(self) -> bytes:
        """What has come and was not read: also what came together with the handshake's last bytes."""
        if self.tls is None:
            return b""
        plain = bytearray()
        with contextlib.suppress(ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            while True:
                piece = self.tls.read(65536)
                if not piece:
                    break
                plain += piece
        return bytes(plain)


@dataclass
class Pump:
    """What the gateway under test does. `judge` rules; what machines said is in `commands`, except what they sent."""

    server: PostgresServer
    judge: Callable[[Operation], Ruling] = lambda operation: ALLOW
    masks: tuple[ColumnMask, ...] = ()
    tls_mode: TlsMode = TlsMode.DISABLE
    offer_tls: bool = False
    user: str = ""
    password: str = ""
    server_name: str = ""
    ca_path: Path | None = None
    refusal: Refusal | None = None
    binding: bytes = b""
    port: int = 0
    commands: list[Command] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    keys: dict[bytes, Machine] = field(default_factory=dict)
    _sockets: list[socket.socket] = field(default_factory=list)

    @property
    def target(self) -> Target:
        ca = (self.ca_path or self.server.ca_path).read_text()
        name = self.server_name or self.server.server_name
        endpoint = Endpoint(self.server.host, self.server.port)
        return Target("db", "postgresql", (endpoint,), self.tls_mode, name, ca, "cred")

    def of(self, kind: type) -> list:
        return [command for command in self.commands if isinstance(command, kind)]

    def serve(self, client: socket.socket) -> None:
        factory = registry.find("postgresql")
        assert factory is not None
        machine = factory(offer_tls=self.offer_tls, refusal=self.refusal)
        _Connection(self, machine, Wire(client)).run()


class _Connection:
    def __init__(self, pump: Pump, machine: Machine, client: Wire | None) -> None:
        self.pump = pump
        self.machine = machine
        self.wires: dict[Side, Wire] = {} if client is None else {Side.CLIENT: client}
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
                        data = self.wires[side].receive()
                        self.step(side, data)
        except (OSError, KeyError, ValueError):
            pass
        finally:
            for wire in self.wires.values():
                wire.sock.close()

    def step_early(self, side: Side) -> bool:
        """Takes what has come, encrypted, together with something else: no socket will announce it."""
        if side not in self.wires or (side is Side.CLIENT and self.machine.unanswered):
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

    def carry_out(self, commands: list[Command]) -> None:
        pending = self.noted(commands)
        while pending:
            pending[:0] = self.noted(self.one(pending.pop(0)))

    def noted(self, commands: list[Command]) -> list[Command]:
        """Before the client hears of any, and looks."""
        self.pump.commands += [command for command in commands if not isinstance(command, Send)]
        return list(commands)

    def one(self, command: Command) -> list[Command]:
        pump, machine = self.pump, self.machine
        match command:
            case Send(side, data):
                self.wires[side].send(bytes(data))
            case AskRuling(_, operation):
                return list(machine.answer(command, pump.judge(operation)))
            case AskLogin(_, database, _):
                key = secrets.token_bytes(8)
                pump.keys[key] = machine
                login = Login(
                    target=pump.target,
                    user=pump.user or pump.server.superuser,
                    password=pump.password or pump.server.superuser_password,
                    database=database,
                    nonce=secrets.token_urlsafe(18),
                    cancel_key=key,
                    masks=pump.masks,
                )
                return list(machine.answer(command, login))
            case AskCancel(key):
                other = pump.keys.get(key)
                canceller = other.canceller() if other is not None else None
                if canceller is not None:
                    _Connection(pump, canceller, None).run()
                return list(machine.answer(command, Cancelled()))
            case Connect():
                try:
                    sock = socket.create_connection((pump.server.host, pump.server.port), timeout=10)
                except OSError as error:
                    return list(machine.notify(UpstreamFailed(str(error))))
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.wires[Side.SERVER] = Wire(sock)
                return list(machine.notify(UpstreamReady()))
            case StartTls(Side.CLIENT):
                self.wires[Side.CLIENT].handshake(_serving_context(), True, None)
                return list(machine.notify(ClientSecured()))
            case StartTls(Side.SERVER):
                return self.secure_server()
            case Close():
                self.closed = True
            case Completed() | Authenticated() | Learned():
                pass
        return []

    def secure_server(self) -> list[Command]:
        pump = self.pump
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = pump.tls_mode is TlsMode.VERIFY_FULL
        if pump.tls_mode not in (TlsMode.VERIFY_CA, TlsMode.VERIFY_FULL):
            context.verify_mode = ssl.CERT_NONE
        context.load_verify_locations(cadata=pump.target.ca_pem)
        wire = self.wires[Side.SERVER]
        try:
            wire.handshake(context, False, pump.target.server_name)
        except ssl.SSLError as error:
            return list(self.machine.notify(UpstreamFailed(f"TLS with target `db` failed: {error.verify_message}")))
        assert wire.tls is not None
        der = wire.tls.getpeercert(binary_form=True)
        assert der is not None
        digest = x509.load_der_x509_certificate(der).fingerprint(hashes.SHA256())
        return list(self.machine.notify(UpstreamReady(pump.binding or digest)))


def _serving_context() -> ssl.SSLContext:
    certificate, key = issue(make_authority("gateway root"), "gateway")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.NamedTemporaryFile() as file:
        file.write(key + certificate)
        file.flush()
        context.load_cert_chain(file.name)
    return context


@contextlib.contextmanager
def running(pump: Pump) -> Iterator[Pump]:
    """Listens until the block ends; `pump.port` is where."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
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
                threads.append(threading.Thread(target=pump.serve, args=(client,), daemon=True))
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


class RawClient:
    """Speaks the protocol by hand, to the gateway or to the server itself, so that both can be compared message by
    message."""

    def __init__(self, host: str, port: int, user: str = "x", database: str = "postgres", password: str = "") -> None:
        self.sock = socket.create_connection((host, port), timeout=10)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = bytearray()
        body = b"".join(
            k.encode() + b"\0" + v.encode() + b"\0"
            for k, v in (("user", user), ("database", database), ("client_encoding", "UTF8"))
        )
        self.sock.sendall(struct.pack(">II", len(body) + 9, 196608) + body + b"\0")
        self.key = b""
        while True:
            kind, content = self.read()
            if kind == "K":
                self.key = content
            if kind == "R" and content == b"\0\0\0\3":
                self.sock.sendall(b"p" + struct.pack(">I", len(password) + 5) + password.encode() + b"\0")
            if kind == "E":
                raise ConnectionError(content)
            if kind == "Z":
                return

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def read(self) -> tuple[str, bytes]:
        """One message, or ("", b"") at the end."""
        while len(self._buffer) < 5 or len(self._buffer) < 1 + struct.unpack_from(">I", self._buffer, 1)[0]:
            data = self.sock.recv(65536)
            if not data:
                return "", b""
            self._buffer += data
        size = 1 + struct.unpack_from(">I", self._buffer, 1)[0]
        message = bytes(self._buffer[:size])
        del self._buffer[:size]
        return chr(message[0]), message[5:]

    def until_ready(self, count: int = 1) -> list[tuple[str, bytes]]:
        """Messages up to the count-th ReadyForQuery, or the end."""
        seen = []
        while count:
            seen.append(self.read())
            if seen[-1][0] == "":
                return seen
            count -= seen[-1][0] == "Z"
        return seen

    def close(self) -> None:
        self.sock.close()
