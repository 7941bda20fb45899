"""Executables as files: what the kernel calls them, their version, their digest.

A version tells files apart only where every write leaves its time, which is so on few file systems, and only once
nobody has the file open for writing: a page that is mapped and was written to can be written again without a trace.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import mmap
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

_CHUNK_BYTES = 1 << 20
TELLING = frozenset({0xEF53, 0x58465342, 0xF2F52010})
"""What statfs(2) says of file systems on which writes, also those through a mapping, set the times: ext2 to ext4, xfs,
f2fs. tmpfs does not, and what FUSE or a server says is its owner's to choose."""
NUMBERED_TWICE = frozenset({0x9123683E, 0xCA451A4E})
"""The same of file systems on which the kernel has one device for all subvolumes, each of which numbers its files:
btrfs, bcachefs. Whoever may write there may make a subvolume, and in it a file with any number."""
SETTLED_NS = 50_000_000
"""Two writes within a tick of the clock may have one time."""
_STATFS_BYTES = 256
_libc = ctypes.CDLL(None, use_errno=True)


class Unsettled(Exception):
    """Whether the file stays as it is cannot be told. The message says why."""


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


def file_system(fd: int) -> int:
    """Its kind, as statfs(2) numbers them. Raises `OSError`."""
    described = ctypes.create_string_buffer(_STATFS_BYTES)
    if _libc.fstatfs(fd, described):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return ctypes.c_long.from_buffer(described).value & 0xFFFFFFFF


def settled_sha256(fd: int, size: int) -> str:
    """The digest of a file that others than root can write: as long as its version stays, so does its digest. Raises
    `OSError`, `Unsettled`."""
    if file_system(fd) not in TELLING:
        raise Unsettled("is on a file system where not every write can be told from its times")
    # instead of SIGIO, which would end the process, should anybody open the file for writing meanwhile
    fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except BlockingIOError as error:
        raise Unsettled("is open for writing") from error
    try:
        if time.time_ns() - os.fstat(fd).st_ctime_ns < SETTLED_NS:
            raise Unsettled("was changed this very moment")
        return sha256(fd, size)
    finally:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)


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
