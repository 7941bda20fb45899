"""Finds the protocols: every folder beside this file is one, with `PROTOCOL` (its name), `DEFAULT_PORTS`, `Machine`
(its `MachineFactory`) and, where it has one, `visit` (its `Visit`). Adding a protocol touches its folder and nothing
here.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

import proxy.protocols
from proxy.protocols.base import MachineFactory, Visit


@cache
def _protocols() -> tuple[dict[str, MachineFactory], dict[int, str], dict[str, Visit]]:
    factories: dict[str, MachineFactory] = {}
    visits: dict[str, Visit] = {}
    ports: dict[int, str] = {}
    for entry in pkgutil.iter_modules(proxy.protocols.__path__):
        if entry.ispkg:
            folder = importlib.import_module(f"{proxy.protocols.__name__}.{entry.name}")
            factories[folder.PROTOCOL] = folder.Machine
            ports.update(dict.fromkeys(folder.DEFAULT_PORTS, folder.PROTOCOL))
            if hasattr(folder, "visit"):
                visits[folder.PROTOCOL] = folder.visit
    return factories, ports, visits


def find(protocol: str) -> MachineFactory | None:
    """The factory for a protocol's name, or None."""
    return _protocols()[0].get(protocol)


def visit(protocol: str) -> Visit | None:
    """What tells whether a target of this protocol can be spoken to; None when nothing but a connection tells."""
    return _protocols()[2].get(protocol)


def protocol_of_port(port: int) -> str | None:
    """The protocol that is spoken on this port by default, or None."""
    return _protocols()[1].get(port)


def names() -> tuple[str, ...]:
    """The names of all protocols, sorted."""
    return tuple(sorted(_protocols()[0]))
