"""Tries, for `hopgate doctor`, what the kernel side needs: each feature by using it once, never by a version number.

What is tried is tried on a cgroup and a network namespace of its own, and nothing stays.

Blind spot: the instructions are written for little-endian hosts.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hostagent.kernel import bpf, cgroups, loader, redirect
from hostagent.kernel.settings import DEFAULT_MARK, KernelError
from proxy.model import Endpoint

_CLONE_NEWNET = 0x40000000
_PROGRAMS = ("bpftool", "iptables", "iptables-save", "iptables-restore", "ip6tables", "ip6tables-restore", "ipset")
_TRY_PORT = 15432


def features() -> Iterator[tuple[str, Callable[[], None], str]]:
    """Name, the trial (raises `KernelError` or `OSError`), and what to do when it fails."""
    yield "programs", _programs, "apt-get install bpftool iptables ipset"
    yield "bcc", _bcc, "apt-get install python3-bpfcc"
    yield "BTF", _btf, "boot a kernel with CONFIG_DEBUG_INFO_BTF"
    yield "hash, queue and LPM maps", _maps, "boot a kernel with CONFIG_BPF_SYSCALL; let nothing take CAP_BPF away"
    yield "raw tracepoints", _raw_tracepoint, "boot a kernel with CONFIG_BPF_EVENTS; let nothing take CAP_PERFMON away"
    yield "sock_ops on a cgroup", _sock_ops, "boot a kernel with CONFIG_CGROUP_BPF (Linux 5.15 or newer has all of it)"
    yield "packets of a cgroup", _packets, "boot a kernel with CONFIG_CGROUP_BPF; without it `intercept: all` cannot be"
    yield "ring buffer", _ring, "boot a kernel with CONFIG_BPF_SYSCALL (Linux 5.8 or newer has ring buffers)"
    yield (
        "netfilter rules",
        _rules,
        "modprobe -a xt_REDIRECT xt_set xt_cgroup xt_bpf xt_conntrack ip_set_hash_net",
    )


def legacy_cgroups() -> list[str]:
    """Mounts of the first cgroup version: on a hybrid host."""
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return [line.split()[1] for line in lines if line.split()[2] == "cgroup"]


def rule_faults() -> list[str]:
    """What is wrong with the rules that are in this network namespace, as far as that can be told without knowing the
    policy. Raises `KernelError`."""
    return redirect.faults()


def backends() -> tuple[dict[int, str], list[str]]:
    """Which backend `iptables` is for IPv4 and IPv6, and the rules that others have in the other one. Raises
    `KernelError`."""
    return {family: redirect.backend(family) for family in (4, 6)}, redirect.foreign()


def _programs() -> None:
    path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    missing = [name for name in _PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        raise KernelError(f"missing: {', '.join(missing)}")


def _bcc() -> None:
    loader.find_bcc()


def _btf() -> None:
    if not loader.BTF.exists():
        raise KernelError(f"`{loader.BTF}` is missing")


def _maps() -> None:
    for kind, key_bytes, value_bytes, flags in ((1, 8, 8, 0), (22, 0, 8, 0), (11, 8, 4, 1)):
        os.close(bpf.map_create(kind, key_bytes, value_bytes, 4, flags))


def _raw_tracepoint() -> None:
    program = bpf.program_load(bpf.RAW_TRACEPOINT, _READ_KERNEL + _END)
    try:
        os.close(bpf.raw_tracepoint_open("sched_process_exec", program))
    finally:
        os.close(program)


def _sock_ops() -> None:
    program = bpf.program_load(bpf.SOCK_OPS, _NETNS_COOKIE + _SET_MARK + _END)
    try:
        with _cgroup() as directory:
            target = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.close(bpf.link_create(program, target, bpf.CGROUP_SOCK_OPS))
            finally:
                os.close(target)
    finally:
        os.close(program)


def _packets() -> None:
    program = bpf.program_load(bpf.CGROUP_SKB, _COOKIE + _END)
    try:
        with _cgroup() as directory:
            target = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                for hook in (bpf.CGROUP_INET_EGRESS, bpf.CGROUP_INET_INGRESS):
                    os.close(bpf.link_create(program, target, hook))
            finally:
                os.close(target)
    finally:
        os.close(program)


def _ring() -> None:
    os.close(bpf.map_create(27, 0, 0, mmap.PAGESIZE))


def _rules() -> None:
    """The rules themselves, in a network namespace that ends with the thread."""
    failed: list[Exception] = []

    def install() -> None:
        try:
            if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET) != 0:
                code = ctypes.get_errno()
                raise OSError(code, f"cannot make a network namespace to try them in: {os.strerror(code)}")
            with _cgroup() as directory, _pinned() as exempt:
                path = str(directory.relative_to(cgroups.mount_point()))
                endpoints = (Endpoint("192.0.2.1", 1), Endpoint("2001:db8::1", 1))
                redirect.install(redirect.Rules(_TRY_PORT, path, DEFAULT_MARK, exempt, (1,), endpoints))
        except (KernelError, OSError) as error:
            failed.append(error)

    thread = threading.Thread(target=install)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


@contextmanager
def _cgroup() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="hopgate-doctor-", dir=cgroups.mount_point()))
    try:
        yield directory
    finally:
        directory.rmdir()


@contextmanager
def _pinned() -> Iterator[Path]:
    """A program that a rule can name."""
    path = loader.BPFFS / f"hopgate-doctor-{os.getpid()}"
    loader.require_bpffs(path)
    program = bpf.program_load(bpf.SOCKET_FILTER, _END)
    try:
        bpf.object_pin(program, path)
        try:
            yield path
        finally:
            path.unlink()
    finally:
        os.close(program)


# --- a few instructions -----------------------------------------------------------------------------------------------


def _move(register: int, value: int) -> bytes:
    return bytes([0xB7, register, 0, 0]) + value.to_bytes(4, "little", signed=True)


def _copy(register: int, other: int) -> bytes:
    return bytes([0xBF, register | other << 4, 0, 0, 0, 0, 0, 0])


def _add(register: int, value: int) -> bytes:
    return bytes([0x07, register, 0, 0]) + value.to_bytes(4, "little", signed=True)


def _call(helper: int) -> bytes:
    return bytes([0x85, 0, 0, 0]) + helper.to_bytes(4, "little")


_END = _move(0, 1) + bytes([0x95, 0, 0, 0, 0, 0, 0, 0])
_STACK = bytes([0x7A, 10, 0xF8, 0xFF, 0, 0, 0, 0])
"""Stores 0 in the eight bytes below the frame pointer."""
_READ_KERNEL = _copy(1, 10) + _add(1, -8) + _move(2, 8) + _move(3, 0) + _call(113)
_COOKIE = _copy(6, 1) + _call(46)
_NETNS_COOKIE = _copy(6, 1) + _call(122)
_SET_MARK = _STACK + _copy(1, 6) + _move(2, 1) + _move(3, 36) + _copy(4, 10) + _add(4, -8) + _move(5, 4) + _call(49)
