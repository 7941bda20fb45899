"""Whose turn it is to change the kernel side: one at a time, also when a daemon was killed in the middle of it.

The lock is an advisory one on the run directory. The programs that are started in a turn (loader, iptables, ipset)
inherit it, so that it is over when the last of them is, and not when the daemon that started them died: the next daemon
never meets a loader or an `iptables-restore` that is still at work.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_held: list[int] = []


@contextmanager
def taken(run_dir: Path) -> Iterator[None]:
    """Waits for the turn. Not to be nested. Raises `OSError` without the directory."""
    descriptor = os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        _held.append(descriptor)
        try:
            yield
        finally:
            _held.remove(descriptor)
    finally:
        os.close(descriptor)


def descriptors() -> tuple[int, ...]:
    """What a program that is started now has to inherit."""
    return tuple(_held)
