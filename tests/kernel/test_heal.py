"""Fork storms, kills, upgrades and version skew: nothing is misattributed, nothing gets past, nothing is lost.

The short forms of `scripts/storm`.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hostagent import kernel
from hostagent.kernel import abi, bpf, turn
from tests.e2e import kills
from tests.kernel import storm
from tests.kernel.bed import Bed, bed
from tests.lab import namespaces

CONNECTS = 16_000
KILLS = 30


def test_a_fork_storm_is_attributed_through_restarts_and_replacements() -> None:
    """The clients hold every answer against what they are, and none gets to the target itself."""
    outcome = storm.run(CONNECTS, every_s=(0.5, 1.5), restarts=2, replacements=2)
    assert storm.tell(CONNECTS, outcome)
    assert outcome.restarts + outcome.replacements >= 2
    assert outcome.lost > 0, "no restart met a client"
    assert outcome.counters["unlabelled_connects"] == 0


def test_killed_at_random_moments_nothing_is_lost_and_nothing_gets_past() -> None:
    outcome = kills.run(KILLS)
    assert kills.tell(outcome), outcome.faults
    assert min(outcome.kills.values()) > 0


def test_twenty_replacements_under_load_lose_no_connect() -> None:
    """The listener is never away, so no attempt may fail at all: a connect that met no program would be refused."""
    with storm.stormy() as (made, listener, outcome, start):
        spawners = start(1_000_000_000, 4)
        try:
            before = _map_ids(made)
            for _ in range(20):
                listener.replace()
            assert _map_ids(made) == before
        finally:
            storm.stop(spawners, outcome)
    assert outcome.replacements == 20
    assert outcome.right > 5_000
    assert (outcome.wrong, outcome.missing, outcome.direct, outcome.past, outcome.lost) == (0, 0, 0, 0, 0), outcome
    assert not any(outcome.counters[name] for name in (*abi.OVERFLOWS, "missed", "unlabelled_connects"))


def _map_ids(made: Bed) -> dict[str, int]:
    found: dict[str, int] = {}
    for name in abi.MAPS:
        fd = bpf.object_get(made.settings.pin_dir / name)
        found[name] = bpf.object_id(fd)[1]
        os.close(fd)
    return found


@pytest.mark.parametrize("field", ["abi", "layout", "build"])
def test_pins_of_another_version_are_noticed(field: str) -> None:
    """Another ABI or layout cannot share maps: loaded again, with the living seeded. Half a load counts as none."""
    with bed("skew") as made:
        process = made.start(made.command("on_line", tag="tag-old"))
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        before = _map_ids(made)
        config = made.pins.config()
        setattr(config, field, 0 if field == "build" else getattr(config, field) + 1)
        made.pins.set_config(bytes(config))
        with namespaces.entered(made.netns):
            assert not kernel.attached(made.settings)
        made.pins.close()
        made.load()
        with namespaces.entered(made.netns):
            assert kernel.attached(made.settings)
        assert not set(_map_ids(made).values()) & set(before.values())
        process.communicate("fork\n")
        assert made.tags() == ["tag-old"]


def test_a_map_of_another_layout_is_noticed() -> None:
    with bed("layout") as made:
        made.pins.close()
        strange = made.settings.pin_dir / "procs"
        strange.unlink()
        subprocess.run(
            [
                *("bpftool", "map", "create", str(strange), "type", "hash"),
                *("key", "4", "value", str(ctypes.sizeof(abi.Node)), "entries", "16", "name", "procs"),
            ],
            check=True,
        )
        with namespaces.entered(made.netns):
            assert not kernel.attached(made.settings)
        made.load()
        with namespaces.entered(made.netns):
            assert kernel.attached(made.settings)
        made.run(made.command("connect", tag="tag-again"))
        assert made.tags() == ["tag-again"]


def test_a_daemon_waits_for_the_loader_of_one_that_was_killed() -> None:
    """The loader of a killed daemon goes on; whoever comes next must not load beside it."""
    with bed("orphan", load=False) as made:
        at = made.settings
        script = (
            "from pathlib import PosixPath; from hostagent import kernel\n"
            "from hostagent.kernel import MapSizes, Scope, Settings\nfrom proxy.model import Endpoint\n"
            f"kernel.start({at!r}, {made.scope!r})"
        )
        first = subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{made.netns}", sys.executable, "-c", script],
            cwd=Path(kernel.__file__).parents[2],
        )
        loader = 0
        while not loader:
            loader = _child(first.pid)
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert _runs(loader)
        made.load()
        assert not _runs(loader)
        with namespaces.entered(made.netns):
            assert kernel.attached(at)
        made.run(made.command("connect", tag="tag-one"))
        assert made.tags() == ["tag-one"]


def _child(pid: int) -> int:
    try:
        for thread in Path(f"/proc/{pid}/task").iterdir():
            for child in (thread / "children").read_text().split():
                if b"hostagent.kernel.loader" in Path(f"/proc/{child}/cmdline").read_bytes():
                    return int(child)
    except OSError:
        pass
    return 0


def _runs(pid: int) -> bool:
    """False for what has ended and is not reaped yet, too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_turns_are_taken_one_after_the_other(tmp_path: Path) -> None:
    times: list[float] = []

    def take() -> None:
        with turn.taken(tmp_path):
            times.append(time.monotonic())

    with turn.taken(tmp_path):
        held = subprocess.Popen(["sleep", "0.5"], pass_fds=turn.descriptors())
    begun = time.monotonic()
    other = threading.Thread(target=take)
    other.start()
    other.join(10)
    held.wait()
    assert times[0] - begun > 0.3, "a program that was started in a turn is part of it"
    assert not turn.descriptors()


def test_a_scope_that_does_not_fit_leaves_the_one_before(shared: Bed) -> None:
    with namespaces.entered(shared.netns):
        guard = kernel.Guard(shared.settings, shared.pins, shared.scope)
        try:
            assert guard.repair() == []
            before = shared.pins.scope()
            with pytest.raises(kernel.KernelError):
                guard.apply(dataclasses.replace(shared.scope, ports=tuple(range(1, 10_000))))
            assert guard.repair() == ["what is recorded was changed"]
            assert shared.pins.scope() == before
            assert guard.repair() == [] and guard.sets_are_whole()
        finally:
            guard.close()
