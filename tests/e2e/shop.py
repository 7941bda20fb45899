"""Where the end-to-end tests run: a runner and a database host, a PostgreSQL with TLS, a gateway with a policy of ours.

Clients are `nobody`. They come through the gateway from the runner's namespace, as the agents that their command line
names (`env HOP=full env HOP=masked psql …`), or directly from the database's namespace, where there is no gateway, to
the same address.
"""

from __future__ import annotations

import base64
import importlib.metadata
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from hostagent.control import client as control
from hostagent.control import messages
from hostagent.control.rows import ApprovalRow, SessionRow, SessionState
from hostagent.control.store import opened
from proxy.recording import read
from proxy.recording.records import Record
from tests.lab.cgroups import cgroup, inside
from tests.lab.hopgate import Gateway, gateway
from tests.lab.namespaces import linked_namespaces
from tests.lab.postgres import PostgresServer, postgres

RUNNER = ("192.0.2.1", "2001:db8::1")
DATABASE = ("192.0.2.10", "2001:db8::10")
SERVER_NAME = "db.shop.example"
HERE = Path(__file__).parent
CLIENTS = HERE / "clients"
DRIVERS = ("psycopg", "psycopg-binary", "asyncpg", "sqlalchemy", "typing-extensions")
CLEAR = b"cleartext"
"""Stands in every masked text of `shop.sql`, and in nothing else."""
WAIT_S = 20.0

_NOBODY = ("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups")


class Shop:
    def __init__(self, server: PostgresServer, running: Gateway, database: str, directory: Path) -> None:
        self.server = server
        self.gateway = running
        self.directory = directory
        self.work = directory / "work"
        self._database = database
        self._agents = 0

    # --- clients ------------------------------------------------------------------------------------------------------

    def environment(self, *, direct: bool = False, **more: str) -> dict[str, str]:
        """What a client is told, in libpq's own variables; a password is not among it."""
        ca = self.directory / ("server-ca.pem" if direct else "gateway-ca.pem")
        return {
            "PATH": "/usr/bin:/bin",
            "LANG": "C.UTF-8",
            "HOME": str(self.work),
            "PYTHONPATH": str(self.directory / "site"),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PGHOST": DATABASE[0],
            "PGUSER": "shop_app",
            "PGDATABASE": "shop",
            "PGSSLMODE": "require",
            "CA": str(ca),
            "WORK": str(self.work),
            **more,
        }

    def command(self, hops: str | Sequence[str], command: Sequence[str], *, direct: bool = False) -> list[str]:
        """The command as `nobody`, below one `env` for each hop, root first."""
        names = [hops] if isinstance(hops, str) else hops
        launched = [*_NOBODY, *(word for name in names for word in ("env", f"HOP={name}")), *command]
        return inside(launched, netns=self._database) if direct else self.gateway.inside(launched)

    def run(
        self,
        hops: str | Sequence[str],
        command: Sequence[str],
        *,
        direct: bool = False,
        stdin: str = "",
        timeout_s: float = 60,
        **environment: str,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a client to its end."""
        return subprocess.run(
            self.command(hops, command, direct=direct),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=self.environment(direct=direct, **environment),
        )

    def start(self, hops: str | Sequence[str], command: Sequence[str], **environment: str) -> subprocess.Popen[str]:
        """Starts a client; what it says, on both outputs, is for the caller to read."""
        return subprocess.Popen(
            self.command(hops, command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.environment(**environment),
        )

    def psql(
        self, hops: str | Sequence[str], script: str, *options: str, direct: bool = False, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """psql, told a script on its standard input."""
        command = ["psql", "-X", "-q", "-A", "-t", *options]
        return self.run(hops, command, direct=direct, stdin=script, **environment)

    def python(self, program: str, *arguments: str) -> list[str]:
        """The command that runs one of `clients/`, on the interpreter itself and not through a virtual environment."""
        return [os.path.realpath(sys.executable), "-B", str(self.directory / "clients" / program), *arguments]

    def tell(
        self, hops: str | Sequence[str], program: str, *arguments: str, direct: bool = False, **environment: str
    ) -> list[Any]:
        """Runs one of `clients/` and returns what it saw: a JSON value a line."""
        done = self.run(hops, self.python(program, *arguments), direct=direct, **environment)
        assert done.returncode == 0, (
            f"{program} {arguments}:\n{done.stdout}\n{done.stderr}\n{self.gateway.log()[-2000:]}"
        )
        return [json.loads(line) for line in done.stdout.splitlines()]

    def recorded(
        self, hops: str | Sequence[str], command: Sequence[str], *, stdin: str = "", **environment: str
    ) -> tuple[subprocess.CompletedProcess[str], bytes]:
        """Runs a client behind a relay of its own agent, without TLS; returns also every byte that it received."""
        record = self.work / f"received-{secrets.token_hex(4)}"
        relay = self.python("recorder.py", str(record))
        done = self.run(hops, [*relay, *command], stdin=stdin, **{"PGSSLMODE": "disable", **environment})
        return done, record.read_bytes()

    def wire(self, hops: str | Sequence[str], *steps: str) -> bytes:
        """Sends messages by hand (`clients/wire.py`) and returns every byte that came back."""
        done = self.run(hops, self.python("wire.py", *steps))
        assert done.returncode == 0, done.stderr
        return base64.b64decode(done.stdout)

    # --- the operator's side ------------------------------------------------------------------------------------------

    def reload(self, policy: str) -> None:
        self.gateway.write_policy(policy)
        control.ask(self._socket, messages.Reload(), messages.Reloaded)

    def pending(self) -> tuple[ApprovalRow, ...]:
        return control.ask(self._socket, messages.ListApprovals(), messages.PendingApprovals).pending

    def await_pending(self, count: int = 1) -> tuple[ApprovalRow, ...]:
        return self.until(lambda: rows if len(rows := self.pending()) == count else None, f"{count} approvals pending")

    def await_none_pending(self) -> None:
        self.until(lambda: not self.pending(), "no approval pending")

    def decide(self, approval: str, approved: bool, reason: str = "") -> None:
        request = messages.Approve if approved else messages.Deny
        control.ask(self._socket, request(approval=approval, reason=reason), messages.ApprovalDecided)

    def sessions(self) -> list[SessionRow]:
        with opened(self.gateway.state_dir / "control.sqlite") as store:
            return list(store.sessions())

    def last_session(self, chain: str, operations: int = 0) -> SessionRow:
        """The newest session of a chain, with at least so many operations, once all of its sessions are closed."""

        def closed() -> SessionRow | None:
            rows = [row for row in self.sessions() if row.chain == chain]
            if any(row.state is SessionState.OPEN for row in rows):
                return None
            return next(row for row in rows if row.operations >= operations)

        return self.until(closed, f"session of `{chain}` closed")

    def records(self, session: SessionRow) -> list[Record]:
        path = self.gateway.state_dir / "recordings" / session.recording
        return [entry.record for entry in read(path, session.id)]

    def worker_pids(self) -> list[int]:
        return [int(word) for word in (self.gateway.cgroup / "workers" / "cgroup.procs").read_text().split()]

    def until(self, found: Any, what: str) -> Any:
        deadline = time.monotonic() + WAIT_S
        while not (value := found()):
            assert time.monotonic() < deadline, f"never: {what}\n{self.gateway.log()[-2000:]}"
            time.sleep(0.05)
        return value

    @property
    def _socket(self) -> Path:
        return self.gateway.directory / "run" / "control.sock"


def policy_text() -> str:
    return (HERE / "policy.yaml").read_text()


@contextmanager
def opened_shop() -> Iterator[Shop]:
    assert os.geteuid() == 0, "the end-to-end tests need root: deselect them with `-m 'not e2e'`"
    password = secrets.token_hex(16)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hopgate-e2e-")))
        directory.chmod(0o711)
        _install_clients(directory)
        runner, database = stack.enter_context(linked_namespaces(RUNNER, DATABASE))
        server = stack.enter_context(
            postgres(
                address=DATABASE[0],
                namespace=database,
                server_name=SERVER_NAME,
                settings={"max_connections": "260", "listen_addresses": ",".join(DATABASE)},
            )
        )
        server.run_sql(f"CREATE ROLE shop_app LOGIN PASSWORD '{password}'")
        server.run_sql("CREATE DATABASE shop OWNER shop_app")
        server.run_sql(f"SET ROLE shop_app; {(HERE / 'shop.sql').read_text()}", database="shop")
        server.set_auth(
            "".join(f"host all shop_app {address} trust\n" for address in ("192.0.2.10/32", "2001:db8::10/128"))
            + "hostssl all all all scram-sha-256\n"
        )
        hooked = stack.enter_context(cgroup("e2e"))
        running = stack.enter_context(gateway(directory / "gateway", namespace=runner, cgroup=hooked))
        shutil.copy(server.ca_path, running.directory / "shop-ca.pem")
        running.write_policy(policy_text())
        running.write_credential("shop", "shop_app", password)
        running.start()
        for source, name in ((server.ca_path, "server-ca.pem"), (running.ca_path, "gateway-ca.pem")):
            shutil.copyfile(source, directory / name)
            (directory / name).chmod(0o644)
        yield Shop(server, running, database, directory)


def _install_clients(directory: Path) -> None:
    """Puts programs and drivers where `nobody` can read them, wherever the checkout and its environment are."""
    shutil.copytree(CLIENTS, directory / "clients")
    for name in DRIVERS:
        for file in importlib.metadata.distribution(name).files or ():
            source = Path(file.locate())
            if ".." not in file.parts and file.suffix != ".pyc" and source.is_file():
                target = directory / "site" / file
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, target)
    work = directory / "work"
    work.mkdir()
    shutil.chown(work, "nobody", "nogroup")
