"""What the kernel side has to be told, and the one error it raises for operators."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import msgspec

from hostagent.errors import OperatorError
from proxy.model import Endpoint, Prefix

DEFAULT_MARK = 0x0F0E
_CONNECTS_LEAST = 8
"""An eighth of them is for users' network namespaces."""


class KernelError(OperatorError):
    """The kernel side could not be set up or read. The message names what is missing and what to do."""


@dataclass(frozen=True, slots=True)
class MapSizes:
    """Entries of the kernel's maps; memory is taken at load, about 540 bytes a node. What is started when `procs` or
    `nodes` are full is unlabelled and denied. `graveyard` is how many dead images wait for a late accept; `connects` is
    how many connections may wait to be accepted; in other network namespaces half as many, and an eighth in those that
    users made. `passing` is how many connects of the workers may wait for an answer, and `declared` how many
    images may be declared to be agents, at a time. `event_bytes`, a power of two,
    holds what the host agent has not read yet, about 90 bytes an event. `agent_files` are the files of agents that are
    intercepted, `spared` the images that look like one of them and are none, and `unwatched` the connections of such
    that cannot be looked at, each at a time."""

    procs: int = 65_536
    nodes: int = 98_304
    graveyard: int = 16_384
    connects: int = 65_536
    scope: int = 4_096
    exempt: int = 1_024
    passing: int = 16_384
    declared: int = 4_096
    event_bytes: int = 262_144
    agent_files: int = 1_024
    spared: int = 16_384
    unwatched: int = 4_096

    def __post_init__(self) -> None:
        if self.event_bytes % mmap.PAGESIZE or self.event_bytes & self.event_bytes - 1:
            raise ValueError("event_bytes has to be a power of two, and whole pages")
        if self.graveyard >= self.nodes:
            raise ValueError("graveyard has to be smaller than nodes")
        if self.connects < _CONNECTS_LEAST:
            raise ValueError(f"connects has to be {_CONNECTS_LEAST} at least")

    @classmethod
    def of(cls, entries: Mapping[str, int]) -> Self:
        """The sizes of the settings file. Raises `KernelError`."""
        try:
            return cls(**entries)
        except ValueError as error:
            raise KernelError(f"sizes of maps in the settings: {error}") from error


@dataclass(frozen=True, slots=True)
class Settings:
    """What stays while the daemon runs. `cgroup` is the cgroup2 directory whose processes' connects are recorded;
    `worker_cgroup` is the directory, below it, of the processes that may be exempt. `run_dir` is a root-owned directory
    for the loader's scratch files."""

    cgroup: Path
    pin_dir: Path
    listen_port: int
    worker_cgroup: Path
    mark: int = DEFAULT_MARK
    sizes: MapSizes = field(default_factory=MapSizes)
    run_dir: Path = Path("/run/hopgate")

    def __post_init__(self) -> None:
        if not 0 < self.mark < 1 << 32:
            raise ValueError(f"mark `{self.mark}` has to be a number of 32 bits other than 0")


@dataclass(frozen=True, slots=True)
class Scope:
    """Connects to what is recorded: `ports` at any address and the targets' `endpoints` and `prefixes` are redirected
    too; `muster` is where the workers connect to, directly, to show which image they are.

    Connects to all else are looked at when they come from below one of `agents`: files, as device (`st_dev`) and inode.
    None: nobody is, and declared agents neither."""

    ports: tuple[int, ...] = ()
    endpoints: tuple[Endpoint, ...] = ()
    muster: Endpoint | None = None
    prefixes: tuple[Prefix, ...] = ()
    agents: frozenset[tuple[int, int]] | None = None

    def covers(self, destination: Endpoint) -> bool:
        """Whether connects to it are redirected."""
        return (
            destination.port in self.ports
            or destination in self.endpoints
            or any(destination in prefix for prefix in self.prefixes)
        )


class LoadRequest(msgspec.Struct, frozen=True):
    """What the loader is told, as JSON. `replace` asks for new programs on the maps that are pinned already."""

    pins: str
    cgroup: str
    run_dir: str
    mark: int
    netns: int
    build: int
    layout: int
    sizes: MapSizes
    replace: bool
