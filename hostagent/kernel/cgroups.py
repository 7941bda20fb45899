"""cgroup2: where it is mounted, which directory an id means, and whose container that is. The id of a cgroup is the
inode of its directory.

Blind spots: the path of a directory that is gone cannot be told. On hosts that have version 1 hierarchies too, an
engine may put its containers into those alone.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from hostagent.kernel.settings import KernelError

_CACHE_MAX = 4096
_CONTAINER = re.compile(r"(?:(?:docker|nerdctl|cri-containerd|crio|libpod)[-:])?([0-9a-f]{64})(?:\.scope)?")
_OF_RUNC = re.compile(r"(?:runc|crun)-(.+)\.scope")


def mount_point() -> Path:
    """Where cgroup2 is mounted: `/sys/fs/cgroup`, or a directory below it on a hybrid host. Raises `KernelError`."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        if right.startswith("cgroup2 "):
            return Path(left.split()[4])
    raise KernelError("cgroup2 is not mounted: mount it on `/sys/fs/cgroup`")


def of_process(tgid: int | str) -> Path:
    """The directory of the cgroup that a process (or `self`) is in. Raises `KernelError` without cgroup2, else
    `OSError`."""
    for line in Path(f"/proc/{tgid}/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            return mount_point() / line[3:].lstrip("/")
    raise KernelError(f"process `{tgid}` is in no cgroup2")


def container(path: str) -> str:
    """The id of the innermost container that a cgroup's path is of, as docker, containerd, CRI-O, podman, runc and the
    kubelet name their cgroups; empty where none is told. For people: whoever may make cgroups chooses their names.

    Blind spots: engines that name cgroups otherwise (systemd-nspawn, LXC), and runc where its caller chose another one.
    """
    for name in reversed(path.split("/")):
        # with a kubelet and a runtime that disagree about systemd, runc's triple of slice, prefix and id is the name
        found = _CONTAINER.fullmatch(re.sub(r"^.+\.slice:", "", name)) or _OF_RUNC.fullmatch(name)
        if found is not None:
            return found[1]
    return ""


class Paths:
    """Tells cgroup ids as paths from the mount (`/system.slice/ci.service`), by walking the tree when an id is new."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: dict[int, str] = {}

    def path(self, cgroup_id: int) -> str:
        """Empty when no directory has this id."""
        known = self._known.get(cgroup_id)
        if known is not None and self._inode(known) == cgroup_id:
            return known
        if len(self._known) > _CACHE_MAX:
            self._known.clear()
        self._known.pop(cgroup_id, None)
        for directory, _directories, _files in os.walk(self._root):
            name = "/" + os.path.relpath(directory, self._root) if directory != str(self._root) else "/"
            self._known[self._inode(name)] = name
        return self._known.get(cgroup_id, "")

    def _inode(self, name: str) -> int:
        try:
            return os.stat(self._root / name.lstrip("/")).st_ino
        except OSError:
            return 0
