"""Whatever way a process is born, its lineage is exact."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostagent import kernel
from tests.kernel.bed import BEYOND, PORT, Bed
from tests.kernel.programs import shell

SOURCE = Path(__file__).with_name("births.c")
_PID_NAMESPACE = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc"]


@pytest.fixture(scope="module")
def births() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="hopgate-births-") as directory:
        path = Path(directory, "births")
        subprocess.run(["gcc", "-O1", "-Wall", "-Wextra", "-Werror", "-o", path, SOURCE], check=True)
        yield path


@pytest.mark.parametrize("way", ["vfork", "clone3", "subreaper"])
def test_a_child_belongs_to_who_made_it(shared: Bed, births: Path, way: str) -> None:
    """Not to who is its parent to the kernel: that is ours with CLONE_PARENT, and anybody's after a death."""
    shared.run([str(births), way, BEYOND[0], str(PORT), "tag-birth"])
    assert shared.tags() == ["tag-birth", "tag-birth-leaf"]


def test_shells_that_start_shells_are_all_there(shared: Bed) -> None:
    inner = shell(BEYOND[0], str(PORT), "tag-inner")
    nested = ["sh", "-c", '"$@"; exit $?', "tag-outer", "sh", "-c", 'exec "$@"', "tag-middle", *inner]
    shared.run(nested)
    lineage = shared.attributed()[1]
    words = [next((word for word in image.argv if word.startswith("tag-")), "") for image in lineage]
    assert words[-3:] == ["tag-outer", "tag-middle", "tag-inner"]


def test_a_pid_namespace_in_a_pid_namespace_hides_nobody(shared: Bed) -> None:
    shared.run([*_PID_NAMESPACE, *_PID_NAMESPACE, *shared.command("connect", tag="tag-deep")])
    accepted, record = shared.take()
    assert accepted.tgid == 1, "so it calls itself"
    assert isinstance(record, kernel.ConnectRecord) and record.tgid > 1
    lineage = shared.pins.lineage(record.node)
    assert lineage is not None
    assert [image.comm for image in lineage[-3:-1]] == ["unshare", "unshare"]
    assert "tag-deep" in lineage[-1].argv
    assert len({image.namespaces.pid for image in lineage[-3:] if image.namespaces is not None}) == 3
