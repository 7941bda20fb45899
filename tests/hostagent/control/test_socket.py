"""The control socket, spoken to as the command line does and as nobody should."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from hostagent.control import messages
from hostagent.control.approvals import Approvals
from hostagent.control.client import ControlFailed, ask
from hostagent.control.server import ControlServer, ControlUnavailable
from hostagent.control.store import Store
from hostagent.errors import OperatorError


class Daemon:
    """What the host agent shows of itself to the socket."""

    def __init__(self, store: Store) -> None:
        self.approvals = Approvals(store)
        self.problem = ""
        self.agents: set[int] = set()

    def check_approver(self, pid: int) -> None:
        if pid in self.agents:
            raise OperatorError(f"process `{pid}` runs under agent `b`")

    def status(self) -> dict[str, object]:
        return {"policy": "v1", "workers": 2, "targets": ["orders"]}

    def reload(self) -> str:
        if self.problem:
            raise OperatorError(self.problem)
        return "v2"

    async def visit_targets(self) -> tuple[messages.Visit, ...]:
        await asyncio.sleep(0)
        return (messages.Visit("orders", "192.0.2.10:5432", True, "it takes connections"),)


def served(tmp_path: Path, talk: Callable[[Path, Daemon], Any], *, allowed_uid: int = 0) -> Any:
    """Runs `talk` in a thread while the socket is served; gives its result."""
    path = tmp_path / "control.sock"
    store = Store.create(tmp_path / "control.sqlite")

    async def run() -> Any:
        daemon = Daemon(store)
        server = ControlServer(path, daemon, allowed_uid=allowed_uid)
        await server.start()
        try:
            hold = asyncio.ensure_future(
                daemon.approvals.hold(
                    session="s", approval="H-7KQ3F9", operation=1, hop="b", rule="r", preview="UPDATE t", timeout_s=30
                )
            )
            await asyncio.sleep(0)
            result = await asyncio.to_thread(talk, path, daemon)
            hold.cancel()
            await asyncio.gather(hold, return_exceptions=True)
            return result
        finally:
            await server.stop()

    try:
        return asyncio.run(run())
    finally:
        store.close()


def raw(path: Path, data: bytes, *, half_close: bool = True) -> bytes:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(5)
        sock.connect(str(path))
        try:
            sock.sendall(data)
            if half_close:
                sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        got = b""
        try:
            while more := sock.recv(65536):
                got += more
        except ConnectionResetError:
            pass
        return got


def test_every_request_is_answered(tmp_path: Path) -> None:
    def talk(path: Path, daemon: Daemon) -> None:
        pending = ask(path, messages.ListApprovals(), messages.PendingApprovals).pending
        assert [row.preview for row in pending] == ["UPDATE t"]
        assert ask(path, messages.AskStatus(), messages.Status).report["workers"] == 2
        assert ask(path, messages.Reload(), messages.Reloaded).policy == "v2"
        (visit,) = ask(path, messages.VisitTargets(), messages.TargetsVisited).visits
        assert (visit.target, visit.reached) == ("orders", True)
        decided = ask(path, messages.Approve(approval="H-7KQ3F9", reason="ok"), messages.ApprovalDecided)
        assert (decided.outcome, decided.approval.id) == ("approved", "H-7KQ3F9")
        assert "(uid " in decided.by
        with pytest.raises(ControlFailed, match="is approved by"):
            ask(path, messages.Deny(approval="H-7KQ3F9"), messages.ApprovalDecided)
        daemon.problem = "policy.yaml:3: unknown key"
        with pytest.raises(ControlFailed, match=r"policy\.yaml:3: unknown key"):
            ask(path, messages.Reload(), messages.Reloaded)

    served(tmp_path, talk)


def test_the_socket_is_for_root_only_and_goes_away(tmp_path: Path) -> None:
    mode = served(tmp_path, lambda path, _: stat.S_IMODE(path.stat().st_mode))
    assert mode == 0o600
    assert not (tmp_path / "control.sock").exists()


def test_another_user_gets_no_answer_even_when_the_mode_lets_it_in(tmp_path: Path) -> None:
    script = """
import socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
try:
    sock.sendall(b'{"is":"AskStatus"}\\n')
    sys.stdout.write(repr(sock.recv(1000)))
except (ConnectionResetError, BrokenPipeError):
    sys.stdout.write("b''")
"""

    def talk(path: Path, _: Daemon) -> tuple[str, str]:
        def run_as_nobody() -> str:
            command = ["/usr/bin/python3", "-I", "-c", script, str(path)]
            done = subprocess.run(command, user=65534, group=65534, capture_output=True, text=True)
            return done.stdout + done.stderr

        kept_out = run_as_nobody()
        path.chmod(0o666)
        return kept_out, run_as_nobody()

    with tempfile.TemporaryDirectory() as public:
        Path(public).chmod(0o755)
        kept_out, refused = served(Path(public), talk)
    assert "PermissionError" in kept_out
    assert refused == "b''"
    assert served(tmp_path, lambda path, _: raw(path, b'{"is":"AskStatus"}\n'), allowed_uid=65534) == b""


@pytest.mark.parametrize(
    "data", [b"\n", b"{}\n", b'{"is":"Approve"}\n', b'{"is":"Nothing"}\n', b"\xff\xfe\n", b"[" * 10_000 + b"\n"]
)
def test_a_bad_request_is_told_so(tmp_path: Path, data: bytes) -> None:
    answer = msgspec.json.decode(served(tmp_path, lambda path, _: raw(path, data)), type=messages.Answer)
    assert isinstance(answer, messages.Failed)
    assert answer.message.startswith("bad request")


@pytest.mark.parametrize("data", [b"", b'{"is":"AskStatus"}', b"x" * 100_000, b"x" * 100_000 + b"\n"])
def test_what_is_no_line_is_dropped_and_the_next_is_served(tmp_path: Path, data: bytes) -> None:
    def talk(path: Path, _: Daemon) -> None:
        assert raw(path, data) == b""
        assert ask(path, messages.AskStatus(), messages.Status).report["policy"] == "v1"

    served(tmp_path, talk)


def test_a_silent_peer_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hostagent.control.server.REQUEST_TIMEOUT_S", 0.05)
    assert served(tmp_path, lambda path, _: raw(path, b"{", half_close=False)) == b""


def test_a_second_daemon_is_refused_and_a_stale_socket_replaced(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))

    def talk(path: Path, daemon: Daemon) -> None:
        with pytest.raises(ControlUnavailable, match="another hopgate answers"):
            asyncio.run(ControlServer(path, daemon).start())
        assert ask(path, messages.AskStatus(), messages.Status).report["policy"] == "v1"

    served(tmp_path, talk)
    nowhere = ControlServer(tmp_path / "absent" / "control.sock", None)  # type: ignore[arg-type]
    with pytest.raises(ControlUnavailable, match="cannot make control socket"):
        asyncio.run(nowhere.start())


def test_the_client_says_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "control.sock"

    def failure(timeout_s: float = 5.0) -> str:
        with pytest.raises(ControlFailed) as raised:
            ask(path, messages.AskStatus(), messages.Status, timeout_s)
        return str(raised.value)

    assert failure() == f"hopgate is not running: nobody answers on `{path}`"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert failure() == f"hopgate is not running: nobody answers on `{path}`"
    path.unlink()
    script = """
import socket, sys, time
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
print("up", flush=True)
peer, _ = listener.accept()
peer.recv(99)
exec(sys.argv[2])
"""
    for reply, expected in (
        ("peer.close()", "without an answer"),
        ("peer.sendall(b'{\\n'); peer.close()", "cannot be read"),
        ('peer.sendall(b\'{"is":"Reloaded","policy":"x"}\\n\'); peer.close()', "answered `Reloaded` to `AskStatus`"),
        ("time.sleep(9)", "did not answer"),
    ):
        path.unlink(missing_ok=True)
        with subprocess.Popen([sys.executable, "-c", script, str(path), reply], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            assert expected in failure(1.0)
            process.kill()


def test_who_decided_is_the_login_user_where_there_is_one(tmp_path: Path) -> None:
    login = Path("/proc/self/loginuid").read_text().strip() if os.path.exists("/proc/self/loginuid") else ""
    request = messages.Deny(approval="H-7KQ3F9")
    decided = served(tmp_path, lambda path, _: ask(path, request, messages.ApprovalDecided))
    expected = "0" if login in ("", str(2**32 - 1)) else login
    assert decided.by.endswith(f"(uid {expected})")
