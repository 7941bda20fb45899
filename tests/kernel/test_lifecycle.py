"""What is put on the host stays when the daemon goes, is replaced without a gap, and is taken off without a trace."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hostagent import kernel, resources
from hostagent.kernel import abi, bpf, loader, redirect
from proxy.model import Endpoint
from tests.kernel.bed import BEYOND, Bed, bed, tags
from tests.lab import cgroups, namespaces


def _rules(made: Bed) -> redirect.Rules:
    return redirect.Rules.of(made.settings, made.scope)


def _everything(netns: str) -> str:
    """Rules and sets of a namespace, without counters and what differs from call to call."""
    with namespaces.entered(netns):
        saved = [
            subprocess.run(command, check=True, capture_output=True, text=True).stdout
            for command in (["iptables-save"], ["ip6tables-save"], ["ipset", "save"])
        ]
    lines = "".join(saved).splitlines()
    return "\n".join(re.split(r" \[| initval ", line)[0] for line in lines if not line.startswith("#"))


def _ids(made: Bed) -> dict[str, set[int]]:
    """The ids of our pinned maps, programs and links."""
    found: dict[str, set[int]] = {"map": set(), "prog": set(), "link": set()}
    for path in made.settings.pin_dir.iterdir():
        kind = {"link": "link", "program": "prog"}.get(path.name.split("_")[0], "map")
        shown = subprocess.run(
            ["bpftool", "-j", kind, "show", "pinned", str(path)], check=True, capture_output=True, text=True
        )
        found[kind].add(json.loads(shown.stdout)["id"])
    return found


def _alive(kind: str) -> set[int]:
    shown = subprocess.run(["bpftool", "-j", kind, "show"], check=True, capture_output=True, text=True)
    return {one["id"] for one in json.loads(shown.stdout)}


def test_cleanup_leaves_nothing() -> None:
    with bed("cleanup", load=False) as made:
        before = _everything(made.netns)
        made.load()
        ids = _ids(made)
        assert len(ids["prog"]) == len({*abi.PROGRAMS, *abi.PACKET_HOOKS, abi.MATCHED})
        assert len(ids["link"]) == len(abi.PROGRAMS)
        assert len(ids["map"]) == len(abi.MAPS) + 4
        assert _everything(made.netns) != before
        made.pins.close()
        with namespaces.entered(made.netns):
            removed = kernel.cleanup(made.settings.pin_dir)
            assert any(str(made.settings.pin_dir) in line for line in removed)
            assert kernel.cleanup(made.settings.pin_dir) == []
        assert made.settings.pin_dir.name not in os.listdir("/sys/fs/bpf")
        # tables that the kernel had not made before may stay, empty
        left_rules = set(_everything(made.netns).splitlines()) - set(before.splitlines())
        assert not [line for line in left_rules if not line.startswith(("*", ":")) and line != "COMMIT"]
        assert not [line for line in left_rules if "hopgate" in line.lower()]
        deadline = time.monotonic() + 10
        while left := {kind: ids[kind] & _alive(kind) for kind in ids if ids[kind] & _alive(kind)}:
            assert time.monotonic() < deadline, left
            time.sleep(0.05)


def test_everything_works_without_the_process_that_loaded_it() -> None:
    """Loader and daemon are gone; another process opens the pins, keeps what it finds, and knows who connected
    before."""
    with bed("survive", load=False) as made:
        script = (
            "import os; from pathlib import PosixPath; from hostagent import kernel\n"
            "from hostagent.kernel import MapSizes, Scope, Settings\nfrom proxy.model import Endpoint\n"
            f"kernel.start({made.settings!r}, {made.scope!r})\nos.kill(os.getpid(), 9)"
        )
        done = cgroups.run([sys.executable, "-c", script], netns=made.netns, cwd=Path(kernel.__file__).parents[2])
        assert done.returncode == -9, done.stderr
        made.run(made.command("connect", tag="tag-between"))
        started = time.monotonic()
        made.load()
        assert time.monotonic() - started < 1.0, "it was loaded again"
        assert made.tags() == ["tag-between"]


def test_another_build_replaces_the_programs_and_keeps_the_maps() -> None:
    with bed("replace") as made:
        process = made.start(made.command("on_line", tag="tag-kept"))
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        before = _ids(made)
        made.pins.close()
        made.settings = dataclasses.replace(made.settings, mark=0x77)
        made.load()
        after = _ids(made)
        assert after["map"] == before["map"]
        assert not after["prog"] & before["prog"]
        assert not after["link"] & before["link"]
        assert made.pins.config().mark == 0x77
        with namespaces.entered(made.netns):
            assert kernel.attached(made.settings)
        process.communicate("exec\n")
        assert made.tags() == ["tag-kept", "tag-kept-later"]
        made.run(made.command("spawn", tag="tag-new"))
        assert made.tags() == ["tag-new", "tag-new-spawned"]


def test_other_map_sizes_load_again() -> None:
    with bed("again") as made:
        before = _ids(made)
        made.pins.close()
        made.settings = dataclasses.replace(made.settings, sizes=kernel.MapSizes(4096, 8192, 1024, 1024))
        made.load()
        assert not _ids(made)["map"] & before["map"]
        made.run(made.command("connect", tag="tag-again"))
        assert made.tags() == ["tag-again"]


def test_what_somebody_unpinned_is_noticed_and_put_back() -> None:
    with bed("tamper") as made:
        with namespaces.entered(made.netns):
            assert kernel.attached(made.settings)
            (made.settings.pin_dir / "link_on_exec").unlink()
            assert not kernel.attached(made.settings)
        made.pins.close()
        made.load()
        with namespaces.entered(made.netns):
            assert kernel.attached(made.settings)


def test_rules_are_never_doubled(shared: Bed) -> None:
    with namespaces.entered(shared.netns):
        first = redirect.install(_rules(shared))
        state = _everything(shared.netns)
        assert redirect.install(_rules(shared)) == first
        assert _everything(shared.netns) == state
        assert redirect.present(first)


@pytest.mark.parametrize(
    "tampering",
    [
        ["iptables", "-t", "nat", "-D", "OUTPUT", "-j", "HOPGATE-OUT"],
        ["ip6tables", "-t", "nat", "-F", "HOPGATE-PRE"],
        ["iptables", "-I", "HOPGATE-IN", "-j", "ACCEPT"],
        ["ipset", "flush", "hopgate-ports"],
    ],
    ids=lambda command: " ".join(command),
)
def test_tampering_with_the_rules_is_noticed_and_put_right(shared: Bed, tampering: list[str]) -> None:
    with namespaces.entered(shared.netns):
        installed = redirect.install(_rules(shared))
        subprocess.run(tampering, check=True)
        assert not redirect.present(installed)
        assert redirect.install(_rules(shared)) == installed
        assert redirect.present(installed)


def test_other_peoples_rules_are_left_alone() -> None:
    with bed("others", load=False) as made, namespaces.entered(made.netns):
        subprocess.run(["iptables", "-A", "OUTPUT", "-p", "tcp", "--dport", "9", "-j", "DROP"], check=True)
        subprocess.run(["ipset", "create", "theirs", "hash:ip"], check=True)
        before = _everything(made.netns)
        made.load()
        with namespaces.entered(made.netns):
            kernel.cleanup(made.settings.pin_dir)
        after = _everything(made.netns)
        assert [line for line in before.splitlines() if line not in after.splitlines()] == []


def test_a_new_scope_is_recorded_and_redirected(shared: Bed) -> None:
    endpoints = (Endpoint("203.0.113.9", 7000), Endpoint("2001:db8:9::9", 7000))
    namespaces.ip("-n", shared.netns, "route", "replace", "203.0.113.0/24", "via", BEYOND[0])
    namespaces.ip("-n", shared.netns, "route", "replace", "2001:db8:9::/64", "via", BEYOND[1])
    with namespaces.entered(shared.netns):
        kernel.apply_scope(shared.settings, shared.pins, dataclasses.replace(shared.scope, endpoints=endpoints))
    try:
        for index, endpoint in enumerate(endpoints):
            shared.run(shared.command("connect", address=endpoint.address, port=endpoint.port, tag=f"tag-{index}"))
            accepted, lineage = shared.attributed()
            assert tags(lineage) == [f"tag-{index}"]
            assert accepted.dialled == endpoint
    finally:
        with namespaces.entered(shared.netns):
            kernel.apply_scope(shared.settings, shared.pins, shared.scope)


def test_a_cgroup_that_is_none_is_said(tmp_path: Path) -> None:
    with bed("none", load=False) as made:
        made.settings = dataclasses.replace(made.settings, cgroup=tmp_path)
        with pytest.raises(kernel.KernelError, match=f"cannot attach to `{tmp_path}`.*cgroup2"):
            made.load()
        assert not made.settings.pin_dir.exists()
        made.settings = dataclasses.replace(made.settings, cgroup=made.cgroup)


def test_a_pin_directory_elsewhere_is_refused(tmp_path: Path) -> None:
    with bed("place", load=False) as made:
        right = made.settings
        made.settings = dataclasses.replace(right, pin_dir=tmp_path / "pins")
        with pytest.raises(kernel.KernelError, match="is not on a bpffs"):
            made.load()
        made.settings = right


def test_a_run_directory_that_others_can_write_to_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with bed("scratch", load=False) as made:
        made.settings = dataclasses.replace(made.settings, run_dir=tmp_path)
        with pytest.raises(kernel.KernelError, match="has to belong to root"):
            made.load()


def test_a_missing_compiler_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_BCC_GLOBS", ())
    with pytest.raises(kernel.KernelError, match="install `python3-bpfcc`"):
        loader.find_bcc()


def test_the_python_mirror_has_the_layout_that_the_kernel_has(shared: Bed) -> None:
    """Compared with the types that the loaded maps carry (BTF), field by field."""
    mirrors = {
        "settings": (None, abi.Config),
        "nodes": (abi.Namespaces, abi.Node),
        "connects": (abi.ConnectKey, abi.ConnectRecord),
        "scope": (abi.ScopeKey, None),
        "declared": (None, abi.Declaration),
        "agent_files": (abi.FileKey, None),
        "watches": (None, abi.Watch),
    }
    compared = 0
    for name, pair in mirrors.items():
        fd = bpf.object_get(shared.settings.pin_dir / name)
        try:
            assert bpf.map_sizes(fd) == {**abi.MAPS, "watches": (4, ctypes.sizeof(abi.Watch))}[name]
        finally:
            os.close(fd)
        types = _types(shared.settings.pin_dir / name)
        for mirror in filter(None, pair):
            struct_name = "hopgate_" + {"Config": "config", "Node": "node"}.get(
                mirror.__name__, "".join("_" * c.isupper() + c.lower() for c in mirror.__name__).lstrip("_")
            )
            found = next(t for t in types if t["kind"] == "STRUCT" and t["name"] == struct_name)
            fields = [(member["name"], member["bits_offset"] // 8) for member in found["members"]]
            assert fields == [(field[0], getattr(mirror, field[0]).offset) for field in mirror._fields_], struct_name
            compared += 1
    assert compared == 9


def _types(path: Path) -> list[dict[str, Any]]:
    shown = subprocess.run(
        ["bpftool", "-j", "map", "show", "pinned", str(path)], check=True, capture_output=True, text=True
    )
    btf_id = json.loads(shown.stdout)["btf_id"]
    dumped = subprocess.run(
        ["bpftool", "-j", "btf", "dump", "id", str(btf_id)], check=True, capture_output=True, text=True
    )
    types: list[dict[str, Any]] = json.loads(dumped.stdout)["types"]
    return types


def test_the_python_mirror_has_the_numbers_of_the_header() -> None:
    text = (resources.path("bpf") / "abi.h").read_text()
    numbers = {name: int(value) for name, value in re.findall(r"#define (\w+) (\d+)u?\b", text)}
    assert numbers["HOPGATE_ABI"] == abi.ABI
    assert numbers["DEPTH_MAX"] == abi.DEPTH_MAX
    assert numbers["CONNECT_ESTABLISHED"] == abi.CONNECT_ESTABLISHED
    assert numbers["CONNECT_AMBIGUOUS"] == abi.CONNECT_AMBIGUOUS
    assert numbers["CONNECT_CLOSED"] == abi.CONNECT_CLOSED
    assert {name: number for name, number in numbers.items() if name.startswith("EVENT_")} == abi.EVENTS
    protocols = {number: name for name, number in numbers.items() if name.startswith("PROTOCOL_")}
    assert {number: f"PROTOCOL_{name.upper()}" for number, name in abi.PROTOCOLS.items()} == protocols
    assert numbers["COUNTERS"] == len(abi.COUNTERS)
    assert numbers["OVERFLOW_LAST"] + 1 == len(abi.OVERFLOWS)
    for prefix in ("OVERFLOW_", "COUNT_"):
        for name, index in numbers.items():
            if name.startswith(prefix) and name != "OVERFLOW_LAST":
                expected = name.removeprefix("COUNT_").lower()
                assert abi.COUNTERS[index].startswith(expected.split("_")[0]) or expected in abi.COUNTERS[index], name
