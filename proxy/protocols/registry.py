"""Finds the protocols: every folder beside this file is one, with `PROTOCOL` (its name), `DEFAULT_PORTS` and
`Machine` (its `MachineFactory`). Adding a protocol touches its folder and nothing here.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

import proxy.protocols
from proxy.protocols.base import MachineFactory


@cache
def _protocols() -> tuple[dict[str, MachineFactory], dict[int, str]]:
    factories: dict[str, MachineFactory] = {}
    ports: dict[int, str] = {}
    for entry in pkgutil.iter_modules(proxy.protocols.__path__):
        if entry.ispkg:
            folder = importlib.import_module(f"{proxy.protocols.__name__}.{entry.name}")
            factories[folder.PROTOCOL] = folder.Machine
            ports.update(dict.fromkeys(folder.DEFAULT_PORTS, folder.PROTOCOL))
    return factories, ports


def find(protocol: str) -> MachineFactory | None:
    """The factory for a protocol's name, or None."""
    return _protocols()[0].get(protocol)


def protocol_of_port(port: int) -> str | None:
    """The protocol that is spoken on this port by default, or None."""
    return _protocols()[1].get(port)


def names() -> tuple[str, ...]:
    """The names of all protocols, sorted."""
    return tuple(sorted(_protocols()[0]))
