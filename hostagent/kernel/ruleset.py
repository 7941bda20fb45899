"""Tells that somebody has changed the ruleset of this network namespace, and who: the kernel names the process.

Source: include/uapi/linux/netfilter/nf_tables.h, NFT_MSG_NEWGEN, which ends every transaction. Needs CAP_NET_ADMIN.

Blind spots: the legacy tables and ipset tell nothing. The process is the one that talked to the kernel (`iptables`,
`nft`); who started it is in its lineage.
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


def _culprit(attributes: bytes) -> Culprit:
    tgid, comm = 0, ""
    start = 0
    while start + 4 <= len(attributes):
        length, kind = struct.unpack_from("=HH", attributes, start)
        if length < 4:
            break
        value = attributes[start + 4 : start + length]
        if kind == _GEN_PROC_PID:
            (tgid,) = struct.unpack("!I", value)
        elif kind == _GEN_PROC_NAME:
            comm = value.rstrip(b"\0").decode(errors="replace")
        start += length + (-length % 4)
    return Culprit(tgid, comm)
