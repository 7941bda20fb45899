"""What somebody takes off a running gateway comes back, and is told: real rules, pins and files, in namespaces of the
test's own."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import re
import select
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from hostagent import alerts
from tests.lab.cgroups import cgroup
from tests.lab.hopgate import Gateway, gateway
from tests.lab.namespaces import entered, linked_namespaces

pytestmark = pytest.mark.kernel

RUNNER, TARGET = "192.0.2.1", "192.0.2.10"
POLICY = """\
agents: {job: {exe: /bin/false}}
targets: {shop: {protocol: postgresql, addresses: 192.0.2.10, credential: shop}}
"""
RULE = "rules: [{name: read, agents: job, targets: shop, statements: select, decision: allow}]\n"
HEALED_S = 3.0
KEPT_MAX = 256
WINDOW_S = 1.0
"""How long a rule may be away: the kernel tells about it, so it is far less on a quiet machine."""

CONNECTOR = """
# connects as fast as it can; what answers with a byte is not the gateway, which waits for the client to speak
import socket, sys, time
direct, tried = 0, 0
print("ready", flush=True)
while True:
    tried += 1
    try:
        with socket.create_connection((sys.argv[1], 5432), timeout=0.2) as sock:
            sock.settimeout(0.02)
            try:
                reached = sock.recv(1) == b"T"
            except TimeoutError:
                reached = False
            direct += reached
            print("direct" if reached else "kept", time.monotonic(), flush=True)
    except OSError:
        print("refused", time.monotonic(), flush=True)
"""


class World:
    """A gateway that runs, a listener that stands for the database, and the alerts."""

    def __init__(self, running: Gateway, runner: str) -> None:
        self.gateway = running
        self.runner = runner

    def tamper(self, *command: str) -> None:
        with entered(self.runner):
            subprocess.run(command, check=True, capture_output=True)

    def alerts(self) -> list[alerts.Alert]:
        found: list[alerts.Alert] = []
        for path in sorted((self.gateway.state_dir / "alerts").glob(f"*{alerts.SUFFIX}")):
            found += alerts.read(path)
        return found

    def status(self) -> dict[str, object]:
        found: dict[str, object] = json.loads(self.gateway.cli("status", "--json").stdout)
        return found

    def state(self) -> str:
        """Rules and sets, without counters."""
        with entered(self.runner):
            saved = [
                subprocess.run(command, check=True, capture_output=True, text=True).stdout
                for command in (["iptables-save"], ["ip6tables-save"], ["ipset", "save"])
            ]
        lines = "".join(saved).splitlines()
        plain = [line.split(" [")[0].split(" initval ")[0] for line in lines if not line.startswith("#")]
        # a set that was filled anew tells its members in another order
        members = sorted(line for line in plain if line.startswith("add "))
        return "\n".join([*(line for line in plain if not line.startswith("add ")), *members])

    def pins(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for path in self.gateway.pin_dir.iterdir():
            kind = {"link": "link", "program": "prog"}.get(path.name.split("_")[0], "map")
            shown = subprocess.run(
                ["bpftool", "-j", kind, "show", "pinned", str(path)], check=True, capture_output=True, text=True
            )
            found[path.name] = json.loads(shown.stdout)["id"]
        return found


@contextmanager
def tripwire(namespace: str) -> Iterator[None]:
    """Stands for the database, and tells everybody who gets to it that he did."""
    with entered(namespace):
        listener = socket.create_server((TARGET, 5432), backlog=1024)

    kept: collections.deque[socket.socket] = collections.deque()

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                kept.append(connection)
                if len(kept) > KEPT_MAX:
                    kept.popleft().close()
                with contextlib.suppress(OSError):
                    connection.sendall(b"T")

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)
        for connection in kept:
            connection.close()


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hopgate-watch-")))
        directory.chmod(0o711)
        runner, database = stack.enter_context(linked_namespaces(RUNNER, TARGET))
        stack.enter_context(tripwire(database))
        hooked = stack.enter_context(cgroup("watch"))
        running = stack.enter_context(
            gateway(directory / "gateway", namespace=runner, cgroup=hooked, settings={"workers": 1})
        )
        running.write_policy(POLICY)
        running.start()
        yield World(running, runner)


@contextmanager
def connecting(world: World) -> Iterator[list[tuple[str, float]]]:
    """A job that goes on connecting; what became of each, and when, is there at the end."""
    # into a file: a pipe that nobody empties would stop it
    with tempfile.TemporaryFile("w+") as told:
        command = ["/usr/bin/python3", "-I", "-S", "-c", CONNECTOR, TARGET]
        process = subprocess.Popen(world.gateway.inside(command), stdout=told)
        outcomes: list[tuple[str, float]] = []
        try:
            within(lambda: os.fstat(told.fileno()).st_size > 0, "the client", 20)
            yield outcomes
        finally:
            process.terminate()
            process.wait()
            told.seek(0)
            words = [line.split() for line in told]
            outcomes += [(word[0], float(word[1])) for word in words if len(word) == 2]


def within(true: Callable[[], bool], what: str, limit_s: float = HEALED_S) -> float:
    begun = time.monotonic()
    while not true():
        assert time.monotonic() < begun + limit_s, f"not within {limit_s:g} s: {what}"
        time.sleep(0.02)
    return time.monotonic() - begun


@pytest.mark.parametrize(
    "command",
    [
        ["iptables", "-t", "nat", "-D", "OUTPUT", "-j", "HOPGATE-OUT"],
        ["iptables", "-t", "nat", "-F", "HOPGATE-OUT"],
        ["iptables", "-t", "nat", "-I", "OUTPUT", "-p", "tcp", "-j", "ACCEPT"],
        ["iptables", "-t", "nat", "-F"],
        ["ipset", "flush", "hopgate-ports"],
        ["sh", "-c", "iptables -t nat -F; iptables -F"],
        ["sh", "-c", "ipset flush hopgate-ports; ipset flush hopgate-4; ipset flush hopgate-targets-4; true"],
    ],
    ids=lambda command: " ".join(command),
)
def test_rules_come_back_and_the_alert_says_who(world: World, command: list[str]) -> None:
    before, known = world.state(), len(world.alerts())
    with connecting(world) as outcomes:
        time.sleep(0.3)
        begun = time.monotonic()
        world.tamper(*command)
        within(lambda: len(world.alerts()) > known, "an alert")
        healed = time.monotonic()
        time.sleep(1)
    if "ACCEPT" in command:
        world.tamper("iptables", "-t", "nat", "-D", *command[4:])
    assert world.state() == before
    alert = world.alerts()[known]
    assert alert.done == "put back"
    if "iptables" in " ".join(command):
        assert f"iptables (process {alert.by.split()[2].rstrip(',')}" in alert.by
        assert "unattributed" in alert.by and " > " in alert.by and alert.by.endswith("> iptables")
    direct = [at for outcome, at in outcomes if outcome == "direct"]
    window_s = max(direct, default=begun) - begun
    print(f"{' '.join(command)}: open for {window_s:.3f} s, alert after {healed - begun:.3f} s, {len(direct)} past")
    assert [outcome for outcome, at in outcomes if at > healed + 0.05]
    assert window_s < WINDOW_S + 0.5


KEEPER = """
# connects until somebody lets it past, and then waits for the end of that connection
import socket, sys
print("ready", flush=True)
while True:
    try:
        sock = socket.create_connection((sys.argv[1], 5432), timeout=5)
        sock.settimeout(0.02)
        if sock.recv(1) == b"T":
            break
    except OSError:
        pass
print("past", flush=True)
sock.settimeout(20)
try:
    print("ended" if sock.recv(1) == b"" else "data", flush=True)
except ConnectionError:
    print("reset", flush=True)
"""


def test_who_went_past_meanwhile_is_reset_and_told(world: World) -> None:
    known = len(world.alerts())
    process = subprocess.Popen(
        world.gateway.inside(["/usr/bin/python3", "-I", "-S", "-c", KEEPER, TARGET]), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n"
        for _ in range(20):
            world.tamper("sh", "-c", "iptables -t nat -F; iptables -F")
            if select.select([process.stdout], [], [], 0.5)[0]:
                break
        assert process.stdout.readline() == "past\n"
        assert process.communicate(timeout=20)[0] == "reset\n"
    finally:
        process.kill()
        process.wait()
    within(lambda: "went past the proxy" in world.alerts()[-1].what, "an alert")
    alert = next(alert for alert in world.alerts()[known:] if "went past the proxy" in alert.what)
    assert alert.done == "reset"
    assert re.search(rf"192\.0\.2\.1:\d+ to {TARGET}:5432 of uid 0 \(.*python3\)", alert.what), alert.what


@pytest.mark.parametrize("name", ["link_on_fork", "link_on_sock_ops", "procs", "program_on_exec"])
def test_a_removed_pin_comes_back_and_nothing_goes_past(world: World, name: str) -> None:
    before, known = world.pins(), len(world.alerts())
    with connecting(world) as outcomes:
        (world.gateway.pin_dir / name).unlink()
        within(lambda: (world.gateway.pin_dir / name).exists(), "the pin")
        within(lambda: len(world.alerts()) > known, "an alert")
    assert world.pins() == before, "the very same objects, none of them twice"
    assert world.alerts()[known].what == f"pin {name} was removed"
    assert {outcome for outcome, _ in outcomes} <= {"kept", "refused"}


def test_all_pins_at_once_come_back_with_the_lineage(world: World) -> None:
    before, known = world.pins(), len(world.alerts())
    with connecting(world) as outcomes:
        for path in world.gateway.pin_dir.iterdir():
            path.unlink()
        world.gateway.pin_dir.rmdir()
        within(lambda: len(world.alerts()) > known, "an alert")
    assert world.pins() == before
    assert {outcome for outcome, _ in outcomes} <= {"kept", "refused"}
    assert not world.status()["overflowed"]


def test_a_detached_program_is_attached_again(world: World) -> None:
    before, known = world.pins(), len(world.alerts())
    with connecting(world) as outcomes:
        world.tamper("bpftool", "link", "detach", "pinned", str(world.gateway.pin_dir / "link_on_sock_ops"))
        within(lambda: len(world.alerts()) > known, "an alert")
    after = world.pins()
    assert {name for name in before if before[name] != after[name]} == {"link_on_sock_ops"}
    shown = subprocess.run(
        ["bpftool", "cgroup", "show", str(world.gateway.cgroup)], check=True, capture_output=True, text=True
    )
    assert shown.stdout.count("sock_ops") == 1 + shown.stdout.count("on_sock_ops")
    assert {outcome for outcome, _ in outcomes} <= {"kept", "refused"}


def test_an_exemption_that_nobody_of_ours_gave_is_taken_back(world: World) -> None:
    known = len(world.alerts())
    exempt = ["pinned", str(world.gateway.pin_dir / "exempt")]
    world.tamper("bpftool", "map", "update", *exempt, "key", *"12345678", "value", *"1000")
    within(lambda: len(world.alerts()) > known, "an alert")
    assert "was exempted from the redirect by somebody else" in world.alerts()[known].what
    shown = subprocess.run(["bpftool", "-j", "map", "dump", *exempt], check=True, capture_output=True, text=True)
    assert len(json.loads(shown.stdout)) == world.status()["workers"]


@pytest.mark.parametrize("name", ["ca/ca.pem", "ca/ca.key", "mask.key"])
@pytest.mark.parametrize("how", ["changed", "removed", "opened"])
def test_keys_and_certificates_are_put_back(world: World, name: str, how: str) -> None:
    path = world.gateway.state_dir / name
    before, mode, known = path.read_bytes(), path.stat().st_mode, len(world.alerts())
    match how:
        case "changed":
            path.write_bytes(before[:-2] + b"x\n")
        case "removed":
            path.unlink()
        case "opened":
            path.chmod(0o666)
    within(lambda: len(world.alerts()) > known, "an alert")
    within(lambda: path.exists() and path.read_bytes() == before, "the file")
    assert path.stat().st_mode == mode
    assert str(path) in world.alerts()[known].what


def test_a_policy_that_changed_on_disk_is_told_and_not_loaded(world: World) -> None:
    version, known = world.status()["policy"], len(world.alerts())
    assert world.status()["policy_on_disk"] == "as it was loaded"
    world.gateway.write_policy(POLICY + RULE)
    within(lambda: "hopgate reload" in str(world.status()["policy_on_disk"]), "the status")
    assert world.status()["policy"] == version
    assert "not in force" in world.alerts()[known].what
    assert world.gateway.cli("reload").stdout
    assert world.status()["policy"] != version
    assert world.status()["policy_on_disk"] == "as it was loaded"
    time.sleep(1.5)
    assert len(world.alerts()) == known + 1


def test_settings_that_changed_on_disk_are_told(world: World) -> None:
    text = world.gateway.config.read_text()
    world.gateway.config.write_text(text + "log_level: debug\n")
    within(lambda: "a restart takes them" in str(world.status()["settings_on_disk"]), "the status")


def test_alerts_are_chained_and_shown(world: World) -> None:
    """The last of this file: what the others did is all there."""
    kept = world.alerts()
    assert len(kept) > 10
    status = world.status()
    assert status["alerts"] == len(kept)
    assert status["last_alert"] == kept[-1].what
    (path,) = (world.gateway.state_dir / "alerts").iterdir()
    assert path.stat().st_mode & 0o777 == 0o600
    text = path.read_bytes()
    copy = path.with_name(path.name)
    lines = text.splitlines(keepends=True)
    try:
        for broken in (
            b"".join(lines[:1] + lines[2:]),
            text.replace(b"put back", b"put blah", 1),
            text[:-9],
        ):
            copy.write_bytes(broken)
            with pytest.raises(ValueError, match=f"{path.name}:"):
                alerts.read(copy)
    finally:
        path.write_bytes(text)


def test_a_new_process_goes_on_with_the_chain(tmp_path: Path) -> None:
    for text in ("one", "two"):
        alerts.Alerts(tmp_path).alert(text, by="somebody", done="nothing")
    (path,) = tmp_path.iterdir()
    assert [alert.what for alert in alerts.read(path)] == ["one", "two"]


def test_the_same_alert_is_counted_and_not_repeated(tmp_path: Path) -> None:
    raised = alerts.Alerts(tmp_path)
    for _ in range(5):
        raised.alert("again")
    (path,) = tmp_path.iterdir()
    assert len(alerts.read(path)) == 1
    assert raised.raised == 1


def test_a_flood_from_one_source_is_counted_and_hides_no_other(tmp_path: Path) -> None:
    """A worker may say what it likes, as often as it likes, with letters that take six bytes each."""
    now_s = 0.0
    raised = alerts.Alerts(tmp_path, monotonic=lambda: now_s)
    for number in range(5000):
        raised.alert(f"{number}" + "\x01" * 5000, by="\udcff" * 5000, source=alerts.Source.WORKER)
    raised.alert("the rules were changed")
    (path,) = tmp_path.iterdir()
    written = alerts.read(path)
    assert len(written) == alerts.BURST + 2
    assert written[-1].what == "the rules were changed"
    assert "too many alerts by workers" in written[-2].what
    assert path.stat().st_size < (alerts.BURST + 2) * 4096
    now_s = alerts.REFILL_S
    raised.alert("one more", source=alerts.Source.WORKER)
    assert [each.what for each in alerts.read(path)[-2:]] == [
        f"{5000 - alerts.BURST} alerts by workers were only counted",
        "one more",
    ]


def test_alerts_that_cannot_be_written_stop_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    raised = alerts.Alerts(tmp_path / "file" / "alerts")
    raised.alert("lost on disk")
    assert raised.raised == 1
    assert os.listdir(tmp_path) == ["file"]
