"""Starts the proxy workers, keeps them running, and ends them.

    launched --(heard from, has its policy, mustered, exempt)--> serving --(exit)--> gone --(back-off)--> launched

A worker that dies takes its connections with it, and nothing else: its sessions are closed from their recordings, its
cancel keys are released, and another one is started. The listening socket is ours, so clients meanwhile wait or go to
the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import structlog

from hostagent.errors import OperatorError
from hostagent.settings import Settings
from proxy import ports
from proxy.gateway.channel import Channel, decoder

log = structlog.get_logger()

RESTART_DELAYS_S = (0.05, 0.2, 1.0)
"""Waits before the next start, after deaths that follow each other within `STEADY_S`. Whoever can make a worker die
again and again does not keep it away for longer than the last."""
STEADY_S = 30.0
STOP_TIMEOUT_S = 5.0


def account(user: str) -> tuple[int, int]:
    """The ids that workers run with. Raises `OperatorError` unless there is such a user, and it is unprivileged."""
    try:
        found = pwd.getpwnam(user)
    except KeyError:
        raise OperatorError(
            f"worker_user `{user}` does not exist: make it (`systemd-sysusers`), or name another in the settings"
        ) from None
    if found.pw_uid == 0:
        raise OperatorError(f"worker_user `{user}` is root: name an unprivileged user in the settings")
    return found.pw_uid, found.pw_gid


class WorkerProcess:
    """One running worker and the channel to it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process
        self.pid = process.pid
        self.channel: Channel[ports.FromWorker]
        self.sessions: set[str] = set()
        self.approvals: set[str] = set()
        self.node: int | None = None
        self.serving = False
        self.gone = asyncio.Event()
        self.why = ""


class Workers:
    """`on_start(worker)` gives a new worker its policy, `on_message(worker, message)` answers what it asks,
    `on_gone(worker)` cleans up after it."""

    def __init__(
        self,
        settings: Settings,
        *,
        muster: socket.socket,
        cgroup: Path,
        on_start: Callable[[WorkerProcess], None],
        on_message: Callable[[WorkerProcess, ports.FromWorker], None],
        on_gone: Callable[[WorkerProcess], None],
    ) -> None:
        self.settings = settings
        self.running: dict[int, WorkerProcess] = {}
        self.deaths = 0
        self._muster_port = muster.getsockname()[1]
        self._cgroup = cgroup
        self._count = settings.workers or len(os.sched_getaffinity(0))
        self._launched: list[tuple[subprocess.Popen[bytes], socket.socket]] = []
        self._on_start = on_start
        self._on_message = on_message
        self._on_gone = on_gone
        self._stopping = asyncio.Event()
        self._uid, self._gid = account(settings.worker_user)

    def launch(self) -> None:
        """Starts the processes ahead of `supervise`: they load their code while the host agent prepares the rest, and
        get nothing to do and are not listened to until then. They end with the host agent."""
        # whoever cannot be started now is started, and told of, by `supervise`
        with contextlib.suppress(OSError):
            while len(self._launched) < self._count:
                self._launched.append(self._launch())

    async def supervise(self) -> None:
        """Runs `settings.workers` workers (0: one per core) until `stop`."""
        async with asyncio.TaskGroup() as tasks:
            for _ in range(self._count):
                tasks.create_task(self._keep_one())

    async def stop(self) -> None:
        """Asks all workers to end, and ends those that do not."""
        self._stopping.set()
        workers = list(self.running.values())
        for worker in workers:
            worker.process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                for worker in workers:
                    await worker.gone.wait()
        except TimeoutError:
            for worker in workers:
                if not worker.gone.is_set():
                    worker.process.kill()
                    await worker.gone.wait()

    def broadcast(self, message: ports.LoadPolicy, descriptor: int) -> None:
        """Sends a new policy to every worker that has one already."""
        for worker in self.running.values():
            worker.channel.send(message, [descriptor])

    def kill(self, worker: WorkerProcess, why: str) -> None:
        """Ends a worker that broke the form."""
        log.error("worker killed", worker=worker.pid, why=why)
        worker.process.kill()

    async def _keep_one(self) -> None:
        loop = asyncio.get_running_loop()
        failures = 0
        while not self._stopping.is_set():
            started = loop.time()
            try:
                worker = self._start()
            except OSError as error:
                pid, why = 0, f"cannot be started: {error.strerror or error}"
            else:
                await worker.gone.wait()
                self.running.pop(worker.pid, None)
                self._on_gone(worker)
                pid, why = worker.pid, worker.why
            if self._stopping.is_set():
                return
            self.deaths += 1
            failures = 0 if loop.time() - started > STEADY_S else failures + 1
            delay = RESTART_DELAYS_S[min(failures, len(RESTART_DELAYS_S) - 1)]
            log.error("worker died", worker=pid, why=why, restart_in_s=delay)
            await asyncio.sleep(delay)

    def _start(self) -> WorkerProcess:
        process, ours = self._launched.pop() if self._launched else self._launch()
        try:
            pidfd = os.pidfd_open(process.pid)
        except OSError:
            ours.close()
            process.kill()
            process.wait()
            raise
        worker = WorkerProcess(process)
        worker.channel = Channel(
            ours,
            decoder(ports.FromWorker),
            lambda message, descriptors: self._received(worker, message, descriptors),
            lambda why: self._lost(worker, why),
        )
        self.running[process.pid] = worker
        asyncio.get_running_loop().add_reader(pidfd, self._exited, worker, pidfd)
        self._on_start(worker)
        return worker

    def _launch(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            process = subprocess.Popen(
                [
                    sys.executable,
                    "-I",
                    "-m",
                    "proxy.gateway.worker",
                    f"--parent={os.getpid()}",
                    f"--channel={theirs.fileno()}",
                    f"--muster={self._muster_port}",
                    f"--uid={self._uid}",
                    f"--gid={self._gid}",
                    "--offer-tls" if self.settings.offer_tls else "--no-offer-tls",
                    f"--log-level={self.settings.log_level}",
                ],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
                cwd="/",
            )
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        try:
            (self._cgroup / "cgroup.procs").write_text(str(process.pid))
        except OSError:
            ours.close()
            process.kill()
            process.wait()
            raise
        return process, ours

    def _received(self, worker: WorkerProcess, message: ports.FromWorker, descriptors: list[int]) -> None:
        if descriptors:
            for descriptor in descriptors:
                os.close(descriptor)
            self.kill(worker, "it sent descriptors")
            return
        self._on_message(worker, message)

    def _lost(self, worker: WorkerProcess, why: str) -> None:
        """A worker without a channel can do nothing that is recorded: it is not left to run."""
        worker.why = worker.why or why
        worker.process.kill()

    def _exited(self, worker: WorkerProcess, pidfd: int) -> None:
        asyncio.get_running_loop().remove_reader(pidfd)
        os.close(pidfd)
        status = worker.process.wait()
        worker.why = f"signal {-status}" if status < 0 else f"exit status {status}"
        worker.channel.finish("worker exited")
        worker.gone.set()
