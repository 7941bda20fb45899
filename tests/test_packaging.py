"""What is built carries what a run needs, and the units are sound."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parent.parent
SOURCES = sorted(path.name for path in (CHECKOUT / "bpf").iterdir() if path.suffix in (".c", ".h"))
UNITS = sorted(path.name for path in (CHECKOUT / "systemd").iterdir())
EXPOSURE = 42
"""Tenths, as `systemd-analyze security` counts: 4.2 of 10. Raising it needs a reason in the unit's header."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(directory), str(CHECKOUT)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return directory


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    (path,) = built.glob("hopgate-*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture(scope="module")
def sdist(built: Path) -> list[str]:
    (path,) = built.glob("hopgate-*.tar.gz")
    with tarfile.open(path) as archive:
        return [name.partition("/")[2] for name in archive.getnames()]


def test_the_wheel_carries_the_c_sources_the_default_policy_and_the_units(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    wanted = [f"bpf/{name}" for name in SOURCES] + [f"systemd/{name}" for name in UNITS] + ["policies/default.yaml"]
    assert len(SOURCES) >= 3
    assert UNITS == ["hopgate.service", "hopgate.sysusers", "hopgate.tmpfiles"]
    for name in wanted:
        assert f"hostagent/data/{name}" in names
        assert wheel.read(f"hostagent/data/{name}") == (CHECKOUT / name).read_bytes()


def test_the_wheel_carries_every_module_and_nothing_of_the_tests(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    modules = {
        str(path.relative_to(CHECKOUT)) for top in ("hostagent", "proxy") for path in (CHECKOUT / top).rglob("*.py")
    }
    assert modules <= names
    tops = {name.partition("/")[0] for name in names}
    assert tops == {"hostagent", "proxy", "hopgate-0.1.0.dist-info"}


def test_the_wheel_carries_both_licences_and_the_command(wheel: zipfile.ZipFile) -> None:
    info = "hopgate-0.1.0.dist-info"
    assert {f"{info}/licenses/LICENSE", f"{info}/licenses/bpf/LICENSE.GPL-2.0"} <= set(wheel.namelist())
    assert "hopgate = hostagent.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()


def test_the_sdist_carries_all_that_a_build_and_its_tests_need(sdist: list[str]) -> None:
    wanted = [f"bpf/{name}" for name in SOURCES] + [f"systemd/{name}" for name in UNITS]
    wanted += ["policies/default.yaml", "LICENSE", "bpf/LICENSE.GPL-2.0", "README.md", "CHANGELOG.md", "pyproject.toml"]
    wanted += ["scripts/setup", "scripts/test", "scripts/install", "vagrant/provision.sh", "tests/test_packaging.py"]
    assert set(wanted) <= set(sdist)
    assert not [name for name in sdist if name.startswith((".venv", ".git/", "dist/"))]


def test_every_c_file_says_its_licence_first() -> None:
    for path in (CHECKOUT / "bpf").iterdir():
        if path.suffix in (".c", ".h"):
            first = path.read_text().splitlines()[0]
            assert "SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)" in first, path.name


def test_the_unit_is_one_that_systemd_understands(tmp_path: Path) -> None:
    """With the command in its place: the path in the unit is where `scripts/install` puts it."""
    text = (CHECKOUT / "systemd/hopgate.service").read_text()
    assert "ExecStart=/opt/hopgate/venv/bin/hopgate run" in text
    unit = tmp_path / "hopgate.service"
    unit.write_text(text.replace("/opt/hopgate/venv/bin/hopgate", "/bin/true"))
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, timeout=60
    )
    ours = [line for line in (done.stdout + done.stderr).splitlines() if "hopgate" in line]
    assert (done.returncode, ours) == (0, [])


def test_the_unit_exposes_no_more_than_its_header_explains() -> None:
    unit = CHECKOUT / "systemd/hopgate.service"
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--no-pager", f"--threshold={EXPOSURE}", str(unit)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout[-400:]


def test_every_capability_of_the_unit_is_explained() -> None:
    text = (CHECKOUT / "systemd/hopgate.service").read_text()
    granted = {name for line in re.findall(r"^CapabilityBoundingSet=(.*)$", text, re.M) for name in line.split()}
    comments = "\n".join(line for line in text.splitlines() if line.startswith("#"))
    assert granted
    assert granted <= set(re.findall(r"CAP_[A-Z_]+", comments))
    assert "CAP_SYS_ADMIN" not in granted


def test_the_scripts_are_sound_bash_and_stop_at_the_first_error() -> None:
    scripts = [*(CHECKOUT / "scripts").iterdir(), CHECKOUT / ".ci/run", *(CHECKOUT / "vagrant").glob("*.sh")]
    for script in filter(Path.is_file, scripts):
        text = script.read_text()
        if text.startswith("#!/bin/bash"):
            subprocess.run(["bash", "-n", str(script)], check=True, timeout=10)
            assert "set -euo pipefail" in text, script
        assert script.stat().st_mode & 0o111, script
