"""The Python mirror of bpf/abi.h: layouts of the kernel's maps, and how their values become the model's.

`tests/kernel/test_lifecycle.py` compares sizes and offsets with the types that the loaded maps carry.
"""

from __future__ import annotations

import ctypes
import hashlib
import ipaddress
import os
import struct
from typing import assert_never

from hostagent import resources
from hostagent.kernel import bpf
from hostagent.kernel.settings import MapSizes, Settings
from proxy.model import Endpoint, Prefix

ABI = 7
SOURCES = ("abi.h", "lineage.bpf.c", "intercept.bpf.c", "connect.bpf.c", "raw.bpf.c")

TRACEPOINTS = {"on_fork": "sched_process_fork", "on_exec": "sched_process_exec", "on_exit": "sched_process_exit"}
"""Those that keep the lineage."""
TELLING_TRACEPOINTS = {"on_queue": "net_dev_queue"}
"""Those that only tell: an event that one of them misses costs nobody a label."""
SOCK_OPS = "on_sock_ops"
CGROUP_HOOKS = {SOCK_OPS: bpf.CGROUP_SOCK_OPS, "on_sock_create": bpf.CGROUP_INET_SOCK_CREATE}
"""Programs on the cgroup, and what they are attached as."""
PACKET_HOOKS = {"on_egress": bpf.CGROUP_INET_EGRESS, "on_ingress": bpf.CGROUP_INET_INGRESS}
"""The same, but attached only while somebody is intercepted."""
MATCHED = "on_exempt"
"""Asked by the netfilter rules, and attached to nothing."""
PROGRAMS = (*TRACEPOINTS, *TELLING_TRACEPOINTS, *CGROUP_HOOKS)

DEPTH_MAX = 1024
SCOPE_PORT_BITS = 32

CONNECT_ESTABLISHED = 1
CONNECT_AMBIGUOUS = 2
CONNECT_CLOSED = 4

COUNTERS = (
    "overflow_procs",
    "overflow_nodes",
    "overflow_connects",
    "too_deep",
    "unlabelled_connects",
    "ambiguous_connects",
    "forged_marks",
    "graveyard_full",
    "connects",
    "graveyard_cut",
    "events_lost",
    "raw_untold",
    "hidden",
    "unwatched",
    "unclosed",
    "users_full",
)
OVERFLOWS = COUNTERS[:3]


class Config(ctypes.Structure):
    _fields_ = (
        ("build", ctypes.c_uint64),
        ("layout", ctypes.c_uint64),
        ("netns", ctypes.c_uint64),
        ("abi", ctypes.c_uint32),
        ("mark", ctypes.c_uint32),
        ("intercept", ctypes.c_uint64),
    )


class Namespaces(ctypes.Structure):
    _fields_ = (
        ("pid", ctypes.c_uint32),
        ("mnt", ctypes.c_uint32),
        ("net", ctypes.c_uint32),
        ("user", ctypes.c_uint32),
    )


class Node(ctypes.Structure):
    _fields_ = (
        ("parent", ctypes.c_uint64),
        ("start_ns", ctypes.c_uint64),
        ("inode", ctypes.c_uint64),
        ("cgroup_id", ctypes.c_uint64),
        ("device", ctypes.c_uint32),
        ("tgid", ctypes.c_uint32),
        ("uid", ctypes.c_uint32),
        ("others", ctypes.c_int32),
        ("depth", ctypes.c_uint32),
        ("argv_length", ctypes.c_uint32),
        ("argv_stored", ctypes.c_uint32),
        ("path_length", ctypes.c_uint32),
        ("namespaces", Namespaces),
        ("comm", ctypes.c_char * 16),
        ("path", ctypes.c_char * 128),
        ("argv", ctypes.c_ubyte * 256),
    )


class ConnectKey(ctypes.Structure):
    _fields_ = (
        ("source", ctypes.c_ubyte * 16),
        ("dest", ctypes.c_ubyte * 16),
        ("source_port", ctypes.c_uint16),
        ("dest_port", ctypes.c_uint16),
        ("family", ctypes.c_uint16),
        ("local", ctypes.c_uint16),
    )


class ConnectRecord(ctypes.Structure):
    _fields_ = (
        ("node", ctypes.c_uint64),
        ("netns", ctypes.c_uint64),
        ("socket", ctypes.c_uint64),
        ("time_ns", ctypes.c_uint64),
        ("tgid", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
    )


class ScopeKey(ctypes.Structure):
    _fields_ = (
        ("prefix", ctypes.c_uint32),
        ("family", ctypes.c_uint16),
        ("port", ctypes.c_uint16),
        ("address", ctypes.c_ubyte * 16),
    )


class TaskRow(ctypes.Structure):
    _fields_ = (
        ("node", ctypes.c_uint64),
        ("exec_id", ctypes.c_uint64),
        ("start_ns", ctypes.c_uint64),
        ("inode", ctypes.c_uint64),
        ("cgroup_id", ctypes.c_uint64),
        ("device", ctypes.c_uint32),
        ("uid", ctypes.c_uint32),
        ("tgid", ctypes.c_uint32),
        ("parent_tgid", ctypes.c_uint32),
        ("ns_tgid", ctypes.c_uint32),
        ("parent_ns_tgid", ctypes.c_uint32),
        ("known", ctypes.c_uint32),
        ("parent_kthread", ctypes.c_uint32),
        ("namespaces", Namespaces),
        ("comm", ctypes.c_char * 16),
    )


class Declaration(ctypes.Structure):
    _fields_ = (("agent", ctypes.c_char * 64),)


class FileKey(ctypes.Structure):
    _fields_ = (
        ("inode", ctypes.c_uint64),
        ("device", ctypes.c_uint32),
        ("unused", ctypes.c_uint32),
    )


class Stream(ctypes.Structure):
    _fields_ = (
        ("first", ctypes.c_uint32),
        ("begun", ctypes.c_uint8),
        ("have", ctypes.c_uint8),
        ("done", ctypes.c_uint8),
        ("unused", ctypes.c_uint8),
        ("head", ctypes.c_ubyte * 16),
    )


class Hello(ctypes.Structure):
    _fields_ = (
        ("number", ctypes.c_uint64),
        ("at", ctypes.c_uint32),
        ("next", ctypes.c_uint32),
        ("left", ctypes.c_uint32),
        ("stage", ctypes.c_uint8),
        ("need", ctypes.c_uint8),
        ("unused", ctypes.c_uint16),
    )


class Watch(ctypes.Structure):
    _fields_ = (
        ("key", ConnectKey),
        ("epoch", ctypes.c_uint64),
        ("node", ctypes.c_uint64),
        ("netns", ctypes.c_uint64),
        ("socket", ctypes.c_uint64),
        ("tgid", ctypes.c_uint32),
        ("found", ctypes.c_uint32),
        ("sent", Stream),
        ("received", Stream),
        ("hello", Hello),
    )


class Event(ctypes.Structure):
    _fields_ = (
        ("time_ns", ctypes.c_uint64),
        ("node", ctypes.c_uint64),
        ("netns", ctypes.c_uint64),
        ("socket", ctypes.c_uint64),
        ("source", ctypes.c_ubyte * 16),
        ("dest", ctypes.c_ubyte * 16),
        ("source_port", ctypes.c_uint16),
        ("dest_port", ctypes.c_uint16),
        ("family", ctypes.c_uint16),
        ("detail", ctypes.c_uint16),
        ("type", ctypes.c_uint32),
        ("tgid", ctypes.c_uint32),
    )


EVENTS = {"EVENT_HIDDEN": 1, "EVENT_UNWATCHED": 2, "EVENT_SENT_RAW": 3}
"""Types of events, named as in the header."""

PROTOCOLS = {1: "postgresql", 2: "mysql", 3: "tds", 4: "mongodb", 5: "redis", 6: "oracle"}
"""What is recognised by its first bytes, by its number in the header (PROTOCOL_…)."""

SENT_RAW_IP, SENT_FRAME, SENT_FRAME_IN_SCOPE = 0, 1, 2

EVENT_BYTES = ctypes.sizeof(Event)
RING = "events"
"""The pin of the ring buffer."""

U32 = struct.Struct("=I")
U64 = struct.Struct("=Q")

CONNECTS = ("connects", "connects_behind", "connects_of_users")
"""Records of connects, by the network namespace: the listener's own; those that root made; those that users made."""

MAPS: dict[str, tuple[int, int]] = {
    "settings": (4, ctypes.sizeof(Config)),
    "counters": (4, 8),
    "procs": (4, 8),
    "nodes": (8, ctypes.sizeof(Node)),
    **dict.fromkeys(CONNECTS, (ctypes.sizeof(ConnectKey), ctypes.sizeof(ConnectRecord))),
    "scope": (ctypes.sizeof(ScopeKey), 4),
    "exempt": (8, 4),
    "passing": (8, 4),
    "declared": (8, ctypes.sizeof(Declaration)),
    "agent_files": (ctypes.sizeof(FileKey), 4),
    "spared": (8, 4),
    "unwatched": (8, 8),
}
"""Maps that user space opens: bytes of key and value."""


def _packed(address: str) -> tuple[int, bytes]:
    value = ipaddress.ip_address(address)
    if isinstance(value, ipaddress.IPv6Address) and value.ipv4_mapped is not None:
        value = value.ipv4_mapped
    return value.version, value.packed.ljust(16, b"\0")


def connect_key(source: Endpoint, dest: Endpoint, *, local: bool) -> bytes:
    """`local`: in the listener's own network namespace. Raises `ValueError` for what is no address, and for a pair of
    two families."""
    family, packed = _packed(source.address)
    dest_family, dest_packed = _packed(dest.address)
    if family != dest_family:
        raise ValueError(f"`{source}` and `{dest}` are of two families")
    return struct.pack("=16s16sHHHH", packed, dest_packed, source.port, dest.port, family, local)


def dest_of(key: bytes) -> Endpoint:
    """The destination in a key of `connects`."""
    read = ConnectKey.from_buffer_copy(key)
    packed = bytes(read.dest)[: 4 if read.family == 4 else 16]
    return Endpoint(str(ipaddress.ip_address(packed)), read.dest_port)


def scope_key(member: Endpoint | Prefix | int) -> bytes:
    """An endpoint, a prefix, or a port that is protected at any address."""
    match member:
        case int():
            return struct.pack("=IHH16s", SCOPE_PORT_BITS, 0, member, b"")
        case Endpoint():
            family, packed = _packed(member.address)
            bits = 32 if family == 4 else 128
        case Prefix():
            network = ipaddress.ip_network(member.network)
            family, packed, bits = network.version, network.network_address.packed.ljust(16, b"\0"), network.prefixlen
        case _:
            assert_never(member)
    return struct.pack("=IHH16s", SCOPE_PORT_BITS + bits, family, member.port, packed)


def file_key(file: tuple[int, int]) -> bytes:
    """`file` is device, as `st_dev` has it, and inode."""
    device, inode = file
    return struct.pack("=QII", inode, s_dev(device), 0)


def file_of(key: bytes) -> tuple[int, int]:
    """The reverse of `file_key`."""
    inode, device, _unused = struct.unpack("=QII", key)
    return st_dev(device), inode


def st_dev(device: int) -> int:
    """The kernel's own device number in the encoding of `st_dev`."""
    return os.makedev(device >> 20, device & 0xFFFFF)


def s_dev(device: int) -> int:
    """`st_dev` in the kernel's own encoding."""
    return os.major(device) << 20 | os.minor(device)


def split_argv(node: Node) -> tuple[tuple[str, ...], bool]:
    """The stored head of the argument vector, and whether anything of it is missing."""
    stored = bytes(node.argv[: node.argv_stored])
    truncated = node.argv_stored < node.argv_length
    if not stored:
        return (), truncated
    arguments = stored.removesuffix(b"\0").split(b"\0")
    return tuple(argument.decode(errors="surrogateescape") for argument in arguments), truncated


def sources() -> str:
    """The C sources as one text, as BCC wants them: it rewrites map calls in its main file only."""
    root = resources.path("bpf")
    return "".join(f'#line 1 "{name}"\n{(root / name).read_text()}\n' for name in SOURCES)


def _digest(*parts: object) -> int:
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return U64.unpack_from(digest)[0] or 1


def layout_of(sizes: MapSizes) -> int:
    """Equal for two builds that can share their maps."""
    return _digest((resources.path("bpf") / "abi.h").read_text(), sizes)


def build_of(settings: Settings, netns: int) -> int:
    """Equal for two builds that behave alike, for a listener in the network namespace with the cookie `netns`."""
    return _digest(sources(), settings.sizes, settings.mark, netns)
