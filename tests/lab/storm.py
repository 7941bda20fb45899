"""The long forms of `tests/kernel/test_heal.py`: `scripts/storm` runs them."""

from __future__ import annotations

import argparse
import os
import sys

from tests.e2e import kills
from tests.kernel import storm

SHORT = {"connects": 300_000, "kills": 60}
CONNECTS_BETWEEN = 20_000
"""Connects, about, between two restarts or replacements."""


def main() -> int:
    arguments = argparse.ArgumentParser(prog="scripts/storm", description=__doc__)
    arguments.add_argument("--connects", type=int, help="connects of the fork storm")
    arguments.add_argument("--kills", type=int, help="how often something is killed")
    arguments.add_argument("--seed", type=int, default=1)
    given = arguments.parse_args()
    if os.geteuid() != 0:
        sys.exit("run as root: it makes network namespaces, and the kernel programs need it")
    wanted = {name: getattr(given, name) for name in SHORT if getattr(given, name) is not None} or SHORT
    held = True
    if wanted.get("connects"):
        steps = max(wanted["connects"] // CONNECTS_BETWEEN, 2)
        outcome = storm.run(wanted["connects"], every_s=(1, 6), restarts=steps, replacements=steps, seed=given.seed)
        held &= storm.tell(wanted["connects"], outcome)
    if wanted.get("kills"):
        held &= kills.tell(kills.run(wanted["kills"], seed=given.seed))
    print("storm: everything held" if held else "storm: NOT everything held")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
