"""cgroups of the test's own below the cgroup2 mount, and processes that are born in one."""

from __future__ import annotations

import os
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hostagent.kernel.cgroups import mount_point

_GONE_TIMEOUT_S = 10.0


@contextmanager
def cgroup(name: str) -> Iterator[Path]:
    """A new cgroup with `name` in its own; at the end its processes are killed, and it goes with everything below
    it."""
    directory = mount_point() / f"hopgate-{name}-{uuid.uuid4().hex[:8]}"
    directory.mkdir()
    try:
        yield directory
    finally:
        _remove(directory)


def _remove(directory: Path) -> None:
    deadline = time.monotonic() + _GONE_TIMEOUT_S
    while True:
        try:
            for below, _directories, _files in os.walk(directory, topdown=False):
                for tgid in Path(below, "cgroup.procs").read_text().split():
                    _kill(int(tgid))
                os.rmdir(below)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return


def _kill(tgid: int) -> None:
    try:
        os.kill(tgid, signal.SIGKILL)
    except ProcessLookupError:
        return


def inside(argv: Sequence[str], *, cgroup: Path | None = None, netns: str | None = None) -> list[str]:
    """The command, in a cgroup and a network namespace from before its execve on. There are then two images above it:
    `sh`, and `nsenter` when `netns` is given."""
    command = [*argv]
    if netns is not None:
        # not `ip netns exec`: it hides cgroup2 and bpffs behind a /sys of its own
        command = ["nsenter", f"--net=/run/netns/{netns}", *command]
    if cgroup is not None:
        join = 'echo 0 >"$0/cgroup.procs" && exec "$@"'
        command = ["/bin/sh", "-c", join, str(cgroup), *command]
    return command


def run(
    argv: Sequence[str], *, cgroup: Path | None = None, netns: str | None = None, timeout_s: float = 60, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Runs a command in a cgroup and a network namespace, and waits for it."""
    return subprocess.run(
        inside(argv, cgroup=cgroup, netns=netns),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        **options,
    )


def start(
    argv: Sequence[str], *, cgroup: Path | None = None, netns: str | None = None, **options: Any
) -> subprocess.Popen[Any]:
    """Starts a command in a cgroup and a network namespace."""
    return subprocess.Popen(inside(argv, cgroup=cgroup, netns=netns), **options)
