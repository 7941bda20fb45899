"""The kernel side: programs, pins, lineage and netfilter rules. The only user of BCC, bpffs, iptables and ipset."""

from __future__ import annotations

from pathlib import Path

from hostagent.kernel import cgroups
from hostagent.kernel.cgroups import mount_point as cgroup_mount
from hostagent.kernel.events import Event, Events, follow
from hostagent.kernel.guard import Guard
from hostagent.kernel.lifecycle import agents_found, apply_scope, attached, cleanup, start
from hostagent.kernel.pins import ConnectRecord, Pins, Refused, Unclaimed
from hostagent.kernel.ruleset import Culprit, RulesetEvents
from hostagent.kernel.settings import KernelError, MapSizes, Scope, Settings
from hostagent.kernel.sockets import Bypass, Sockets

__all__ = [
    "Bypass",
    "ConnectRecord",
    "Culprit",
    "Event",
    "Events",
    "Guard",
    "KernelError",
    "MapSizes",
    "Pins",
    "Refused",
    "RulesetEvents",
    "Scope",
    "Settings",
    "Sockets",
    "Unclaimed",
    "agents_found",
    "apply_scope",
    "attached",
    "cgroup_mount",
    "cleanup",
    "follow",
    "own_cgroup",
    "start",
]


def own_cgroup() -> Path:
    """The cgroup2 directory that we are in. Raises `KernelError`."""
    return cgroups.of_process("self")
