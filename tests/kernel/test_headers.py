"""The kernel's types are shortened for the compiler, and nothing else comes of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import pytest

from hostagent.kernel import abi, headers, loader
from hostagent.kernel.pins import remove

COMPILE = """
import json, sys
from pathlib import Path
from hostagent.kernel import headers, loader
from hostagent.kernel.settings import LoadRequest, MapSizes

how, pins, run_dir = sys.argv[1:]
if how == "whole":
    headers.shortened = lambda types, program: types
if how == "too short":
    headers.shortened = lambda types, program: types[:1000]
Path(pins).mkdir()
request = LoadRequest(
    pins=pins, cgroup="", run_dir=run_dir, mark=1, netns=1, build=1, layout=1, sizes=MapSizes(), replace=False
)
module = loader.compile_sources(loader.import_bcc(), request)

def code(name):
    # without the descriptors of the maps, which are whatever was free
    steps = [module.dump_func(name)[at:at + 8] for at in range(0, len(module.dump_func(name)), 8)]
    return [(step[:4] if step[0] == 0x18 and step[1] >> 4 == 1 else step).hex() for step in steps]

print(json.dumps({name: code(name) for name in loader.load_programs(module)}))
"""


def programs(how: str, run_dir: Path) -> dict[str, list[str]]:
    pins = Path("/sys/fs/bpf") / f"hopgate-headers-{uuid4().hex[:8]}"
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", COMPILE, how, str(pins), str(run_dir)], capture_output=True, text=True
        )
    finally:
        remove(pins)
    assert done.returncode == 0, done.stderr
    assert ("error" in done.stderr) == (how == "too short"), done.stderr
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("how", ["whole", "too short"])
def test_the_programs_are_those_that_the_whole_header_makes(how: str, tmp_path: Path) -> None:
    """A header that lacks something is loud about it, and the whole one is taken."""
    short = programs("as it is", tmp_path)
    assert len(short) > len(abi.TRACEPOINTS)
    assert programs(how, tmp_path) == short
    assert list(tmp_path.iterdir()) == []


def test_most_of_the_header_is_not_needed() -> None:
    types = loader.kernel_types()
    short = headers.shortened(types, abi.sources())
    assert len(short) < len(types) / 2
    assert "struct task_struct {" in short
