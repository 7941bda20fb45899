"""Clients in network namespaces of their own, as docker and podman make them: a veth pair into a bridge of the host's
namespace, which forwards. They are attributed by the same record, and served."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from pathlib import Path

import msgspec
import pytest

from hostagent.kernel.cgroups import mount_point
from proxy.model import Chain, Namespaces, ProcessImage
from tests.e2e import beds
from tests.e2e.beds import DATABASE, JOB, Bed
from tests.lab import cgroups
from tests.lab.namespaces import ip, namespace, sysctl

PODMANS = "10.89.0.0/24"
CONTAINER_ID = "5e" * 32
GATE, CONTAINER, OTHER = "10.88.0.1", "10.88.0.2", "10.88.0.3"
PSQL = ("psql", "-X", "-A", "-t", "-c")
CONNINFO = f"host={DATABASE} dbname=shop user=agent sslmode=prefer"
FROM_PORT = """
import re, socket, struct, sys
with socket.socket() as sock:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("", int(sys.argv[2])))
    if sys.argv[3:]:
        sock.setblocking(False)
    sock.connect_ex((sys.argv[1], 5432))
    print("connecting", flush=True)
    if sys.argv[3:]:
        sys.stdin.read()
    else:
        startup = struct.pack("!I", 196608) + b"user\\0agent\\0database\\0shop\\0\\0"
        sock.sendall(struct.pack("!I", len(startup) + 4) + startup)
        sock.settimeout(10)
        print(sock.recv(4096).decode(errors="replace").replace("\\0", "\\n"), flush=True)
"""


@dataclass
class Hosts:
    """The gateway's bed, and two containers behind a bridge."""

    bed: Bed
    one: str
    two: str

    def command(self, netns: str, command: Sequence[str], *, hooked: bool = True) -> list[str]:
        group = self.bed.gateway.cgroup / "jobs" if hooked else None
        if group is not None:
            group.mkdir(exist_ok=True)
        return cgroups.inside(command, cgroup=group, netns=netns)

    def run(self, netns: str, command: Sequence[str], *, hooked: bool = True) -> str:
        done = subprocess.run(
            self.command(netns, command, hooked=hooked), capture_output=True, text=True, timeout=60, cwd="/"
        )
        return (done.stdout + done.stderr).strip()


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with beds.bed("containers") as bed, namespace() as one, namespace() as two:
        ip("-n", bed.runner, "link", "add", "bridge", "type", "bridge")
        ip("-n", bed.runner, "address", "add", f"{GATE}/24", "dev", "bridge")
        ip("-n", bed.runner, "link", "set", "bridge", "up")
        sysctl(bed.runner, "net.ipv4.ip_forward", "1")
        for number, (netns, address) in enumerate([(one, CONTAINER), (two, OTHER)]):
            wire = f"veth{number}"
            ip("link", "add", wire, "netns", bed.runner, "type", "veth", "peer", "name", "eth0", "netns", netns)
            ip("-n", bed.runner, "link", "set", wire, "master", "bridge", "up")
            ip("-n", netns, "address", "add", f"{address}/24", "dev", "eth0")
            ip("-n", netns, "link", "set", "eth0", "up")
            ip("-n", netns, "route", "add", "default", "via", GATE)
        bed.gateway.write_policy(JOB + "targets:\n" + beds.target("shop", f"{DATABASE}:5432") + beds.rules())
        bed.gateway.start()
        yield Hosts(bed, one, two)


def _asking(bed: Bed) -> ProcessImage:
    """The image of the client of the latest session, as it was recorded."""
    opened = bed.replay(str(bed.sessions()[0]["id"]))[0]
    return msgspec.convert(opened["chain"], Chain).lineage[-1]


def test_a_client_behind_a_bridge_is_attributed_and_served(hosts: Hosts) -> None:
    for netns, address in ((hosts.one, CONTAINER), (hosts.two, OTHER)):
        assert hosts.run(netns, [*PSQL, "SELECT 'served'", CONNINFO]) == "served"
        session = hosts.bed.sessions()[0]
        assert (session["chain"], session["target"]) == ("job", "shop")
        assert str(session["peer"]).startswith(f"{address}:")


def test_the_record_has_the_digest_of_what_connected(hosts: Hosts) -> None:
    """The first one about a file may lack it: nobody waits for long."""
    psql = Path("/usr/lib/postgresql/15/bin/psql")
    for _attempt in range(10):
        assert hosts.run(hosts.one, [str(psql), *PSQL[1:], "SELECT 'served'", CONNINFO]) == "served"
        if found := _asking(hosts.bed).sha256:
            break
    assert found == hashlib.sha256(psql.read_bytes()).hexdigest()


def test_a_client_behind_a_bridge_that_no_record_is_of_is_refused(hosts: Hosts) -> None:
    said = hosts.run(hosts.one, [*PSQL, "SELECT 1", CONNINFO], hooked=False)
    assert "could not be attributed" in said
    assert "no record of this connection" in said


@contextmanager
def twin(hosts: Hosts, port: int) -> Iterator[None]:
    """Another container with the first one's address connects from this port, into nowhere, and stays."""
    with namespace(CONTAINER) as netns:
        ip("-n", netns, "link", "add", "void", "type", "veth", "peer", "name", "nowhere")
        for device in ("void", "nowhere"):
            ip("-n", netns, "link", "set", device, "up")
        ip("-n", netns, "route", "add", "default", "dev", "void", "src", CONTAINER)
        command = ["/usr/bin/python3", "-I", "-c", FROM_PORT, DATABASE, str(port), "stay"]
        with subprocess.Popen(
            hosts.command(netns, command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None and process.stdout.readline() == "connecting\n"
            try:
                yield
            finally:
                process.communicate()


def test_overlapping_addresses_of_two_containers_are_refused(hosts: Hosts) -> None:
    port = 41_500
    client = ["/usr/bin/python3", "-I", "-c", FROM_PORT, DATABASE, str(port)]
    with twin(hosts, port):
        assert "two network namespaces use the same addresses" in hosts.run(hosts.one, client)
    assert hosts.bed.sessions()[0]["refusal"]
    # without the twin the same client from another port is served
    assert "two network namespaces" not in hosts.run(hosts.one, [*client[:-1], str(port + 1)])


# --- a real container -------------------------------------------------------------------------------------------------


def _root_filesystem(directory: Path) -> Path:
    """psql and what it needs, of this host: returns the path of psql in it."""
    psql = Path("/usr/lib/postgresql/15/bin/psql")
    linked = subprocess.run(["ldd", str(psql)], check=True, capture_output=True, text=True).stdout
    libraries = [word for line in linked.splitlines() for word in line.split() if word.startswith("/")]
    for name in ("proc", "dev", "tmp", "etc", "usr/bin"):
        (directory / name).mkdir(parents=True)
    for library in libraries:
        place = directory / library.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, place)
    (directory / "etc/passwd").write_text("root:x:0:0::/:/usr/bin/psql\n")
    return Path(shutil.copy(psql, directory / "usr/bin/psql"))


def _bundle(directory: Path, netns: str, cgroup: Path, command: Sequence[str]) -> None:
    subprocess.run(["runc", "spec"], check=True, cwd=directory)
    config = json.loads((directory / "config.json").read_text())
    config["process"] |= {"terminal": False, "args": [*command], "cwd": "/", "env": ["PATH=/usr/bin", "HOME=/tmp"]}
    config["process"].pop("rlimits", None)
    config["mounts"] = [mount for mount in config["mounts"] if mount["type"] in ("proc", "tmpfs")]
    linux = config["linux"]
    linux["namespaces"] = [kind for kind in linux["namespaces"] if kind["type"] not in ("network", "cgroup")]
    linux["namespaces"].append({"type": "network", "path": f"/run/netns/{netns}"})
    linux.pop("resources", None)
    # below the hooked one, as all of a runner's containers are below the root
    linux["cgroupsPath"] = f"/{cgroup.relative_to(mount_point())}"
    (directory / "config.json").write_text(json.dumps(config))


def _forget(name: str) -> None:
    """Where version 1 hierarchies are mounted too, runc leaves the directories above its own in each of them."""
    for directory in Path("/sys/fs/cgroup").glob(f"*/{name}"):
        if directory.parent != mount_point():
            for below in sorted({directory, *directory.glob("**/")}, reverse=True):
                _await_empty(below)
                below.rmdir()


def _await_empty(cgroup: Path) -> None:
    """podman's monitor of a container ends a moment after it."""
    deadline = time.monotonic() + 5
    while (cgroup / "cgroup.procs").read_text() and time.monotonic() < deadline:
        time.sleep(0.02)


def _here() -> Namespaces:
    return Namespaces(*(Path(f"/proc/self/ns/{kind}").stat().st_ino for kind in ("pid", "mnt", "net", "user")))


def test_an_agent_in_a_container_of_runc_is_known_by_its_file(hosts: Hosts) -> None:
    """Its mount, pid, uts and ipc namespaces are its own, and so is its root file system."""
    bed = hosts.bed
    bundle = bed.directory / "bundle"
    bundle.mkdir()
    psql = _root_filesystem(bundle / "rootfs")
    # as containerd has it without systemd: the name is the container's id
    cgroup = bed.gateway.cgroup / CONTAINER_ID
    _bundle(bundle, hosts.one, cgroup, ["/usr/bin/psql", *PSQL[1:], "SELECT 'contained'", CONNINFO])
    agents = f"agents:\n  job: {{exe: /bin/sh}}\n  contained: {{exe: {psql}}}\n"
    rules = textwrap.dedent("""\
        rules:
          - {name: all-read, agents: "*", targets: "*", statements: read, decision: allow}
        """)
    bed.gateway.write_policy(agents + "targets:\n" + beds.target("shop", f"{DATABASE}:5432") + rules)
    bed.gateway.cli("reload")
    root = ["runc", "--root", str(bed.directory / "runc")]
    try:
        said = hosts.run(bed.runner, [*root, "run", "--bundle", str(bundle), "hopgate-test"])
    finally:
        subprocess.run([*root, "delete", "--force", "hopgate-test"], capture_output=True)
        _forget(bed.gateway.cgroup.name)
    assert said == "contained"
    session = bed.sessions()[0]
    assert session["chain"] == "job > contained"
    assert str(session["peer"]).startswith(f"{CONTAINER}:")
    asking, here = _asking(bed), _here()
    assert asking.container == CONTAINER_ID
    assert asking.sha256 in ("", hashlib.sha256(psql.read_bytes()).hexdigest())
    assert asking.namespaces is not None and asking.namespaces.user == here.user
    assert asking.namespaces.net == Path(f"/run/netns/{hosts.one}").stat().st_ino
    assert asking.namespaces.pid not in (0, here.pid) and asking.namespaces.mnt not in (0, here.mnt)


# podman writes to places of its own and of its network programs: here each is in its test's directory, or a file system
# that goes with the mount namespace
PODMAN = """\
set -e
mount --make-rprivate /
mkdir -p /var/lib/cni /run/netns /run/containers
for place in /var/lib/cni /run/netns /run/containers; do mount -t tmpfs none $place; done
cd {place}
export CONTAINERS_CONF={place}/containers.conf
podman="podman --root {place}/root --runroot {place}/run --storage-driver vfs --cgroup-manager cgroupfs"
$podman import --quiet rootfs.tar hopgate-test >import.log 2>&1 || {{ cat import.log; exit 1; }}
$podman run --rm --cidfile {place}/id --net bridge --cgroup-parent /{parent} \
    --ulimit nofile=1024:1024 --ulimit nproc=4096:4096 hopgate-test /usr/bin/psql "$@"
"""
CONTAINERS_CONF = """\
[network]
network_config_dir = "{place}/networks"
default_subnet = "{subnet}"
[engine]
runtime = "runc"
events_logger = "none"
tmp_dir = "{place}/tmp"
[containers]
log_driver = "k8s-file"
"""


def test_a_client_in_a_container_of_podman_on_its_own_bridge_is_served(hosts: Hosts) -> None:
    """The bridge, its addresses and its rules are podman's, in the gateway's namespace; podman finds the tables with
    Hopgate's chains in them, and Hopgate's jumps are back in front when podman has put its own there."""
    bed = hosts.bed
    place = bed.directory / "podman"
    place.mkdir()
    _root_filesystem(place / "rootfs")
    subprocess.run(["tar", "-C", str(place / "rootfs"), "-cf", str(place / "rootfs.tar"), "."], check=True)
    (place / "containers.conf").write_text(CONTAINERS_CONF.format(place=place, subnet=PODMANS))
    bed.gateway.write_policy(JOB + "targets:\n" + beds.target("shop", f"{DATABASE}:5432") + beds.rules())
    bed.gateway.cli("reload")
    script = PODMAN.format(place=place, parent=f"{bed.gateway.cgroup.name}/podman")
    psql = [*PSQL[1:], "SELECT 'contained'", CONNINFO]
    try:
        said = hosts.run(bed.runner, ["unshare", "--mount", "sh", "-c", script, "sh", *psql])
    finally:
        _forget(bed.gateway.cgroup.name)
    assert said == "contained"
    session = bed.sessions()[0]
    assert (session["chain"], session["target"]) == ("job", "shop")
    assert ip_address(str(session["peer"]).rpartition(":")[0]) in ip_network(PODMANS)
    assert _asking(bed).container == (place / "id").read_text().strip()
    # podman's network programs ran iptables, below an agent
    assert "raw IP socket" not in bed.gateway.log()
