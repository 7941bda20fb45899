"""Opens what the loader pinned: takes connect records, reads lineages, keeps scope and exemptions. No BCC, no compiler.

Not for use by two threads at once.

Blind spots: a record says who called `connect()`, not who holds the socket now. A record is believed for `STALE_S`
after the connect, and for `CLOSED_S` after the client's socket was closed.
"""

from __future__ import annotations

import ctypes
import os
import socket
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import msgspec

from hostagent.kernel import abi, bpf, cgroups
from hostagent.kernel.conntrack import Conntrack
from hostagent.kernel.settings import KernelError, Scope
from proxy.model import Endpoint, Namespaces, Prefix, ProcessImage

STALE_S = 30.0
CLOSED_S = 5.0
_CACHE_MAX = 16_384
_SPARED_HERE_MAX = 65_536
_SO_NETNS_COOKIE = 71
_ONE = abi.U32.pack(1)


class ConnectRecord(msgspec.Struct, frozen=True):
    """Who connected. `node` is the process image; `time_ns` is CLOCK_MONOTONIC of the connect, or of the close when the
    client has closed since. `netns` and `socket` are the kernel's cookies."""

    node: int
    tgid: int
    netns: int
    socket: int
    time_ns: int


class Unclaimed(msgspec.Struct, frozen=True):
    """A record that nobody took. When it was `established`, somebody answered who was not the listener: the connection
    went past the proxy. `local` is whether it was in the listener's network namespace."""

    node: int
    tgid: int
    time_ns: int
    dest: Endpoint
    local: bool
    established: bool


class Refused(msgspec.Struct, frozen=True):
    """Nobody can be named as the one who asks; `reason` says why, for the record."""

    reason: str


class Pins:
    """The pinned maps. Every method that reads may raise `OSError` when the kernel refuses."""

    def __init__(
        self, directory: Path, maps: dict[str, bpf.Map], programs: list[int], conntrack: Conntrack | None
    ) -> None:
        self.directory = directory
        self._settings = maps["settings"]
        self._counters = maps["counters"]
        self._procs = maps["procs"]
        self._nodes = maps["nodes"]
        self._connects = [maps[name] for name in abi.CONNECTS]
        self._scope = maps["scope"]
        self._exempt = maps["exempt"]
        self._declared = maps["declared"]
        self._agent_files = maps["agent_files"]
        self._spared = maps["spared"]
        self._unwatched = maps["unwatched"]
        self._maps = maps
        self._programs = programs
        self._conntrack = conntrack
        self._muster: Endpoint | None = None
        self._cgroups = cgroups.Paths(cgroups.mount_point())
        self._images: OrderedDict[int, tuple[int, ProcessImage]] = OrderedDict()
        self.exempt_here: set[int] = set()
        """The nodes that were exempted through this object: never fewer than are in the map."""
        self.scope_here: frozenset[bytes] = frozenset()
        """The keys of the scope that was set through this object."""
        self.rules_here = ""
        """The netfilter rules that were put in with it, as `redirect.present` compares them."""
        self.agents_here: frozenset[tuple[int, int]] | None = None
        """The files of agents that were set through this object."""
        self.spared_here: set[int] = set()
        """The nodes that were spared through this object: never fewer than are in the map."""

    @classmethod
    def open(cls, directory: Path, conntrack: Conntrack | None = None) -> Self:
        """With `conntrack`, records are looked up by the tuple that the client used, before any rewriting. Raises
        `KernelError`."""
        maps: dict[str, bpf.Map] = {}
        programs: list[int] = []
        try:
            for name, (key_bytes, value_bytes) in abi.MAPS.items():
                maps[name] = bpf.Map.pinned(directory / name, key_bytes, value_bytes)
            programs.extend(bpf.object_get(directory / f"program_{name}") for name in abi.TRACEPOINTS)
            return cls(directory, maps, programs, conntrack)
        except (OSError, ValueError) as error:
            for one in maps.values():
                one.close()
            for program in programs:
                os.close(program)
            raise KernelError(f"cannot open the pins in `{directory}`: {error}; restart hopgate") from error

    def close(self) -> None:
        """Repeatable."""
        while self._maps:
            self._maps.popitem()[1].close()
        while self._programs:
            os.close(self._programs.pop())
        if self._conntrack is not None:
            self._conntrack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def config(self) -> abi.Config:
        return abi.Config.from_buffer_copy(self._settings.get(abi.U32.pack(0)) or bytes(ctypes.sizeof(abi.Config)))

    def set_config(self, config: bytes) -> None:
        self._settings.put(abi.U32.pack(0), config)

    # --- records ------------------------------------------------------------------------------------------------------

    def take(self, peer: Endpoint, dialled: Endpoint) -> ConnectRecord | Refused:
        """Takes the record of an accepted connection out of the map, whatever comes of it, so that nobody can claim it
        again."""
        source, local = peer, True
        if self._conntrack is not None and dialled != self._muster:
            try:
                found = self._conntrack.source(peer, dialled)
            except OSError as error:
                return Refused(f"conntrack cannot be asked about the connection: {error.strerror or error}")
            if found is None:
                return Refused("conntrack knows no redirected connection between these addresses")
            source, local = found
        try:
            key = abi.connect_key(source, dialled, local=local)
        except ValueError as error:
            return Refused(f"the connection's addresses make no sense: {error}")
        records = self._taken(key, self._connects[:1] if local else self._connects[1:])
        if not records:
            return Refused(
                "the kernel has no record of this connection: raw socket, or a process outside the hooked cgroup"
            )
        record = records[0]
        age_s = (time.monotonic_ns() - record.time_ns) / 1e9
        closed = bool(record.flags & abi.CONNECT_CLOSED)
        if record.flags & abi.CONNECT_AMBIGUOUS or len(records) > 1:
            return Refused("two network namespaces use the same addresses for this connection")
        if not record.flags & abi.CONNECT_ESTABLISHED:
            return Refused("the recorded connection was never established by its own socket")
        if age_s > (CLOSED_S if closed else STALE_S):
            return Refused(f"the record is stale: {'closed' if closed else 'connected'} {age_s:.0f} s ago")
        if not record.node:
            return Refused("the connecting process has no lineage: it is older than the hooks, or a table overflowed")
        return ConnectRecord(record.node, record.tgid, record.netns, record.socket, record.time_ns)

    def _taken(self, key: bytes, tables: list[bpf.Map]) -> list[abi.ConnectRecord]:
        """Takes the records under this key; those whose sockets were closed since only if there is no other."""
        found = [
            abi.ConnectRecord.from_buffer_copy(value)
            for table in tables
            if (value := table.get(key)) is not None and table.delete(key)
        ]
        return [record for record in found if not record.flags & abi.CONNECT_CLOSED] or found

    def asker(self, source: Endpoint, dest: Endpoint) -> int:
        """The node of who connected, in the listener's network namespace, if nobody has taken the record; else 0."""
        value = self._connects[0].get(abi.connect_key(source, dest, local=True))
        return int(abi.ConnectRecord.from_buffer_copy(value).node) if value is not None else 0

    def sweep(self, age_s: float = STALE_S) -> list[Unclaimed]:
        """Removes the records that nobody took within `age_s`, and returns them. To be called every few seconds."""
        oldest_ns = time.monotonic_ns() - int(age_s * 1e9)
        swept: list[Unclaimed] = []
        # a list: deleting while walking would start the walk again
        for table, key in [(each, key) for each in self._connects for key in list(each.keys())]:
            value = table.get(key)
            if value is None:
                continue
            record = abi.ConnectRecord.from_buffer_copy(value)
            if record.time_ns < oldest_ns and table.delete(key):
                established = bool(record.flags & abi.CONNECT_ESTABLISHED)
                local = bool(abi.ConnectKey.from_buffer_copy(key).local)
                dest = abi.dest_of(key)
                swept.append(Unclaimed(record.node, record.tgid, record.time_ns, dest, local, established))
        return swept

    # --- lineage ------------------------------------------------------------------------------------------------------

    def image(self, node: int) -> ProcessImage | None:
        """None when the node is not known any more."""
        found = self._image(node)
        return found[1] if found is not None else None

    def lineage(self, node: int) -> tuple[ProcessImage, ...] | None:
        """Root first, `node` last; None when any of it is missing."""
        images: list[ProcessImage] = []
        while node:
            found = self._image(node)
            if found is None or len(images) > abi.DEPTH_MAX:
                return None
            node, image = found
            images.append(image)
        return tuple(reversed(images)) or None

    def node_of(self, tgid: int) -> int | None:
        """The node of a process, by its id in the initial pid namespace; None without label."""
        value = self._procs.get(abi.U32.pack(tgid))
        node: int = abi.U64.unpack(value)[0] if value is not None else 0
        return node or None

    def nodes(self) -> Iterator[int]:
        """All nodes that are known, in no order; may never end while others come and go."""
        for key in iter(self._nodes.keys()):
            yield abi.U64.unpack(key)[0]

    def _image(self, node: int) -> tuple[int, ProcessImage] | None:
        known = self._images.get(node)
        if known is not None:
            self._images.move_to_end(node)
            return known
        value = self._nodes.get(abi.U64.pack(node))
        if value is None:
            return None
        read = abi.Node.from_buffer_copy(value)
        argv, truncated = abi.split_argv(read)
        label = self._declared.get(abi.U64.pack(node))
        cgroup = self._cgroups.path(read.cgroup_id)
        inside = read.namespaces
        image = ProcessImage(
            node=node,
            tgid=read.tgid,
            start_ns=read.start_ns,
            uid=read.uid,
            device=abi.st_dev(read.device),
            inode=read.inode,
            path=read.path.decode(errors="surrogateescape"),
            comm=read.comm.decode(errors="surrogateescape"),
            argv=argv,
            argv_truncated=truncated,
            cgroup=cgroup,
            declared=abi.Declaration.from_buffer_copy(label).agent.decode() if label is not None else "",
            namespaces=Namespaces(inside.pid, inside.mnt, inside.net, inside.user) if any(bytes(inside)) else None,
            container=cgroups.container(cgroup),
        )
        self._images[node] = read.parent, image
        if len(self._images) > _CACHE_MAX:
            self._images.popitem(last=False)
        return read.parent, image

    def declare(self, node: int, agent: str) -> None:
        """Labels an image that one process alone runs as an agent, for as long as the image is known. Raises
        `KernelError` when it is shared already, or was declared before."""
        key, name = abi.U64.pack(node), agent.encode()
        if not 0 < len(name) < ctypes.sizeof(abi.Declaration):
            raise KernelError(f"`{agent}` is no name that an image can be declared by")
        value = self._nodes.get(key)
        if value is None or abi.Node.from_buffer_copy(value).others != 0:
            raise KernelError("the process has forked since it was started: declare from a fresh one (`hopgate exec`)")
        try:
            self._declared.put(key, bytes(abi.Declaration(agent=name)), bpf.NOEXIST)
        except FileExistsError:
            raise KernelError("the process was declared before") from None
        except OSError as error:
            raise KernelError(f"no more processes can be declared: {error}") from error
        self._images.pop(node, None)
        if self._nodes.get(key) is None:
            # it died meanwhile, and whoever released it found nothing to take along
            self._declared.delete(key)
            raise KernelError("the process ended meanwhile")

    # --- exemption and scope ------------------------------------------------------------------------------------------

    def exempt(self, node: int) -> None:
        """Exempts the processes that run this image, until they call execve. Raises `KernelError`."""
        self.exempt_here.add(node)
        try:
            self._exempt.put(abi.U64.pack(node), _ONE)
        except OSError as error:
            raise KernelError(f"cannot exempt a worker: {error}") from error

    def unexempt(self, node: int) -> None:
        self._exempt.delete(abi.U64.pack(node))
        self.exempt_here.discard(node)

    def exempted(self) -> frozenset[int]:
        """The nodes that are exempt: those of a daemon that was killed have to be taken out by the next."""
        return frozenset(abi.U64.unpack(key)[0] for key in list(self._exempt.keys()))

    def set_scope(self, scope: Scope) -> None:
        """Connects to these are recorded. New members are in before old ones are out. Raises `KernelError` when they do
        not fit."""
        members: list[Endpoint | Prefix | int] = [*scope.ports, *scope.endpoints, *scope.prefixes]
        if scope.muster is not None:
            members.append(scope.muster)
        self._muster = scope.muster
        wanted = {abi.scope_key(member) for member in members}
        self.scope_here = frozenset(wanted)
        try:
            for key in wanted:
                self._scope.put(key, _ONE)
        except OSError as error:
            raise KernelError(
                f"cannot protect `{len(wanted)}` ports and endpoints: {error}; enlarge the scope map"
            ) from error
        for key in list(self._scope.keys()):
            if key not in wanted:
                self._scope.delete(key)

    def scope(self) -> frozenset[bytes]:
        """The keys of what is recorded now."""
        return frozenset(self._scope.keys())

    # --- who is looked at ---------------------------------------------------------------------------------------------

    def agents(self) -> frozenset[tuple[int, int]] | None:
        """The files of the agents that are intercepted; None when nobody is."""
        if not self.config().intercept:
            return None
        return frozenset(map(abi.file_of, list(self._agent_files.keys())))

    def set_agents(self, agents: frozenset[tuple[int, int]]) -> None:
        """New ones are in before old ones are out. Raises `KernelError` when they do not fit."""
        self.agents_here = agents
        wanted = {abi.file_key(file) for file in agents}
        try:
            for key in wanted:
                self._agent_files.put(key, _ONE)
        except OSError as error:
            raise KernelError(
                f"cannot intercept `{len(wanted)}` files of agents: {error}; enlarge the map of agents' files"
            ) from error
        for key in list(self._agent_files.keys()):
            if key not in wanted:
                self._agent_files.delete(key)

    def begin_interception(self) -> None:
        """Connections are looked at from now on; what was seen in part before is left alone."""
        config = self.config()
        config.intercept = time.monotonic_ns()
        self.set_config(bytes(config))

    def end_interception(self) -> None:
        self.agents_here = None
        config = self.config()
        config.intercept = 0
        self.set_config(bytes(config))
        for key in list(self._unwatched.keys()):
            self._unwatched.delete(key)

    def spare(self, node: int) -> None:
        """What processes that run this image send and get passes, whatever it is. Raises `KernelError`."""
        if len(self.spared_here) > _SPARED_HERE_MAX:
            self.spared_here &= self.spared()
        self.spared_here.add(node)
        try:
            self._spared.put(abi.U64.pack(node), _ONE)
        except OSError as error:
            raise KernelError(f"cannot spare an image that is no agent: {error}") from error
        if self._nodes.get(abi.U64.pack(node)) is None:
            # it died meanwhile, and whoever released it found nothing to take along
            self.unspare(node)

    def unspare(self, node: int) -> None:
        self._spared.delete(abi.U64.pack(node))
        self.spared_here.discard(node)

    def spared(self) -> frozenset[int]:
        """The nodes that are spared."""
        return frozenset(abi.U64.unpack(key)[0] for key in list(self._spared.keys()))

    # --- health -------------------------------------------------------------------------------------------------------

    def counters(self) -> dict[str, int]:
        """Events since the programs were loaded, by name (`abi.COUNTERS`), and `missed`: events for which the kernel
        skipped a program."""
        found = {}
        for index, name in enumerate(abi.COUNTERS):
            value = self._counters.get(abi.U32.pack(index))
            found[name] = abi.U64.unpack(value)[0] if value is not None else 0
        found["missed"] = sum(bpf.recursion_misses(program) for program in self._programs)
        return found

    def used(self) -> dict[str, tuple[int, int]]:
        """How many entries each map has, and how many it can have. Takes some 10 ms where there are many."""
        return {
            name: (
                len(list(self._maps[name].keys())) if name == "scope" else self._maps[name].count(),
                bpf.map_entries(self._maps[name].fd),
            )
            for name in abi.MAPS
            if name not in ("settings", "counters")
        }

    def overflowed(self) -> bool:
        """Whether any process or connection lost its label since the programs were loaded. Those are denied; an alert
        is due. A missed event is worse, since a missed execve leaves a process with the label of what it ran before."""
        counters = self.counters()
        return counters["missed"] > 0 or any(counters[name] for name in abi.OVERFLOWS)


def own_netns() -> int:
    """The cookie of the network namespace that we are in. Raises `KernelError`."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as any_socket:
        try:
            cookie = any_socket.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)
        except OSError as error:
            raise KernelError(
                "the kernel has no cookies for network namespaces: Linux 5.15 or newer is needed"
            ) from error
    value: int = abi.U64.unpack(cookie)[0]
    return value


def remove(directory: Path) -> None:
    """Unpins, which detaches. Links first, so that nothing runs on maps that are half gone."""
    try:
        names = sorted(os.listdir(directory), key=lambda name: (not name.startswith("link_"), name))
    except FileNotFoundError:
        return
    for name in names:
        (directory / name).unlink(missing_ok=True)
    directory.rmdir()
