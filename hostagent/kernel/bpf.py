"""bpf(2), as far as the loader and the pins need it: raw system calls, no library.

Every function raises `OSError` of the kernel unless its docstring says otherwise. File descriptors that are returned
belong to the caller and are close-on-exec. Source: include/uapi/linux/bpf.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterator
from pathlib import Path

_SYSCALL = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "loongarch64": 280, "ppc64le": 361, "s390x": 351}

_MAP_CREATE = 0
_MAP_LOOKUP_ELEM = 1
_MAP_UPDATE_ELEM = 2
_MAP_DELETE_ELEM = 3
_MAP_GET_NEXT_KEY = 4
_PROG_LOAD = 5
_OBJ_PIN = 6
_OBJ_GET = 7
_OBJ_GET_INFO_BY_FD = 15
_RAW_TRACEPOINT_OPEN = 17
_LINK_CREATE = 28
_ITER_CREATE = 33
_MAP_LOOKUP_BATCH = 24

SOCKET_FILTER = 1
CGROUP_SKB = 8
SOCK_OPS = 13
RAW_TRACEPOINT = 17

CGROUP_INET_INGRESS = 0
CGROUP_INET_EGRESS = 1
CGROUP_INET_SOCK_CREATE = 2
CGROUP_SOCK_OPS = 3
TRACE_ITER = 28

ANY = 0
NOEXIST = 1
_BATCH = 4096
"""More than there ever are in one bucket."""

_ATTR_BYTES = 144
_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _bpf(command: int, form: str, *fields: int, what: str) -> int:
    return _answered(command, ctypes.create_string_buffer(struct.pack(form, *fields), _ATTR_BYTES), what)


def _answered(command: int, attr: ctypes.Array[ctypes.c_char], what: str) -> int:
    """The same with the arguments in a buffer, into which the kernel may write. Raises `OSError`."""
    number = _SYSCALL.get(platform.machine())
    if number is None:
        raise OSError(errno.ENOSYS, f"bpf(2) is not known on `{platform.machine()}`")
    result: int = _libc.syscall(
        ctypes.c_long(number), ctypes.c_int(command), ctypes.byref(attr), ctypes.c_uint(_ATTR_BYTES)
    )
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


class Map:
    """One map by its descriptor. Keys and values are bytes of exactly the sizes that the map was made with.

    Not for use by two threads at once: the value buffer is shared.
    """

    def __init__(self, fd: int, key_bytes: int, value_bytes: int) -> None:
        self.fd = fd
        self._key_bytes = key_bytes
        self._value = ctypes.create_string_buffer(max(value_bytes, 1))
        self._value_bytes = value_bytes

    @classmethod
    def pinned(cls, path: Path, key_bytes: int, value_bytes: int) -> Map:
        """Raises `OSError`, and `ValueError` when the map's sizes are not the expected ones."""
        fd = object_get(path)
        try:
            found = map_sizes(fd)
        except OSError:
            os.close(fd)
            raise
        if found != (key_bytes, value_bytes):
            os.close(fd)
            raise ValueError(f"map `{path}` has key and value of {found} bytes, not {(key_bytes, value_bytes)}")
        return cls(fd, key_bytes, value_bytes)

    def get(self, key: bytes) -> bytes | None:
        try:
            self._element(_MAP_LOOKUP_ELEM, key, self._value, 0, "map lookup")
        except FileNotFoundError:
            return None
        return self._value.raw[: self._value_bytes]

    def put(self, key: bytes, value: bytes, flags: int = ANY) -> None:
        """Raises `FileExistsError` with `NOEXIST`."""
        if len(value) != self._value_bytes:
            raise ValueError(f"value of {len(value)} bytes for a map with {self._value_bytes}")
        self._element(_MAP_UPDATE_ELEM, key, ctypes.create_string_buffer(value, len(value)), flags, "map update")

    def delete(self, key: bytes) -> bool:
        """False when there was no such key: of several callers at once, exactly one gets True."""
        try:
            self._element(_MAP_DELETE_ELEM, key, None, 0, "map delete")
        except FileNotFoundError:
            return False
        return True

    def keys(self) -> Iterator[bytes]:
        """The keys of a hash map. A key that is deleted meanwhile restarts the walk, so keys may come twice; it is
        bounded by a multiple of the map's size only if the map comes to rest."""
        following = ctypes.create_string_buffer(self._key_bytes)
        key: bytes | None = None
        while True:
            given = ctypes.create_string_buffer(key, self._key_bytes) if key is not None else None
            try:
                self._call(_MAP_GET_NEXT_KEY, given, following, 0, "map next key")
            except FileNotFoundError:
                return
            key = following.raw
            yield key

    def count(self) -> int:
        """How many entries a hash map has, of which none is missed or counted twice that is there all the time."""
        keys = ctypes.create_string_buffer(self._key_bytes * _BATCH)
        values = ctypes.create_string_buffer(self._value_bytes * _BATCH)
        place = ctypes.create_string_buffer(max(self._key_bytes, 8))
        addresses = [ctypes.addressof(buffer) for buffer in (place, keys, values)]
        found, begin, more = 0, 0, True
        while more:
            attr = ctypes.create_string_buffer(
                struct.pack("=QQQQIIQQ", begin, *addresses, _BATCH, self.fd, 0, 0), _ATTR_BYTES
            )
            try:
                _answered(_MAP_LOOKUP_BATCH, attr, "map batch")
            except FileNotFoundError:
                more = False
            counted: int = struct.unpack_from("=I", attr, 32)[0]
            found += counted
            begin = addresses[0]
        return found

    def close(self) -> None:
        os.close(self.fd)

    def _element(
        self, command: int, key: bytes, value: ctypes.Array[ctypes.c_char] | None, flags: int, what: str
    ) -> None:
        if len(key) != self._key_bytes:
            raise ValueError(f"key of {len(key)} bytes for a map with {self._key_bytes}")
        self._call(command, ctypes.create_string_buffer(key, len(key)), value, flags, what)

    def _call(
        self,
        command: int,
        key: ctypes.Array[ctypes.c_char] | None,
        value: ctypes.Array[ctypes.c_char] | None,
        flags: int,
        what: str,
    ) -> None:
        _bpf(
            command,
            "=IxxxxQQQ",
            self.fd,
            ctypes.addressof(key) if key is not None else 0,
            ctypes.addressof(value) if value is not None else 0,
            flags,
            what=what,
        )


def map_sizes(fd: int) -> tuple[int, int]:
    """Bytes of key and value (struct bpf_map_info)."""
    info = ctypes.create_string_buffer(128)
    _bpf(_OBJ_GET_INFO_BY_FD, "=IIQ", fd, len(info), ctypes.addressof(info), what="map information")
    _type, _id, key_bytes, value_bytes = struct.unpack_from("=IIII", info)
    return key_bytes, value_bytes


def map_entries(fd: int) -> int:
    """How many entries a map may have; of a ring buffer, its bytes (struct bpf_map_info)."""
    info = ctypes.create_string_buffer(128)
    _bpf(_OBJ_GET_INFO_BY_FD, "=IIQ", fd, len(info), ctypes.addressof(info), what="map information")
    entries: int = struct.unpack_from("=I", info, 16)[0]
    return entries


def object_id(fd: int) -> tuple[str, int]:
    """Which object a descriptor means: its kind as the kernel calls it, and its id among those."""
    info = ctypes.create_string_buffer(256)
    _bpf(_OBJ_GET_INFO_BY_FD, "=IIQ", fd, len(info), ctypes.addressof(info), what="object information")
    number: int = struct.unpack_from("=I", info, 4)[0]
    # the kernel spells a link's descriptor `bpf_link` where it is made and `bpf-link` where it is opened
    return os.readlink(f"/proc/self/fd/{fd}").replace("_", "-"), number


def linked_program(link: int) -> int:
    """The id of the program behind a link (struct bpf_link_info)."""
    info = ctypes.create_string_buffer(64)
    _bpf(_OBJ_GET_INFO_BY_FD, "=IIQ", link, len(info), ctypes.addressof(info), what="link information")
    number: int = struct.unpack_from("=I", info, 8)[0]
    return number


def recursion_misses(fd: int) -> int:
    """How often the kernel skipped this program because it was already running (struct bpf_prog_info)."""
    info = ctypes.create_string_buffer(256)
    _bpf(_OBJ_GET_INFO_BY_FD, "=IIQ", fd, len(info), ctypes.addressof(info), what="program information")
    misses: int = struct.unpack_from("=Q", info, 208)[0]
    return misses


def attached_cgroup(link: int) -> int:
    """The id of the cgroup that a cgroup link is attached to (struct bpf_link_info); 0 once that cgroup is gone."""
    info = ctypes.create_string_buffer(64)
    _bpf(_OBJ_GET_INFO_BY_FD, "=IIQ", link, len(info), ctypes.addressof(info), what="link information")
    cgroup_id: int = struct.unpack_from("=Q", info, 16)[0]
    return cgroup_id


def map_create(kind: int, key_bytes: int, value_bytes: int, entries: int, flags: int = 0) -> int:
    """The descriptor of a new map (enum bpf_map_type)."""
    return _bpf(_MAP_CREATE, "=IIIII", kind, key_bytes, value_bytes, entries, flags, what="create map")


def program_load(kind: int, instructions: bytes) -> int:
    """The descriptor of a new program (enum bpf_prog_type), under the GPL."""
    code = ctypes.create_string_buffer(instructions, len(instructions))
    licence = ctypes.create_string_buffer(b"GPL")
    return _bpf(
        _PROG_LOAD,
        "=IIQQ",
        kind,
        len(instructions) // 8,
        ctypes.addressof(code),
        ctypes.addressof(licence),
        what="load program",
    )


def object_get(path: Path) -> int:
    name = ctypes.create_string_buffer(os.fsencode(path))
    return _bpf(_OBJ_GET, "=QII", ctypes.addressof(name), 0, 0, what=f"open pin `{path}`")


def object_pin(fd: int, path: Path) -> None:
    name = ctypes.create_string_buffer(os.fsencode(path))
    _bpf(_OBJ_PIN, "=QII", ctypes.addressof(name), fd, 0, what=f"pin `{path}`")


def raw_tracepoint_open(name: str, program: int) -> int:
    """The descriptor of a link."""
    text = ctypes.create_string_buffer(name.encode())
    return _bpf(_RAW_TRACEPOINT_OPEN, "=QI", ctypes.addressof(text), program, what=f"attach to raw tracepoint `{name}`")


def link_create(program: int, target: int, attach_type: int) -> int:
    """The descriptor of a link (cgroup programs, and iterators with target 0)."""
    return _bpf(_LINK_CREATE, "=IIII", program, target, attach_type, 0, what="create link")


def iterator_create(link: int) -> int:
    """A descriptor whose reads run the iterator."""
    return _bpf(_ITER_CREATE, "=II", link, 0, what="create iterator")
