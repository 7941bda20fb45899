"""Where the kernel tests run: a hooked cgroup, the listener's namespace, a namespace behind a wire, the programs
loaded."""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from hostagent import kernel
from proxy.model import Endpoint, ProcessImage
from tests.lab import cgroups, namespaces

PROGRAMS = Path(__file__).with_name("programs.py")
LISTEN_PORT = 15432
HERE = ("192.0.2.1", "2001:db8::1")
"""Addresses of the listener's namespace on the wire, and …"""
BEYOND = ("192.0.2.2", "2001:db8::2")
"""… of the namespace behind it."""
PORT = 5432
SMALL = kernel.MapSizes(procs=8192, nodes=32_768, graveyard=16_384, connects=16_384)
_SO_ORIGINAL_DST = 80


@dataclass
class Accepted:
    """One connection that the listener accepted, and the line that its client sent."""

    peer: Endpoint
    dialled: Endpoint
    tgid: int
    tag: str


class Bed:
    """`cgroup` is hooked; `workers` is in it; `netns` has the listener and the rules; `beyond` is at the other end of a
    wire."""

    def __init__(self, cgroup: Path, netns: str, beyond: str, sizes: kernel.MapSizes) -> None:
        self.cgroup = cgroup
        self.netns = netns
        self.beyond = beyond
        self.workers = cgroup / "workers"
        self.workers.mkdir()
        self.settings = kernel.Settings(
            cgroup=cgroup,
            pin_dir=Path("/sys/fs/bpf") / cgroup.name,
            listen_port=LISTEN_PORT,
            worker_cgroup=self.workers,
            sizes=sizes,
            run_dir=Path("/run") / cgroup.name,
        )
        with namespaces.entered(netns):
            self.listener = socket.create_server(
                ("::", LISTEN_PORT), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096
            )
            self.muster = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(10)
        self.scope = kernel.Scope(ports=(PORT,), muster=Endpoint("127.0.0.1", self.muster.getsockname()[1]))

    def load(self) -> None:
        with namespaces.entered(self.netns):
            self.pins = kernel.start(self.settings, self.scope)

    def close(self) -> None:
        self.listener.close()
        self.muster.close()
        with namespaces.entered(self.netns):
            kernel.cleanup(self.settings.pin_dir)
        run_dir = Path("/run") / self.cgroup.name
        if run_dir.exists():
            # also shows that the loader left nothing in it
            run_dir.rmdir()

    # --- clients ------------------------------------------------------------------------------------------------------

    def command(
        self, name: str, *arguments: object, address: str = BEYOND[0], port: int = PORT, tag: str = "tag"
    ) -> list[str]:
        return [sys.executable, "-I", "-S", str(PROGRAMS), name, address, str(port), tag, *map(str, arguments)]

    def run(self, command: Sequence[str], **options: Any) -> str:
        """Runs a client in the hooked cgroup and the listener's namespace; returns what it printed."""
        done = cgroups.run(command, **{"cgroup": self.cgroup, "netns": self.netns, **options})
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start(self, command: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        defaults: dict[str, Any] = {"cgroup": self.cgroup, "netns": self.netns}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        return cgroups.start(command, **{**defaults, **pipes, **options})

    # --- the listener's side ------------------------------------------------------------------------------------------

    def accept(self) -> Accepted:
        """Accepts one connection and reads its line, if it sent one."""
        connection, address = self.listener.accept()
        with connection:
            connection.settimeout(10)
            peer = Endpoint(_plain(address[0]), address[1])
            dialled = original_destination(connection, ":" in peer.address)
            try:
                line = connection.recv(200).decode().split()
            except ConnectionResetError:
                line = []
        tgid, tag = line if len(line) == 2 else ("0", "")
        return Accepted(peer, dialled, int(tgid), tag)

    def take(self) -> tuple[Accepted, kernel.ConnectRecord | kernel.Refused]:
        accepted = self.accept()
        return accepted, self.pins.take(accepted.peer, accepted.dialled)

    def attributed(self) -> tuple[Accepted, tuple[ProcessImage, ...]]:
        """Accepts one connection; its lineage has to be known and to end in the process that connected."""
        accepted, record = self.take()
        assert isinstance(record, kernel.ConnectRecord), record
        assert record.tgid == accepted.tgid
        lineage = self.pins.lineage(record.node)
        assert lineage is not None
        return accepted, lineage

    def tags(self) -> list[str]:
        """The tags in the lineage of the next connection, root first."""
        return tags(self.attributed()[1])


def tags(lineage: Sequence[ProcessImage]) -> list[str]:
    """What each tagged image has as its tag; the helpers that put a command into cgroup and namespace do not count."""
    found = [
        next((word for word in image.argv if word.startswith("tag-")), "")
        for image in lineage
        if image.comm not in ("sh", "nsenter")
    ]
    return [tag for tag in found if tag]


def original_destination(connection: socket.socket, ipv6: bool) -> Endpoint:
    if ipv6:
        data = connection.getsockopt(socket.IPPROTO_IPV6, _SO_ORIGINAL_DST, 28)
        return Endpoint(str(ip_address(data[8:24])), struct.unpack_from("!H", data, 2)[0])
    data = connection.getsockopt(socket.SOL_IP, _SO_ORIGINAL_DST, 16)
    return Endpoint(str(ip_address(data[4:8])), struct.unpack_from("!H", data, 2)[0])


def _plain(address: str) -> str:
    return address.removeprefix("::ffff:")


@contextmanager
def bed(name: str, sizes: kernel.MapSizes = SMALL, *, load: bool = True) -> Iterator[Bed]:
    with (
        cgroups.cgroup(name) as cgroup,
        namespaces.linked_namespaces(HERE, BEYOND) as (netns, beyond),
    ):
        made = Bed(cgroup, netns, beyond, sizes)
        try:
            if load:
                made.load()
            yield made
        finally:
            made.close()
            if hasattr(made, "pins"):
                made.pins.close()
