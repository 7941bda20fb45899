"""Prints what was expected of each class of attack and what was seen; the exit status is 0 when nothing differs.

Arguments choose classes by words in their name or attacker; `--said` also shows what each attacker said.
"""

from __future__ import annotations

import os
import sys
import textwrap
import time

from tests.bypass.bed import opened_bed
from tests.bypass.cases import CASES, NOT_RUN

_WIDTHS = (46, 20, 62)
_TOLD_MAX = 4


def main(wanted: list[str]) -> int:
    if os.geteuid() != 0:
        sys.exit("run as root: the suite makes network namespaces, and the kernel programs need it")
    cases = [case for case in CASES if not wanted or any(word in f"{case.name} {case.attacker}" for word in wanted)]
    if not cases:
        sys.exit(f"no class has one of `{' '.join(wanted)}` in its name or attacker")
    started = time.monotonic()
    differs = 0
    with opened_bed() as bed:
        _row("CLASS", "ATTACKER", "EXPECTED", "SEEN", "VERDICT")
        for case in cases:
            seen = case.run(bed)
            good = seen.outcome == case.expected
            differs += not good
            _row(case.name, case.attacker, case.promise, seen.outcome, "ok" if good else "DIFFERS")
            if not good or "--said" in sys.argv:
                said = [f"said: {line}" for line in seen.said]
                arrived = [str(one) for one in seen.arrived[:_TOLD_MAX]]
                for line in (*said, *arrived, *seen.alerts[:_TOLD_MAX]):
                    print(f"      {line}", flush=True)
    for name, why in NOT_RUN.items():
        _row(name, "-", f"not run, because {why}", "-", "-")
    print(f"\n{len(cases)} attacks, {differs} differ, {time.monotonic() - started:.0f} s")
    return min(differs, 1)


def _row(name: str, attacker: str, expected: str, seen: str, verdict: str) -> None:
    columns = [
        textwrap.wrap(text, width) or [""] for text, width in zip((name, attacker, expected), _WIDTHS, strict=True)
    ]
    for line in range(max(map(len, columns))):
        cells = [column[line] if line < len(column) else "" for column in columns]
        tail = f"{seen:42} {verdict}" if line == 0 else ""
        print(
            "  ".join(f"{cell:{width}}" for cell, width in zip(cells, _WIDTHS, strict=True)) + "  " + tail, flush=True
        )


if __name__ == "__main__":
    sys.exit(main([word for word in sys.argv[1:] if not word.startswith("-")]))
