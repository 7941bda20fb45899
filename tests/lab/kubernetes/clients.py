"""The kubectls that this machine has: each a program that people really use. They are looked for

- where `binaries` builds: one of the API server's own version, always there;
- in its cache, as `debian-*/kubectl`: Debian's, which `unpack_debian_kubectl` puts there;
- as `kubectl.1.*` in the folder of the Google Cloud SDK's Debian package;
- as `kubectl` and `kubectl-1.*` in the folders of `$PATH`.

Where there is none but the first, that one stands for all.

A kubectl before 1.30 speaks SPDY for exec and attach, one before 1.31 for port-forward too; later ones begin with
WebSocket. `KUBECTL_REMOTE_COMMAND_WEBSOCKETS=false` and `KUBECTL_PORT_FORWARD_WEBSOCKETS=false` bring SPDY back there.

Blind spot: Debian's own kubectl is old (1.20) in Debian 12 only.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.lab.kubernetes.binaries import binaries, cache_directory

SDK = Path("/usr/lib/google-cloud-sdk/bin")
SPDY_ENVIRONMENT = {"KUBECTL_REMOTE_COMMAND_WEBSOCKETS": "false", "KUBECTL_PORT_FORWARD_WEBSOCKETS": "false"}


@dataclass(frozen=True)
class Kubectl:
    """One kubectl. `environment` is what it has to be run with, beside what every client gets."""

    path: Path
    version: tuple[int, int]
    origin: str
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For a test's id: `1.20-debian`."""
        return f"{self.version[0]}.{self.version[1]}-{self.origin}"

    @property
    def speaks_spdy(self) -> bool:
        """Whether exec begins with SPDY."""
        return self.version < (1, 30) or bool(self.environment)


def current_kubectl() -> Kubectl:
    """The one that is built with the API server. Raises `LabError`."""
    made = binaries()
    return Kubectl(made.kubectl, _parse(made.version), "built")


@functools.cache
def kubectls() -> tuple[Kubectl, ...]:
    """Every kubectl that is here, the newest first, one for each minor version; and the current one once more, made
    to speak SPDY. Raises `LabError` when the current one cannot be built."""
    current = current_kubectl()
    found = {current.version: current}
    folders = [Path(each).absolute() for each in os.get_exec_path()]
    for path, origin in [
        *((path, "debian") for path in sorted(cache_directory().glob("debian-*/kubectl"))),
        *((path, "sdk") for path in sorted(SDK.glob("kubectl.1.*"))),
        *((path, "path") for folder in folders for path in [*sorted(folder.glob("kubectl-1.*")), folder / "kubectl"]),
    ]:
        version = _ask_version(path)
        if version is not None:
            found.setdefault(version, Kubectl(path, version, origin))
    return (
        *(found[version] for version in sorted(found, reverse=True)),
        Kubectl(current.path, current.version, "built-spdy", SPDY_ENVIRONMENT),
    )


def oldest_kubectl() -> Kubectl:
    """An old one that speaks SPDY; where none is to be had, the current one made to."""
    *_, oldest, forced = kubectls()
    return oldest if oldest.speaks_spdy else forced


def debian_kubectl() -> tuple[str, Path] | None:
    """The version of Debian's package, and where its kubectl lies once it is unpacked. None where there is no such
    package, or no list of packages: then the others have to do."""
    if shutil.which("apt-cache") is None:
        return None
    policy = subprocess.run(["apt-cache", "policy", "kubernetes-client"], capture_output=True, text=True).stdout
    candidate = re.search(r"Candidate: (\d\S*)", policy)
    if candidate is None:
        return None
    directory = f"debian-{re.sub(r'[^0-9A-Za-z.]', '-', candidate[1])}"
    return candidate[1], cache_directory() / directory / "kubectl"


def unpack_debian_kubectl() -> None:
    """Puts Debian's kubectl into the cache without installing its package, which other kubectl packages shut out.
    Raises `subprocess.CalledProcessError`."""
    wanted = debian_kubectl()
    if wanted is None or wanted[1].exists():
        return
    version, kubectl = wanted
    kubectl.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="unfinished-", dir=cache_directory()) as scratch:
        for command in (
            ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", f"kubernetes-client={version}"],
            ["sh", "-c", "dpkg-deb -x kubernetes-client_*.deb package"],
        ):
            subprocess.run(command, cwd=scratch, stdin=subprocess.DEVNULL, check=True)
        os.replace(Path(scratch, "package/usr/bin/kubectl"), kubectl)


def _ask_version(path: Path) -> tuple[int, int] | None:
    """None for what does not run, and for the SDK's dispatcher, which runs another each time."""
    if not os.access(path, os.X_OK):
        return None
    done = subprocess.run(
        [path, "version", "--client", "--output=json"],
        capture_output=True,
        text=True,
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent"},
    )
    if done.returncode != 0:
        return None
    version = json.loads(done.stdout)["clientVersion"]["gitVersion"]
    return None if version.endswith("-dispatcher") else _parse(version)


def _parse(version: str) -> tuple[int, int]:
    found = re.match(r"v(\d+)\.(\d+)", version)
    assert found is not None, version
    return int(found[1]), int(found[2])
