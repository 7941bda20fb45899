"""A proxy worker: one unprivileged process on one core, with an event loop, the shared listener and the policy.

Started by the host agent as `python -m proxy.gateway.worker` in the worker's cgroup, with one inherited socket. It
becomes the worker's user, for good, before it reads a byte from anywhere. It waits for its first policy, which comes
when the kernel side is in place. Then it connects once to the muster address, so that the kernel side learns which
process image it is and exempts it, gets the listener for it, and accepts. It ends when the host agent does.
"""

from __future__ import annotations

import argparse
import asyncio
import codecs
import contextlib
import ctypes
import gc
import os
import resource
import signal
import socket
import ssl
import sys
import time
from collections.abc import Coroutine
from typing import Any

import msgspec
import structlog
import uvloop

from proxy import journal, ports
from proxy.gateway import listener, tls, upstream
from proxy.gateway.link import HostLink
from proxy.gateway.session import Session
from proxy.model import Endpoint, Target
from proxy.policy.compile import CompiledPolicy
from proxy.policy.document import ResolvedPolicy
from proxy.protocols import registry

log = structlog.get_logger()

PR_SET_PDEATHSIG = 1
PR_SET_NO_NEW_PRIVS = 38
CAPABILITIES_V3 = 0x20080522
M_MMAP_THRESHOLD = -3
M_TRIM_THRESHOLD = -1
MAX_POLICY = 64 * 1024 * 1024
CERTIFICATE_SLACK_S = 3600
POLICY_TIMEOUT_S = 150.0
"""Longer than the host agent may take to load the kernel side, which it does while a first worker starts."""
MAX_CONTEXTS = 1024
"""TLS contexts kept; any address can be dialled at a protected port."""
GC_THRESHOLD = 50_000
"""Net allocations between two runs of the cycle collector; sessions make few cycles, and few of them last."""
GRACE_S = 2.0
"""How long sessions may take to deliver their farewells when the worker stops."""
DELIVERY_POLL_S = 0.02
RESERVED_DESCRIPTORS = 64
DESCRIPTORS_PER_SESSION = 3
"""Client, server, recording."""


class Worker:
    """What the sessions of one process share."""

    def __init__(self, *, offer_tls: bool, tasks: asyncio.TaskGroup) -> None:
        self.offer_tls = offer_tls
        self.clock = time.time_ns
        self.endpoints = listener.endpoints
        self.sessions: dict[str, Session] = {}
        self.stopping = asyncio.Event()
        self.policy_loaded = asyncio.Event()
        self.connections = 0
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._max_connections = max((limit - RESERVED_DESCRIPTORS) // DESCRIPTORS_PER_SESSION, 1)
        self.link: HostLink
        self.policy: CompiledPolicy
        self.targets: dict[str, Target] = {}
        self._tasks = tasks
        self._contexts: dict[tuple[str, str, tuple[str, ...]], tuple[float, ssl.SSLContext]] = {}

    @property
    def full(self) -> bool:
        """Whether one more connection could leave those that exist without descriptors."""
        return self.connections >= self._max_connections

    def opened(self, session: Session) -> None:
        """A session has its id."""
        self.sessions[session.id] = session

    def closed(self, session: Session) -> None:
        """A session is over."""
        self.sessions.pop(session.id, None)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return self._tasks.create_task(work)

    async def serving_context(
        self, session: str, name: str, dialled: Endpoint, alpn: tuple[str, ...]
    ) -> ssl.SSLContext:
        """The TLS context that stands, towards the client, for what the session dialled: `name` is the target's name or
        the bare address; `alpn` are the protocols it accepts. Raises `ports.Unavailable`."""
        key = (name, dialled.address, alpn)
        not_after, context = self._contexts.get(key, (0.0, None))
        if context is None or not_after < time.time() + CERTIFICATE_SLACK_S:
            certificate, descriptor = await self.link.certificate(session, dialled)
            context = tls.server_context(descriptor, alpn)
            if len(self._contexts) >= MAX_CONTEXTS:
                self._contexts.clear()
            self._contexts[key] = (certificate.not_after_s, context)
        return context

    def pushed(self, message: ports.Push, descriptors: list[int]) -> None:
        """What the host agent says unasked."""
        match message:
            case ports.LoadPolicy():
                self._load(message, descriptors)
            case ports.CancelSession():
                self.spawn(self._cancel(message))
            case ports.VisitTarget():
                self.spawn(self._visit(message))

    async def _cancel(self, message: ports.CancelSession) -> None:
        try:
            if (session := self.sessions.get(message.session)) is not None:
                await session.cancel()
        finally:
            self.link.cancel_done(message.cancel)

    async def _visit(self, message: ports.VisitTarget) -> None:
        reached, what = False, f"target `{message.target}` is not in the worker's policy"
        try:
            if (target := self.targets.get(message.target)) is not None:
                what = await upstream.visit(registry.visit(target.protocol), target, message.endpoint)
                reached = True
        except upstream.UpstreamError as error:
            what = str(error)
        finally:
            self.link.visited(message.visit, reached, what)

    def _load(self, message: ports.LoadPolicy, descriptors: list[int]) -> None:
        try:
            document = msgspec.msgpack.decode(_content(descriptors), type=ResolvedPolicy)
        except (ValueError, OSError, msgspec.MsgspecError) as error:
            # without the policy of the host agent nothing may be ruled on
            self.end(f"policy `{message.version}` cannot be read: {error}")
            return
        self.policy = CompiledPolicy(document, message.mask_key)
        self.targets = {target.name: target for target in document.targets}
        self._contexts.clear()
        for session in list(self.sessions.values()):
            session.policy_changed()
        self.policy_loaded.set()

    def end(self, why: str) -> None:
        """The host agent is gone, or says so."""
        log.info("worker ends", why=why)
        self.stopping.set()


async def _muster(worker: Worker, port: int) -> int:
    """The connection stays open until the host agent has answered: its record is what tells the process image. Gives
    the listening socket."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    source = writer.get_extra_info("sockname")
    listening = await worker.link.muster(Endpoint(source[0], source[1]))
    writer.close()
    del reader
    return listening


def _content(descriptors: list[int]) -> bytes:
    """What the one descriptor holds. Its offset is shared with the other workers, so it is not used."""
    try:
        (descriptor,) = descriptors
        return os.pread(descriptor, MAX_POLICY, 0)
    finally:
        for each in descriptors:
            os.close(each)


async def _serve(options: argparse.Namespace) -> None:
    async with asyncio.TaskGroup() as tasks:
        worker = Worker(offer_tls=options.offer_tls, tasks=tasks)
        channel = socket.socket(fileno=options.channel)
        worker.link = HostLink(channel, worker.pushed, worker.end)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, worker.end, "terminated")
        try:
            async with asyncio.timeout(POLICY_TIMEOUT_S):
                await worker.policy_loaded.wait()
            listening = await _muster(worker, options.muster)
        except (ports.Unavailable, OSError) as error:
            log.error("worker not started", why=str(error) or "no policy came")
            os._exit(1)
        accepting = listener.Listener(
            socket.socket(fileno=listening), lambda connection: Session(worker).accepted(connection)
        )
        await worker.stopping.wait()
        accepting.close()
        for session in list(worker.sessions.values()):
            session.farewell("the gateway on this host is stopping", "connect again")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(GRACE_S):
                while worker.sessions:
                    await asyncio.sleep(DELIVERY_POLL_S)
                    for session in [each for each in worker.sessions.values() if each.delivered]:
                        session.end()
        # what has not ended by now is told by the host agent from the recordings
        os._exit(0)


def _confine(parent: int, uid: int, gid: int) -> None:
    """Becomes the worker's user; no capability, no new privileges, and no life after the host agent."""
    libc = ctypes.CDLL(None, use_errno=True)
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, uid)
        # systemd 257 gives a service its capabilities as inheritable too, and those survive the change of user
        libc.capset((ctypes.c_uint32 * 2)(CAPABILITIES_V3, 0), (ctypes.c_uint32 * 6)())
    # a change of user clears the death signal: it is set afterwards
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit("the host agent is gone already")
    with open("/proc/self/status", "rb") as status:
        held = {
            name: int(value, 16)
            for name, _, value in (line.partition(b":") for line in status)
            if name in (b"CapPrm", b"CapEff", b"CapAmb", b"CapInh")
        }
    if os.getuid() == 0 or os.geteuid() == 0 or any(held.values()):
        sys.exit("a worker must not be root and must hold no capability: start it through `hopgate run`")
    # replies of 128 KiB and more would be mapped and unmapped one by one
    libc.mallopt(M_MMAP_THRESHOLD, 256 * 1024)
    libc.mallopt(M_TRIM_THRESHOLD, 128 * 1024 * 1024)


def main() -> None:
    """Runs a worker until the host agent ends it."""
    parser = argparse.ArgumentParser(description="hopgate proxy worker; started by the host agent")
    parser.add_argument("--parent", type=int, required=True, help="process id of the host agent")
    parser.add_argument("--channel", type=int, required=True, help="descriptor of the channel to the host agent")
    parser.add_argument("--muster", type=int, required=True, help="TCP port on loopback to muster at")
    parser.add_argument("--uid", type=int, required=True, help="user id to run as, not 0")
    parser.add_argument("--gid", type=int, required=True, help="group id to run as")
    parser.add_argument("--offer-tls", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--log-level", default="info")
    options = parser.parse_args()
    # all code is loaded while we may still read it, wherever it is installed
    registry.names()
    for codec in ("ascii", "latin-1", "idna"):
        codecs.lookup(codec)
    _confine(options.parent, options.uid, options.gid)
    journal.configure(options.log_level, worker=os.getpid())
    # what is loaded stays; what a statement makes is freed by its references, so the cycle collector may come by rarely
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD)
    uvloop.run(_serve(options))


if __name__ == "__main__":
    main()
