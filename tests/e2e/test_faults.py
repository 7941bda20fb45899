"""What fails while it runs: a full disk, killed workers, a killed daemon, hostile clients. In all of it nothing reaches
the server that was not recorded as allowed before, and nothing reaches it past the gateway.

The tests of this file share one bed, and leave it in order. The last one looks back on all of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import resource
import select
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e import beds
from tests.e2e.beds import DATABASE, JOB, Bed, target, wait_until
from tests.lab.cgroups import inside
from tests.lab.hopgate import GatewayError

VERIFIED = "{mode: verify-full, ca: ../ca.pem}"
SPACE_BYTES = 24 * 1024 * 1024
KILLS = 32
SEED = 20261124

LOADER = """
# asks one statement after another, over a new connection whenever the last one was lost; tells what was answered
import json, socket, struct, sys, threading
host, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
stop = threading.Event()
answered, lost, refused = [], [], []

def exactly(sock, size):
    data = sock.recv(size, socket.MSG_WAITALL)
    if len(data) < size:
        raise ConnectionError("closed")
    return data

def until_ready(sock):
    seen = set()
    while "Z" not in seen:
        kind, size = struct.unpack("!cI", exactly(sock, 5))
        exactly(sock, size - 4)
        seen.add(kind.decode())
    return seen

def work(which):
    number = 0
    while not stop.is_set():
        try:
            with socket.create_connection((host, 5432), timeout=20) as sock:
                words = b"user\\0agent\\0database\\0shop\\0\\0"
                sock.sendall(struct.pack("!II", len(words) + 8, 196608) + words)
                until_ready(sock)
                for _ in range(200):
                    if stop.is_set():
                        return
                    number += 1
                    text = f"SELECT '{name}-{which}-{number}'"
                    body = text.encode() + b"\\0"
                    sock.sendall(b"Q" + struct.pack("!I", len(body) + 4) + body)
                    seen = until_ready(sock)
                    (refused if "E" in seen else answered).append(text)
        except OSError as error:
            lost.append(str(error))
            stop.wait(0.02)

threads = [threading.Thread(target=work, args=(which,)) for which in range(count)]
for thread in threads:
    thread.start()
sys.stdin.read()
stop.set()
for thread in threads:
    thread.join()
print(json.dumps({"answered": answered, "refused": refused, "lost": len(lost)}))
"""


@dataclass
class World(Bed):
    """A bed whose index and recordings lie on file systems of their own, that can be full."""

    def recorded_statements(self) -> set[str]:
        """Every statement that some recording holds as allowed."""
        found: set[str] = set()
        for path in (self.gateway.state_dir / "recordings").rglob("*.hgr"):
            for line in path.read_bytes().splitlines():
                with contextlib.suppress(ValueError):
                    record = json.loads(line.partition(b" ")[2])
                    if record["is"] == "ruled" and record["decision"] == "allow":
                        found.add(record["text"])
        return found

    def served_statements(self) -> set[str]:
        """Every statement that the server has seen from the network."""
        return set(re.findall(r"shop_app@192\S* LOG:  statement: (.*)", self.server.log()))

    def alerts(self, words: str) -> list[str]:
        return [json.dumps(line) for line in self.log_lines() if line.get("level") == "error" and words in str(line)]


class Talk:
    """One psql that is told one statement after another."""

    def __init__(self, bed: Bed) -> None:
        self.process = subprocess.Popen(
            bed.gateway.inside(
                [
                    *("psql", "-X", "-q", "-A", "-t", "-v", "VERBOSITY=verbose"),
                    f"host={DATABASE} dbname=shop user=agent sslmode=require",
                ]
            ),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._number = 0
        self.session = ""

    def say(self, sql: str, timeout_s: float = 20) -> str:
        """The answer, with errors; what there is when psql gives up."""
        self._number += 1
        end = f"--end {self._number}--"
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{sql}\n\\echo {end}\n".encode())
            self.process.stdin.flush()
        told = self._read_until(end.encode(), timeout_s)
        return told.decode().partition(end)[0]

    def _read_until(self, end: bytes, timeout_s: float) -> bytes:
        assert self.process.stdout is not None
        told, deadline = b"", time.monotonic() + timeout_s
        while end not in told:
            if not select.select([self.process.stdout], [], [], max(deadline - time.monotonic(), 0))[0]:
                raise AssertionError(f"no answer within {timeout_s:g} s; so far {told!r}")
            data = os.read(self.process.stdout.fileno(), 65536)
            if not data:
                break
            told += data
        return told

    def close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Talk:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


@contextmanager
def tmpfs(path: Path, mode: str = "0755") -> Iterator[None]:
    path.mkdir(parents=True, exist_ok=True)
    options = f"size={SPACE_BYTES},mode={mode}"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "hopgate-test", str(path)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


@contextmanager
def full(directory: Path) -> Iterator[None]:
    """The file system of the directory has no byte left."""
    ballast = directory / ".ballast"
    try:
        with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        yield
    finally:
        ballast.unlink()


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with ExitStack() as stack:
        made = stack.enter_context(
            beds.bed(
                "faults",
                server_settings={
                    "log_statement": "all",
                    "log_connections": "on",
                    "log_line_prefix": "%m [%p] %u@%h ",
                    "max_connections": "100",
                },
            )
        )
        made.server.set_auth("host shop shop_app all scram-sha-256")
        # mounted below what the gateway fixture removes, so unmounted before it does
        mounts = stack.enter_context(ExitStack())
        mounts.enter_context(tmpfs(made.gateway.state_dir))
        mounts.enter_context(tmpfs(made.gateway.state_dir / "recordings", "0700"))
        made.gateway.write_policy(JOB + "targets:\n" + target("shop", f"{DATABASE}:5432", tls=VERIFIED) + beds.rules())
        made.gateway.start()
        stack.callback(made.gateway.stop)
        yield World(**{name: getattr(made, name) for name in Bed.__dataclass_fields__})


def session_of(world: World, talk: Talk) -> tuple[str, int]:
    """The session of this client, and the worker that has it: by the mark that it leaves in its recording."""
    mark = f"mark-{time.monotonic_ns()}"
    talk.say(f"SELECT '{mark}';")
    for path in (world.gateway.state_dir / "recordings").rglob("*.hgr"):
        if mark.encode() in path.read_bytes():
            for worker in world.workers():
                for link in Path(f"/proc/{worker}/fd").iterdir():
                    with contextlib.suppress(OSError):
                        if os.readlink(link) == str(path):
                            return path.stem, worker
    raise AssertionError("the session has no recording, or no worker has it open")


# --- a full disk ------------------------------------------------------------------------------------------------------


def test_nothing_runs_unrecorded_when_the_recordings_have_no_space(world: World) -> None:
    with Talk(world) as talk:
        session, _ = session_of(world, talk)
        with full(world.gateway.state_dir / "recordings"):
            # what fits into the last page of the file is still recorded, and so may still run
            for number in range(200):
                told = talk.say(f"SELECT 'space-{number}';")
                if f"space-{number}" not in told.splitlines():
                    break
            assert "ERROR:  42501: " in told
            assert "it cannot be recorded" in told and re.search("No space left on device|is the disk full?", told)
            assert "HINT:  nothing runs unrecorded: tell the operators of this runner" in told
            for later in range(3):
                assert "42501" in talk.say(f"SELECT 'later-{later}';")
            for tls in ("disable", "require"):
                refused = world.psql("SELECT 'new-session'", tls=tls)
                assert refused.returncode == 2
                assert refused.stderr.count("FATAL: ") == 1, refused.stderr
                assert f"no connection to {DATABASE}:5432: it cannot be recorded: " in refused.stderr
                assert "HINT:  nothing runs unrecorded" in refused.stderr
            seen = world.served_statements()
            assert f"SELECT 'space-{number}';" not in seen
            assert not [text for text in seen if "later-" in text or "new-session" in text]
            assert seen <= world.recorded_statements()
        assert world.alerts("the recording cannot be written")
        assert world.alerts("it cannot be recorded")
        after = world.psql("SELECT 'space again'", tls="require")
        assert after.stdout == "space again\n", after.stderr
    wait_until(
        lambda: any(row["id"] == session and row["state"] == "interrupted" for row in world.sessions()), "interrupted"
    )
    assert world.status()["worker_deaths"] == 0
    assert world.gateway.cli("audit", "verify").returncode == 0


def test_no_session_opens_when_the_index_has_no_space(world: World) -> None:
    with full(world.gateway.state_dir):
        for number in range(60):
            done = world.psql(f"SELECT 'index-{number}'", tls="require")
            if done.returncode:
                break
        assert done.stderr.count("FATAL: ") == 1, done.stderr
        assert "it cannot be recorded: control store `" in done.stderr and "full" in done.stderr
        assert f"SELECT 'index-{number}'" not in world.served_statements()
    assert world.alerts("database or disk is full")
    assert world.psql("SELECT 'index again'", tls="require").stdout == "index again\n"
    assert world.status()["worker_deaths"] == 0
    assert world.gateway.cli("audit", "verify").returncode == 0


# --- hostile clients --------------------------------------------------------------------------------------------------

ATTACKS = """
# connects once, misbehaves as it is told, and tells how it ended
import json, socket, struct, sys, time
how, host = sys.argv[1:]
ssl_request = struct.pack("!II", 8, 80877103)
sock = socket.create_connection((host, 5432), timeout=20)
try:
    if how == "garbage":
        sock.sendall(bytes(range(256)) * 64)
    elif how == "giant length":
        sock.sendall(struct.pack("!II", 0x7FFFFFFF, 196608) + b"user\\0")
    elif how == "endless start-up":
        sock.sendall(struct.pack("!II", 9000, 196608))
        for _ in range(20000):
            sock.sendall(b"x" * 65536)
    elif how == "ssl flood":
        for _ in range(1000):
            sock.sendall(struct.pack("!II", 8, 80877104))
    elif how == "garbage as tls":
        sock.sendall(ssl_request)
        assert sock.recv(1) == b"S"
        sock.sendall(b"\\x16\\x03\\x01\\xff\\xff" + bytes(70000))
    elif how == "plain behind ssl":
        sock.sendall(ssl_request + struct.pack("!II", 40, 196608) + b"user\\0agent\\0database\\0shop\\0\\0......")
    got = b""
    while len(got) < 1 << 20:
        data = sock.recv(65536)
        if not data:
            break
        got += data
    print(json.dumps({"end": "closed", "got": got.decode("latin-1")}))
except ConnectionError as error:
    print(json.dumps({"end": type(error).__name__, "got": ""}))
"""


@pytest.mark.parametrize(
    "how", ["garbage", "giant length", "endless start-up", "ssl flood", "garbage as tls", "plain behind ssl"]
)
def test_a_hostile_client_loses_its_own_connection_and_nothing_else(world: World, how: str) -> None:
    with Talk(world) as talk:
        assert talk.say("SELECT 'beside';") == "beside\n"
        told = json.loads(world.python(ATTACKS, how, DATABASE, timeout_s=30))
        assert told["end"] in ("closed", "ConnectionResetError", "BrokenPipeError")
        assert talk.say("SELECT 'still beside';") == "still beside\n"
    wait_until(lambda: world.status()["open_sessions"] == 0, "all sessions closed")
    ended = world.sessions()[0]
    assert ended["operations"] == 0 or ended["chain"], ended
    assert world.status()["worker_deaths"] == 0


CROWD = """
import socket, sys
held = [socket.create_connection((sys.argv[1], 5432), timeout=20) for _ in range(int(sys.argv[2]))]
print(len(held), flush=True)
sys.stdin.read()
"""


def test_five_hundred_half_open_connections_keep_nobody_out(world: World) -> None:
    crowd = world.start_python(CROWD, DATABASE, "500")
    try:
        assert crowd.stdout is not None and crowd.stdout.readline() == "500\n"
        wait_until(lambda: world.status()["open_sessions"] == 500, "all of them have a session", 20)
        begun = time.monotonic()
        assert world.psql("SELECT 'through the crowd'", tls="require").stdout == "through the crowd\n"
        assert time.monotonic() - begun < 5
    finally:
        crowd.kill()
        crowd.communicate()
    wait_until(lambda: world.status()["open_sessions"] == 0, "all sessions closed", 20)
    assert world.status()["worker_deaths"] == 0


@pytest.fixture
def few_descriptors(world: World) -> Iterator[None]:
    """The gateway is restarted with room for few connections, and afterwards with what it had."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    world.gateway.stop()
    resource.setrlimit(resource.RLIMIT_NOFILE, (150, hard))
    try:
        world.gateway.start()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    yield
    world.gateway.stop()
    world.gateway.start()


@pytest.mark.usefixtures("few_descriptors")
def test_more_clients_than_a_worker_has_descriptors_cost_no_worker(world: World) -> None:
    workers = world.workers()
    with Talk(world) as talk:
        assert talk.say("SELECT 'before';") == "before\n"
        crowd = world.start_python(CROWD, DATABASE, "600")
        try:
            assert crowd.stdout is not None and crowd.stdout.readline() == "600\n"
            time.sleep(1)
            assert talk.say("SELECT 'within';") == "within\n"
        finally:
            crowd.kill()
            crowd.communicate()
        wait_until(lambda: world.status()["open_sessions"] == 1, "the crowd's sessions closed", 20)
    assert world.workers() == workers
    assert "this worker has no room for more connections" in world.gateway.log()
    assert world.psql("SELECT 'after'", tls="require").stdout == "after\n"


NEVER_READS = """
import socket, struct, sys, time
sock = socket.create_connection((sys.argv[1], 5432), timeout=20)
words = b"user\\0agent\\0database\\0shop\\0\\0"
sock.sendall(struct.pack("!II", len(words) + 8, 196608) + words)
got = b""
while b"Z\\0\\0\\0\\5I" not in got:
    got += sock.recv(4096)
text = b"SELECT repeat('x', 1000000) FROM generate_series(1, 4000)\\0"
sock.sendall(b"Q" + struct.pack("!I", len(text) + 4) + text)
print("asked", flush=True)
sys.stdin.read()
"""


def resident_kib(pid: int) -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1])


def test_a_client_that_never_reads_costs_bounded_memory(world: World) -> None:
    before = {worker: resident_kib(worker) for worker in world.workers()}
    client = world.start_python(NEVER_READS, DATABASE)
    try:
        assert client.stdout is not None and client.stdout.readline() == "asked\n"
        time.sleep(3)
        grown = {worker: resident_kib(worker) - was for worker, was in before.items()}
        assert max(grown.values()) < 16 * 1024, grown
        assert world.psql("SELECT 'not stuck'", tls="require").stdout == "not stuck\n"
    finally:
        client.kill()
        client.communicate()
    wait_until(lambda: world.status()["open_sessions"] == 0, "its session closed")


def test_the_listener_itself_cannot_be_dialled(world: World) -> None:
    for host in ("127.0.0.1", beds.RUNNER):
        done = world.psql("SELECT 1", host=host, port=301)
        assert done.returncode == 2
        assert "Connection refused" in done.stderr or "reset" in done.stderr, done.stderr
    assert world.status()["open_sessions"] == 0


def test_a_connect_from_outside_the_hooked_cgroup_is_denied_and_recorded(world: World) -> None:
    done = subprocess.run(
        inside(
            ["psql", "-X", "-c", "SELECT 1", f"host={DATABASE} dbname=shop user=agent sslmode=require"],
            netns=world.runner,
        ),
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count("FATAL: ") == 1 and "could not be attributed to a process" in done.stderr
    assert "outside the hooked cgroup" in done.stderr and "HINT: " in done.stderr
    newest = world.sessions()[0]
    assert "could not be attributed" in str(newest["refusal"])
    assert newest["chain"] == "" and newest["operations"] == 0


# --- killed workers, killed daemon ------------------------------------------------------------------------------------


def test_a_killed_worker_takes_its_sessions_with_it_and_no_others(world: World) -> None:
    with ExitStack() as stack:
        talks: dict[int, tuple[Talk, str]] = {}
        while len(talks) < 2:
            talk = stack.enter_context(Talk(world))
            session, worker = session_of(world, talk)
            talks[worker] = (talk, session)
        (dying, (lost, lost_session)), (other, (kept, kept_session)) = talks.items()
        assert lost.say("SELECT 'its last';") == "its last\n"
        deaths = world.status()["worker_deaths"]
        assert isinstance(deaths, int)
        os.kill(dying, signal.SIGKILL)
        assert "connection to server was lost" in lost.say("SELECT 'after its end';")
        assert kept.say("SELECT 'goes on';") == "goes on\n"
        took_s = wait_until(lambda: world.status()["workers"] == 2, "the worker was replaced", 5)
        assert took_s < 2
        assert dying not in world.workers() and other in world.workers()
        assert world.status()["worker_deaths"] == deaths + 1
        rows = {row["id"]: row for row in world.sessions()}
        assert rows[lost_session]["state"] == "interrupted"
        assert "worker died: signal 9" in str(rows[lost_session]["reason"])
        assert rows[kept_session]["state"] == "open"
        ruled = [record["text"] for record in world.replay(lost_session) if record["is"] == "ruled"]
        assert ruled[-1] == "SELECT 'its last';"
    assert world.gateway.cli("audit", "verify").returncode == 0


def rules_of(world: World) -> list[str]:
    """Everything of netfilter in the runner's namespace, without counters, dates and what is random."""
    lines: list[str] = []
    for command in (["iptables-save"], ["ip6tables-save"], ["ipset", "save"]):
        said = subprocess.run(
            ["ip", "netns", "exec", world.runner, *command], check=True, capture_output=True, text=True
        ).stdout
        lines += [
            re.sub(r"\[\d+:\d+\]| initval \S+", "", line) for line in said.splitlines() if not line.startswith("#")
        ]
    return sorted(line for line in lines if not re.match(r":[A-Z]+ ACCEPT|\*|COMMIT", line))


def programs_of(world: World) -> list[int]:
    """The kernel's ids of the programs that are pinned."""
    found = []
    for pin in sorted(world.gateway.pin_dir.glob("program_*")):
        said = subprocess.run(
            ["bpftool", "-j", "prog", "show", "pinned", str(pin)], check=True, capture_output=True, text=True
        ).stdout
        found.append(json.loads(said)["id"])
    return found


def loaded_programs() -> set[int]:
    said = subprocess.run(["bpftool", "-j", "prog", "show"], check=True, capture_output=True, text=True).stdout
    return {program["id"] for program in json.loads(said)}


def test_while_the_daemon_is_dead_connects_are_refused_and_its_restart_doubles_nothing(world: World) -> None:
    rules, programs = rules_of(world), programs_of(world)
    pins = sorted(path.name for path in world.gateway.pin_dir.iterdir())
    assert len(programs) >= 4 and [line for line in rules if "REDIRECT" in line]
    with Talk(world) as talk:
        session, _ = session_of(world, talk)
        world.gateway.kill()
        refused = world.psql("SELECT 'while dead'")
        assert refused.returncode == 2
        assert "Connection refused" in refused.stderr, refused.stderr
        assert "connection to server was lost" in talk.say("SELECT 'while dead';")
    assert rules_of(world) == rules
    assert programs_of(world) == programs
    wait_until(lambda: not world.workers(), "the workers went with it")
    world.gateway.start()
    assert world.psql("SELECT 'alive'", tls="require").stdout == "alive\n"
    assert rules_of(world) == rules
    assert programs_of(world) == programs
    assert sorted(path.name for path in world.gateway.pin_dir.iterdir()) == pins

    def row() -> dict[str, object]:
        (found,) = [row for row in world.sessions() if row["id"] == session]
        return found

    wait_until(lambda: row()["state"] == "interrupted", "the session of the dead daemon was ended")
    assert "the host agent died" in str(row()["reason"])
    assert not [text for text in world.served_statements() if "while dead" in text]
    assert world.gateway.cli("audit", "verify").returncode == 0


def test_a_worker_that_a_killed_daemon_left_behind_holds_nothing(world: World) -> None:
    """It has not yet got to where it asks to die with the daemon: here it is kept from it."""
    world.gateway.stop()

    def start() -> None:
        with contextlib.suppress(GatewayError):
            world.gateway.start()

    starting = threading.Thread(target=start)
    starting.start()
    while not (left := world.workers()):
        time.sleep(0.002)
    for worker in left:
        os.kill(worker, signal.SIGSTOP)
    try:
        world.gateway.kill()
        starting.join()
        assert set(left) <= set(world.workers()), "they were not left behind"
        world.gateway.start()
        assert world.psql("SELECT 'alive'", tls="require").stdout == "alive\n"
    finally:
        for worker in left:
            os.kill(worker, signal.SIGCONT)
    wait_until(lambda: not set(left) & set(world.workers()), "they ended")
    assert world.psql("SELECT 'still alive'", tls="require").stdout == "still alive\n"


def test_a_second_daemon_touches_nothing(world: World) -> None:
    rules, pins = rules_of(world), sorted(path.name for path in world.gateway.pin_dir.iterdir())
    deaths = world.status()["worker_deaths"]
    with Talk(world) as talk:
        session, _ = session_of(world, talk)
        second = world.gateway.cli("run", check=False)
        assert second.returncode == 1 and "is another hopgate running?" in second.stderr, second.stderr
        (row,) = [row for row in world.sessions() if row["id"] == session]
        assert row["state"] == "open"
        assert talk.say("SELECT 'still here';") == "still here\n"
    assert rules_of(world) == rules
    assert sorted(path.name for path in world.gateway.pin_dir.iterdir()) == pins
    assert world.status()["worker_deaths"] == deaths


def test_nothing_unrecorded_reaches_the_server_whatever_is_killed_when(world: World) -> None:
    chance = random.Random(SEED)
    loaders = [world.start_python(LOADER, DATABASE, name, "3") for name in ("left", "right")]
    daemons = 0
    try:
        time.sleep(0.5)
        for number in range(KILLS):
            if number % 4 == 3:
                world.gateway.kill()
                time.sleep(chance.uniform(0, 0.3))
                world.gateway.start()
                daemons += 1
            else:
                wait_until(lambda: bool(world.workers()), "a worker", 5)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(chance.choice(world.workers()), signal.SIGKILL)
            time.sleep(chance.uniform(0.02, 0.4))
        wait_until(lambda: world.status()["workers"] == 2, "both workers", 10)
        time.sleep(0.5)
    finally:
        told = [json.loads(loader.communicate("", timeout=60)[0]) for loader in loaders]
    answered = {text for each in told for text in each["answered"]}
    served = {text for text in world.served_statements() if re.search(r"'(left|right)-\d+-\d+'", text)}
    recorded = world.recorded_statements()
    assert daemons == KILLS // 4
    assert all(each["lost"] >= 6 and not each["refused"] for each in told)
    assert len(answered) > 500
    assert answered <= served
    assert served - recorded == set()
    wait_until(lambda: world.status()["open_sessions"] == 0, "all sessions closed")
    assert world.gateway.cli("audit", "verify").returncode == 0
    states = {row["state"] for row in world.sessions()}
    assert states == {"closed", "interrupted"}


# --- the end ----------------------------------------------------------------------------------------------------------


def test_a_stop_says_farewell_and_closes_recordings(world: World) -> None:
    with ExitStack() as stack:
        talks = [stack.enter_context(Talk(world)) for _ in range(4)]
        sessions = [session_of(world, talk)[0] for talk in talks]
        world.gateway.stop()
        for talk in talks:
            told = talk.say("SELECT 'too late';")
            assert "FATAL:  57P01: " in told and "the gateway on this host is stopping" in told
            assert "HINT:  connect again" in told
    world.gateway.start()
    rows = {row["id"]: row for row in world.sessions()}
    assert {rows[session]["state"] for session in sessions} == {"closed"}
    assert {rows[session]["reason"] for session in sessions} == {"the gateway on this host is stopping"}
    assert not [text for text in world.served_statements() if "too late" in text]
    assert world.gateway.cli("audit", "verify").returncode == 0


def test_nobody_ever_reached_the_server_past_the_gateway(world: World) -> None:
    log = world.server.log()
    assert set(re.findall(r"connection authorized: user=(\S+) database=shop", log)) == {"shop_app"}
    # who comes past the gateway comes as `agent`, whom the server would have turned down, and told
    assert "agent" not in set(re.findall(r"\] (\S*?)@192\S* ", log))
    assert not re.search(r"no pg_hba\.conf entry|no password supplied", log)
    assert world.served_statements() <= world.recorded_statements()
    assert "Traceback" not in world.gateway.log()


def test_cleanup_leaves_nothing(world: World) -> None:
    programs = set(programs_of(world))
    assert programs <= loaded_programs()
    running = world.gateway.cli("cleanup", check=False)
    assert running.returncode == 1 and "hopgate is running" in running.stderr
    world.gateway.stop()
    world.gateway.cli("cleanup")
    assert rules_of(world) == []
    assert not world.gateway.pin_dir.exists()
    wait_until(lambda: not programs & loaded_programs(), "the programs are gone")
    # nothing is redirected any more: the server itself turns the client down
    assert "no pg_hba.conf entry" in world.psql("SELECT 1").stderr
    world.gateway.start()
    assert world.psql("SELECT 'again'", tls="require").stdout == "again\n"
