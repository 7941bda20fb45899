"""A running Hopgate of the test's own: daemon and workers in a cgroup and a network namespace that the test has made.

Everything it writes is in one directory; its hooks are on the test's cgroup, its rules in the test's namespace. Nothing
of it touches the host's own cgroup root or rules.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml

from tests.lab.cgroups import inside

READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0


class GatewayError(Exception):
    """The daemon did not come up, or did not end; the message holds the end of its log."""


class Gateway:
    """`namespace` is the name of a network namespace; `cgroup` the directory that the hooks are attached to."""

    def __init__(
        self, directory: Path, *, namespace: str, cgroup: Path, settings: Mapping[str, object] | None = None
    ) -> None:
        self.directory = directory
        self.namespace = namespace
        self.cgroup = cgroup
        self.config = directory / "hopgate.yaml"
        self.policy_dir = directory / "policy.d"
        self.state_dir = directory / "state"
        self.log_path = directory / "hopgate.log"
        self.ca_path = self.state_dir / "ca" / "ca.pem"
        self.process: subprocess.Popen[bytes] | None = None
        self._credentials = directory / "credentials"
        self.pin_dir = Path("/sys/fs/bpf") / cgroup.name
        for made in (self.policy_dir, self._credentials, directory / "run"):
            made.mkdir(parents=True, exist_ok=True)
        workers = cgroup / "workers"
        workers.mkdir(exist_ok=True)
        (cgroup / "daemon").mkdir(exist_ok=True)
        self.config.write_text(
            yaml.safe_dump(
                {
                    "cgroup": str(cgroup),
                    "worker_cgroup": str(workers),
                    "worker_user": "nobody",
                    "workers": 2,
                    "policy_dir": str(self.policy_dir),
                    "state_dir": str(self.state_dir),
                    "run_dir": str(directory / "run"),
                    "pin_dir": str(self.pin_dir),
                    "credentials_dir": str(self._credentials),
                    **(settings or {}),
                }
            )
        )

    def write_policy(self, text: str, name: str = "policy.yaml") -> None:
        (self.policy_dir / name).write_text(text)

    def write_credential(self, name: str, user: str, password: str) -> None:
        self.write_entry(name, {"user": user, "password": password})

    def write_entry(self, name: str, entry: Mapping[str, object]) -> None:
        """Any credential that the credential source can read."""
        path = self._credentials / name
        path.touch(0o600)
        path.write_text(yaml.safe_dump(dict(entry)))

    def start(self) -> None:
        """Starts the daemon and returns when it says that it is ready. Raises `GatewayError`."""
        address = str(self.directory / "notify.sock")
        Path(address).unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as inbox, self.log_path.open("ab") as log:
            inbox.bind(address)
            inbox.settimeout(0.2)
            self.process = subprocess.Popen(
                self.inside(
                    [sys.executable, "-I", "-m", "hostagent.cli", "run", "--config", str(self.config)], "daemon"
                ),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, "NOTIFY_SOCKET": address},
            )
            deadline = time.monotonic() + READY_TIMEOUT_S
            while time.monotonic() < deadline:
                try:
                    if b"READY=1" in inbox.recv(4096).split(b"\n"):
                        return
                except TimeoutError:
                    if self.process.poll() is not None:
                        break
        raise GatewayError(f"hopgate did not become ready:\n{self.log()[-4000:]}")

    def kill(self) -> None:
        """Kills the daemon as `kill -9` does, and nothing else."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(STOP_TIMEOUT_S)

    def stop(self) -> None:
        """Ends the daemon in order. Raises `GatewayError` when it does not end."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.terminate()
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise GatewayError(f"hopgate did not end when asked:\n{self.log()[-4000:]}") from None

    def cli(self, *arguments: str, check: bool = True, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
        """Runs `hopgate ARGUMENTS` as root in the namespace. Raises `GatewayError` on a non-zero status when
        `check`."""
        command = [sys.executable, "-I", "-m", "hostagent.cli", *arguments, "--config", str(self.config)]
        done = subprocess.run(
            ["nsenter", f"--net=/run/netns/{self.namespace}", *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            # Python's own view: pytest loads readline, which sets COLUMNS where Python does not see it
            env=dict(os.environ),
        )
        if check and done.returncode != 0:
            raise GatewayError(
                f"`hopgate {' '.join(arguments)}` ended with {done.returncode}:\n{done.stdout}{done.stderr}"
            )
        return done

    def inside(self, command: Sequence[str], group: str = "jobs") -> list[str]:
        """The command, run inside the namespace and the sub-cgroup `group` of the hooked cgroup."""
        directory = self.cgroup / group
        directory.mkdir(exist_ok=True)
        return inside(command, cgroup=directory, netns=self.namespace)

    def run(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        timeout_s: float = 60,
        group: str = "jobs",
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command inside, as a job on the runner would run."""
        return subprocess.run(
            self.inside(command, group),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            cwd="/",
            env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8", **(env or {})},
            timeout=timeout_s,
        )

    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""


@contextmanager
def gateway(
    directory: Path, *, namespace: str, cgroup: Path, settings: Mapping[str, object] | None = None
) -> Iterator[Gateway]:
    """A gateway that is not started yet. At the end it is stopped and what it put on the host is taken off."""
    made = Gateway(directory, namespace=namespace, cgroup=cgroup, settings=settings)
    try:
        yield made
    finally:
        try:
            made.stop()
        finally:
            made.cli("cleanup", check=False)
            shutil.rmtree(made.pin_dir, ignore_errors=True)
