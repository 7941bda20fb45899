"""Shortens the kernel's types, as `bpftool btf dump` writes them, to those that a program needs: clang reads the header
three times for BCC, and most of a load is spent on that.

What is kept: everything but structs and unions; of those the ones that are named (by the program, or by BCC), what
they hold by value, and what they point to through a member that the program names. What is left out is an incomplete
type, so a program that needed it does not compile: its layout is never taken for another.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_HEAD = re.compile(r"(?:struct|union) (\w+) \{")
_MEMBER = re.compile(r"\b(?:struct|union) (\w+) (\**)(\w*)")
_NAMED = re.compile(r"\b(?:struct|union) (\w+)")
_FOLLOWED = re.compile(r"(?:->|\.)(\w+)")
_OF_BCC = ("bpf_stack_build_id",)
"""What BCC's own helpers hold by value."""


def shortened(header: str, program: str) -> str:
    """The header for this program, in the order it has."""
    blocks = header.split("\n\n")
    places: dict[str, int] = {}
    kept = [False] * len(blocks)
    typedefs: list[str] = []
    waiting = list(_OF_BCC)
    for place, block in enumerate(blocks):
        head = _HEAD.match(block)
        if head is not None:
            places[head[1]] = place
        else:
            kept[place] = True
            typedefs.append(block)
    waiting += _NAMED.findall(program)
    followed = frozenset(_FOLLOWED.findall(program))
    for block in typedefs:
        waiting += _needed(block, followed)
    while waiting:
        place = places.get(waiting.pop(), -1)
        if place >= 0 and not kept[place]:
            kept[place] = True
            waiting += _needed(blocks[place], followed)
    return "\n\n".join(block for place, block in enumerate(blocks) if kept[place])


def _needed(block: str, followed: frozenset[str]) -> Iterable[str]:
    return [name for name, pointer, member in _MEMBER.findall(block) if not pointer or member in followed]
