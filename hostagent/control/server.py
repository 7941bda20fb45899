"""The control socket: answers the command line of this host's root, and nobody else.

The socket is 0600, and whoever connects is looked at by SO_PEERCRED as well (unix(7)), whatever became of the mode. Who
decided an approval is told by the audit login uid of the peer's process, which the kernel keeps over `sudo`
(proc_pid_loginuid(5)).

Blind spots: where nothing sets a login uid (containers, CI jobs) every decision is by `root`; a process of root that
hands its connected socket to somebody else answers for what is done with it; an agent that runs as root is root here.
"""

from __future__ import annotations

import asyncio
import os
import pwd
import socket
import struct
from pathlib import Path
from typing import Protocol, assert_never

import msgspec
import structlog

from hostagent.control import messages
from hostagent.control.approvals import Approvals
from hostagent.errors import OperatorError

REQUEST_TIMEOUT_S = 5.0
MAX_CONNECTIONS = 32
_NO_LOGIN_UID = 2**32 - 1
_CREDENTIALS = struct.Struct("3i")

log = structlog.get_logger()


class ControlUnavailable(OperatorError):
    """The control socket cannot be made, or nobody answers on it."""


class Handler(Protocol):
    """What the daemon does for its operators. Methods may raise `OperatorError`: its message is the answer."""

    @property
    def approvals(self) -> Approvals: ...

    def check_approver(self, pid: int) -> None:
        """Raises `OperatorError` when this process may not approve anything: an agent that is root could otherwise
        approve what it asks for itself."""

    def status(self) -> dict[str, object]:
        """Names and values that JSON can carry."""

    def reload(self) -> str:
        """Takes the policies on disk, and gives the version then in force. When they cannot be loaded the old ones
        stay, and that is an `OperatorError`."""

    async def visit_targets(self) -> tuple[messages.Visit, ...]:
        """Tries whether the targets can be reached, within half of `client.ANSWER_TIMEOUT_S`."""


class ControlServer:
    """Serves on `path` from `start` to `stop`. `allowed_uid` is the only user that gets an answer."""

    def __init__(self, path: Path, handler: Handler, *, allowed_uid: int = 0) -> None:
        self._path = path
        self._handler = handler
        self._allowed_uid = allowed_uid
        self._connections = 0
        self._decode = msgspec.json.Decoder(messages.Request).decode
        self._listener: socket.socket | None = None
        self._server: asyncio.Server | None = None

    def claim(self) -> None:
        """Takes the path; who asks waits until `start`. Raises `ControlUnavailable`, also when another daemon answers
        there."""
        self._listener = _listen(self._path)

    async def start(self) -> None:
        """Serves; takes the path first, if that was not done. Raises `ControlUnavailable`."""
        if self._listener is None:
            self.claim()
        self._server = await asyncio.start_unix_server(self._connected, sock=self._listener, limit=messages.MAX_REQUEST)

    async def stop(self) -> None:
        """Takes the socket away. Requests that are being answered are not waited for."""
        if self._server is not None:
            _remove(self._path)
            self._server.close()
            self._server = None

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        try:
            pid, uid = _peer(writer.get_extra_info("socket"))
            if uid != self._allowed_uid:
                log.warning("control socket refused a peer", uid=uid, pid=pid)
                return
            if self._connections > MAX_CONNECTIONS:
                log.warning("control socket is busy", connections=self._connections)
                return
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                line = await reader.readuntil(b"\n")
            writer.write(msgspec.json.encode(await self._answer(line, pid)) + b"\n")
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                await writer.drain()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            log.warning("control request dropped", why=str(error) or type(error).__name__)
        finally:
            self._connections -= 1
            writer.close()

    async def _answer(self, line: bytes, pid: int) -> messages.Answer:
        try:
            request = self._decode(line)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            return messages.Failed(message=f"bad request: {error}; is the service of the same version?")
        try:
            return await self._meet(request, pid)
        except OperatorError as error:
            return messages.Failed(message=str(error))

    async def _meet(self, request: messages.Request, pid: int) -> messages.Answer:
        match request:
            case messages.Approve(approval=approval, reason=reason):
                self._handler.check_approver(pid)
                return self._decide(approval, True, reason, pid)
            case messages.Deny(approval=approval, reason=reason):
                return self._decide(approval, False, reason, pid)
            case messages.ListApprovals():
                return messages.PendingApprovals(pending=tuple(self._handler.approvals.pending))
            case messages.AskStatus():
                return messages.Status(report=self._handler.status())
            case messages.Reload():
                return messages.Reloaded(policy=self._handler.reload())
            case messages.VisitTargets():
                return messages.TargetsVisited(visits=await self._handler.visit_targets())
            case _:
                assert_never(request)

    def _decide(self, approval: str, approved: bool, reason: str, pid: int) -> messages.ApprovalDecided:
        by = _who(pid, self._allowed_uid)
        row = self._handler.approvals.decide(approval, approved=approved, by=by, reason=reason)
        return messages.ApprovalDecided(approval=row, outcome="approved" if approved else "denied", by=by)


def _listen(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.is_socket():
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                try:
                    probe.connect(str(path))
                except ConnectionRefusedError:
                    path.unlink(missing_ok=True)
                else:
                    raise ControlUnavailable(f"another hopgate answers on `{path}`: stop it first")
        umask = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(umask)
        listener.listen(MAX_CONNECTIONS)
    except OSError as error:
        listener.close()
        raise ControlUnavailable(f"cannot make control socket `{path}`: {error.strerror or error}") from error
    except ControlUnavailable:
        listener.close()
        raise
    return listener


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


def _peer(sock: socket.socket) -> tuple[int, int]:
    pid, uid, _ = _CREDENTIALS.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return pid, uid


def _who(pid: int, uid: int) -> str:
    """`alice (uid 1000)`: who logged in, or the uid of the process where nobody did."""
    try:
        login_uid = int(Path(f"/proc/{pid}/loginuid").read_text())
    except (OSError, ValueError):
        login_uid = _NO_LOGIN_UID
    if login_uid == _NO_LOGIN_UID:
        login_uid = uid
    try:
        name = pwd.getpwuid(login_uid).pw_name
    except KeyError:
        name = "unknown"
    return f"{name} (uid {login_uid})"
