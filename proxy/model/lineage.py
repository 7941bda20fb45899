"""Who is asking: process images, and the hops that the policy makes of them."""

from __future__ import annotations

import msgspec

UNATTRIBUTED = "unattributed"
"""Name of the principal that a chain without any agent stands for."""


class Namespaces(msgspec.Struct, frozen=True):
    """Namespaces by the inode numbers that `/proc/PID/ns` shows, 0 where one could not be read."""

    pid: int
    mnt: int
    net: int
    user: int


class ProcessImage(msgspec.Struct, frozen=True):
    """What one process was running between two `execve` calls: one node of the lineage that the kernel keeps.

    `node` is unique for the life of the host's boot. `device` and `inode` identify the executable that was mapped
    (`device` in `st_dev` encoding); `path` is what was passed to `execve` and is for people only: it never grants.
    `declared` is the agent that a launcher declared the image to be, empty for most.
    `argv` is the head of the argument vector; `argv_truncated` says that more followed. `start_ns` is
    CLOCK_MONOTONIC nanoseconds. `container` is the id that the engine gave it, told by the cgroup, empty where none is;
    `sha256` is the digest of the executable in hex, empty where it was not known in time. Neither grants. `namespaces`
    is None in what older versions recorded.

    Blind spot: `uid`, `cgroup` and `namespaces` are those at `execve`. What `unshare()` or `setns()` did afterwards is
    seen in the images that the process, or what it forks, executes then.
    """

    node: int
    tgid: int
    start_ns: int
    uid: int
    device: int
    inode: int
    path: str
    comm: str
    argv: tuple[str, ...]
    argv_truncated: bool
    cgroup: str
    declared: str = ""
    namespaces: Namespaces | None = None
    container: str = ""
    sha256: str = ""


class Hop(msgspec.Struct, frozen=True):
    """One agent in the lineage, with the process images that belong to it, oldest first."""

    agent: str
    nodes: tuple[int, ...]


class Chain(msgspec.Struct, frozen=True):
    """The lineage from the session root to the process that called `connect()`, and its hops; both root first."""

    hops: tuple[Hop, ...]
    lineage: tuple[ProcessImage, ...]

    @property
    def principals(self) -> tuple[str, ...]:
        """The names that the policy rules on: the agents root first, or `unattributed` alone."""
        return tuple(hop.agent for hop in self.hops) or (UNATTRIBUTED,)

    def __str__(self) -> str:
        return " > ".join(self.principals)
