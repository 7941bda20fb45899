"""A booted Debian of the test's own, on the live kernel: systemd in a container with its own cgroup and network.

    with Machine(directory, files={"/opt/thing": path}) as machine:
        machine.run("systemctl is-system-running")

The root file system is made once by debootstrap, from the mirror that this host's apt is configured for, and kept
outside the checkout; each machine writes into an overlay that goes with it. The machine's cgroup tree ends at a cgroup
that we make, and its network has no way out, so a program attached to "the root cgroup" or a rule in "the root
namespace" of the machine concerns nobody else. Process ids inside are those of a PID namespace; the kernel below is
shared, tracepoints too.

Blind spot: `/sys/fs/bpf` is mounted by hand, since systemd leaves that to the host when it runs in a container.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

CACHE = Path(os.environ.get("HOPGATE_TEST_CACHE", "/var/cache/hopgate-test"))
"""Root file systems and wheels, kept between runs."""
BASE_PACKAGES = ("systemd", "systemd-sysv", "dbus", "procps", "kmod", "iputils-ping")
BOOT_TIMEOUT_S = 60.0
POWER_OFF_TIMEOUT_S = 30.0


class MachineError(Exception):
    """The machine could not be made, booted or ended; the message has the end of its output."""


def host_release() -> str:
    """The Debian that this host is, e.g. `bookworm`."""
    lines = Path("/etc/os-release").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line).get("VERSION_CODENAME", "").strip('"')


def suite() -> str:
    """The Debian to boot: that of this host, or `HOPGATE_TEST_SUITE`."""
    return os.environ.get("HOPGATE_TEST_SUITE") or host_release()


def mirror(suite: str) -> str:
    """The address this host's apt takes Debian's `main` from; it serves the other releases too."""
    command = ["apt-get", "indextargets", "--format", "$(SITE) $(CODENAME) $(COMPONENT)", "Created-By: Packages"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    sources = [line.split() for line in output.splitlines()]
    for release in (suite, host_release()):
        for source in sources:
            if source[1:] == [release, "main"]:
                return source[0]
    raise MachineError(f"apt on this host knows no source of Debian `{suite}`: add one to /etc/apt/sources.list.d")


def root_tree(suite: str, packages: tuple[str, ...]) -> Path:
    """Makes, or finds, the root file system of a Debian with these packages. A minute when it has to be made."""
    names = sorted({*BASE_PACKAGES, *packages})
    digest = hashlib.sha256("\n".join([suite, *names]).encode()).hexdigest()[:12]
    tree = CACHE / f"{suite}-{digest}"
    if tree.exists():
        return tree
    CACHE.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(prefix=f"{suite}-making-", dir=CACHE))
    environment = dict(os.environ)
    for scheme in ("http", "https"):
        proxy = subprocess.run(
            ["apt-config", "shell", "PROXY", f"Acquire::{scheme}::Proxy"], check=True, capture_output=True, text=True
        ).stdout
        if value := proxy.partition("=")[2].strip().strip("'"):
            environment[f"{scheme}_proxy"] = value
    try:
        making.chmod(0o755)
        command = [
            "debootstrap",
            "--variant=minbase",
            f"--include={','.join(names)}",
            suite,
            str(making),
            mirror(suite),
        ]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
        if done.returncode != 0:
            raise MachineError(f"`{shlex.join(command)}` failed:\n{(done.stdout + done.stderr)[-3000:]}")
        for archive in (making / "var/cache/apt/archives").glob("*.deb"):
            archive.unlink()
        # The machine makes the servers that its scenario needs, and only those.
        for unit in ("postgresql.service", "pgbouncer.service", "apt-daily.timer", "apt-daily-upgrade.timer"):
            link = making / "etc/systemd/system" / unit
            link.unlink(missing_ok=True)
            link.symlink_to("/dev/null")
        making.rename(tree)
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return tree


def python_version(tree: Path) -> str:
    """`3.11`: what /usr/bin/python3 of the tree is."""
    return (tree / "usr/bin/python3").readlink().name.removeprefix("python")


def unified_cgroup() -> Path:
    """Where this host mounts cgroup2: alone, or beside the v1 controllers."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, *_ = line.split()
        if kind == "cgroup2":
            return Path(where)
    raise MachineError("no cgroup2 is mounted: mount one at /sys/fs/cgroup/unified")


class Machine:
    """One boot, from `__enter__` to `__exit__`. `files` are put into its file system first: path inside -> here."""

    def __init__(self, tree: Path, *, files: Mapping[str, Path] | None = None) -> None:
        self.name = f"hopgate-test-{os.getpid()}"
        self.cgroup = unified_cgroup() / self.name
        self.leader = 0
        self._tree = tree
        self._files = dict(files or {})
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._stack = ExitStack()

    def __enter__(self) -> Machine:
        with ExitStack() as stack:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="run-", dir=CACHE)))
            self.root = self._mount_overlay(work, stack)
            for inside, here in self._files.items():
                self._put(inside, here)
            self.console = work / "console.log"
            self.cgroup.mkdir()
            stack.callback(self._remove_cgroup)
            self._boot(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def run(self, command: str, *, timeout_s: float = 120.0, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Runs a shell command as a service of the machine's own systemd. Output is stdout and stderr together.

        Raises `MachineError` with the output when it fails and `check` is set."""
        done = subprocess.run(
            [
                *self._enter(),
                *("systemd-run", "--quiet", "--wait", "--pipe", "--collect", f"--property=RuntimeMaxSec={timeout_s}"),
                *("--setenv=LANG=C.UTF-8", "--", "/bin/bash", "-c", f"exec 2>&1; {command}"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s + 10,
        )
        if check and done.returncode != 0:
            raise MachineError(f"`{command}` ended with `{done.returncode}`:\n{done.stdout[-6000:]}")
        return done

    def _mount_overlay(self, work: Path, stack: ExitStack) -> Path:
        upper, inner, root = work / "upper", work / "work", work / "root"
        for directory in (upper, inner, root):
            directory.mkdir()
        layers = f"lowerdir={self._tree},upperdir={upper},workdir={inner}"
        subprocess.run(["mount", "-t", "overlay", "-o", layers, "overlay", str(root)], check=True)
        stack.callback(subprocess.run, ["umount", "--lazy", str(root)], check=True)
        return root

    def _put(self, inside: str, here: Path) -> None:
        target = self.root / inside.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        if here.is_dir():
            shutil.copytree(here, target, symlinks=True)
        else:
            shutil.copy2(here, target)

    def _boot(self, stack: ExitStack) -> None:
        command = [
            *(
                "systemd-nspawn",
                "--quiet",
                f"--directory={self.root}",
                f"--machine={self.name}",
                "--register=no",
                "--keep-unit",
            ),
            *("--boot", "--private-network", "--capability=all", "--system-call-filter=bpf perf_event_open @keyring"),
            *("--console=pipe", "--resolv-conf=off", "--timezone=off", "--link-journal=no", "--kill-signal=SIGRTMIN+4"),
            "systemd.unit=multi-user.target",
        ]
        join = ["/bin/sh", "-c", 'echo 0 >"$0/cgroup.procs" && exec "$@"', str(self.cgroup), *command]
        with self.console.open("wb") as console:
            self._nspawn = subprocess.Popen(
                join,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                env={**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
                start_new_session=True,
            )
        stack.callback(self._power_off)
        deadline = time.monotonic() + BOOT_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._nspawn.poll() is not None:
                raise MachineError(f"the machine ended while it booted:\n{self._console_end()}")
            if self._find_leader() and self._is_up():
                self._mount_bpffs()
                return
            time.sleep(0.1)
        raise MachineError(f"the machine was not up after {BOOT_TIMEOUT_S:.0f} s:\n{self._console_end()}")

    def _find_leader(self) -> bool:
        assert self._nspawn is not None
        children = Path(f"/proc/{self._nspawn.pid}/task/{self._nspawn.pid}/children").read_text().split()
        for child in children:
            if Path(f"/proc/{child}/comm").read_text().strip() == "systemd":
                self.leader = int(child)
        return self.leader != 0

    def _is_up(self) -> bool:
        done = subprocess.run([*self._enter(), "systemctl", "is-system-running"], capture_output=True, text=True)
        return done.stdout.strip() in ("running", "degraded")

    def _mount_bpffs(self) -> None:
        """What systemd does on a real boot: /sys is read-only here and has no such directory."""
        for command in (
            "mount -o remount,rw /sys",
            "mkdir -p /sys/fs/bpf",
            "mount -t bpf -o nosuid,nodev,noexec,mode=700 bpf /sys/fs/bpf",
            "mount -o remount,ro /sys",
        ):
            subprocess.run([*self._enter(), *command.split()], check=True)

    def _enter(self) -> list[str]:
        return ["nsenter", "-t", str(self.leader), "-m", "-u", "-i", "-n", "-p", "--"]

    def _power_off(self) -> None:
        """By its init; one that does not obey is ended through its cgroup, since killing nspawn leaves init alive."""
        assert self._nspawn is not None
        if self._nspawn.poll() is None and self.leader:
            os.kill(self.leader, signal.SIGRTMIN + 4)
        try:
            self._nspawn.wait(POWER_OFF_TIMEOUT_S if self.leader else 1.0)
        except subprocess.TimeoutExpired:
            (self.cgroup / "cgroup.kill").write_text("1")
            self._nspawn.wait(POWER_OFF_TIMEOUT_S)

    def _remove_cgroup(self) -> None:
        deadline = time.monotonic() + 5
        while True:
            try:
                for directory, _, _ in os.walk(self.cgroup, topdown=False):
                    os.rmdir(directory)
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)

    def _console_end(self) -> str:
        return self.console.read_text(errors="replace")[-3000:]
