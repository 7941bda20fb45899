"""Kills the daemon, its workers or the kernel loader at random moments, under load, and looks what came of it.

After each kill: rules and pins are there, and once; the service is back. At the end: what a client was told is what the
server saw, all of which is recorded; every recording holds; nobody got to the server past the gateway.

The service is to be back within `BACK_S`. Where a machine is slower than ours, or busy with other things, everything
takes longer, and nothing says so better than how long bare Python takes there to import the daemon, in between: beyond
`BARE_S` the limit grows with it, and after a kill of the loader twice as much, since the programs are compiled anew.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from hostagent.errors import OperatorError
from tests.e2e import beds
from tests.e2e.beds import DATABASE, Bed, target, wait_until
from tests.e2e.test_faults import LOADER, World
from tests.lab.hopgate import GatewayError
from tests.lab.namespaces import entered

KINDS = ("worker", "worker", "worker", "daemon", "daemon", "loader")
JOB = "agents:\n  job: {exe: /usr/bin/python3}\n"
"""What the clients run themselves: when everything is loaded anew, what they ran before is not known any more."""
BACK_S = 2.0
"""Median; the slowest of all may take `SLOWEST` times as long."""
SLOWEST = 3.0
BARE_S = 0.4
PROGRAMS = ["on_exec", "on_exit", "on_fork", "on_sock_ops"]


@dataclass
class Outcome:
    """`back_s` are the seconds from the start of a daemon until it serves, or from the kill of a worker until all
    serve; `bare_s` what an import takes meanwhile. `faults` is empty when everything held."""

    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("worker", "daemon", "loader"), 0))
    back_s: dict[str, list[float]] = field(default_factory=lambda: {"worker": [], "daemon": [], "loader": []})
    bare_s: list[float] = field(default_factory=list)
    answered: int = 0
    recorded: int = 0
    sessions: str = ""
    faults: list[str] = field(default_factory=list)


def run(kills: int, seed: int = 1) -> Outcome:
    """Leaves nothing behind."""
    chance, outcome = random.Random(seed), Outcome()
    with ExitStack() as stack:
        log = {"log_statement": "all", "log_connections": "on", "log_line_prefix": "%m [%p] %u@%h "}
        made = stack.enter_context(beds.bed("kills", server_settings={**log, "max_connections": "100"}))
        made.server.set_auth("host shop shop_app all scram-sha-256")
        made.gateway.write_policy(JOB + "targets:\n" + target("shop", f"{DATABASE}:5432") + beds.rules())
        world = World(**{name: getattr(made, name) for name in Bed.__dataclass_fields__})
        world.gateway.start()
        expected = _state(world)
        loads = [world.start_python(LOADER, DATABASE, name, "2") for name in ("left", "right")]
        try:
            time.sleep(0.5)
            for number in range(kills):
                # the first of each kind for certain
                kind = KINDS[number * 2 + 1] if number < 3 else chance.choice(KINDS)
                _KILL[kind](world, chance, outcome)
                outcome.kills[kind] += 1
                found = _state(world)
                if found != expected:
                    outcome.faults.append(f"after kill {number} ({kind}): {sorted(set(found) ^ set(expected))}")
                time.sleep(chance.uniform(0.02, 0.4))
            wait_until(lambda: world.status()["workers"] == 2, "both workers", 20)
            time.sleep(0.5)
        finally:
            told = [json.loads(load.communicate("", timeout=60)[0]) for load in loads]
        _look_back(world, told, outcome)
        outcome.faults += _late(outcome)
    return outcome


def _kill_worker(world: World, chance: random.Random, outcome: Outcome) -> None:
    wait_until(lambda: bool(world.workers()), "a worker", 20)
    waits = chance.random() < 0.5
    if waits:
        wait_until(lambda: _serving(world) == 2, "both workers", 20)
    with contextlib.suppress(ProcessLookupError):
        os.kill(chance.choice(world.workers()), signal.SIGKILL)
        if waits:
            begun = time.monotonic()
            wait_until(lambda: _serving(world) < 2, "the daemon knows of the death", 20)
            wait_until(lambda: _serving(world) == 2, "the worker was replaced", 20)
            outcome.back_s["worker"].append(time.monotonic() - begun)


def _serving(world: World) -> int:
    with contextlib.suppress(OperatorError):
        serving = world.status()["workers"]
        assert isinstance(serving, int)
        return serving
    return -1


def _kill_daemon(world: World, chance: random.Random, outcome: Outcome) -> None:
    world.gateway.kill()
    if chance.random() < 0.5:
        outcome.bare_s.append(_bare())
    else:
        time.sleep(chance.uniform(0, 0.3))
    outcome.back_s["daemon"].append(_start(world))


def _kill_loader(world: World, chance: random.Random, outcome: Outcome) -> None:
    """The pins are damaged while the daemon is away, so that the next has to load; loader or daemon are killed then."""
    world.gateway.kill()
    (world.gateway.pin_dir / f"link_{chance.choice(PROGRAMS)}").unlink()
    starting = threading.Thread(target=_start_in_vain, args=(world,))
    starting.start()
    loader = 0
    while not loader and starting.is_alive():
        loader = _loader(world)
        time.sleep(0.01)
    time.sleep(chance.uniform(0, 1.5))
    with contextlib.suppress(ProcessLookupError):
        if chance.random() < 0.5:
            if loader:
                os.kill(loader, signal.SIGKILL)
        else:
            # the loader then goes on without the daemon that started it
            world.gateway.kill()
    starting.join()
    world.gateway.kill()
    outcome.back_s["loader"].append(_start(world))


_KILL = {"worker": _kill_worker, "daemon": _kill_daemon, "loader": _kill_loader}


def _start(world: World) -> float:
    begun = time.monotonic()
    world.gateway.start()
    return time.monotonic() - begun


def _bare() -> float:
    begun = time.monotonic()
    subprocess.run([sys.executable, "-I", "-c", "import hostagent.daemon"], check=True)
    return time.monotonic() - begun


def _late(outcome: Outcome) -> list[str]:
    """What was not back in time."""
    if not outcome.bare_s:
        return ["nothing tells how busy the machine was"]
    late: list[str] = []
    for kind, seconds in outcome.back_s.items():
        for what, took, bare, times in (
            ("typically", _quantile(seconds, 0.5), _quantile(outcome.bare_s, 0.5), 1.0),
            ("at most", _quantile(seconds, 1.0), _quantile(outcome.bare_s, 1.0), SLOWEST),
        ):
            busy = bare / BARE_S * (2.0 if kind == "loader" else 1.0) if bare > BARE_S else 1.0
            limit = BACK_S * times * busy
            if took > limit:
                late.append(f"back {what} {took:.2f} s after a kill of the {kind}, not {limit:.2f}")
    return late


def _quantile(seconds: list[float], part: float) -> float:
    """0 when there are none."""
    ordered = sorted(seconds)
    return ordered[min(int(len(ordered) * part), len(ordered) - 1)] if ordered else 0.0


def _start_in_vain(world: World) -> None:
    with contextlib.suppress(GatewayError):
        world.gateway.start()


def _loader(world: World) -> int:
    process = world.gateway.process
    if process is None:
        return 0
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{process.pid}/task").iterdir():
            for child in (thread / "children").read_text().split():
                if b"hostagent.kernel.loader" in Path(f"/proc/{child}/cmdline").read_bytes():
                    return int(child)
    return 0


def _state(world: World) -> list[str]:
    """Rules, sets, names of pins, and the programs that work on our maps: whatever could be missing or doubled."""
    with entered(world.runner):
        saved = [
            subprocess.run(command, check=True, capture_output=True, text=True).stdout
            for command in (["iptables-save"], ["ip6tables-save"], ["ipset", "save"])
        ]
    lines = [line.split(" [")[0].split(" initval ")[0] for line in "".join(saved).splitlines()]
    found = [line for line in lines if not line.startswith("#")]
    found += [f"pin {path.name}" for path in world.gateway.pin_dir.iterdir()]
    shown = _bpftool("map", "show", "pinned", str(world.gateway.pin_dir / "procs"))
    programs = [program["name"] for program in _bpftool("prog", "show") if shown["id"] in program.get("map_ids", ())]
    return sorted(found + [f"program {name}" for name in programs])


def _bpftool(*arguments: str):  # type: ignore[no-untyped-def]
    # a program that goes while it lists them makes it fail
    for _ in range(20):
        done = subprocess.run(["bpftool", "-j", *arguments], capture_output=True, text=True)
        if done.returncode == 0:
            break
        time.sleep(0.05)
    return json.loads(done.stdout)


def _look_back(world: World, told: list[dict[str, list[str]]], outcome: Outcome) -> None:
    ours = re.compile(r"'(left|right)-\d+-\d+'")
    answered = {text for each in told for text in each["answered"]}
    served = {text for text in world.served_statements() if ours.search(text)}
    recorded = world.recorded_statements()
    outcome.answered, outcome.recorded = len(answered), len(recorded)
    checks = {
        "a client was told what the server never saw": answered - served,
        "the server saw what is not recorded": served - recorded,
        "a statement was refused": {text for each in told for text in each["refused"]},
        "somebody else than the gateway logged in": set(
            re.findall(r"connection authorized: user=(\S+) database=shop", world.server.log())
        )
        - {"shop_app"},
        "somebody came past the gateway": {"agent"} & set(re.findall(r"\] (\S*?)@192\S* ", world.server.log())),
        "a traceback is in the log": set(re.findall("Traceback", world.gateway.log())),
    }
    outcome.faults += [f"{what}: {sorted(found)[:3]}" for what, found in checks.items() if found]
    if not answered:
        outcome.faults.append("nothing was answered at all")
    with contextlib.suppress(AssertionError):
        wait_until(lambda: world.status()["open_sessions"] == 0, "all sessions closed")
    verified = world.gateway.cli("audit", "verify", check=False)
    outcome.sessions = verified.stdout.strip().splitlines()[-1]
    if verified.returncode:
        outcome.faults.append(f"audit verify: {verified.stdout}{verified.stderr}")


def tell(outcome: Outcome) -> bool:
    """Prints the numbers; true when everything held."""
    print("kills:", ", ".join(f"{count} of the {kind}" for kind, count in outcome.kills.items()))
    rows = {f"back, {kind} killed": seconds for kind, seconds in outcome.back_s.items()}
    for what, seconds in {**rows, "bare import": outcome.bare_s}.items():
        middle, nearly, most = (_quantile(seconds, part) for part in (0.5, 0.99, 1.0))
        print(f"kills: {what}: median {middle:.2f} s, p99 {nearly:.2f} s, at most {most:.2f} s, of {len(seconds)}")
    print(f"kills: {outcome.answered} statements answered, {outcome.recorded} recorded; {outcome.sessions}")
    for fault in outcome.faults:
        print(f"kills: FAULT: {fault}")
    return not outcome.faults
