"""The doctor finds what is wrong with a real gateway, in namespaces of the test's own, and says how to put it right."""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from hostagent.alerts import Alerts
from hostagent.kernel import cgroups, probe
from tests.lab.cgroups import cgroup
from tests.lab.hopgate import Gateway, gateway
from tests.lab.namespaces import entered, linked_namespaces
from tests.lab.postgres import postgres

pytestmark = pytest.mark.kernel

POLICY = """\
agents: {job: {exe: /bin/false, uid: 65534}, boss: {exe: /bin/true, uid: 0}}
targets:
  shop: {protocol: postgresql, addresses: 192.0.2.10, credential: shop, tls: {mode: verify-full, ca: ../ca.pem}}
"""
SOUND = {
    *("programs", "bcc", "BTF", "hash, queue and LPM maps", "raw tracepoints", "sock_ops on a cgroup"),
    *("netfilter rules", "cgroup2", "workers", "settings", "programs and pins", "lineage", "rules", "policy"),
    *("policy in force", "target shop", "credential shop", "certificate authority", "disk of the state"),
    *("alerts", "user 65534", "shop reachable", "iptables", "capabilities of job"),
}


class Patient:
    """A gateway that runs, until a test stops it."""

    def __init__(self, running: Gateway, runner: str) -> None:
        self.gateway = running
        self.runner = runner

    def findings(self) -> tuple[int, dict[str, dict[str, str]]]:
        done = self.gateway.cli("doctor", "--json", check=False)
        assert done.returncode in (0, 1), done.stderr
        return done.returncode, {each["check"]: each for each in json.loads(done.stdout)}

    def tamper(self, *command: str) -> None:
        with entered(self.runner):
            subprocess.run(command, check=True, capture_output=True)


@pytest.fixture(scope="module")
def patient() -> Iterator[Patient]:
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hopgate-doctor-")))
        directory.chmod(0o711)
        runner, database = stack.enter_context(linked_namespaces("192.0.2.1", "192.0.2.10"))
        server = stack.enter_context(postgres(address="192.0.2.10", port=5432, namespace=database, tls=True))
        hooked = stack.enter_context(cgroup("doctor"))
        running = stack.enter_context(
            gateway(directory / "gateway", namespace=runner, cgroup=hooked, settings={"workers": 1})
        )
        running.write_policy(POLICY)
        running.write_credential("shop", "shop_app", "secret-of-the-shop")
        shutil.copy(server.ca_path, directory / "gateway" / "ca.pem")
        shutil.copy(server.other_ca_path, directory / "gateway" / "other.pem")
        running.start()
        yield Patient(running, runner)


def test_a_sound_host_is_found_sound(patient: Patient) -> None:
    status, found = patient.findings()
    assert [each for each in found.values() if each["state"] == "wrong"] == []
    assert status == 0, found
    assert {check for check, each in found.items() if each["state"] == "ok"} >= SOUND
    assert found["system trust store"]["state"] == "weak"
    assert "update-ca-certificates" in found["system trust store"]["fix"]
    assert (
        found["shop reachable"]["what"] == "192.0.2.10:5432: it takes connections; its TLS is as `verify-full` wants it"
    )
    assert found["user 0"]["state"] == "weak" and found["user 65534"]["state"] == "ok"
    assert all(each["fix"] for each in found.values() if each["state"] in ("weak", "wrong"))
    assert "secret-of-the-shop" not in json.dumps(found)


def test_it_is_shown_to_people_too(patient: Patient) -> None:
    shown = patient.gateway.cli("doctor", check=False).stdout
    assert re.search(r"^ok +policy in force", shown, re.MULTILINE)
    assert re.search(r"^0 wrong, \d+ weak$", shown, re.MULTILINE)


def test_it_leaves_nothing_behind(patient: Patient) -> None:
    before = set(os.listdir(cgroups.mount_point())), set(os.listdir("/sys/fs/bpf"))
    patient.findings()
    left = {name for name in os.listdir(cgroups.mount_point()) if name.startswith("hopgate-doctor-")}
    assert left <= before[0]
    assert patient.gateway.pin_dir.name in before[1]


def _policy_changed(patient: Patient) -> Callable[[], object]:
    patient.gateway.write_policy(POLICY + "# changed\n")
    patient.gateway.cli("status")
    return lambda: (patient.gateway.write_policy(POLICY), patient.gateway.cli("reload"))


def _policy_bad(patient: Patient) -> Callable[[], object]:
    patient.gateway.write_policy("agents: [")
    return lambda: (patient.gateway.write_policy(POLICY), patient.gateway.cli("reload"))


def _name_unknown(patient: Patient) -> Callable[[], object]:
    patient.gateway.write_policy(POLICY.replace("192.0.2.10", "nowhere.invalid"))
    return lambda: (patient.gateway.write_policy(POLICY), patient.gateway.cli("reload"))


def _credential_open(patient: Patient) -> Callable[[], object]:
    path = patient.gateway.directory / "credentials" / "shop"
    path.chmod(0o644)
    return lambda: path.chmod(0o600)


def _credential_gone(patient: Patient) -> Callable[[], object]:
    path = patient.gateway.directory / "credentials" / "shop"
    text = path.read_text()
    path.unlink()

    def undo() -> None:
        path.touch(0o600)
        path.write_text(text)

    return undo


def _alerts_rewritten(patient: Patient) -> Callable[[], object]:
    directory = patient.gateway.state_dir / "alerts"
    Alerts(directory).alert("of a test")
    path = sorted(directory.iterdir())[-1]
    path.write_bytes(path.read_bytes().replace(b"of a test", b"of a jest"))
    return path.unlink


@pytest.mark.parametrize(
    ("hurt", "check", "words", "fix"),
    [
        (_policy_bad, "policy", "problems, the first: ", "hopgate policy check"),
        (_name_unknown, "target shop", "does not resolve", "resolver"),
        (_credential_open, "credential shop", "mode `0644`", "root only"),
        (_credential_gone, "credential shop", "No such file", "docs/install.md"),
        (_alerts_rewritten, "alerts", "does not follow", "log"),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
def test_what_is_wrong_is_found_with_its_fix(
    patient: Patient, hurt: Callable[[Patient], Callable[[], object]], check: str, words: str, fix: str
) -> None:
    undo = hurt(patient)
    try:
        status, found = patient.findings()
        assert status == 1
        assert found[check]["state"] == "wrong" and words in found[check]["what"] and fix in found[check]["fix"]
    finally:
        undo()


def test_targets_that_cannot_be_reached_are_found(patient: Patient) -> None:
    """By a worker: nobody listens, nobody is there, the certificate is another's, and one answers without TLS."""
    shop = "credential: shop, tls: {mode: verify-full, ca: ../ca.pem}"
    patient.gateway.write_policy(
        POLICY
        + f"  shut: {{protocol: postgresql, addresses: '192.0.2.10:5433', {shop}}}\n"
        + f"  away: {{protocol: postgresql, addresses: '192.0.2.77:5432', {shop}}}\n"
        + f"  wide: {{protocol: postgresql, addresses: '198.51.100.0/24:5432', {shop}}}\n"
    )
    try:
        patient.gateway.cli("reload")
        status, found = patient.findings()
        assert status == 1
        assert {check: found[f"{check} reachable"]["state"] for check in ("shop", "shut", "away", "wide")} == {
            "shop": "ok",
            "shut": "wrong",
            "away": "wrong",
            "wide": "skipped",
        }
        assert "refused" in found["shut reachable"]["what"]
        assert "firewall" in found["shut reachable"]["fix"]
        patient.gateway.write_policy(POLICY.replace("ca.pem", "other.pem"))
        patient.gateway.cli("reload")
        _, found = patient.findings()
        assert found["shop reachable"]["state"] == "wrong" and "certificate" in found["shop reachable"]["what"]
    finally:
        patient.gateway.write_policy(POLICY)
        patient.gateway.cli("reload")


def test_capabilities_that_agents_should_not_have_are_found(patient: Patient) -> None:
    program = Path(shutil.copy("/bin/sleep", patient.gateway.directory / "agent"))
    policy = patient.gateway.policy_dir / "policy.yaml"
    before = policy.read_text()
    kept = ["--inh-caps=+net_raw", "--ambient-caps=+net_raw"]
    try:
        policy.write_text(before.replace("job: {exe: /bin/false, uid: 65534}", f"job: {{exe: {program}, uid: 65534}}"))
        assert patient.findings()[1]["capabilities of job"]["state"] == "ok"
        user = ["setpriv", "--reuid=65534", "--clear-groups"]
        for given, others in ((kept, []), ([], kept)):
            started = [subprocess.Popen([*user, *one, str(program), "60"]) for one in (given, others)]
            try:
                time.sleep(0.3)
                found = patient.findings()[1]["capabilities of job"]
                whose = started[0 if given else 1].pid
                assert found["state"] == "weak" and found["fix"]
                assert f"process {whose} of uid 65534 has NET_RAW" in found["what"]
                assert found["what"].count("process ") == 1
            finally:
                for one in started:
                    one.kill()
                    one.wait()
        # cap_net_admin+ep, of the second version
        os.setxattr(program, "security.capability", struct.pack("<IIIII", 0x02000001, 1 << 12, 0, 0, 0))
        assert "has the file capabilities NET_ADMIN" in patient.findings()[1]["capabilities of job"]["what"]
        os.removexattr(program, "security.capability")
        program.chmod(0o4755)
        assert "(setuid)" in patient.findings()[1]["capabilities of job"]["what"]
    finally:
        policy.write_text(before)


def test_a_policy_that_was_not_loaded_is_found(patient: Patient) -> None:
    undo = _policy_changed(patient)
    try:
        deadline = 20
        while (found := patient.findings()[1]["policy in force"])["state"] == "ok" and deadline:
            deadline -= 1
        assert found["state"] == "wrong" and found["fix"] == "hopgate reload"
    finally:
        undo()


def test_without_the_daemon_it_says_so_and_finds_what_was_taken_off(patient: Patient) -> None:
    """The last of this file: the daemon is stopped."""
    patient.gateway.stop()
    status, found = patient.findings()
    assert status == 1
    assert found["daemon"]["state"] == "wrong" and "systemctl start hopgate" in found["daemon"]["fix"]
    assert found["policy in force"]["state"] == found["targets reachable"]["state"] == "skipped"
    assert {found[check]["state"] for check in ("programs and pins", "rules", "policy", "lineage")} == {"ok"}
    patient.tamper("iptables", "-t", "nat", "-D", "OUTPUT", "-j", "HOPGATE-OUT")
    patient.tamper("ip6tables", "-t", "nat", "-F", "HOPGATE-PRE")
    (patient.gateway.pin_dir / "link_on_exec").unlink()
    _, found = patient.findings()
    assert "IPv4 nat: the jump from OUTPUT to HOPGATE-OUT is missing" in found["rules"]["what"]
    assert "IPv6 nat: chain HOPGATE-PRE is empty or gone" in found["rules"]["what"]
    assert found["programs and pins"]["state"] == "wrong"
    patient.gateway.cli("cleanup")
    _, found = patient.findings()
    assert "there are none" in found["programs and pins"]["what"]
    assert found["rules"]["state"] == "wrong"


def test_a_kernel_that_refuses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trials can fail: an instruction that the verifier does not take, and a missing program."""
    monkeypatch.setattr(probe, "_NETNS_COOKIE", probe._call(9999))
    monkeypatch.setattr(probe, "_PROGRAMS", ("no-such-program",))
    refused = set()
    for name, attempt, fix in probe.features():
        try:
            attempt()
        except Exception as error:
            refused.add(name)
            assert str(error) and fix
    assert refused == {"programs", "sock_ops on a cgroup"}
