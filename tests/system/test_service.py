"""The product as an operator has it: installed from the wheel on a booted system, started by systemd, taken off again.

One machine for the module: provisioned by vagrant/provision.sh, judged by vagrant/scenario.sh, which are the same that
Vagrant runs. Meanwhile nothing may change on the host below it.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import machine as lab

pytestmark = pytest.mark.system

CHECKOUT = Path(__file__).parent.parent.parent


def wheels(tree: Path) -> Path:
    """The wheels of all dependencies for the Python of that tree, from wherever pip of this host gets them."""
    version = lab.python_version(tree)
    needed = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]["dependencies"]
    digest = hashlib.sha256("\n".join([version, *needed]).encode()).hexdigest()[:12]
    directory = lab.CACHE / f"wheels-{version}-{digest}"
    if not directory.exists():
        making = directory.with_suffix(".making")
        options = ["--only-binary=:all:", f"--python-version={version}", "--dest", str(making)]
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *options, *needed], check=True, timeout=600)
        making.rename(directory)
    return directory


def host_state() -> dict[str, str]:
    """What nothing in the machine may change: programs on the host's root cgroup, rules and sets of its own."""
    commands = {
        "programs": f"bpftool cgroup show {lab.unified_cgroup()}",
        "rules": "iptables-save | sed -E '/^#/d; s/\\[[0-9:]+\\]//'",
        "rules6": "ip6tables-save | sed -E '/^#/d; s/\\[[0-9:]+\\]//'",
        "sets": "ipset list -name",
        "links": "ip -brief link",
    }
    return {
        name: subprocess.run(["/bin/bash", "-c", command], capture_output=True, text=True, timeout=30).stdout
        for name, command in commands.items()
    }


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[lab.Machine]:
    packages = tuple((CHECKOUT / "vagrant/packages").read_text().split())
    tree = lab.root_tree(lab.suite(), packages)
    dist = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", str(dist), str(CHECKOUT)],
        check=True,
        capture_output=True,
        timeout=300,
    )
    files = {f"/opt/wheels/{wheel.name}": wheel for source in (dist, wheels(tree)) for wheel in source.glob("*.whl")}
    files |= {f"/opt/checkout/{name}": CHECKOUT / name for name in ("scripts", "vagrant", "policies")}
    before = host_state()
    with lab.Machine(tree, files=files) as machine:
        yield machine
    assert host_state() == before


@pytest.fixture(scope="module")
def provisioned(machine: lab.Machine) -> lab.Machine:
    print(machine.run("PIP_NO_INDEX=1 /opt/checkout/vagrant/provision.sh /opt/wheels", timeout_s=300).stdout)
    return machine


def test_the_installed_service_runs_as_its_unit_says(provisioned: lab.Machine) -> None:
    state = provisioned.run(
        "systemctl show hopgate -p ActiveState -p SubState -p Type -p NotifyAccess -p Result"
    ).stdout
    assert set(state.split()) == {
        "ActiveState=active",
        "SubState=running",
        "Type=notify",
        "NotifyAccess=main",
        "Result=success",
    }
    workers = provisioned.run("ps -o uid= -u hopgate | sort -u; id -u hopgate").stdout.split()
    assert len(workers) == 2
    assert workers[0] == workers[1] != "0"
    capabilities = provisioned.run(
        "for pid in $(pgrep -u hopgate); do grep -E '^Cap(Eff|Prm|Inh|Amb)' /proc/$pid/status; done"
    ).stdout
    assert capabilities.count("\n") >= 4
    assert set(capabilities.split()[1::2]) == {"0000000000000000"}


def test_the_scenario_is_seen_as_expected(provisioned: lab.Machine) -> None:
    done = provisioned.run("/opt/checkout/vagrant/scenario.sh", timeout_s=300, check=False)
    print(done.stdout)
    assert done.returncode == 0, provisioned.run("journalctl -u hopgate --no-pager -n 80").stdout
    told = re.search(r"^all (\d+) promises were kept$", done.stdout, re.MULTILINE)
    assert told is not None
    assert int(told[1]) >= 12
    assert "all promises of the service were kept" in done.stdout


def test_its_programs_are_on_the_cgroup_of_the_machine_and_not_above(provisioned: lab.Machine) -> None:
    inside = provisioned.run("bpftool cgroup show /sys/fs/cgroup").stdout
    assert "sock_ops" in inside
    above = subprocess.run(["bpftool", "cgroup", "show", str(lab.unified_cgroup())], capture_output=True, text=True)
    assert "sock_ops" not in above.stdout
