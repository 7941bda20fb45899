"""Tells what a command that is run in a container is for, where its words say so: `kubectl cp` is an exec of tar."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

_SHELLS = frozenset({"sh", "bash", "ash", "dash"})
_RESUMED = re.compile(r"(tar cf - .+?) \| tail -c\+[0-9]+", re.DOTALL)
"""What `kubectl cp --retries` runs in a shell."""


def told(command: Sequence[str]) -> str:
    """In a few words what the command does to the pod's files; empty where that cannot be told."""
    words = _unwrapped(command)
    if not words or words[0].rpartition("/")[2] != "tar":
        return ""
    modes, directory, operands = "", "", []
    pending = iter(words[1:])
    for index, word in enumerate(pending):
        if word == "-C":
            directory = next(pending, "")
        elif word.startswith("--"):
            continue
        elif (index == 0 and word != "-") or (word.startswith("-") and word != "-"):
            modes += word.lstrip("-")
        else:
            operands.append(word)
    if "f" not in modes or "-" not in operands:
        return ""
    paths = [word for word in operands if word != "-"]
    if "c" in modes and paths:
        return f"copies out of the pod: {', '.join(paths)}"
    if "x" in modes:
        return f"copies into the pod: {directory or 'its working directory'}"
    return ""


def _unwrapped(command: Sequence[str]) -> Sequence[str]:
    """The tar inside of what kubectl runs in a shell."""
    if len(command) == 3 and command[0].rpartition("/")[2] in _SHELLS and command[1] == "-c":
        resumed = _RESUMED.fullmatch(command[2])
        if resumed:
            try:
                return shlex.split(resumed[1])
            except ValueError:
                return ()
    return command
