"""The sockets of this host that write below IP, and who has them: AF_PACKET and AF_XDP, in every network namespace that
a process is in.

Read from /proc: what sockets there are in a namespace is in its `net/packet` and `net/protocols` (proc(5)); what a
descriptor is, the kernel tells by the attribute `system.sockprotoname` of its socket (net/socket.c).

Blind spots: a socket that is closed between two looks; one that nobody has open because it is on its way to somebody
else; a namespace that no process is in.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

SOCKETS_MAX = 4096
"""Looked at in one namespace."""
DESCRIPTORS_MAX = 500_000
"""Looked at in all, for whose a socket is."""
_PROCESSES_TRIED = 4
_KINDS = {b"PACKET\0": "AF_PACKET", b"XDP\0": "AF_XDP"}


class RawSocket(msgspec.Struct, frozen=True):
    """`tgid` is as /proc has it; `inode` is the socket's own number."""

    kind: str
    inode: int
    tgid: int


Stamp = frozenset[tuple[int, str]]
"""What tells whether sockets have come or gone: by namespace, a packet socket's number or how many AF_XDP sockets."""


def stamp(proc: Path = Path("/proc")) -> Stamp:
    """What there is, without whose it is. Cheap."""
    return frozenset((netns, what) for netns, tgids in _namespaces(proc).items() for what in _of_namespace(proc, tgids))


def owners(proc: Path = Path("/proc")) -> list[RawSocket]:
    """Each socket once for each process that has it open. Looks at every descriptor there is."""
    found: set[RawSocket] = set()
    looked = 0
    for tgid in _processes(proc):
        try:
            descriptors = os.listdir(proc / str(tgid) / "fd")
        except OSError:
            continue
        for descriptor in descriptors:
            looked += 1
            path = f"{proc}/{tgid}/fd/{descriptor}"
            try:
                target = os.readlink(path)
                if not target.startswith("socket:["):
                    continue
                kind = _KINDS.get(os.getxattr(path, "system.sockprotoname"))
            except OSError:
                continue
            if kind is not None:
                found.add(RawSocket(kind, int(target[len("socket:[") : -1]), tgid))
        if looked > DESCRIPTORS_MAX:
            break
    return sorted(found, key=lambda one: (one.inode, one.tgid))


def _processes(proc: Path) -> Iterator[int]:
    for name in os.listdir(proc):
        if name.isdecimal():
            yield int(name)


def _namespaces(proc: Path) -> dict[int, list[int]]:
    """By the number of a network namespace, a few of the processes in it."""
    found: dict[int, list[int]] = {}
    for tgid in _processes(proc):
        try:
            netns = os.stat(f"{proc}/{tgid}/ns/net").st_ino
        except OSError:
            continue
        if len(some := found.setdefault(netns, [])) < _PROCESSES_TRIED:
            some.append(tgid)
    return found


def _of_namespace(proc: Path, tgids: list[int]) -> Iterator[str]:
    for tgid in tgids:
        net = proc / str(tgid) / "net"
        try:
            packet, protocols = (net / "packet").read_text(), (net / "protocols").read_text()
        except OSError:
            # it has ended; another may be there still
            continue
        yield from (line.split()[-1] for line in packet.splitlines()[1 : 1 + SOCKETS_MAX])
        for line in protocols.splitlines():
            words = line.split()
            if words[:1] == ["XDP"] and words[2] != "0":
                yield f"{words[2]} AF_XDP"
        return
