"""Where the end-to-end tests of Kubernetes run: `clusters.ClusterBed` with a policy of ours (`harbour.yaml`), a pod,
and the ports that a port-forward may be led to.

Clients come through the gateway as the agents that their command line names (`env HOP=reader env HOP=full kubectl …`),
or directly from beside the server with the gateway's own token.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hostagent.control import client as control
from hostagent.control import messages
from hostagent.control.rows import ApprovalRow, SessionRow, SessionState
from hostagent.control.store import opened
from proxy.recording import read
from proxy.recording.records import Record, Ruled
from tests.e2e.beds import hostile_server
from tests.e2e.clusters import CLUSTER, ClusterBed, cluster_bed
from tests.lab.kubernetes import GATEWAY, Kubectl, current_kubectl
from tests.lab.namespaces import entered

HERE = Path(__file__).parent
POLICY = HERE / "harbour.yaml"
WAIT_S = 20.0
WEB_PORT = 8080
OTHER_PORT = 8081
DATABASE_PORT = 5432
POD = "shell"
Hops = str | Sequence[str]


@dataclass(frozen=True)
class Answered:
    """What came back in one conversation of `clients/https.py`."""

    received: bytes
    end: str
    took_s: float

    @property
    def statuses(self) -> list[int]:
        """Of the answers, in order; a body that looks like an answer counts too."""
        return [int(word) for word in re.findall(rb"HTTP/1\.1 ([0-9]{3}) ", self.received)]

    @property
    def body(self) -> bytes:
        """Of the only answer: without its chunks, decompressed where it says that it is compressed."""
        head, _, rest = self.received.partition(b"\r\n\r\n")
        if b"transfer-encoding: chunked" in head.lower():
            chunked, rest = rest, b""
            while chunked:
                size, _, chunked = chunked.partition(b"\r\n")
                rest += chunked[: int(size, 16)]
                chunked = chunked[int(size, 16) + 2 :]
        return gzip.decompress(rest) if b"content-encoding: gzip" in head.lower() else rest


class Harbour:
    def __init__(self, bed: ClusterBed) -> None:
        self.bed = bed
        self.server = bed.server
        self.gateway = bed.gateway

    # --- clients ------------------------------------------------------------------------------------------------------

    def command(self, hops: Hops, command: Sequence[str | Path]) -> list[str]:
        """The command below one `env` for each hop, root first."""
        names = [hops] if isinstance(hops, str) else hops
        return self.gateway.inside(
            [*(word for name in names for word in ("env", f"HOP={name}")), *(str(word) for word in command)]
        )

    def environment(self, kubectl: Kubectl | None = None, **more: str) -> dict[str, str]:
        return {
            "PATH": "/usr/bin:/bin",
            "LANG": "C.UTF-8",
            **self.bed.environment(),
            **(kubectl.environment if kubectl else {}),
            **more,
        }

    def run(
        self, hops: Hops, command: Sequence[str | Path], *, stdin: str = "", timeout_s: float = 60, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs a client to its end."""
        return subprocess.run(
            self.command(hops, command),
            input=stdin,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            env=self.environment(**environment),
            cwd="/",
        )

    def kubectl(
        self,
        hops: Hops,
        *arguments: str | Path,
        kubectl: Kubectl | None = None,
        stdin: str = "",
        timeout_s: float = 60,
        **environment: str,
    ) -> subprocess.CompletedProcess[str]:
        program = kubectl or current_kubectl()
        return self.run(
            hops,
            [program.path, *arguments],
            stdin=stdin,
            timeout_s=timeout_s,
            **{**program.environment, **environment},
        )

    @contextmanager
    def start(
        self, hops: Hops, *arguments: str | Path, kubectl: Kubectl | None = None, **environment: str
    ) -> Iterator[subprocess.Popen[str]]:
        """Starts kubectl, which ends with the block; what it says, on both outputs, is for the caller to read."""
        program = kubectl or current_kubectl()
        with subprocess.Popen(
            self.command(hops, [program.path, *arguments]),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            bufsize=1,
            env=self.environment(program, **environment),
            cwd="/",
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    def converse(
        self,
        hops: Hops,
        conversations: Sequence[Sequence[object]],
        *,
        port: int = 6443,
        timeout_s: float = 90,
        patience_s: float = 10.0,
    ) -> list[Answered]:
        """Each conversation on a connection of its own; bytes are sent, a number of seconds is waited for, a tuple of
        bytes is read until. Then the client reads until the server ends it, or its patience does."""
        steps = [[*map(_step, one), {"drain": patience_s}] for one in conversations]
        program = [os.path.realpath(sys.executable), "-I", HERE / "clients" / "https.py"]
        done = self.run(
            hops,
            [*program, CLUSTER, str(port), self.gateway.ca_path],
            stdin=json.dumps(steps),
            timeout_s=timeout_s,
        )
        assert done.returncode == 0, done.stderr
        return [
            Answered(base64.b64decode(each["received"]), each["end"], each["took_s"])
            for each in json.loads(done.stdout)
        ]

    def converse_once(self, hops: Hops, *steps: object, port: int = 6443, patience_s: float = 10.0) -> Answered:
        (answered,) = self.converse(hops, [steps], port=port, patience_s=patience_s)
        return answered

    # --- the operator's side ------------------------------------------------------------------------------------------

    @property
    def policy(self) -> str:
        """What is in force."""
        return (self.gateway.policy_dir / "policy.yaml").read_text()

    def reload(self, policy: str) -> None:
        self.gateway.write_policy(policy)
        control.ask(self._socket, messages.Reload(), messages.Reloaded)

    def pending(self) -> tuple[ApprovalRow, ...]:
        return control.ask(self._socket, messages.ListApprovals(), messages.PendingApprovals).pending

    def await_pending(self) -> ApprovalRow:
        return until(lambda: self.pending()[:1], "an approval pending")[0]  # type: ignore[no-any-return]

    def decide(self, approval: str, approved: bool, reason: str = "") -> None:
        request = messages.Approve if approved else messages.Deny
        control.ask(self._socket, request(approval=approval, reason=reason), messages.ApprovalDecided)

    def sessions(self) -> list[SessionRow]:
        """The newest first."""
        with opened(self.gateway.state_dir / "control.sqlite") as store:
            return list(store.sessions())

    def sessions_since(self, mark: int) -> list[SessionRow]:
        """Of what was opened since `mark` (see `mark`), the oldest first, once all of it is closed."""

        def closed() -> list[SessionRow] | None:
            rows = [row for row in self.sessions() if row.opened_us >= mark]
            return None if any(row.state is SessionState.OPEN for row in rows) else rows[::-1]

        rows: list[SessionRow] = until(closed, "all sessions closed")
        return rows

    @staticmethod
    def mark() -> int:
        return time.time_ns() // 1000

    def records(self, session: SessionRow) -> list[Record]:
        path = self.gateway.state_dir / "recordings" / session.recording
        return [entry.record for entry in read(path, session.id)]

    def ruled_since(self, mark: int) -> list[Ruled]:
        """Every request and connection that was ruled on, as it was ruled."""
        return [
            record for row in self.sessions_since(mark) for record in self.records(row) if isinstance(record, Ruled)
        ]

    def audited(self, since: int) -> list[tuple[str, str]]:
        """Verb and path of what the server got from the gateway since `audit_size` was asked, without discovery."""
        found: dict[str, tuple[str, str]] = {}
        for event in self.server.audit(user=GATEWAY, since=since):
            path = event["requestURI"].split("?")[0]
            if path.startswith(("/api/", "/apis/")) and "objectRef" in event:
                found.setdefault(event["auditID"], (event["verb"], event["requestURI"]))
        return list(found.values())

    def workers(self) -> list[int]:
        return [int(word) for word in (self.gateway.cgroup / "workers" / "cgroup.procs").read_text().split()]

    def everything_written(self) -> Iterator[tuple[str, bytes]]:
        """Whatever the gateway left behind where somebody could read it."""
        yield "log", self.gateway.log().encode()
        for path in sorted(self.gateway.state_dir.rglob("*")):
            if path.is_file():
                yield str(path), path.read_bytes()

    @property
    def _socket(self) -> Path:
        return self.gateway.directory / "run" / "control.sock"


def _step(step: object) -> dict[str, object]:
    match step:
        case bytes():
            return {"send": base64.b64encode(step).decode()}
        case str():
            return {"send": base64.b64encode(step.encode("latin-1")).decode()}
        case (bytes() as wanted,):
            return {"until": base64.b64encode(wanted).decode()}
        case _:
            return {"wait": step}


def until(found: Callable[[], Any], what: str, timeout_s: float = WAIT_S) -> Any:
    deadline = time.monotonic() + timeout_s
    while not (value := found()):
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.05)
    return value


class Lines:
    """What a started process says, read as it comes by a thread of its own."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self._said: list[str] = []
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._said.append(line)

    @property
    def text(self) -> str:
        return "".join(self._said)

    def await_text(self, wanted: str, timeout_s: float = WAIT_S) -> str:
        """The first line with `wanted` in it."""
        deadline = time.monotonic() + timeout_s
        while True:
            for line in list(self._said):
                if wanted in line:
                    return line
            assert time.monotonic() < deadline, f"`{wanted}` was not said within {timeout_s:g} s: {self.text}"
            time.sleep(0.02)


def spoken(harbour: Harbour, port: int, data: bytes, timeout_s: float = WAIT_S) -> bytes:
    """What a local port of the runner says to these bytes, until it ends the connection."""
    with entered(harbour.gateway.namespace):
        connection = socket.create_connection(("127.0.0.1", port), timeout_s)
    with connection:
        received = b""
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while piece := connection.recv(65536):
                received += piece
        except OSError as error:
            if isinstance(error, TimeoutError):
                raise
        return received


def shout(connection: socket.socket) -> None:
    """Says everything back, in capitals."""
    while data := connection.recv(65536):
        connection.sendall(data.upper())


@contextmanager
def opened_harbour() -> Iterator[Harbour]:
    assert os.geteuid() == 0, "the end-to-end tests need root: deselect them with `-m 'not e2e'`"
    with ExitStack() as stack:
        bed = stack.enter_context(cluster_bed("harbour"))
        assert bed.server.namespace is not None
        for port in (WEB_PORT, OTHER_PORT, DATABASE_PORT):
            stack.enter_context(hostile_server(bed.server.namespace, "127.0.0.1", port, shout))
        bed.server.create("/api/v1/namespaces", {"metadata": {"name": "shop"}})
        bed.node.run_pod(POD, ["sh", "-c", "echo started; exec cat"], stdin=True, env={"COLOUR": "green"})
        bed.start(POLICY.read_text())
        yield Harbour(bed)


@contextmanager
def forwarded(
    harbour: Harbour, hops: Hops, ports: Sequence[int], *, kubectl: Kubectl | None = None
) -> Iterator[tuple[dict[int, int], Lines]]:
    """A port-forward by kubectl to each of the pod's ports: which local port leads there, and what kubectl says."""
    with harbour.start(hops, "port-forward", f"pod/{POD}", *(f":{port}" for port in ports), kubectl=kubectl) as process:
        lines = Lines(process)
        found = {}
        for port in ports:
            found[port] = int(lines.await_text(f"-> {port}").split(" -> ")[0].rsplit(":", 1)[1])
        yield found, lines
