"""Executables as files: what the kernel calls them, their version, their digest."""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import time
from collections.abc import Callable
from pathlib import Path

_CHUNK_BYTES = 1 << 20


def version(status: os.stat_result) -> tuple[int, ...]:
    """Equal for two looks at a file between which nobody changed it."""
    return (
        status.st_dev,
        status.st_ino,
        status.st_mode,
        status.st_uid,
        status.st_size,
        status.st_mtime_ns,
        status.st_ctime_ns,
    )


def sha256(fd: int, size: int, rest: Callable[[float], None] | None = None) -> str:
    """The digest of the first `size` bytes, in hex. `rest` is told after each MiB how many seconds that took. Raises
    `OSError`."""
    digest = hashlib.sha256()
    chunk = memoryview(bytearray(min(size, _CHUNK_BYTES)))
    offset = 0
    while offset < size:
        start_s = time.monotonic()
        read = os.preadv(fd, [chunk[: size - offset]], offset)
        if not read:
            break
        digest.update(chunk[:read])
        offset += read
        if rest is not None:
            rest(time.monotonic() - start_s)
    return digest.hexdigest()


def mapped(fd: int) -> tuple[int, int] | None:
    """Device and inode as the kernel itself names the file: on btrfs and overlayfs `stat` says something else. None
    when that cannot be told. Raises `OSError`, and `ValueError` for an empty file."""
    with mmap.mmap(fd, mmap.PAGESIZE, access=mmap.ACCESS_COPY) as page:
        start = ctypes.addressof(ctypes.c_char.from_buffer(page))
        for line in Path("/proc/self/maps").read_text().splitlines():
            addresses, _mode, _offset, device, inode = line.split(maxsplit=5)[:5]
            low, high = (int(part, 16) for part in addresses.split("-"))
            if low <= start < high:
                major, minor = (int(part, 16) for part in device.split(":"))
                return os.makedev(major, minor), int(inode)
    return None


def wall_ns(monotonic_ns: int) -> int:
    """CLOCK_REALTIME, as a file's times are, of a moment of CLOCK_MONOTONIC."""
    return time.time_ns() - (time.monotonic_ns() - monotonic_ns)
