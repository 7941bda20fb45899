"""Gives the processes that are older than the kernel programs their place in the lineage.

Runs once, after the programs are attached, so that whatever starts from then on is either seen by them or found here.
The task iterator lists the processes with their labels, global ids and executables; /proc adds the argument vector.
Parents go before children, every insert is create-only, and it is repeated until nothing changes. A process that was
seen to run something else than what it was labelled with had called execve in between, and is labelled again.

Blind spots: what happened before is known only as far as the kernel still shows it. A process whose parent had died
then belongs to whoever adopted it, and images that an old process ran before its last exec are lost: start the daemon
early. Their argument vector is what /proc shows, which a process can rewrite; uid, cgroup and namespaces are those of
now. Seeded images are never released.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self

from hostagent.kernel import abi, bpf, cgroups
from hostagent.kernel.settings import KernelError

_PASSES_MAX = 100
_HELD = 1 << 30
_ARGV_BYTES = 256
_PATH_BYTES = 128


class Tasks:
    """The processes that /proc shows, without kernel threads: each iteration runs the iterator program once."""

    def __init__(self, program: int) -> None:
        self._link = bpf.link_create(program, 0, bpf.TRACE_ITER)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        os.close(self._link)

    def __iter__(self) -> Iterator[abi.TaskRow]:
        with open(bpf.iterator_create(self._link), "rb", buffering=0) as rows:
            data = b""
            while chunk := rows.read(1 << 16):
                data += chunk
        size = ctypes.sizeof(abi.TaskRow)
        return (abi.TaskRow.from_buffer_copy(data, start) for start in range(0, len(data), size))


def seed(pins: Path, tasks: Iterable[abi.TaskRow]) -> int:
    """`tasks` is looked through again and again. Returns how many processes were labelled. Raises `KernelError` when it
    does not come to rest, `OSError`."""
    return _Seed(pins).run(tasks)


class _Seed:
    def __init__(self, pins: Path) -> None:
        self._procs = bpf.Map.pinned(pins / "procs", *abi.MAPS["procs"])
        self._nodes = bpf.Map.pinned(pins / "nodes", *abi.MAPS["nodes"])
        self._made: dict[int, int] = {}

    def run(self, tasks: Iterable[abi.TaskRow]) -> int:
        labelled = 0
        try:
            for _pass in range(_PASSES_MAX):
                rows = {row.tgid: row for row in tasks}
                first = _first_process(rows)
                if first is not None and self._procs.get(abi.U32.pack(first.tgid)) is None:
                    rows[first.tgid] = first
                changed = sum(self._correct(row) for row in rows.values())
                made = sum(self._label(row, rows) for row in _parents_first(rows) if not row.known)
                labelled += made
                if not changed and not made and not self._orphans(rows):
                    return labelled
            raise KernelError(f"processes start faster than they can be labelled: gave up after {_PASSES_MAX} passes")
        finally:
            self._procs.close()
            self._nodes.close()

    def _orphans(self, rows: dict[int, abi.TaskRow]) -> bool:
        """Whether some process waits for the kernel to show who adopted it."""
        waiting = any(
            not row.known and self._procs.get(abi.U32.pack(row.tgid)) is None and row.parent_tgid not in rows
            for row in rows.values()
        )
        if waiting:
            time.sleep(0.01)
        return waiting

    def _correct(self, row: abi.TaskRow) -> bool:
        """Takes back a label of ours that an unseen execve had made wrong before it was written."""
        if self._made.get(row.node, row.exec_id) == row.exec_id:
            return False
        del self._made[row.node]
        key = abi.U32.pack(row.tgid)
        if self._procs.get(key) == abi.U64.pack(row.node):
            self._procs.delete(key)
        return True

    def _label(self, row: abi.TaskRow, rows: dict[int, abi.TaskRow]) -> bool:
        above, depth = 0, 0
        if row.parent_ns_tgid and not row.parent_kthread:
            entry = self._procs.get(abi.U32.pack(row.parent_tgid))
            if entry is None:
                return False
            (above,) = abi.U64.unpack(entry)
            value = self._nodes.get(entry)
            if value is None:
                # the parent lost its label to an overflow, and so do its children
                return False
            depth = abi.Node.from_buffer_copy(value).depth + 1
        if depth >= abi.DEPTH_MAX:
            return False
        argv = _argv(row.ns_tgid)
        path = _path(row.ns_tgid)[: _PATH_BYTES - 1]
        node = abi.Node(
            parent=above,
            start_ns=row.start_ns,
            inode=row.inode,
            cgroup_id=row.cgroup_id,
            device=row.device,
            tgid=row.tgid,
            uid=row.uid,
            others=_HELD,
            depth=depth,
            argv_length=len(argv),
            argv_stored=min(len(argv), _ARGV_BYTES),
            path_length=len(path) + 1,
            namespaces=row.namespaces,
            comm=row.comm,
            path=path,
        )
        ctypes.memmove(node.argv, argv, node.argv_stored)
        node_id = self._insert(bytes(node))
        try:
            self._procs.put(abi.U32.pack(row.tgid), abi.U64.pack(node_id), bpf.NOEXIST)
        except OSError as error:
            self._nodes.delete(abi.U64.pack(node_id))
            if isinstance(error, FileExistsError):
                return False
            raise
        self._made[node_id] = row.exec_id
        return True

    def _insert(self, value: bytes) -> int:
        while True:
            node_id = (time.monotonic_ns() << 8 | 0xFF) & (1 << 64) - 1
            try:
                self._nodes.put(abi.U64.pack(node_id), value, bpf.NOEXIST)
            except FileExistsError:
                continue
            return node_id


def _parents_first(rows: dict[int, abi.TaskRow]) -> list[abi.TaskRow]:
    ordered: dict[int, abi.TaskRow] = {}
    for row in rows.values():
        above: list[abi.TaskRow] = []
        following: abi.TaskRow | None = row
        while following is not None and following.tgid not in ordered and following not in above:
            above.append(following)
            following = rows.get(following.parent_tgid)
        ordered.update((one.tgid, one) for one in reversed(above))
    return list(ordered.values())


def _first_process(rows: dict[int, abi.TaskRow]) -> abi.TaskRow | None:
    """The row of process 1, which the task iterator leaves out: what its children and /proc tell of it."""
    tgid = next((row.parent_tgid for row in rows.values() if row.parent_ns_tgid == 1), None)
    if tgid is None or tgid in rows:
        return None
    row = abi.TaskRow(tgid=tgid, ns_tgid=1)
    row.comm = Path("/proc/1/comm").read_bytes().strip()
    row.uid = os.stat("/proc/1").st_uid
    try:
        executable = os.stat("/proc/1/exe")
        row.inode, row.device = executable.st_ino, abi.s_dev(executable.st_dev)
        row.cgroup_id = cgroups.of_process(1).stat().st_ino
        kinds = ("pid", "mnt", "net", "user")
        row.namespaces = abi.Namespaces(*(os.stat(f"/proc/1/ns/{kind}").st_ino for kind in kinds))
    except OSError:
        # not even root may look at it on some hosts: it then matches no agent
        pass
    return row


def _argv(ns_tgid: int) -> bytes:
    try:
        return Path(f"/proc/{ns_tgid}/cmdline").read_bytes()
    except OSError:
        return b""


def _path(ns_tgid: int) -> bytes:
    try:
        return os.fsencode(os.readlink(f"/proc/{ns_tgid}/exe"))
    except OSError:
        return b""
