"""Prints what was expected of each class of attack and what was seen; the exit status is 0 when nothing differs."""

from __future__ import annotations

import os
import sys
import textwrap
import time

from tests.bypass.bed import opened_bed
from tests.bypass.cases import CASES, NOT_RUN

_WIDTHS = (46, 20, 62)


def main(wanted: list[str]) -> int:
    if os.geteuid() != 0:
        sys.exit("run as root: the suite makes network namespaces, and the kernel programs need it")
    cases = [case for case in CASES if not wanted or any(word in case.id for word in wanted)]
    started = time.monotonic()
    differs = 0
    with opened_bed() as bed:
        _row("CLASS", "ATTACKER", "EXPECTED", "SEEN", "VERDICT")
        for case in cases:
            seen = case.run(bed)
            good = seen.outcome == case.expected
            differs += not good
            promise = case.promise if case.promise != case.expected else "as seen" if good else case.expected
            _row(
                case.name,
                case.attacker,
                promise if not good else case.promise,
                seen.outcome,
                "ok" if good else "DIFFERS",
            )
            if not good or "--said" in sys.argv:
                print(
                    *(f"      said: {line}" for line in seen.said),
                    *(f"      {one}" for one in seen.arrived[:4]),
                    sep="\n",
                )
                print(*(f"      alert: {line}" for line in seen.alerts[:4]), sep="\n", flush=True)
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
