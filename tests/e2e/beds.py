"""Where the end-to-end tests about failure stand: a runner with a gateway in one network namespace, real servers in
another, and hostile ones beside them.

The database side has many addresses, so that one real server can be several targets, each configured in its own way.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import struct
import subprocess
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from hostagent.control import client, messages
from tests.lab.cgroups import cgroup
from tests.lab.hopgate import Gateway, gateway
from tests.lab.namespaces import entered, linked_namespaces
from tests.lab.postgres import PostgresServer, postgres

RUNNER = "192.0.2.1"
DATABASE = "192.0.2.10"
MORE = tuple(f"192.0.2.{last}" for last in range(11, 20))
SERVER_NAME = "db.shop.example"
PASSWORD = "correct-horse-7c1f-battery"
JOB = "agents:\n  job: {exe: /bin/sh}\n"


def target(name: str, address: str, *, tls: str = "{mode: disable}", credential: str = "shop", extra: str = "") -> str:
    """One entry of `targets`."""
    return (
        f"  {name}: {{protocol: postgresql, addresses: '{address}', tls: {tls}, credential: {credential}, "
        f"server_name: {SERVER_NAME}{extra}}}\n"
    )


def rules(statements: str = "'*'") -> str:
    return textwrap.dedent(f"""\
        rules:
          - {{name: job-does, agents: job, targets: "*", statements: {statements}, decision: allow}}
        """)


@dataclass
class Bed:
    """A gateway in `runner`, `server` in `database`. Nothing of the gateway is started yet."""

    directory: Path
    runner: str
    database: str
    server: PostgresServer
    gateway: Gateway

    def psql(
        self,
        sql: str,
        *,
        host: str = DATABASE,
        port: int = 5432,
        tls: str = "prefer",
        group: str = "jobs",
        timeout_s: float = 30,
    ) -> subprocess.CompletedProcess[str]:
        """What a job on the runner gets to see."""
        return self.gateway.run(
            ["psql", "-X", "-A", "-t", "-c", sql, f"host={host} port={port} dbname=shop user=agent sslmode={tls}"],
            timeout_s=timeout_s,
            group=group,
        )

    def start_python(self, source: str, *arguments: str, group: str = "jobs") -> subprocess.Popen[str]:
        """Starts a program of a hostile, or just an unlucky, client on the runner."""
        return subprocess.Popen(
            self.gateway.inside(["/usr/bin/python3", "-I", "-c", textwrap.dedent(source), *arguments], group),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def python(self, source: str, *arguments: str, group: str = "jobs", timeout_s: float = 60) -> str:
        process = self.start_python(source, *arguments, group=group)
        try:
            return process.communicate(timeout=timeout_s)[0]
        finally:
            process.kill()
            process.wait()

    def status(self) -> dict[str, object]:
        """Raises `OperatorError` when the daemon does not answer."""
        path = self.gateway.directory / "run" / "control.sock"
        return client.ask(path, messages.AskStatus(), messages.Status).report

    def sessions(self) -> list[dict[str, object]]:
        found: list[dict[str, object]] = json.loads(self.gateway.cli("sessions", "--json", "--limit", "0").stdout)
        return found

    def replay(self, session: str) -> list[dict[str, object]]:
        lines = self.gateway.cli("replay", session, "--json").stdout.splitlines()
        return [json.loads(line) for line in lines]

    def workers(self) -> list[int]:
        return [int(pid) for pid in (self.gateway.cgroup / "workers" / "cgroup.procs").read_text().split()]

    def log_lines(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.gateway.log().splitlines() if line.startswith("{")]

    def everything_written(self) -> Iterator[tuple[str, bytes]]:
        """Whatever the gateway left behind where somebody could read it."""
        yield "log", self.gateway.log().encode()
        for path in sorted(self.gateway.state_dir.rglob("*")):
            if path.is_file():
                yield str(path), path.read_bytes()


@contextmanager
def bed(
    name: str, *, server_settings: Mapping[str, str] | None = None, settings: Mapping[str, object] | None = None
) -> Iterator[Bed]:
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"hopgate-{name}-")))
        directory.chmod(0o711)
        runner, database = stack.enter_context(linked_namespaces(RUNNER, [DATABASE, *MORE]))
        server = stack.enter_context(
            postgres(
                address=DATABASE,
                namespace=database,
                server_name=SERVER_NAME,
                settings={"listen_addresses": "*", **(server_settings or {})},
            )
        )
        prepare(server)
        hooked = stack.enter_context(cgroup(name))
        made = stack.enter_context(gateway(directory / "gateway", namespace=runner, cgroup=hooked, settings=settings))
        shutil.copy(server.ca_path, made.directory / "ca.pem")
        shutil.copy(server.other_ca_path, made.directory / "other-ca.pem")
        made.write_credential("shop", "shop_app", PASSWORD)
        yield Bed(directory, runner, database, server, made)


def prepare(server: PostgresServer) -> None:
    """The login that only the gateway has, and its database."""
    server.run_sql(f"CREATE ROLE shop_app LOGIN PASSWORD '{PASSWORD}'")
    server.run_sql("CREATE DATABASE shop OWNER shop_app")


def wait_until(true: Callable[[], bool], what: str, timeout_s: float = 10.0) -> float:
    """How long it took, in seconds."""
    begun = time.monotonic()
    while not true():
        if time.monotonic() > begun + timeout_s:
            raise AssertionError(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.05)
    return time.monotonic() - begun


# --- hostile servers --------------------------------------------------------------------------------------------------

Behaviour = Callable[[socket.socket], None]


@contextmanager
def hostile_server(namespace: str, address: str, port: int, behave: Behaviour) -> Iterator[None]:
    """Listens in the namespace; `behave` gets every connection, in a thread of its own."""
    with entered(namespace):
        listener = socket.create_server((address, port))
    accepted: list[socket.socket] = []

    def serve_one(connection: socket.socket) -> None:
        with contextlib.suppress(OSError), connection:
            behave(connection)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                accepted.append(connection)
                threading.Thread(target=serve_one, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for connection in accepted:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        thread.join(5)


def read_startup(connection: socket.socket) -> None:
    (size,) = struct.unpack("!I", connection.recv(4, socket.MSG_WAITALL))
    connection.recv(size - 4, socket.MSG_WAITALL)


def message(kind: bytes, body: bytes) -> bytes:
    return kind + struct.pack("!I", len(body) + 4) + body


SCRAM_OFFER = message(b"R", struct.pack("!I", 10) + b"SCRAM-SHA-256\0\0")


def close_after_startup(connection: socket.socket) -> None:
    read_startup(connection)


def close_during_tls(connection: socket.socket) -> None:
    read_startup(connection)
    connection.sendall(b"S")
    connection.recv(1)


def close_during_scram(connection: socket.socket) -> None:
    read_startup(connection)
    connection.sendall(SCRAM_OFFER)
    connection.recv(1)


def send_garbage(connection: socket.socket) -> None:
    read_startup(connection)
    connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    connection.recv(1)


def announce_too_much(connection: socket.socket) -> None:
    read_startup(connection)
    connection.sendall(b"R" + struct.pack("!I", 0x7FFFFFFF) + bytes(1000))
    connection.recv(1)


def echo_password(connection: socket.socket) -> None:
    """Asks for the password in clear, which a target with `disable` may, and quotes it in its error."""
    read_startup(connection)
    connection.sendall(message(b"R", struct.pack("!I", 3)))
    kind = connection.recv(5, socket.MSG_WAITALL)
    password = connection.recv(struct.unpack("!I", kind[1:])[0] - 4, socket.MSG_WAITALL).rstrip(b"\0")
    fields = b"SFATAL\0C28P01\0Mno entry for `" + password + b"`\0Dpassword was " + password + b"\0\0"
    connection.sendall(message(b"E", fields))
    connection.recv(1)


def log_in(connection: socket.socket) -> None:
    """Takes anybody, and waits for the first query."""
    read_startup(connection)
    parameters = {"server_version": "15.0", "client_encoding": "UTF8", "standard_conforming_strings": "on"}
    welcome = message(b"R", bytes(4))
    for name, value in parameters.items():
        welcome += message(b"S", f"{name}\0{value}\0".encode())
    connection.sendall(welcome + message(b"K", bytes(8)) + message(b"Z", b"I"))
    kind = connection.recv(5, socket.MSG_WAITALL)
    connection.recv(struct.unpack("!I", kind[1:])[0] - 4, socket.MSG_WAITALL)


def answer_garbage(connection: socket.socket) -> None:
    log_in(connection)
    connection.sendall(b"\xff\xfe\xfd\xfc" * 1000)
    connection.recv(1)


def announce_a_row_too_large(connection: socket.socket) -> None:
    log_in(connection)
    columns = struct.pack("!H", 1) + b"a\0" + struct.pack("!IHIhih", 0, 0, 25, -1, -1, 0)
    connection.sendall(message(b"T", columns) + b"D" + struct.pack("!I", 0x7FFFFFFF) + bytes(100_000))
    connection.recv(1)


def ask_for_the_password_late(connection: socket.socket) -> None:
    """A second authentication, when the login is long done: nothing may answer it."""
    log_in(connection)
    connection.sendall(message(b"R", struct.pack("!I", 3)))
    connection.recv(1)


def reset_in_a_reply(connection: socket.socket) -> None:
    log_in(connection)
    connection.sendall(b"D" + struct.pack("!I", 100) + bytes(20))
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def say_nothing(connection: socket.socket) -> None:
    while connection.recv(4096):
        pass
