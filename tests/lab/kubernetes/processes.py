"""Starting and ending the lab's programs: in a network namespace, with a log, never outliving whoever started them."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

STOP_TIMEOUT_S = 15.0


def start(
    directory: Path, namespace: str | None, name: str, command: Sequence[str | Path], *, ask_first: bool = False
) -> subprocess.Popen[bytes]:
    """Starts a program whose output goes to `NAME.log` in `directory`. When we are killed it is too, or only asked to
    end when it has children of its own (`ask_first`)."""
    words = ["setpriv", "--pdeathsig", "TERM" if ask_first else "KILL", *map(str, command)]
    if namespace is not None:
        words = ["nsenter", f"--net=/run/netns/{namespace}", *words]
    with (directory / f"{name}.log").open("wb") as log:
        return subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=directory, start_new_session=True
        )


def stop(process: subprocess.Popen[bytes]) -> None:
    """Asks the process to end, and kills its group when it has not after the deadline."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(STOP_TIMEOUT_S)
