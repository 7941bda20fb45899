"""What the benches share: turns, CPU and memory of processes, the head of a JSON file."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import random
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
RESAMPLES = 2000
BUSY = 1.0
"""From this load on, figures tell more of the neighbours than of what is measured."""


class BenchError(Exception):
    """A workload did not run, or a route is not the one that it claims to be."""


def options(prog: str, description: str, arguments: Sequence[str], output: str) -> argparse.Namespace:
    """The command line that all benches have. Ends the program when it makes no sense here."""
    parser = argparse.ArgumentParser(prog=prog, description=f"{description}; no pass mark")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter runs: a look, not a measurement")
    parser.add_argument("--only", metavar="TEXT", default="", help="only workloads whose name holds this text")
    parser.add_argument("--output", type=Path, help=f"JSON file to write ({output}-DATE.json)")
    given = parser.parse_args(arguments)
    if os.geteuid() != 0:
        sys.exit("run as root: the bench makes network namespaces, and the kernel programs need it")
    given.output = given.output or Path(f"{output}-{datetime.date.today()}.json")
    if load() >= BUSY:
        tell(f"the machine is busy (load {load():.1f}): believe ratios, and those not much")
    return given


def tell(line: str) -> None:
    print(f"bench: {line}", file=sys.stderr, flush=True)


def load() -> float:
    """How many processes have wanted a core, over the last minute."""
    return os.getloadavg()[0]


def head() -> dict[str, object]:
    """Where and when a file of samples was made."""
    return {
        "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cores": os.cpu_count(),
        "load": load(),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def rotated(members: Sequence[T], turn: int) -> list[T]:
    """The members, beginning with another in each turn."""
    first = turn % len(members)
    return [*members[first:], *members[:first]]


def ratio(samples: Sequence[float], base: Sequence[float]) -> float:
    """The median of what each round says: what moves the machine from one round to the next cancels out."""
    return statistics.median(one / other for one, other in zip(samples, base, strict=True))


def interval(samples: Sequence[float], base: Sequence[float]) -> tuple[float, float]:
    """Where 95 of 100 such ratios would lie if the rounds were drawn again from those that there were (bootstrap)."""
    pairs = [one / other for one, other in zip(samples, base, strict=True)]
    draw = random.Random(0)
    drawn = sorted(statistics.median(draw.choices(pairs, k=len(pairs))) for _ in range(RESAMPLES))
    return drawn[RESAMPLES * 25 // 1000], drawn[RESAMPLES * 975 // 1000]


def cpu_s(processes: Sequence[int]) -> float:
    """User and system time of these processes up to now."""
    ticks = 0
    for pid in processes:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks * TICK_S


def memory_kib(processes: Sequence[int]) -> float:
    """Memory of these processes that is their own, and their share of what they have together (PSS)."""
    total = 0
    for pid in processes:
        found = re.search(r"^Pss: +(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
        assert found is not None
        total += int(found[1])
    return total


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
