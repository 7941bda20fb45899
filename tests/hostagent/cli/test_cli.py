"""The command line, run as a process on real stores, files and sockets."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from hostagent.certificates import open_authority
from hostagent.control.approvals import Approvals
from hostagent.control.messages import Visit
from hostagent.control.server import ControlServer
from hostagent.control.sessions import Sessions
from hostagent.control.store import Store
from hostagent.errors import OperatorError
from hostagent.settings import load
from proxy.model import Chain, Decision, Endpoint, Hop, Operation, OperationKind, Phase, ProcessImage, Reason, Ruling
from proxy.recording import Writer

ROOT = Path(__file__).parents[3]
ALLOW = Ruling(Decision.ALLOW, (Reason("agent-a", "read", Decision.ALLOW, ""),), "", "", "v1")
DENY = Ruling(Decision.DENY, (Reason("agent-b", "no-drop", Decision.DENY, "never"),), "", "", "v1")
CHAIN = Chain(
    hops=(Hop("agent-a", (1,)), Hop("agent-b", (2,))),
    lineage=(
        ProcessImage(1, 100, 5, 1000, 2049, 77, "/usr/bin/python3", "python3", ("python3",), False, "/jobs"),
        ProcessImage(2, 101, 6, 1000, 2049, 78, "/usr/bin/psql", "psql", ("psql",), False, "/jobs"),
    ),
)
REFUSAL = "no target \x1b[31m[bold]of ours[/bold]"


@dataclass
class Host:
    """A host's files, and its command line."""

    config: Path
    store: Store
    sessions: Sessions
    ids: list[str]

    def hopgate(self, *arguments: str, config: Path | None = None) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "hostagent.cli", *arguments, "--config", str(config or self.config)]
        environ = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error", "COLUMNS": "300"}
        done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=60)
        assert "Traceback" not in done.stdout + done.stderr
        return done

    def fails(self, *arguments: str, config: Path | None = None) -> str:
        """The one line that a failing verb says."""
        done = self.hopgate(*arguments, config=config)
        assert done.returncode == 1, done
        assert done.stderr.count("\n") == 1
        return done.stderr.strip()


def record(sessions: Sessions, *, refusal: str = "") -> str:
    session = sessions.open(
        peer=Endpoint("127.0.0.1", 40000),
        dialled=Endpoint("192.0.2.7", 5432),
        target="" if refusal else "orders",
        protocol="postgres",
        chain=None if refusal else CHAIN,
        policy_version="v1",
        refusal=refusal,
    )
    writer = Writer(session.fd, session.id, session.records, bytes.fromhex(session.digest), sessions._clock)
    operations = denied = 0
    if not refusal:
        writer.login("app", "shop", (), ALLOW)
        for number, (text, ruling) in enumerate([("SELECT 1", ALLOW), ("DROP TABLE orders\x1b[2J", DENY)], 1):
            operation = Operation("postgres", OperationKind.QUERY, Phase.EXECUTE, text, text, ())
            writer.ruled(number, operation, ruling)
            writer.completed(number, "SELECT 1", 1, "", ())
        operations, denied = 2, 1
    writer.closed("done", operations, denied)
    writer.close()
    sessions.close(
        session.id,
        records=writer.records,
        digest=writer.digest.hex(),
        operations=operations,
        denied=denied,
        reason="done",
    )
    return session.id


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    config = tmp_path / "hopgate.yaml"
    config.write_text(f"state_dir: {tmp_path}/state\nrun_dir: {tmp_path}\npolicy_dir: {tmp_path}/policy.d\n")
    settings = load(config)
    store = Store.create(settings.store_path)
    sessions = Sessions(store, settings.recordings_dir, host="runner-1")
    yield Host(config, store, sessions, [record(sessions), record(sessions, refusal=REFUSAL)])
    store.close()


def test_sessions_are_listed_for_people_and_for_programs(host: Host) -> None:
    done = host.hopgate("sessions")
    assert done.returncode == 0
    header, *lines = done.stdout.splitlines()
    assert header.split()[:2] == ["SESSION", "OPENED"]
    assert {line.split()[0] for line in lines} == set(host.ids)
    attributed = next(line for line in lines if line.startswith(host.ids[0]))
    assert re.search(r"closed +agent-a > agent-b +orders +shop +2 +1 +-", attributed)
    assert r"no target \x1b[31m[bold]of ours[/bold]" in done.stdout
    rows = json.loads(host.hopgate("sessions", "--json").stdout)
    assert {row["id"] for row in rows} == set(host.ids)
    assert rows[0].keys() >= {"chain", "digest", "records", "state", "denied"}
    assert len(json.loads(host.hopgate("sessions", "--json", "--limit", "1").stdout)) == 1
    assert json.loads(host.hopgate("sessions", "--json", "--open").stdout) == []


def test_replay_tells_a_session(host: Host) -> None:
    done = host.hopgate("replay", host.ids[0])
    assert done.returncode == 0
    for expected in ("agent-a > agent-b", "/usr/bin/psql", "SELECT 1", "agent-b: deny by no-drop (never)", "1 denied"):
        assert expected in done.stdout
    assert "\x1b" not in done.stdout
    assert r"DROP TABLE orders\x1b[2J" in done.stdout
    lines = [json.loads(line) for line in host.hopgate("replay", host.ids[0], "--json").stdout.splitlines()]
    assert [line["is"] for line in lines] == [
        "opened", "login", "ruled", "completed", "ruled", "completed", "closed"
    ]  # fmt: skip
    refused = host.hopgate("replay", host.ids[1]).stdout
    assert "chain: not known" in refused
    assert r"refused: no target \x1b[31m" in refused


def test_replay_of_what_is_not_there_or_not_whole(host: Host) -> None:
    assert "is no session id" in host.fails("replay", "../../etc/passwd")
    assert "no recording of session" in host.fails("replay", "20200101-000000-abcdef")
    path = next((host.sessions.recordings).glob(f"*/{host.ids[0]}.hgr"))
    path.write_bytes(path.read_bytes().replace(b"SELECT 1", b"SELECT 2", 1))
    assert "is broken: line 3" in host.fails("replay", host.ids[0])


def test_audit_verify_holds_and_fails_after_one_changed_byte(host: Host) -> None:
    done = host.hopgate("audit", "verify")
    assert (done.returncode, done.stdout) == (0, "2 sessions, 9 records: all hold\n")
    path = next((host.sessions.recordings).glob(f"*/{host.ids[0]}.hgr"))
    changed = bytearray(path.read_bytes())
    changed[-30] ^= 1
    path.write_bytes(changed)
    done = host.hopgate("audit", "verify")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "2 sessions, 8 records: 1 broken"
    assert re.search(rf"broken +{path} +7 +does not follow", done.stdout)
    path.unlink()
    assert re.search(rf"broken +{path} +- +cannot be read", host.hopgate("audit", "verify").stdout)


class Daemon:
    def __init__(self, store: Store) -> None:
        self.approvals = Approvals(store)

    def check_approver(self, pid: int) -> None:
        pass

    def status(self) -> dict[str, object]:
        return {"policy": "v7", "workers": 2, "targets": ["orders", "shop"], "policy_problem": "", "overflowed": False}

    def reload(self) -> str:
        raise OperatorError("a.yaml:3: unknown key `rulez`")

    async def visit_targets(self) -> tuple[Visit, ...]:
        return ()


def test_a_running_host_agent_is_asked(host: Host) -> None:
    """Status, reload and approvals against a real control socket, with statements that wait."""
    ready, stop = threading.Event(), threading.Event()
    outcomes: list[tuple[str, str, str]] = []

    async def hold(daemon: Daemon, approval: str, preview: str) -> None:
        decided = await daemon.approvals.hold(
            session=host.ids[0],
            approval=approval,
            operation=3,
            hop="agent-b",
            rule="ask",
            preview=preview,
            timeout_s=60,
        )
        outcomes.append((approval, decided.outcome, decided.reason))

    async def serve() -> None:
        daemon = Daemon(host.store)
        server = ControlServer(load(host.config).control_socket, daemon)
        await server.start()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(hold(daemon, "H-AAAAAA", "UPDATE orders SET x = 1"))
            tasks.create_task(hold(daemon, "H-BBBBBB", "DELETE FROM orders\x1b[2J\nH-CCCCCC  pending"))
            await asyncio.sleep(0)
            ready.set()
        await asyncio.to_thread(stop.wait, 60)
        await server.stop()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert ready.wait(10)
        status = host.hopgate("status")
        assert status.returncode == 0
        assert re.search(r"policy +v7\n", status.stdout)
        assert re.search(r"targets +orders, shop\n", status.stdout)
        assert json.loads(host.hopgate("status", "--json").stdout)["workers"] == 2
        assert "hopgate is running" in host.fails("cleanup")
        assert host.fails("reload") == "a.yaml:3: unknown key `rulez`"
        listed = host.hopgate("approvals").stdout
        assert "UPDATE orders SET x = 1" in listed
        assert listed.endswith("\nH-BBBBBB in full:\n  DELETE FROM orders\\x1b[2J\n  H-CCCCCC  pending\n"), listed
        assert {row["id"] for row in json.loads(host.hopgate("approvals", "--json").stdout)} == {"H-AAAAAA", "H-BBBBBB"}
        assert "no approval `H-CCCCCC`" in host.fails("approve", "H-CCCCCC")
        approved = host.hopgate("approve", "h-aaaaaa", "--reason", "ticket 7")
        assert approved.returncode == 0
        assert re.fullmatch(r"approved H-AAAAAA by \S+ \(uid \d+\): UPDATE orders SET x = 1\n", approved.stdout)
        assert "is approved by" in host.fails("deny", "H-AAAAAA")
        assert host.hopgate("deny", "H-BBBBBB").stdout.startswith("denied H-BBBBBB by ")
        assert host.hopgate("approvals", "--json").stdout == "[]\n"
        assert re.search(r"H-AAAAAA +approved by ", host.hopgate("approvals", "--all").stdout)
    finally:
        stop.set()
        if len(outcomes) < 2:
            host.hopgate("deny", "H-AAAAAA")
            host.hopgate("deny", "H-BBBBBB")
        thread.join(30)
    assert outcomes == [("H-AAAAAA", "approved", "ticket 7"), ("H-BBBBBB", "denied", "")]


@pytest.mark.parametrize("verb", [("status",), ("reload",), ("approvals",), ("approve", "H-AAAAAA")])
def test_without_a_host_agent_verbs_say_so(host: Host, verb: tuple[str, ...]) -> None:
    socket = load(host.config).control_socket
    assert host.fails(*verb) == f"hopgate is not running: nobody answers on `{socket}`"


@pytest.mark.parametrize("verb", [("sessions",), ("audit", "verify"), ("approvals", "--all")])
def test_without_a_store_verbs_say_so(host: Host, tmp_path: Path, verb: tuple[str, ...]) -> None:
    config = tmp_path / "other.yaml"
    config.write_text(f"state_dir: {tmp_path}/nothing\n")
    assert "hopgate has not run with this state_dir" in host.fails(*verb, config=config)
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize(
    "verb", [("run",), ("cleanup",), ("status",), ("sessions",), ("audit", "verify"), ("policy", "check")]
)
def test_bad_settings_are_one_line_with_the_place(host: Host, tmp_path: Path, verb: tuple[str, ...]) -> None:
    config = tmp_path / "bad.yaml"
    config.write_text("listen_port: 1\nlisten_prot: 2\n")
    assert host.fails(*verb, config=config).startswith(f"{config}:2: unknown key `listen_prot`")
    assert "cannot read settings" in host.fails(*verb, config=tmp_path / "absent.yaml")


def test_policy_check_tells_every_problem(host: Host, tmp_path: Path) -> None:
    assert "no such directory" in host.fails("policy", "check")
    directory = tmp_path / "policy.d"
    directory.mkdir()
    (directory / "a.yaml").write_text("agents:\n  agent-a:\n    exe: /usr/bin/python3\n")
    done = host.hopgate("policy", "check")
    assert (done.returncode, done.stdout) == (0, f"{directory}: 1 agents, 0 targets, 0 rules: no problem found\n")
    (directory / "b.yaml").write_text("rulez: []\n")
    (directory / "c.yaml").write_text("agents: [\n")
    done = host.hopgate("policy", "check", str(directory))
    assert done.returncode == 1
    assert re.search(rf"^{directory}/b\.yaml:1: ", done.stderr, re.MULTILINE)
    assert re.search(rf"^{directory}/c\.yaml:\d: ", done.stderr, re.MULTILINE)


def test_policy_test_tells_what_is_ruled_otherwise(host: Host, tmp_path: Path) -> None:
    example = ROOT / "policies" / "examples" / "nested-agents"
    done = host.hopgate("policy", "test", str(example / "tests.yaml"))
    assert (done.returncode, done.stderr) == (0, "")
    wrong = tmp_path / "tests.yaml"
    wrong.write_text(
        f"policy: {example / 'policy.yaml'}\n"
        "tests: [{chain: agent-b, target: shop, sql: DROP TABLE orders, expect: allow}]\n"
    )
    done = host.hopgate("policy", "test", str(wrong))
    assert done.returncode == 1
    assert done.stderr.startswith(f"{wrong}:2: `DROP TABLE orders`: expected allow, seen deny: ")
    assert done.stdout == "1 statements, 1 ruled otherwise than expected\n"


def test_a_reader_that_leaves_early_is_no_error_of_ours(host: Host) -> None:
    command = f"{sys.executable} -m hostagent.cli sessions --json --config {host.config} | head -c 1"
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, env=environ)
    assert done.stderr == ""


def test_another_user_is_told_and_learns_nothing(host: Host) -> None:
    # the interpreter of the tests may be in a directory that others cannot enter: the command becomes the user itself
    script = "import os, sys; os.setgid(65534); os.setuid(65534); from hostagent.cli import main; main()"
    for verb in (["sessions"], ["audit", "verify"], ["replay", host.ids[0]], ["approve", "H-AAAAAA"]):
        command = [sys.executable, "-c", f"import msgspec, sqlalchemy, hostagent.control.audit; {script}", *verb]
        environ = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([*command, "--config", str(host.config)], capture_output=True, text=True, env=environ)
        assert done.returncode == 1
        assert done.stdout == ""
        assert "ermission denied" in done.stderr or "only root may" in done.stderr


def test_a_kubeconfig_holds_the_host_ca_and_no_credential(host: Host) -> None:
    settings = load(host.config)
    settings.policy_dir.mkdir(exist_ok=True)
    cluster = "targets:\n  cluster: {protocol: kubernetes, addresses: '[2001:db8::1]:6443', credential: cluster}\n"
    (settings.policy_dir / "cluster.yaml").write_text(cluster)
    assert "known are `cluster`" in host.fails("kubeconfig", "other")
    assert "made when hopgate first starts" in host.fails("kubeconfig", "cluster")
    open_authority(settings.state_dir)
    written = yaml.safe_load(host.hopgate("kubeconfig", "cluster", "-n", "shop").stdout)
    entry = written["clusters"][0]["cluster"]
    assert entry["server"] == "https://[2001:db8::1]:6443"
    assert base64.b64decode(entry["certificate-authority-data"]) == (settings.state_dir / "ca/ca.pem").read_bytes()
    assert written["users"] == [{"name": "hopgate", "user": {"token": "the-gateway-holds-it"}}]
    assert written["contexts"][0]["context"] == {"cluster": "cluster", "user": "hopgate", "namespace": "shop"}
    trusting = yaml.safe_load(
        host.hopgate("kubeconfig", "cluster", "--system-trust", "--server", "https://api.example").stdout
    )
    assert trusting["clusters"][0]["cluster"] == {"server": "https://api.example"}
