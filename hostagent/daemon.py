"""Composition root of the host agent: what is started in which order, what is watched, and what stays when it ends.

    port, control socket   nothing is touched before these are ours: there is no other daemon
    workers' processes     they load their code meanwhile, and wait
    policy, CA, store      nothing of the kernel is touched before these are there
    kernel                 hooks attached and pinned (or found pinned), older processes seeded, rules in: closed so far
    workers                connections are served once the workers are exempt from the redirect
    READY

When the daemon ends, in whatever way, hooks and rules stay: connections are refused until it is back. `hopgate cleanup`
takes them off.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec
import structlog
import uvloop

from hostagent import kernel
from hostagent.adoption import Adoption
from hostagent.alerts import Alerts, Source
from hostagent.attribution import AgentMatcher, Attribution, Undecidable, build_chain
from hostagent.cancels import CancelTable
from hostagent.certificates import open_authority
from hostagent.control.approvals import Approvals
from hostagent.control.messages import Visit
from hostagent.control.server import ControlServer
from hostagent.control.sessions import Sessions
from hostagent.control.store import Store
from hostagent.credentials import CredentialFiles, mask_key
from hostagent.declarations import INITIAL_PID_NAMESPACE, SOCKET, Declarations
from hostagent.errors import OperatorError
from hostagent.interception import Interception
from hostagent.kernel import abi
from hostagent.names import Names
from hostagent.notify import notify, watchdog_interval_s
from hostagent.policies import ActivePolicy, PolicyUnusable
from hostagent.raw_sockets import RawSockets
from hostagent.service import Misconduct, Service, memory_file
from hostagent.settings import Settings
from hostagent.visits import Visits
from hostagent.watch import Watch, policy_stamp
from hostagent.workers import WorkerProcess, Workers, account
from proxy import journal, ports
from proxy.gateway.listener import BACKLOG, endpoint
from proxy.model import Chain, Endpoint, ProcessImage

log = structlog.get_logger()
T = TypeVar("T")

SWEEP_INTERVAL_S = 5.0
NAMES_INTERVAL_S = 1.0
ESCAPED_TOLD_MAX = 8
COUNTED = {
    "events_lost": "the kernel had more to tell than there was room for: some denied connections are not recorded",
    "unclosed": "connections of agents could be neither looked at nor closed: enlarge the map `unwatched`",
}
"""Counters of the kernel side that have to stay where they are."""
RECORD_AGE_S = 30.0
"""How long a connection may wait to be accepted before its record of who it is counts as stale."""


class Daemon:
    """One per host (per network namespace, to be exact)."""

    def __init__(self, settings: Settings, config: Path | None = None) -> None:
        """`config` is the file that the settings came from."""
        self.settings = settings
        self._config = config
        self.started_s = time.time()
        self._stopping = asyncio.Event()
        self._serving = asyncio.Event()
        self._since_ns = time.monotonic_ns()
        self._muster: Endpoint

    async def serve(self) -> None:
        """Runs until it is told to stop. Raises `OperatorError` when it cannot start."""
        settings = self.settings
        account(settings.worker_user)
        for directory in (settings.state_dir, settings.run_dir):
            _make(directory)
        self._listener = _listening_socket(settings.listen_port)
        control = ControlServer(settings.control_socket, self)
        control.claim()
        muster = socket.create_server(("127.0.0.1", 0))
        self._muster = endpoint(*muster.getsockname()[:2])
        self._kernel_settings = _kernel_settings(settings)
        self.workers = Workers(
            settings,
            muster=muster,
            cgroup=self._kernel_settings.worker_cgroup,
            on_start=self._worker_started,
            on_message=self._from_worker,
            on_gone=self._worker_gone,
        )
        self.workers.launch()

        key = await self._prepared(lambda: mask_key(settings.state_dir))
        self._alerts = Alerts(settings.state_dir / "alerts")
        self._names = Names(alert=self._alerts.alert)
        self.policy = ActivePolicy(settings.policy_dir, key, self._names)
        policy_loaded = policy_stamp(settings.policy_dir)
        try:
            self.policy.reload()
        except PolicyUnusable as error:
            # closed: with no policy everything is denied, which is what the rules below make true
            log.error("starting with no policy: everything is denied", problems=str(error).splitlines())
        self._mask_key = key
        authority = await self._prepared(lambda: open_authority(settings.state_dir))
        self._store = await self._prepared(lambda: Store.create(settings.store_path))
        self._sessions = Sessions(self._store, settings.recordings_dir, host=socket.gethostname())
        left_open = await self._prepared(self._sessions.recover)
        self.approvals = Approvals(self._store)
        await self._prepared(self.approvals.recover)

        self._agents = AgentMatcher(self.policy.resolved.agents)
        self.pins = await asyncio.to_thread(kernel.start, self._kernel_settings, self._scope())
        self._attribution = Attribution(self.pins, self._agents)
        self._guard = await asyncio.to_thread(kernel.Guard, self._kernel_settings, self.pins, self._scope())
        self._adoption = Adoption(
            kernel.Sockets(settings.listen_port, self._kernel_settings.mark),
            reset=settings.adopt == "reset",
            alert=self._alerts.alert,
        )
        self._adoption.adopt(self._scope())
        self._events = kernel.Events.open(settings.pin_dir)
        raw_sockets = RawSockets(
            lineage=self.pins.lineage, guard=self._guard, name_chain=self._name_chain, alerts=self._alerts
        )
        sockets = kernel.Sockets(settings.listen_port, self._kernel_settings.mark)
        interception = Interception(
            policy=self.policy,
            attribution=self._attribution,
            sessions=self._sessions,
            sockets=sockets,
            spare=self.pins.spare,
            alerts=self._alerts,
        )
        authority_dir = settings.state_dir / "ca"
        self.watch = Watch(
            guard=self._guard,
            alerts=self._alerts,
            kept=(authority_dir / "ca.pem", authority_dir / "ca.key", settings.state_dir / "mask.key"),
            policy_dir=settings.policy_dir,
            policy_loaded=policy_loaded,
            config=self._config,
            name_chain=self._name_chain,
        )

        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            self._visits = Visits(lambda: self.policy.targets.values(), self._any_worker)
            self.service = Service(
                policy=self.policy,
                attribution=self._attribution,
                sessions=self._sessions,
                approvals=self.approvals,
                source=CredentialFiles(settings.credentials_dir),
                authority=authority,
                cancels=CancelTable(),
                exempt=self._exempt,
                find_worker=self.workers.running.get,
                spawn=tasks.create_task,
                visited=self._visits.visited,
                alert=lambda what, by: self._alerts.alert(what, by=by, source=Source.WORKER),
                no_target=self._names.hurry,
            )
            declarations = Declarations(
                settings.run_dir / SOCKET,
                self._attribution,
                self.pins,
                functools.partial(self._alerts.alert, source=Source.DECLARATION),
            )
            await control.start()
            await declarations.start()
            loop = asyncio.get_running_loop()
            loop.add_signal_handler(signal.SIGTERM, self._stopping.set)
            loop.add_signal_handler(signal.SIGINT, self._stopping.set)
            loop.add_signal_handler(signal.SIGHUP, self._reload_logged)
            background = [
                tasks.create_task(self._accept_musters(muster)),
                tasks.create_task(self.workers.supervise()),
                tasks.create_task(self._sweep()),
                tasks.create_task(self.watch.run()),
                tasks.create_task(raw_sockets.run()),
                tasks.create_task(
                    kernel.follow(
                        self._events,
                        {
                            abi.EVENTS["EVENT_SENT_RAW"]: raw_sockets.told,
                            abi.EVENTS["EVENT_HIDDEN"]: interception.told,
                            abi.EVENTS["EVENT_UNWATCHED"]: interception.told,
                        },
                    )
                ),
                tasks.create_task(self._follow_names()),
                tasks.create_task(self._tell_when_ready()),
                tasks.create_task(self._end_sessions(left_open)),
            ]
            await self._stopping.wait()
            notify(STOPPING=1, STATUS="stopping: connections are refused until the next start")
            await self.workers.stop()
            await control.stop()
            await declarations.stop()
            for task in background:
                task.cancel()
        self._events.close()
        sockets.close()
        self._guard.close()
        self._adoption.close()
        self._store.close()

    # --- what the control socket asks ---------------------------------------------------------------------------------

    def check_approver(self, pid: int) -> None:
        """A process below an agent may not approve. In a pid namespace of our own the kernel's process ids are not
        ours: there the lineage of a caller cannot be told, and being root has to do."""
        if os.stat("/proc/self/ns/pid").st_ino != INITIAL_PID_NAMESPACE:
            return
        chain = self._attribution.of_process(pid)
        if not isinstance(chain, Chain):
            self._alerts.alert(
                "somebody who is not known tried to approve",
                by=f"process {pid}: {chain.reason}",
                source=Source.APPROVAL,
            )
            raise OperatorError(f"who approves has to be known: {chain.reason}")
        if chain.hops:
            self._alerts.alert("an agent tried to approve", by=f"process {pid}, {chain}", source=Source.APPROVAL)
            raise OperatorError(f"agents may not approve: process `{pid}` runs under {chain}; ask a human")

    async def visit_targets(self) -> tuple[Visit, ...]:
        """Whether the targets can be reached. Raises `OperatorError` when nobody can try."""
        return await self._visits.make()

    def _any_worker(self) -> WorkerProcess | None:
        return next((worker for worker in self.workers.running.values() if worker.serving), None)

    def status(self) -> dict[str, object]:
        """What `hopgate status` shows."""
        return {
            "policy": self.policy.compiled.version,
            "policy_problem": self.policy.problem,
            "targets": sorted(self.policy.targets),
            "workers": sum(worker.serving for worker in self.workers.running.values()),
            "worker_deaths": self.workers.deaths,
            "open_sessions": self.service.open_sessions,
            "kernel": self.pins.counters(),
            "overflowed": self.pins.overflowed(),
            "maps": {name: f"{used}/{size}" for name, (used, size) in self.pins.used().items()},
            "up_s": round(time.time() - self.started_s),
            **self._adoption.report(self._scope()),
            **self.watch.report(),
        }

    def reload(self) -> str:
        """Takes the policy on disk; returns its version. Raises `PolicyUnusable`: then the old one stays."""
        self.watch.policy_taken()
        self.policy.reload()
        # whoever rules has the new policy even when the rules of netfilter cannot be brought in line with it
        self._agents = self._attribution.agents = AgentMatcher(self.policy.resolved.agents, self._agents)
        self._send_policy(list(self.workers.running.values()))
        self._notify_status()
        self._guard.apply(self._scope())
        self._adoption.adopt(self._scope())
        return self.policy.compiled.version

    def _name_chain(self, lineage: tuple[ProcessImage, ...]) -> str:
        try:
            return str(build_chain(lineage, self._attribution.agents.match))
        except Undecidable as error:
            return f"agents undecidable: {error}"

    def _reload_logged(self) -> None:
        try:
            self.reload()
        except OperatorError as error:
            log.error("reload failed", why=str(error))

    # --- workers ------------------------------------------------------------------------------------------------------

    def _worker_started(self, worker: WorkerProcess) -> None:
        try:
            self._send_policy([worker])
        except OSError as error:
            self.workers.kill(worker, f"its policy cannot be sent: {error.strerror}")

    def _from_worker(self, worker: WorkerProcess, message: ports.FromWorker) -> None:
        try:
            self.service.handle(worker, message)
        except Misconduct as error:
            self._alerts.alert(f"a worker broke the form: {error}", by=f"worker {worker.pid}", source=Source.WORKER)
            self.workers.kill(worker, str(error))

    def _worker_gone(self, worker: WorkerProcess) -> None:
        self.service.forget(worker)
        if worker.node is not None:
            self.pins.unexempt(worker.node)

    async def _accept_musters(self, muster: socket.socket) -> None:
        """Keeps the queue of the muster address empty: what counts is the record of the connect, not the connection."""
        loop = asyncio.get_running_loop()
        muster.setblocking(False)
        while True:
            accepted, _ = await loop.sock_accept(muster)
            accepted.close()

    def _exempt(self, worker: WorkerProcess, message: ports.Mustered) -> None:
        """The image that connected from where the worker says it did is the worker's: while the worker keeps its end
        open nobody else can have that port, and the record is that of the latest connect from it."""
        taken = self.pins.take(message.source, self._muster)
        if not isinstance(taken, kernel.ConnectRecord):
            self.workers.kill(worker, f"there is no record of its muster from {message.source}: {taken.reason}")
            return
        worker.node = taken.node
        self.pins.exempt(taken.node)
        worker.channel.send(ports.Begin(id=message.id), [self._listener.fileno()])
        worker.serving = True
        self._serving.set()

    def _send_policy(self, workers: list[WorkerProcess]) -> None:
        descriptor = memory_file("policy", msgspec.msgpack.encode(self.policy.resolved))
        try:
            for worker in workers:
                worker.channel.send(
                    ports.LoadPolicy(version=self.policy.compiled.version, mask_key=self._mask_key), [descriptor]
                )
        finally:
            os.close(descriptor)

    # --- what goes on beside ------------------------------------------------------------------------------------------

    def _scope(self) -> kernel.Scope:
        return _scope_of(self.policy, self._agents, self._muster, self._kernel_settings)

    async def _prepared(self, make: Callable[[], T]) -> T:
        """What the host agent keeps on disk, opened or brought up to date. Without it nothing could be recorded: the
        gate is closed before this start is given up. Raises `OperatorError`."""
        try:
            return make()
        except OperatorError as error:
            log.error("cannot serve: connections to what is protected are refused", why=str(error))
            policy = ActivePolicy(self.settings.policy_dir, bytes(32))
            with contextlib.suppress(PolicyUnusable):
                policy.reload()
            agents = AgentMatcher(policy.resolved.agents)
            scope = _scope_of(policy, agents, None, self._kernel_settings)
            pins = await asyncio.to_thread(kernel.start, self._kernel_settings, scope)
            pins.close()
            raise

    async def _end_sessions(self, left_open: list[str]) -> None:
        """Those of a daemon that died. Their recordings can be long, and clients do not wait for that."""
        for session in left_open:
            await asyncio.to_thread(self._sessions.interrupt, session, "the host agent died")
            log.warning("session was interrupted", session=session)

    async def _sweep(self) -> None:
        lost = False
        before = self.pins.counters()
        while True:
            await asyncio.sleep(SWEEP_INTERVAL_S)
            before = self._tell_counted(before)
            unclaimed = self.pins.sweep(RECORD_AGE_S)
            # what was under way when another daemon was killed is not told from what went past it
            self._tell_escaped([one for one in unclaimed if one.established and one.time_ns > self._since_ns])
            if self.pins.overflowed() and not lost:
                lost = True
                self._alerts.alert(f"processes or connections lost their label and are denied: {self.pins.counters()}")

    def _tell_counted(self, before: dict[str, int]) -> dict[str, int]:
        """What the kernel side could only count since then; the counts now."""
        now = self.pins.counters()
        for name, what in COUNTED.items():
            if now[name] > before[name]:
                # not how many: the same again is the same alert
                self._alerts.alert(what, by="`hopgate status` has the counts", source=Source.INTERCEPTION)
        return now

    async def _follow_names(self) -> None:
        """Asks for the policy's names again when their time has come, and looks whether agents have other files.
        Workers need not know: they ask for every connection what it is."""
        moved = False
        while True:
            await asyncio.sleep(NAMES_INTERVAL_S)
            for name in self._names.due():
                outcome = await asyncio.to_thread(self._names.ask, name)
                moved |= self.policy.readdress(name, outcome, self.service.addresses_in_use)
            self._agents.look()
            moved |= self._scope().agents != self.pins.agents_here
            if not moved:
                continue
            try:
                self._guard.apply(self._scope())
                self._adoption.adopt(self._scope())
                moved = False
            except kernel.KernelError as error:
                self._alerts.alert(
                    f"new addresses of names, or files of agents, are not followed yet: {error}",
                    done="it is tried again",
                )

    def _tell_escaped(self, escaped: list[kernel.Unclaimed]) -> None:
        """Connections to what is protected that were answered, and by nobody of ours."""
        for one in escaped[:ESCAPED_TOLD_MAX]:
            where = "" if one.local else " in another network namespace"
            lineage = self.pins.lineage(one.node)
            by = f"process {one.tgid}, lineage not known"
            if lineage is not None:
                names = " > ".join(image.comm for image in lineage[-ESCAPED_TOLD_MAX:])
                by = f"process {one.tgid}, uid {lineage[-1].uid}, {self._name_chain(lineage)}: {names}"
            self._alerts.alert(f"a connection to {one.dest}{where} went past the proxy", by=by)
        if len(escaped) > ESCAPED_TOLD_MAX:
            self._alerts.alert("more connections went past the proxy than are told one by one")

    async def _tell_when_ready(self) -> None:
        await self._serving.wait()
        notify(READY=1, MAINPID=os.getpid())
        self._notify_status()
        log.info("ready", policy=self.policy.compiled.version, port=self.settings.listen_port)
        interval_s = watchdog_interval_s()
        while interval_s:
            await asyncio.sleep(interval_s)
            notify(WATCHDOG=1)

    def _notify_status(self) -> None:
        problem = self.policy.problem.splitlines()
        notify(
            STATUS=f"policy {self.policy.compiled.version}"
            + (f", NOT what is on disk: {problem[0]}" if problem else "")
        )


def _listening_socket(port: int) -> socket.socket:
    """IPv6 and IPv4 on one socket; IPv4 alone where the kernel has no IPv6. Raises `OperatorError` when the port is
    taken."""
    ipv6 = socket.has_dualstack_ipv6()
    try:
        return socket.create_server(
            ("::" if ipv6 else "0.0.0.0", port),
            family=socket.AF_INET6 if ipv6 else socket.AF_INET,
            backlog=BACKLOG,
            dualstack_ipv6=ipv6,
        )
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        raise OperatorError(f"cannot listen on port `{port}`: {why}: is another hopgate running?") from error


def _worker_cgroup(settings: Settings) -> Path:
    """The configured directory, or `workers` below the daemon's own cgroup."""
    directory = settings.worker_cgroup or kernel.own_cgroup() / "workers"
    _make(directory)
    return directory


def _kernel_settings(settings: Settings) -> kernel.Settings:
    return kernel.Settings(
        cgroup=settings.cgroup or kernel.cgroup_mount(),
        pin_dir=settings.pin_dir,
        listen_port=settings.listen_port,
        worker_cgroup=_worker_cgroup(settings),
        sizes=kernel.MapSizes.of(settings.maps),
        run_dir=settings.run_dir,
    )


def _scope_of(
    policy: ActivePolicy, agents: AgentMatcher, muster: Endpoint | None, settings: kernel.Settings
) -> kernel.Scope:
    """What is redirected: the targets' addresses, and the protected ports of any address; beside it the muster. And
    whose connections to all else are looked at: with no policy, those of the agents of the last one."""
    resolved = policy.resolved
    intercepted = agents.intercepted_files() if agents.intercepted else None
    if not policy.loaded:
        intercepted = kernel.agents_found(settings)
    return kernel.Scope(
        ports=tuple(sorted(resolved.protected_ports)),
        endpoints=tuple(sorted(at for target in resolved.targets for at in target.endpoints)),
        prefixes=tuple(sorted(at for target in resolved.targets for at in target.prefixes)),
        muster=muster,
        agents=intercepted,
    )


def _make(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise OperatorError(f"cannot make directory `{directory}`: {error.strerror}") from error


def run(settings: Settings, config: Path | None = None) -> None:
    """Runs the host agent in the foreground. Raises `OperatorError` when it cannot start."""
    if os.geteuid() != 0:
        raise OperatorError("hopgate has to be started by root: use the systemd unit")
    journal.configure(settings.log_level)
    uvloop.run(_run(settings, config))


async def _run(settings: Settings, config: Path | None) -> None:
    await Daemon(settings, config).serve()
