"""A fork storm against a listener that is killed and started again, and whose programs are replaced, while it goes on.

The clients (storm.c) hold every answer against what they are. The listener is a process of its own that takes records
as the daemon does; each time it starts, it takes the pins that are there. The programs are replaced by those of another
build while it listens. Behind it, where nobody may get, somebody stands for the database.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec

from hostagent import kernel
from hostagent.kernel import abi
from proxy.model import Endpoint
from tests.kernel.bed import BEYOND, LISTEN_PORT, PORT, Bed, bed, original_destination, tags
from tests.lab import namespaces

SOURCE = Path(__file__).with_name("storm.c")
ROOT = Path(__file__).parents[2]
SPAWNERS = 4
PARALLEL = 24
MARKS = (0x0F0E, 0x0F0F)
SIZES = kernel.MapSizes()
SCOPE = kernel.Scope(ports=(PORT,))


class Order(msgspec.Struct, frozen=True):
    """What a listener is told on its command line."""

    cgroup: str
    pins: str
    workers: str
    run_dir: str
    mark: int


@dataclasses.dataclass
class Outcome:
    """Totals over all processes. `lost` counts attempts that were refused or cut off while no listener was there; each
    was tried again. `up_s` are the seconds from the start of each listener to its first accept; `past` counts who got
    to the target."""

    done: int = 0
    right: int = 0
    wrong: int = 0
    missing: int = 0
    direct: int = 0
    lost: int = 0
    forks: int = 0
    what: str = ""
    restarts: int = 0
    replacements: int = 0
    seconds: float = 0.0
    up_s: list[float] = dataclasses.field(default_factory=list)
    counters: dict[str, int] = dataclasses.field(default_factory=dict)
    past: int = 0

    def holds(self, connects: int) -> bool:
        return (
            self.done == self.right == connects
            and not (self.wrong or self.missing or self.direct or self.past)
            and not any(self.counters[name] for name in (*abi.OVERFLOWS, "missed"))
        )


# --- the listener -----------------------------------------------------------------------------------------------------


def settings(order: Order) -> kernel.Settings:
    return kernel.Settings(
        cgroup=Path(order.cgroup),
        pin_dir=Path(order.pins),
        listen_port=LISTEN_PORT,
        worker_cgroup=Path(order.workers),
        mark=order.mark,
        sizes=SIZES,
        run_dir=Path(order.run_dir),
    )


def replace(order: Order) -> None:
    """Brings in the programs of the build that the order is for, and rules that go with them."""
    kernel.start(settings(order), SCOPE).close()


def listen(order: Order) -> None:
    """Serves until it is killed."""
    listener = socket.create_server(("::", LISTEN_PORT), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    pins = kernel.start(settings(order), SCOPE)
    print("ready", flush=True)
    swept_s = time.monotonic()
    while True:
        connection, address = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.settimeout(10)
            connection.sendall(_answer(pins, connection, address).encode() + b"\n")
        if time.monotonic() - swept_s > 5:
            pins.sweep()
            swept_s = time.monotonic()


def _answer(pins: kernel.Pins, connection: socket.socket, address: tuple[Any, ...]) -> str:
    peer = Endpoint(address[0].removeprefix("::ffff:"), address[1])
    record = pins.take(peer, original_destination(connection, ":" in peer.address))
    if isinstance(record, kernel.Refused):
        return f"refused: {record.reason}"
    lineage = pins.lineage(record.node)
    if lineage is None:
        return "refused: the lineage is incomplete"
    return f"{record.tgid} {(tags(lineage) or ['no tag'])[-1]}"


# --- the bed ----------------------------------------------------------------------------------------------------------


@contextmanager
def tripwire(beyond: str) -> Iterator[list[str]]:
    """Answers for every address of the target's networks; the list has everybody who got there."""
    for network in ("198.51.100.0/24", "2001:db8:5::/64"):
        namespaces.ip("-n", beyond, "route", "add", "local", network, "dev", "lo")
    with namespaces.entered(beyond):
        listener = socket.create_server(("::", PORT), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    got: list[str] = []

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, address = listener.accept()
                got.append(str(address))
                with connection, contextlib.suppress(OSError):
                    connection.sendall(b"T\n")

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield got
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


def compile_storm(directory: Path) -> Path:
    program = directory / "storm"
    subprocess.run(["gcc", "-O2", "-Wall", "-Werror", "-static", "-o", program, SOURCE], check=True, timeout=60)
    return program


class Listener:
    """The listener's process, started again whenever it is killed; `mark` tells the build of the programs."""

    def __init__(self, made: Bed, outcome: Outcome) -> None:
        self._made = made
        self._outcome = outcome
        self._mark = MARKS[0]
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        begun = time.monotonic()
        self._process = subprocess.Popen(self._command("listen"), cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            raise RuntimeError("the listener did not start")
        self._outcome.up_s.append(time.monotonic() - begun)

    def restart(self) -> None:
        self.kill()
        self.start()
        self._outcome.restarts += 1

    def replace(self) -> None:
        """Another build, while the listener listens."""
        self._mark = next(mark for mark in MARKS if mark != self._mark)
        subprocess.run(self._command("replace"), cwd=ROOT, check=True, timeout=60)
        self._outcome.replacements += 1

    def kill(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.communicate()
            self._process = None

    def _command(self, verb: str) -> list[str]:
        at = self._made.settings
        order = Order(str(at.cgroup), str(at.pin_dir), str(at.worker_cgroup), str(at.run_dir), self._mark)
        return [
            *("nsenter", f"--net=/run/netns/{self._made.netns}"),
            *(sys.executable, "-m", "tests.kernel.storm", verb, msgspec.json.encode(order).decode()),
        ]


Spawners = list[subprocess.Popen[str]]


@contextmanager
def stormy() -> Iterator[tuple[Bed, Listener, Outcome, Callable[..., Spawners]]]:
    """A bed with a listener that runs; the last starts the spawners of so many connects, so many at a
    time by each. The totals that are no
    client's are in the outcome at the end. Leaves nothing behind."""
    outcome = Outcome()
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hopgate-storm-")))
        program = compile_storm(directory)
        made = stack.enter_context(bed("storm", SIZES, load=False))
        made.listener.close()
        for network, gateway in (("198.51.100.0/24", BEYOND[0]), ("2001:db8:5::/64", BEYOND[1])):
            namespaces.ip("-n", made.netns, "route", "add", network, "via", gateway)
        got = stack.enter_context(tripwire(made.beyond))
        listener = Listener(made, outcome)
        stack.callback(listener.kill)
        listener.start()

        def start(connects: int, parallel: int = PARALLEL) -> Spawners:
            spawners: Spawners = []
            for index in range(SPAWNERS):
                share = connects // SPAWNERS + (index < connects % SPAWNERS)
                command = [str(program), f"tag-{index}", str(share), str(parallel)]
                spawners.append(made.start(command, stdin=subprocess.DEVNULL))
                stack.callback(spawners[-1].kill)
            return spawners

        yield made, listener, outcome, start
        outcome.past = len(got)
        with kernel.Pins.open(made.settings.pin_dir) as pins:
            outcome.counters = pins.counters()


def stop(spawners: Spawners, outcome: Outcome) -> None:
    """Lets what has been started come to its end, and adds it up."""
    for spawner in spawners:
        spawner.send_signal(signal.SIGTERM)
    for spawner in spawners:
        _add(outcome, json.loads(spawner.communicate(timeout=60)[0]))


def run(connects: int, *, every_s: tuple[float, float], restarts: int, replacements: int, seed: int = 1) -> Outcome:
    """`connects` in all; at random times, `every_s` apart, up to so many restarts and replacements. Leaves nothing
    behind."""
    chance = random.Random(seed)
    with stormy() as (_made, listener, outcome, start):
        begun = time.monotonic()
        spawners = start(connects)
        steps = [listener.restart] * restarts + [listener.replace] * replacements
        chance.shuffle(steps)
        while not _ended(spawners, chance.uniform(*every_s)):
            if steps:
                steps.pop()()
        outcome.seconds = time.monotonic() - begun
        for spawner in spawners:
            _add(outcome, json.loads(spawner.communicate()[0]))
    return outcome


def _ended(spawners: list[subprocess.Popen[str]], within_s: float) -> bool:
    until = time.monotonic() + within_s
    while any(spawner.poll() is None for spawner in spawners):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def tell(connects: int, outcome: Outcome) -> bool:
    """Prints the numbers; true when nothing was wrong and nothing missing."""
    holds = outcome.holds(connects)
    up_s = sorted(outcome.up_s)
    print(
        f"storm: {outcome.done} connects in {outcome.seconds:.0f} s ({outcome.done / outcome.seconds:.0f}/s, "
        f"{outcome.forks / outcome.seconds:.0f} forks/s), {outcome.restarts} restarts (back after "
        f"{up_s[len(up_s) // 2]:.1f} s, at most {up_s[-1]:.1f} s), {outcome.replacements} replacements"
    )
    print(
        f"storm: {outcome.right} right, {outcome.wrong} wrong, {outcome.missing} missing, "
        f"{outcome.direct + outcome.past} past the proxy; {outcome.lost} attempts refused and repeated"
    )
    for name, value in outcome.counters.items():
        if value:
            print(f"storm: kernel counter {name} {value}")
    if outcome.what:
        print(f"storm: {outcome.what}")
    return holds


def _add(outcome: Outcome, totals: dict[str, Any]) -> None:
    outcome.what = str(totals.pop("what")) or outcome.what
    for name, value in totals.items():
        setattr(outcome, name, getattr(outcome, name) + value)


if __name__ == "__main__":
    verb, order = sys.argv[1], msgspec.json.decode(sys.argv[2], type=Order)
    {"listen": listen, "replace": replace}[verb](order)
