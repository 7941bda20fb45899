"""Answers launchers: a process may say which agent it is about to become, if the policy lets it (`hopgate exec`).

    connect   who asks is told by the kernel (SO_PEERCRED, and a pidfd of the same process), never by the request
    look up   the chain of that process; may its innermost agent, or its user, declare this agent?
    label     the image that the process runs goes into the kernel's map, before it is answered and before its exec

The label is the image's, so nobody else can have it: a process that forked is refused, since its children run the same
image. Whatever the process executes afterwards has the label among its ancestors and cannot lose it.

Everybody may connect. Blind spots: on Linux before 6.5 the pidfd is opened by number, so between the connect and our
accept the process may have ended and another have its number: that one is then judged and labelled, for what it may
itself declare. Where the daemon is in a pid namespace of its own, numbers cannot be told, and nothing can be declared.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec
import structlog

from hostagent.attribution import Attribution
from hostagent.errors import OperatorError
from hostagent.kernel import Pins
from proxy.model import Chain

log = structlog.get_logger()

SOCKET = "declare.sock"
MAX_LINE = 1024
TIMEOUT_S = 5.0
MAX_CONNECTIONS = 128
MAX_CONNECTIONS_OF_USER = 16
INITIAL_PID_NAMESPACE = 0xEFFFFFFC
"""Inode of the first pid namespace (include/linux/proc_ns.h, PROC_PID_INIT_INO)."""
_SO_PEERPIDFD = 77
_CREDENTIALS = struct.Struct("3i")


class Declare(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a launcher asks: to be this agent from now on."""

    agent: str


class Declared(msgspec.Struct, frozen=True):
    """The answer: `refusal` is empty, or says why not."""

    refusal: str = ""


class Declarations:
    """Serves on `path` from `start` to `stop`. `alert` tells the operators about refusals."""

    def __init__(self, path: Path, attribution: Attribution, pins: Pins, alert: Callable[..., None]) -> None:
        self._path = path
        self._attribution = attribution
        self._pins = pins
        self._alert = alert
        self._decode = msgspec.json.Decoder(Declare).decode
        self._connections: Counter[int] = Counter()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Raises `OperatorError`. The control socket says whether another daemon runs: what is at the path is stale."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._path.unlink(missing_ok=True)
            listener.bind(str(self._path))
            self._path.chmod(0o666)
        except OSError as error:
            listener.close()
            raise OperatorError(f"cannot make socket `{self._path}`: {error.strerror or error}") from error
        self._server = await asyncio.start_unix_server(self._connected, sock=listener, limit=MAX_LINE)

    async def stop(self) -> None:
        if self._server is not None:
            self._path.unlink(missing_ok=True)
            self._server.close()
            self._server = None

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        uid, pidfd = -1, -1
        try:
            pid, uid, pidfd = _peer(writer.get_extra_info("socket"))
            self._connections[uid] += 1
            if self._connections.total() > MAX_CONNECTIONS or self._connections[uid] > MAX_CONNECTIONS_OF_USER:
                log.warning("declaration refused: too many at once", uid=uid, pid=pid)
                return
            async with asyncio.timeout(TIMEOUT_S):
                line = await reader.readuntil(b"\n")
            writer.write(msgspec.json.encode(Declared(self._answer(line, pid, uid, pidfd))) + b"\n")
            async with asyncio.timeout(TIMEOUT_S):
                await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            log.warning("declaration dropped", why=str(error) or type(error).__name__)
        finally:
            if uid >= 0:
                self._connections[uid] -= 1
                self._connections += Counter()
            if pidfd >= 0:
                os.close(pidfd)
            writer.close()

    def _answer(self, line: bytes, pid: int, uid: int, pidfd: int) -> str:
        try:
            request = self._decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            return f"bad request: {error}; is the service of the same version?"
        refusal = self._label(request.agent, pid, uid, pidfd)
        if refusal:
            log.warning("declaration refused", why=refusal, pid=pid, uid=uid)
            # of any other name everybody could have as many alerts as he likes
            if request.agent in self._attribution.agents.declarable:
                self._alert(f"declaration refused: {refusal}", by=f"process {pid}, uid {uid}")
        else:
            log.info("agent declared", agent=request.agent, pid=pid, uid=uid)
        return refusal

    def _label(self, agent: str, pid: int, uid: int, pidfd: int) -> str:
        if os.stat("/proc/self/ns/pid").st_ino != INITIAL_PID_NAMESPACE:
            return "the host agent is in a pid namespace of its own, where it cannot tell who asks"
        try:
            chain = self._attribution.of_process(pid)
            if not isinstance(chain, Chain):
                return f"who asks is not known: {chain.reason}"
            if not _alive(pidfd):
                return "the process that asked has ended"
            refusal = self._attribution.agents.why_not_declare(agent, chain, uid)
            if not refusal:
                self._pins.declare(chain.lineage[-1].node, agent)
        except (OSError, OperatorError) as error:
            return str(error)
        return refusal


def ask(path: Path, agent: str, *, server_uid: int = 0) -> None:
    """For the launcher: the calling process becomes the agent. Blocks. Raises `OperatorError` when it does not."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(TIMEOUT_S)
            sock.connect(str(path))
            _pid, uid, _ = _CREDENTIALS.unpack(
                sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            )
            if uid != server_uid:
                raise OperatorError(f"`{path}` is served by uid `{uid}` and not by hopgate: do not believe it")
            sock.sendall(msgspec.json.encode(Declare(agent)) + b"\n")
            data = b""
            while not data.endswith(b"\n") and len(data) < 64 * MAX_LINE and (more := sock.recv(MAX_LINE)):
                data += more
        answer = msgspec.json.decode(data, type=Declared)
    except (FileNotFoundError, ConnectionRefusedError) as error:
        raise OperatorError(f"hopgate is not running: nobody answers on `{path}`") from error
    except OSError as error:
        raise OperatorError(f"cannot declare agent `{agent}` on `{path}`: {error.strerror or error}") from error
    except msgspec.MsgspecError as error:
        raise OperatorError(f"hopgate closed `{path}` without an answer: see its log") from error
    if answer.refusal:
        raise OperatorError(answer.refusal)


def _peer(sock: socket.socket) -> tuple[int, int, int]:
    """Process id, uid and a pidfd of who connected. Raises `OSError` when it is gone."""
    pid, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    try:
        (pidfd,) = struct.unpack("i", sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD, 4))
    except OSError:
        pidfd = os.pidfd_open(pid)
    return pid, uid, pidfd


def _alive(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return not poll.poll(0)
