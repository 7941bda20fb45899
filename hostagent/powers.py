"""What agents can do that they should not: capabilities of their executables and processes, for `hopgate doctor`.

A process counts as an agent by its executable and user, as /proc shows them now; one in a user namespace of its own
does not count, since its capabilities are of that namespace.

Blind spots: an agent that does not run now, and was given no capability by its file; what else agents start.
"""

from __future__ import annotations

import fnmatch
import os
import stat
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from proxy.policy.document import Agent

POWERS = {
    1: "DAC_OVERRIDE",
    2: "DAC_READ_SEARCH",
    6: "SETGID",
    7: "SETUID",
    12: "NET_ADMIN",
    13: "NET_RAW",
    16: "SYS_MODULE",
    17: "SYS_RAWIO",
    19: "SYS_PTRACE",
    21: "SYS_ADMIN",
    22: "SYS_BOOT",
    31: "SETFCAP",
    38: "PERFMON",
    39: "BPF",
}
"""Capabilities with which a process gets at hooks, rules, packets, other processes or other users' files, by their
number (include/uapi/linux/capability.h)."""

_ATTRIBUTE = "security.capability"
_FILE_CAPABILITIES = struct.Struct("<IIIII")


class Running(NamedTuple):
    """A process: its user, its executable as device and inode, its arguments, its permitted capabilities."""

    pid: int
    uid: int
    exe: tuple[int, int]
    argv: str
    capabilities: int


def names(capabilities: int) -> list[str]:
    """Those of `POWERS` that are in a set."""
    return [name for number, name in POWERS.items() if capabilities >> number & 1]


def running(proc: Path = Path("/proc")) -> list[Running]:
    """The processes of this user namespace, without kernel threads."""
    ours = os.stat(proc / "self" / "ns" / "user").st_ino
    found: list[Running] = []
    for directory in proc.iterdir():
        if not directory.name.isdecimal():
            continue
        try:
            if os.stat(directory / "ns" / "user").st_ino != ours:
                continue
            exe = os.stat(directory / "exe")
            argv = (directory / "cmdline").read_bytes().removesuffix(b"\0").replace(b"\0", b" ")
            status = dict(line.split(":", 1) for line in (directory / "status").read_text().splitlines())
        except OSError:
            # it has ended, or is a kernel thread
            continue
        uid, capabilities = int(status["Uid"].split()[0]), int(status["CapPrm"], 16)
        identity = exe.st_dev, exe.st_ino
        found.append(Running(int(directory.name), uid, identity, argv.decode(errors="surrogateescape"), capabilities))
    return found


def processes(agent: Agent, among: Iterable[Running]) -> list[Running]:
    """Those that are the agent, as far as that can be told from outside."""
    try:
        exe = os.stat(agent.exe)
    except OSError:
        return []
    return [
        one
        for one in among
        if one.exe == (exe.st_dev, exe.st_ino)
        and agent.uid in (None, one.uid)
        and (not agent.argv or fnmatch.fnmatchcase(one.argv, agent.argv))
    ]


def of_file(path: str) -> Iterator[str]:
    """What an executable gives to whoever starts it. Nothing for a file that cannot be looked at."""
    try:
        status = os.stat(path)
        attributed = _ATTRIBUTE in os.listxattr(path)
        given = os.getxattr(path, _ATTRIBUTE) if attributed else b""
    except OSError:
        return
    if status.st_mode & stat.S_ISUID:
        yield f"runs as uid {status.st_uid}, whoever starts it (setuid)"
    if len(given) >= _FILE_CAPABILITIES.size:
        _magic, low, inheritable, high, inheritable_high = _FILE_CAPABILITIES.unpack_from(given)
        if found := names(low | inheritable | (high | inheritable_high) << 32):
            yield f"has the file capabilities {', '.join(found)}"
