from __future__ import annotations

import hashlib
import mmap
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest
from structlog.testing import capture_logs

from hostagent.attribution import AgentMatcher, Undecidable, agents, files
from proxy.model import ProcessImage
from proxy.policy.document import Agent

Image = Callable[..., ProcessImage]


@pytest.fixture(autouse=True)
def look_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agents, "RECHECK_S", 0.0)


TELLING, SETTLED_NS = files.TELLING, files.SETTLED_NS


@pytest.fixture(autouse=True)
def trust_new_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also where temporary files are on tmpfs."""
    monkeypatch.setattr(files, "SETTLED_NS", 0)
    with (tmp_path / "any").open("wb") as file:
        monkeypatch.setattr(files, "TELLING", TELLING | {files.file_system(file.fileno())})


@pytest.fixture
def exe(tmp_path: Path) -> Path:
    path = tmp_path / "agent"
    shutil.copy("/bin/true", path)
    path.chmod(0o755)
    return path


@pytest.fixture
def image(exe: Path) -> Image:
    """The image of a process that started just now from `exe`."""

    def make(**given: object) -> ProcessImage:
        status = exe.stat()
        values: dict[str, object] = {
            "node": 1,
            "tgid": 100,
            "start_ns": time.monotonic_ns(),
            "uid": 1000,
            "device": status.st_dev,
            "inode": status.st_ino,
            "path": "whatever",
            "comm": "agent",
            "argv": ("agent", "serve", "--fast"),
            "argv_truncated": False,
            "cgroup": "/ci.slice/job-7",
            **given,
        }
        return ProcessImage(**values)  # type: ignore[arg-type]

    return make


def test_the_file_decides_and_not_the_path(exe: Path, image: Image) -> None:
    matcher = AgentMatcher([Agent("a", str(exe))])
    assert matcher.match(image()) == ("a",)
    assert matcher.match(image(path=str(exe), inode=image().inode + 1)) == ()
    assert matcher.match(image(path=str(exe), device=image().device + 1)) == ()


def test_a_copy_is_somebody_else(exe: Path, image: Image, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copy(exe, copy)
    assert AgentMatcher([Agent("a", str(exe))]).match(image(inode=copy.stat().st_ino)) == ()


@pytest.mark.parametrize(
    ("condition", "matches"),
    [
        ({"uid": 1000}, True),
        ({"uid": 0}, False),
        ({"argv": "agent serve *"}, True),
        ({"argv": "agent serve"}, False),
        ({"argv": "*--fast"}, True),
        ({"cgroup": "/ci.slice/*"}, True),
        ({"cgroup": "/other.slice/*"}, False),
        ({"uid": 1000, "argv": "agent *", "cgroup": "/ci.slice/job-[0-9]"}, True),
        ({"uid": 1000, "argv": "agent *", "cgroup": "/ci.slice/job-[a-z]"}, False),
    ],
)
def test_all_conditions_have_to_hold(exe: Path, image: Image, condition: dict[str, object], matches: bool) -> None:
    agent = Agent("a", str(exe), **condition)  # type: ignore[arg-type]
    assert bool(AgentMatcher([agent]).match(image())) is matches


def test_several_agents_count_in_the_order_of_their_names(exe: Path, image: Image) -> None:
    matcher = AgentMatcher([Agent("b", str(exe)), Agent("a", str(exe), argv="agent *"), Agent("c", "/bin/cat")])
    assert matcher.match(image()) == ("a", "b")


def test_the_digest_has_to_be_that_of_the_policy(exe: Path, image: Image) -> None:
    digest = hashlib.sha256(exe.read_bytes()).hexdigest()
    assert AgentMatcher([Agent("a", str(exe), sha256=digest.upper())]).match(image()) == ("a",)
    with capture_logs() as logs:
        assert AgentMatcher([Agent("a", str(exe), sha256="0" * 64)]).match(image()) == ()
    assert "sha256" in logs[0]["why"]


def test_a_changed_file_is_looked_at_again(exe: Path, image: Image) -> None:
    digest = hashlib.sha256(exe.read_bytes()).hexdigest()
    matcher = AgentMatcher([Agent("a", str(exe), sha256=digest)])
    assert matcher.match(image()) == ("a",)
    with exe.open("ab") as file:
        file.write(b"more")
    with pytest.raises(Undecidable, match="is not to be trusted any more"):
        matcher.match(image())


@pytest.mark.parametrize("mode", [0o775, 0o757])
def test_a_file_that_others_can_write_makes_nobody_an_agent(exe: Path, image: Image, mode: int) -> None:
    digest = hashlib.sha256(exe.read_bytes()).hexdigest()
    exe.chmod(mode)
    with capture_logs() as logs:
        matcher = AgentMatcher([Agent("a", str(exe), sha256=digest)])
        assert matcher.match(image()) == ()
        assert matcher.match(image()) == ()
    assert [log["why"] for log in logs] == ["can be written by group or others"], "said once"


def test_without_digest_the_file_has_to_be_roots(exe: Path, image: Image) -> None:
    os.chown(exe, 1000, 1000)
    assert AgentMatcher([Agent("a", str(exe))]).match(image()) == ()
    digest = hashlib.sha256(exe.read_bytes()).hexdigest()
    assert AgentMatcher([Agent("a", str(exe), sha256=digest)]).match(image()) == ("a",)


@contextmanager
def written_through_a_mapping(exe: Path) -> Iterator[mmap.mmap]:
    """A page that was written to, and is as it was: further writes to it leave no trace in the file's times."""
    with exe.open("r+b") as file, mmap.mmap(file.fileno(), 0) as page:
        page[-1] = page[-1]
        yield page


def test_a_file_that_is_open_for_writing_makes_nobody_an_agent(exe: Path, image: Image) -> None:
    """Its owner shows what the policy wants, and writes something else when that was read."""
    os.chown(exe, 1000, 1000)
    digest = hashlib.sha256(exe.read_bytes()).hexdigest()
    with written_through_a_mapping(exe) as page, capture_logs() as logs:
        matcher = AgentMatcher([Agent("a", str(exe), sha256=digest)])
        assert matcher.match(image()) == ()
        page[-1] ^= 0xFF
    assert logs[0]["why"] == "is open for writing"
    assert matcher.match(image()) == ()
    with exe.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read()[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 0xFF]))
    assert matcher.match(image()) == ("a",)


def test_who_writes_while_it_is_read_ends_nobody(exe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel tells the holder of a lease by a signal."""
    others: list[subprocess.Popen[bytes]] = []

    def read(fd: int, _size: int) -> str:
        others.append(subprocess.Popen(["sh", "-c", 'echo >> "$0"', exe]))
        time.sleep(0.3)
        return "read"

    monkeypatch.setattr(files, "sha256", read)
    with exe.open("rb") as file:
        assert files.settled_sha256(file.fileno(), 1) == "read"
    assert others[0].wait(10) == 0


def test_without_times_that_tell_the_digest_proves_nothing(
    exe: Path, image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "TELLING", TELLING)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as directory:
        copy = Path(shutil.copy2(exe, directory))
        os.chown(copy, 1000, 1000)
        digest = hashlib.sha256(copy.read_bytes()).hexdigest()
        with capture_logs() as logs:
            made = image(device=copy.stat().st_dev, inode=copy.stat().st_ino)
            assert AgentMatcher([Agent("a", str(copy), sha256=digest)]).match(made) == ()
    assert "not every write can be told" in logs[0]["why"]


def test_two_writes_within_a_tick_are_waited_out(exe: Path, image: Image, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "SETTLED_NS", SETTLED_NS)
    os.chown(exe, 1000, 1000)
    digest = hashlib.sha256(exe.read_bytes()).hexdigest()
    matcher = AgentMatcher([Agent("a", str(exe), sha256=digest)])
    os.utime(exe)
    assert matcher.match(image()) == ()
    time.sleep(0.1)
    assert matcher.match(image()) == ("a",)


@pytest.mark.parametrize(("mode", "owner", "trusted"), [(0o777, 0, False), (0o1777, 0, True), (0o755, 1000, False)])
def test_without_digest_only_root_may_put_files_there(
    exe: Path, image: Image, mode: int, owner: int, trusted: bool
) -> None:
    exe.parent.chmod(mode)
    os.chown(exe.parent, owner, owner)
    assert bool(AgentMatcher([Agent("a", str(exe))]).match(image())) is trusted


def test_a_missing_file_makes_nobody_an_agent_until_it_is_there(exe: Path, image: Image) -> None:
    away = exe.rename(exe.with_name("away"))
    matcher = AgentMatcher([Agent("a", str(exe))])
    assert matcher.match(image_of(away, image)) == ()
    away.rename(exe)
    assert matcher.match(image()) == ("a",)


def image_of(path: Path, image: Image) -> ProcessImage:
    link = path.with_name("agent")
    os.link(path, link)
    made = image()
    link.unlink()
    return made


@pytest.mark.parametrize("how", ["replaced", "removed", "opened", "reloaded"])
def test_a_running_agent_does_not_cease_to_be_one(exe: Path, image: Image, how: str) -> None:
    """By what its user does to its file: it would then have what its parents may do."""
    os.chown(exe, 1000, 1000)
    digest = hashlib.sha256(exe.read_bytes()).hexdigest()
    agent = Agent("a", str(exe), sha256=digest, uid=1000, intercept="all")
    matcher = AgentMatcher([agent])
    runs = image()
    assert matcher.match(runs) == ("a",)
    match how:
        case "replaced" | "reloaded":
            copy = Path(shutil.copy2(exe, exe.with_name("copy")))
            os.chown(copy, 1000, 1000)
            copy.rename(exe)
        case "removed":
            exe.unlink()
        case "opened":
            exe.chmod(0o777)
    if how == "reloaded":
        matcher, former = AgentMatcher([agent], matcher), matcher
        former.close()
    with pytest.raises(Undecidable, match="was replaced, or is not to be trusted any more, and process `100`"):
        matcher.match(runs)
    assert (runs.device, runs.inode) in matcher.intercepted_files()
    assert matcher.match(msgspec.structs.replace(runs, uid=1001)) == ()
    if how == "opened":
        exe.chmod(0o755)
    if exe.exists():
        assert matcher.match(image()) == ("a",)


def test_where_files_are_numbered_twice_nobody_can_be_told(
    exe: Path, image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anybody's file in a subvolume of his own can have the number, for the kernel of the same device."""
    with exe.open("rb") as file:
        monkeypatch.setattr(files, "NUMBERED_TWICE", {files.file_system(file.fileno())})
    matcher = AgentMatcher([Agent("a", str(exe), intercept="all")])
    with pytest.raises(Undecidable, match="btrfs"):
        matcher.match(image())
    assert (image().device, image().inode) in matcher.intercepted_files()
    assert "btrfs" in matcher.complaints()["a"]


def test_the_number_of_a_former_file_is_not_used_again(exe: Path, image: Image) -> None:
    matcher = AgentMatcher([Agent("a", str(exe))])
    former = exe.stat().st_ino
    assert matcher.match(image()) == ("a",)
    exe.unlink()
    matcher.look()
    for number in range(300):
        other = Path(shutil.copy("/bin/true", exe.with_name("other")))
        assert other.stat().st_ino != former, number
        other.unlink()


def test_what_was_changed_after_the_process_started_cannot_be_told(exe: Path, image: Image) -> None:
    """Its owner ran something else from this file, and then put back what the policy wants."""
    os.chown(exe, 1000, 1000)
    digest = hashlib.sha256(exe.read_bytes()).hexdigest()
    matcher = AgentMatcher([Agent("a", str(exe), sha256=digest)])
    started_before = image(start_ns=time.monotonic_ns() - 60 * 10**9)
    with pytest.raises(Undecidable, match="was changed after process `100` started"):
        matcher.match(started_before)
    assert matcher.match(image()) == ("a",)


def test_a_cgroup_that_is_gone_cannot_be_told(exe: Path, image: Image) -> None:
    matcher = AgentMatcher([Agent("a", str(exe), cgroup="/ci.slice/*")])
    with pytest.raises(Undecidable, match="cgroup of process `100` is gone"):
        matcher.match(image(cgroup=""))
    assert AgentMatcher([Agent("a", "/bin/cat", cgroup="/ci.slice/*")]).match(image(cgroup="")) == ()


@pytest.mark.parametrize(("pattern", "matches"), [("agent serve --f*", True), ("agent run*", False), ("*-v", False)])
def test_arguments_that_were_cut_are_matched_as_far_as_the_kernel_kept_them(
    exe: Path, image: Image, pattern: str, matches: bool
) -> None:
    matcher = AgentMatcher([Agent("a", str(exe), argv=pattern)])
    assert bool(matcher.match(image(argv_truncated=True))) is matches


def test_descriptors_are_given_back(exe: Path, image: Image) -> None:
    before = set(os.listdir("/proc/self/fd"))
    matcher = AgentMatcher([Agent("a", str(exe)), Agent("b", "/bin/cat")])
    matcher.match(image())
    assert set(os.listdir("/proc/self/fd")) > before
    del matcher
    assert set(os.listdir("/proc/self/fd")) == before


def test_the_files_of_intercepted_agents_are_those_that_match(exe: Path, image: Image, tmp_path: Path) -> None:
    agents = [
        Agent("a", str(exe), argv="nothing like it", intercept="all"),
        Agent("b", "/bin/cat"),
        Agent("c", declared_by=("uid:0",), intercept="all"),
        Agent("d", str(tmp_path / "missing"), intercept="all"),
    ]
    matcher = AgentMatcher(agents)
    assert matcher.intercepted == {"a", "c", "d"}
    assert (image().device, image().inode) in matcher.intercepted_files()
    cat = Path("/bin/cat").stat()
    assert (cat.st_dev, cat.st_ino) not in matcher.intercepted_files()
    assert AgentMatcher([agents[1]]).intercepted_files() == frozenset()
