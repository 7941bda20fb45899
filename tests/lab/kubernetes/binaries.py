"""The programs of a Kubernetes cluster, built once from the Go modules that `programs/go.mod` names: etcd, the API
server, the controller manager, kubectl, helm, and two of our own (`node`, a small kubelet, and `goclient`).

    binaries().kube_apiserver        # a path; the first call on a machine builds for minutes

They lie outside the checkout, in `$XDG_CACHE_HOME/hopgate/kubernetes/KEY`, where KEY says what they are made of; a
folder is either complete or absent. `python -m tests.lab.kubernetes` makes them all.

Blind spot: another architecture or Go release gives another KEY; the C toolchain plays no part.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.lab.postgres import LabError

SOURCES = Path(__file__).parent / "programs"
PACKAGES = {
    "etcd": "go.etcd.io/etcd/server/v3",
    "kube-apiserver": "k8s.io/kubernetes/cmd/kube-apiserver",
    "kube-controller-manager": "k8s.io/kubernetes/cmd/kube-controller-manager",
    "kubectl": "k8s.io/kubernetes/cmd/kubectl",
    "helm": "helm.sh/helm/v4/cmd/helm",
    "node": "./node",
    "goclient": "./goclient",
}
JOBS = 2
"""Compilers at a time: each takes up to a gigabyte."""
UNUSED_S = 24 * 3600
"""After this long an older build that nobody used is removed."""


class GoMissing(LabError):
    """There is no Go that can build the programs; the message says which is needed."""


@dataclass(frozen=True)
class Binaries:
    """Where the programs are, and which Kubernetes they are (`v1.37.2`)."""

    directory: Path
    version: str

    @property
    def etcd(self) -> Path:
        return self.directory / "etcd"

    @property
    def kube_apiserver(self) -> Path:
        return self.directory / "kube-apiserver"

    @property
    def kube_controller_manager(self) -> Path:
        return self.directory / "kube-controller-manager"

    @property
    def kubectl(self) -> Path:
        return self.directory / "kubectl"

    @property
    def helm(self) -> Path:
        return self.directory / "helm"

    @property
    def node(self) -> Path:
        return self.directory / "node"

    @property
    def goclient(self) -> Path:
        return self.directory / "goclient"


def cache_directory() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hopgate" / "kubernetes"


@functools.cache
def binaries() -> Binaries:
    """Builds what is absent. Raises `GoMissing`, or `LabError` with what the compiler said."""
    go, made = _plan()
    if not made.directory.is_dir():
        cache_directory().mkdir(parents=True, exist_ok=True)
        with _only_builder():
            if not made.directory.is_dir():
                _build(go, made)
                _remove_unused()
    os.utime(made.directory)
    return made


def are_built() -> bool:
    """Whether `binaries` has nothing to build. Raises `GoMissing`."""
    return _plan()[1].directory.is_dir()


def _plan() -> tuple[str, Binaries]:
    """The Go to build with, and what comes of it."""
    text = (SOURCES / "go.mod").read_text()
    go = _find_go(text)
    return go, Binaries(cache_directory() / _key(go), _required(text, "k8s.io/kubernetes"))


def _required(go_mod: str, module: str) -> str:
    found = re.search(rf"^\s*(?:require )?{re.escape(module)} (v\S+)", go_mod, re.MULTILINE)
    if found is None:
        raise LabError(f"`{SOURCES / 'go.mod'}` does not require `{module}`")
    return found[1]


def _find_go(go_mod: str) -> str:
    needed = re.search(r"^go (\d+)\.(\d+)", go_mod, re.MULTILINE)
    assert needed is not None
    for candidate in (shutil.which("go"), "/usr/local/go/bin/go"):
        if candidate is None or not os.access(candidate, os.X_OK):
            continue
        have = re.match(r"go(\d+)\.(\d+)", _go_version(candidate))
        if have is not None and tuple(map(int, have.groups())) >= tuple(map(int, needed.groups())):
            return candidate
    raise GoMissing(f"no Go {needed[1]}.{needed[2]} or newer on the path: the Kubernetes programs cannot be built")


@functools.cache
def _go_version(go: str) -> str:
    done = subprocess.run([go, "env", "GOVERSION"], capture_output=True, text=True, cwd="/", env=_environment())
    return done.stdout.strip()


def _environment() -> dict[str, str]:
    return {**os.environ, "CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOFLAGS": "-mod=readonly", "GOWORK": "off"}


def _key(go: str) -> str:
    digest = hashlib.sha256(f"{_go_version(go)} {platform.machine()}".encode())
    for path in sorted([*SOURCES.rglob("*.go"), SOURCES / "go.mod", SOURCES / "go.sum", Path(__file__)]):
        digest.update(b"\0%s\0" % path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _only_builder() -> Iterator[None]:
    with (cache_directory() / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(go: str, made: Binaries) -> None:
    started = time.monotonic()
    major, minor, _ = made.version.removeprefix("v").split(".")
    flags = ["-s", "-w"]
    for package in ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version"):
        for name, value in (("gitVersion", made.version), ("gitMajor", major), ("gitMinor", minor)):
            flags += ["-X", f"{package}.{name}={value}"]
    unfinished = Path(tempfile.mkdtemp(prefix="unfinished-", dir=made.directory.parent))
    try:
        for name, package in PACKAGES.items():
            _tell(f"building {name} ...")
            done = subprocess.run(
                [
                    *(go, "build", f"-p={JOBS}", "-trimpath", "-buildvcs=false"),
                    *(f"-ldflags={' '.join(flags)}", "-o", str(unfinished / name), package),
                ],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                cwd=SOURCES,
                env=_environment(),
            )
            if done.returncode:
                raise LabError(f"`{package}` does not build:\n{done.stderr[-4000:]}")
        unfinished.chmod(0o755)
        unfinished.rename(made.directory)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    _tell(f"built in {time.monotonic() - started:.0f} s: {made.directory}")


def _tell(line: str) -> None:
    print(f"kubernetes: {line}", file=sys.stderr, flush=True)


def _remove_unused() -> None:
    for path in cache_directory().iterdir():
        ours = re.fullmatch(r"[0-9a-f]{16}|unfinished-.*", path.name)
        if ours and path.stat().st_mtime < time.time() - UNUSED_S:
            shutil.rmtree(path, ignore_errors=True)
