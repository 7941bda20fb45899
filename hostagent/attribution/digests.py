"""The sha256 of what process images run: for the record, it grants nothing.

One thread takes them, beside the event loop, which neither a large file nor a file system that does not answer may keep
waiting. Who asks about images waits until they are done, but `WAIT_S` at most, and not at all while the thread has
other work: so the first record about a large file lacks its digest, and later ones have it. A file is read once for
each version of it (`files.version`), the agents' files before anybody asks, and a large one with half of one processor.

The file is looked for where the process shows it, and then at the path that was executed, in the process's root and in
ours. It counts if it has the device and inode of the image, and if it was not changed after the image started.

Blind spots: no digest of a file that was changed, replaced or removed before it was looked at, is larger than
`FILE_BYTES_MAX`, or that cannot be opened any more. On tmpfs, what is written through a mapping of a file can leave its
times, and so its version, as they were. For a script it is the interpreter's; libraries are not looked at. While a file
system does not answer there are no new digests.
"""

from __future__ import annotations

import os
import stat
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import msgspec

from hostagent.attribution import files
from proxy.model import ProcessImage

WAIT_S = 0.01
FILE_BYTES_MAX = 512 << 20
_AT_ONCE_S = 0.02
"""What one file may take of the processor before it takes turns with everybody else."""
_IDLE_S = 10.0
"""The thread ends when nobody asked for so long."""
_IMAGES_MAX = 16_384
_VERSIONS_MAX = 4096
_QUEUE_MAX = 1024


class _Seen(NamedTuple):
    """A file that did not change between `changed_ns` (CLOCK_REALTIME) and `at_ns` (CLOCK_MONOTONIC): what
    every image of it runs that started meanwhile."""

    digest: str
    changed_ns: int
    at_ns: int


class Digests:
    """To be asked by one thread."""

    def __init__(self) -> None:
        self._versions: OrderedDict[tuple[int, ...], str] = OrderedDict()
        self._seen: OrderedDict[tuple[int, int], _Seen] = OrderedDict()
        """By device and inode as the kernel names them. These two are the thread's own."""
        self._images: OrderedDict[int, str] = OrderedDict()
        """By node, empty where there will be none. This and what follows is guarded by `_changed`."""
        self._queue: deque[ProcessImage | str] = deque()
        self._asked: set[int] = set()
        self._busy = False
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()

    def prepare(self, paths: Iterable[str]) -> None:
        """Takes the digests of these files, so that they are known when somebody runs them."""
        with self._changed:
            for path in paths:
                self._put(path)

    def completed(self, lineage: tuple[ProcessImage, ...]) -> tuple[ProcessImage, ...]:
        """The same images, each with its digest if that is known within `WAIT_S`."""
        with self._changed:
            missing = [image for image in lineage if image.node not in self._images]
            if missing:
                self._ask(missing)
            return tuple(map(self._complete, lineage))

    def _complete(self, image: ProcessImage) -> ProcessImage:
        digest = self._images.get(image.node)
        if not digest:
            return image
        self._images.move_to_end(image.node)
        return msgspec.structs.replace(image, sha256=digest)

    def _ask(self, images: list[ProcessImage]) -> None:
        idle = not self._queue and not self._busy
        for image in images:
            if image.node not in self._asked and self._put(image):
                self._asked.add(image.node)
        if idle:
            self._changed.wait_for(lambda: not self._asked, WAIT_S)

    def _put(self, wanted: ProcessImage | str) -> bool:
        if len(self._queue) >= _QUEUE_MAX:
            return False
        # the latest first: who connects may end soonest
        self._queue.appendleft(wanted)
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="digests", daemon=True)
            self._thread.start()
        self._changed.notify_all()
        return True

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (wanted := self._next()) is not None:
            if isinstance(wanted, str):
                self._prepare(wanted)
                continue
            digest = self._of_image(wanted)
            with self._changed:
                self._images[wanted.node] = digest
                if len(self._images) > _IMAGES_MAX:
                    self._images.popitem(last=False)
                self._asked.discard(wanted.node)
                # not for each: who waits would take turns with us for nothing
                if not self._asked:
                    self._changed.notify_all()

    def _next(self) -> ProcessImage | str | None:
        with self._changed:
            self._busy = False
            if not self._changed.wait_for(lambda: self._queue, _IDLE_S):
                self._thread = None
                return None
            self._busy = True
            return self._queue.popleft()

    def _prepare(self, path: str) -> None:
        try:
            fd = _opened(path)
        except OSError:
            return
        try:
            self._of_file(fd, os.fstat(fd))
        finally:
            os.close(fd)

    def _of_image(self, image: ProcessImage) -> str:
        started_ns = files.wall_ns(image.start_ns)
        seen = self._seen.get((image.device, image.inode))
        if seen is not None and seen.changed_ns <= started_ns and image.start_ns <= seen.at_ns:
            return seen.digest
        at_ns = time.monotonic_ns()
        for path in _paths(image):
            try:
                fd = _opened(path, image)
            except OSError:
                continue
            try:
                status = os.fstat(fd)
                if status.st_ctime_ns <= started_ns and (digest := self._of_file(fd, status)):
                    self._seen[image.device, image.inode] = _Seen(digest, status.st_ctime_ns, at_ns)
                    if len(self._seen) > _VERSIONS_MAX:
                        self._seen.popitem(last=False)
                    return digest
            finally:
                os.close(fd)
            return ""
        return ""

    def _of_file(self, fd: int, status: os.stat_result) -> str:
        version = files.version(status)
        known = self._versions.get(version)
        if known is not None:
            self._versions.move_to_end(version)
            return known
        if not 0 < status.st_size <= FILE_BYTES_MAX:
            return ""
        try:
            digest = files.sha256(fd, status.st_size, _Turns().rest)
        except OSError:
            return ""
        if files.version(os.fstat(fd)) != version:
            return ""
        self._versions[version] = digest
        if len(self._versions) > _VERSIONS_MAX:
            self._versions.popitem(last=False)
        return digest


class _Turns:
    """A file of many MiB takes half of one processor: a lower priority would keep the interpreter's lock with a thread
    that does not run."""

    def __init__(self) -> None:
        self._taken_s = 0.0

    def rest(self, took_s: float) -> None:
        self._taken_s += took_s
        if self._taken_s > _AT_ONCE_S:
            time.sleep(took_s)


def _paths(image: ProcessImage) -> Iterator[str]:
    """Where the image's file may be. Numbers of processes are those of the initial pid namespace: in another one /proc
    has somebody else under them, which device and inode show."""
    process = f"/proc/{image.tgid}"
    yield f"{process}/exe"
    if image.path.startswith("/"):
        yield f"{process}/root{image.path}"
        yield image.path
    elif image.path:
        yield f"{process}/cwd/{image.path}"


def _opened(path: str, image: ProcessImage | None = None) -> int:
    """A descriptor of the file, which has to be the image's. Raises `OSError`."""
    named = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        # before it is opened: to open a device can do something
        status = os.fstat(named)
        if not stat.S_ISREG(status.st_mode) or (image is not None and status.st_ino != image.inode):
            raise FileNotFoundError(path)
        fd = os.open(f"/proc/self/fd/{named}", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.close(named)
    try:
        if image is None or image.device == status.st_dev or (image.device, image.inode) == files.mapped(fd):
            return fd
    except (OSError, ValueError):
        # an empty file, or one that cannot be mapped, is no executable
        pass
    os.close(fd)
    raise FileNotFoundError(path)
