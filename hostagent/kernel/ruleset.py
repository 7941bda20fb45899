"""Tells that somebody has changed the ruleset of this network namespace, and who: the kernel names the process. And
tells, cheaply enough for twenty times a second, how many members address sets have.

Source: include/uapi/linux/netfilter/nf_tables.h, NFT_MSG_NEWGEN, which ends every transaction; ipset/ip_set.h. Needs
CAP_NET_ADMIN.

Blind spots: the legacy tables and ipset tell nothing by themselves. The process is the one that talked to the kernel
(`iptables`, `nft`); who started it is in its lineage.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass

_NETLINK_NETFILTER = 12
_NFNLGRP_NFTABLES = 7
_NEWGEN = 10 << 8 | 15
_GEN_PROC_PID, _GEN_PROC_NAME = 2, 3
_BUFFER_BYTES = 1 << 20

_IPSET_LIST = 6 << 8 | 7
_NLM_F_REQUEST, _NLM_F_DUMP = 1, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_IPSET_PROTOCOL, _IPSET_SETNAME, _IPSET_FLAGS, _IPSET_DATA, _IPSET_ELEMENTS = 1, 2, 6, 7, 24
_NESTED, _NET_BYTEORDER = 0x8000, 0x4000
_LIST_HEADER = 4
_PROTOCOL_VERSION = 6
_TIMEOUT_S = 1.0


@dataclass(frozen=True, slots=True)
class Culprit:
    """A process by its id in the initial pid namespace, and its name; 0 when the kernel had to drop the news."""

    tgid: int
    comm: str


class RulesetEvents:
    """A socket that becomes readable with every change, for an event loop's reader."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
        self._socket.setblocking(False)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
        self._socket.bind((0, 1 << (_NFNLGRP_NFTABLES - 1)))

    def fileno(self) -> int:
        return self._socket.fileno()

    def close(self) -> None:
        self._socket.close()

    def read(self) -> list[Culprit]:
        """Who has changed something since the last call; empties the socket."""
        found: list[Culprit] = []
        while True:
            try:
                data = self._socket.recv(1 << 17)
            except BlockingIOError:
                return found
            except OSError:
                # ENOBUFS: more happened than fits
                found.append(Culprit(0, ""))
                continue
            found += _culprits(data)


class SetSizes:
    """A socket in the network namespace of its maker."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
        self._socket.settimeout(_TIMEOUT_S)
        self._socket.bind((0, 0))
        self._sequence = 0

    def close(self) -> None:
        self._socket.close()

    def of(self, name: str) -> int:
        """How many members the set has; -1 when there is no such set. Raises `OSError` when it cannot be asked."""
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        body = struct.pack("=BBH", socket.AF_INET, 0, 0)
        body += _attribute(_IPSET_PROTOCOL, bytes([_PROTOCOL_VERSION]))
        body += _attribute(_IPSET_SETNAME, name.encode() + b"\0")
        body += _attribute(_IPSET_FLAGS | _NET_BYTEORDER, struct.pack("!I", _LIST_HEADER))
        flags = _NLM_F_REQUEST | _NLM_F_DUMP
        self._socket.send(struct.pack("=IHHII", 16 + len(body), _IPSET_LIST, flags, self._sequence, 0) + body)
        members = -1
        while True:
            data = self._socket.recv(1 << 16)
            start = 0
            while start + 16 <= len(data):
                length, kind, _flags, sequence, _pid = struct.unpack_from("=IHHII", data, start)
                if length < 16:
                    break
                if sequence == self._sequence:
                    if kind in (_NLMSG_DONE, _NLMSG_ERROR):
                        return members
                    described = _attributes(data[start + 20 : start + length]).get(_IPSET_DATA, b"")
                    count = _attributes(described).get(_IPSET_ELEMENTS)
                    if count is not None:
                        (members,) = struct.unpack("!I", count)
                start += length + (-length % 4)


def _attribute(kind: int, value: bytes) -> bytes:
    length = 4 + len(value)
    return struct.pack("=HH", length, kind) + value + bytes(-length % 4)


def _culprits(data: bytes) -> list[Culprit]:
    found: list[Culprit] = []
    start = 0
    while start + 20 <= len(data):
        length, kind = struct.unpack_from("=IH", data, start)
        if length < 20:
            break
        if kind == _NEWGEN:
            found.append(_culprit(data[start + 20 : start + length]))
        start += length + (-length % 4)
    return found


def _culprit(data: bytes) -> Culprit:
    found = _attributes(data)
    (tgid,) = struct.unpack("!I", found.get(_GEN_PROC_PID, bytes(4)))
    return Culprit(tgid, found.get(_GEN_PROC_NAME, b"").rstrip(b"\0").decode(errors="replace"))


def _attributes(data: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    start = 0
    while start + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, start)
        if length < 4:
            break
        found[kind & ~(_NESTED | _NET_BYTEORDER)] = data[start + 4 : start + length]
        start += length + (-length % 4)
    return found
