"""Digests of the executables of processes that run, with real files and the real thread."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from hostagent.attribution import digests, files
from hostagent.attribution.digests import Digests
from proxy.model import ProcessImage

Run = Callable[..., ProcessImage]


@pytest.fixture
def exe(tmp_path: Path) -> Path:
    path = tmp_path / "agent"
    shutil.copy("/bin/sleep", path)
    return path


@pytest.fixture
def run() -> Iterator[Run]:
    """Starts a program, and tells its image as the kernel does."""
    started: list[subprocess.Popen[bytes]] = []
    nodes = iter(range(1, 100))

    def start(exe: Path, *arguments: str, path: str = "", file: Path | None = None) -> ProcessImage:
        process = subprocess.Popen([exe, *(arguments or ("60",))])
        started.append(process)
        status = (file or exe).stat()
        return ProcessImage(
            node=next(nodes),
            tgid=process.pid,
            start_ns=time.monotonic_ns(),
            uid=0,
            device=status.st_dev,
            inode=status.st_ino,
            path=path or str(exe),
            comm="agent",
            argv=(),
            argv_truncated=False,
            cgroup="",
        )

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> Digests:
    """One that waits as long as it takes."""
    monkeypatch.setattr(digests, "WAIT_S", 30.0)
    return Digests()


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the files that were read."""
    sizes: list[int] = []
    real = files.sha256

    def counting(fd: int, size: int, rest: Callable[[float], None] | None = None) -> str:
        sizes.append(size)
        return real(fd, size, rest)

    monkeypatch.setattr(files, "sha256", counting)
    return sizes


def told(made: Digests, *images: ProcessImage) -> list[str]:
    completed = made.completed(images)
    assert [msgspec.structs.replace(image, sha256="") for image in completed] == [*images]
    return [image.sha256 for image in completed]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_file_is_read_once_for_each_version(patient: Digests, exe: Path, run: Run, read: list[int]) -> None:
    first, second = run(exe), run(exe)
    before = sha256(exe)
    assert told(patient, first, second) == [before, before]
    assert told(patient, first, run(exe)) == [before, before]
    assert read == [exe.stat().st_size]
    changed = exe.with_name("changed")
    shutil.copy(exe, changed)
    changed.write_bytes(exe.read_bytes() + b"\0")
    changed.rename(exe)
    assert told(patient, first, run(exe)) == [before, sha256(exe)]
    assert len(read) == 2


def test_the_file_of_who_ended_is_found_by_the_path_that_was_executed(patient: Digests, exe: Path, run: Run) -> None:
    image = run(exe, "0")
    until(lambda: not Path(f"/proc/{image.tgid}/exe").exists())
    assert told(patient, image) == [sha256(exe)]


def test_an_image_that_its_process_has_left_has_its_own_digest(patient: Digests, exe: Path, run: Run) -> None:
    now = run(Path("/bin/sleep"))
    former = run(exe)
    left = msgspec.structs.replace(former, node=98, tgid=now.tgid)
    assert told(patient, left, now) == [sha256(exe), sha256(Path("/bin/sleep"))]


def test_another_file_at_the_path_is_not_taken_for_it(patient: Digests, exe: Path, run: Run) -> None:
    image = run(exe, "0")
    until(lambda: not Path(f"/proc/{image.tgid}/exe").exists())
    exe.rename(exe.with_name("former"))
    shutil.copy("/bin/cat", exe)
    assert told(patient, image) == [""]


def test_a_file_that_was_changed_after_the_image_started_tells_nothing(patient: Digests, exe: Path, run: Run) -> None:
    image = run(exe, "0")
    until(lambda: not Path(f"/proc/{image.tgid}/exe").exists())
    time.sleep(0.02)
    exe.write_bytes(exe.read_bytes() + b"\0")
    time.sleep(0.02)
    assert told(patient, image, run(exe)) == ["", sha256(exe)]


def test_a_file_that_is_gone_is_known_for_who_started_before_it_was_seen_last(
    patient: Digests, exe: Path, run: Run
) -> None:
    digest = sha256(exe)
    early, late = run(exe, "0"), run(exe)
    assert told(patient, late) == [digest]
    changed_ns = exe.stat().st_ctime_ns
    exe.unlink()
    after = msgspec.structs.replace(early, node=98, start_ns=time.monotonic_ns())
    before_s = (time.time_ns() - changed_ns) / 1e9 + 1
    older = msgspec.structs.replace(early, node=99, start_ns=time.monotonic_ns() - int(before_s * 1e9))
    until(lambda: not Path(f"/proc/{early.tgid}/exe").exists())
    assert told(patient, early, after, older) == [digest, "", ""]


def test_a_file_that_changes_while_it_is_read_tells_nothing(
    patient: Digests, exe: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = files.sha256

    def disturbed(fd: int, size: int, rest: Callable[[float], None] | None = None) -> str:
        exe.chmod(0o700)
        return real(fd, size, rest)

    image = run(exe)
    time.sleep(0.02)
    monkeypatch.setattr(files, "sha256", disturbed)
    assert told(patient, image) == [""]


def test_nobody_waits_for_a_large_file_and_later_records_have_it(exe: Path, run: Run) -> None:
    with exe.open("r+b") as file:
        file.truncate(64 << 20)
    made, image = Digests(), run(exe)
    assert told(made, image) == [""]
    until(lambda: told(made, image) != [""])
    assert told(made, image) == [sha256(exe)]


def test_nobody_waits_while_the_thread_has_other_work(
    patient: Digests, exe: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    real = files.sha256

    def slow(fd: int, size: int, rest: Callable[[float], None] | None = None) -> str:
        begun.set()
        assert go_on.wait(30)
        return real(fd, size, rest)

    monkeypatch.setattr(files, "sha256", slow)
    patient.prepare([str(exe)])
    assert begun.wait(10)
    image, start_s = run(exe), time.monotonic()
    assert told(patient, image) == [""]
    assert time.monotonic() - start_s < 5
    go_on.set()
    until(lambda: told(patient, image) == [sha256(exe)])


def test_what_was_prepared_is_not_read_again(patient: Digests, exe: Path, run: Run, read: list[int]) -> None:
    patient.prepare([str(exe), "/nowhere/agent"])
    until(lambda: len(read) == 1)
    assert told(patient, run(exe)) == [sha256(exe)]
    assert len(read) == 1


def test_a_file_that_is_too_large_is_not_read(
    patient: Digests, exe: Path, run: Run, read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "FILE_BYTES_MAX", exe.stat().st_size - 1)
    assert told(patient, run(exe)) == [""]
    assert read == []


def test_what_is_no_file_is_not_opened(patient: Digests, tmp_path: Path, run: Run) -> None:
    """To open this one would never return."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    image = run(Path("/bin/sleep"), path=str(fifo), file=fifo)
    assert told(patient, image) == [""]


def _mounted(run: Run, script: str, exe: Path, place: Path) -> ProcessImage:
    """The image of what a shell in a mount namespace of its own ends in."""
    line = f"mount --make-rprivate / && {script}"
    image = run(Path("/usr/bin/unshare"), "--mount", "sh", "-ec", line, "sh", str(exe), str(place))
    until(lambda: os.readlink(f"/proc/{image.tgid}/exe").endswith(("/agent", "/sleep")))
    return image


@pytest.mark.kernel
def test_a_path_is_looked_up_in_the_mount_namespace_of_the_process(patient: Digests, exe: Path, run: Run) -> None:
    place = exe.with_name("place")
    place.mkdir()
    shell = _mounted(run, 'mount -t tmpfs none "$2"; cp "$1" "$2/agent"; exec sleep 60', exe, place)
    status = os.stat(f"/proc/{shell.tgid}/root{place}/agent")
    image = msgspec.structs.replace(shell, path=f"{place}/agent", device=status.st_dev, inode=status.st_ino)
    assert not (place / "agent").exists()
    assert told(patient, msgspec.structs.replace(image, start_ns=time.monotonic_ns())) == [sha256(exe)]


@pytest.mark.kernel
def test_a_file_on_overlayfs_is_known_by_the_kernels_own_name(patient: Digests, exe: Path, run: Run) -> None:
    place = exe.with_name("place")
    place.mkdir()
    layers = (
        'cd "$2"; mkdir a b; mount -t tmpfs none a; mount -t tmpfs none b; cp "$1" a/agent; mkdir c; '
        'mount -t overlay -o "lowerdir=$2/a:$2/b" none c; exec "$2/c/agent" 60'
    )
    image = _mounted(run, layers, exe, place)
    _addresses, _mode, _offset, device, inode = Path(f"/proc/{image.tgid}/maps").read_text().split(maxsplit=5)[:5]
    major, minor = (int(part, 16) for part in device.split(":"))
    named = msgspec.structs.replace(image, device=os.makedev(major, minor), inode=int(inode), path="")
    assert named.device != os.stat(f"/proc/{image.tgid}/exe").st_dev, "stat says the same: this test shows nothing"
    assert told(patient, msgspec.structs.replace(named, start_ns=time.monotonic_ns())) == [sha256(exe)]


def test_the_thread_ends_when_nobody_asks_and_begins_again(
    patient: Digests, exe: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "_IDLE_S", 0.05)
    before = threading.active_count()
    for _ in range(2):
        assert told(patient, run(exe)) == [sha256(exe)]
        until(lambda: threading.active_count() == before)


def test_memory_is_bounded(patient: Digests, exe: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "_IMAGES_MAX", 3)
    monkeypatch.setattr(digests, "_QUEUE_MAX", 5)
    image = run(exe)
    many = [msgspec.structs.replace(image, node=1000 + number) for number in range(20)]
    told(patient, *many)
    assert len(patient._images) == 3
    assert told(patient, many[-1]) == [sha256(exe)]
