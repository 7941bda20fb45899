"""The TCP sockets of this network namespace that go past the proxy, and the end of one of them (sock_diag(7)).

Such a socket is connected, or connects, to what is protected, carries no mark of ours, and conntrack knows nothing of a
redirect: it is older than the rules, or was made while somebody had them off.

Blind spots: sockets of other network namespaces, also those whose packets pass this one. A socket that has shut down
one direction is left out: conntrack forgets those too early to tell.

Source: include/uapi/linux/inet_diag.h, sock_diag.h. Needs CAP_NET_ADMIN in the network namespace in which it was made,
and CONFIG_INET_DIAG_DESTROY to end sockets.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from collections.abc import Iterator

import msgspec

from hostagent.kernel.conntrack import Conntrack
from hostagent.kernel.settings import KernelError, Scope
from proxy.model import Endpoint

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY, _SOCK_DESTROY = 20, 21
_NLM_F_REQUEST, _NLM_F_ACK, _NLM_F_DUMP = 1, 4, 0x300
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_ESTABLISHED, _SYN_SENT = 1, 2
_STATES = 1 << _ESTABLISHED | 1 << _SYN_SENT
_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBBBI48s")
_MESSAGE = struct.Struct("=BBBB48sIIIII")
_ID = struct.Struct("!HH16s16s")
_INET_DIAG_MARK = 15
_TIMEOUT_S = 5.0


class Bypass(msgspec.Struct, frozen=True):
    """A socket that goes past the proxy; `identity` is the kernel's own, with its cookie."""

    source: Endpoint
    dest: Endpoint
    uid: int
    family: int
    identity: bytes

    def __str__(self) -> str:
        return f"{self.source} to {self.dest} of uid {self.uid}"


class Sockets:
    """One netlink socket, in the network namespace of its maker."""

    def __init__(self, listen_port: int, mark: int) -> None:
        self._mark = mark
        self._conntrack = Conntrack(listen_port)
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG)
        self._socket.settimeout(_TIMEOUT_S)
        self._socket.bind((0, 0))
        self._sequence = 0

    def close(self) -> None:
        self._socket.close()
        self._conntrack.close()

    def past(self, scope: Scope) -> list[Bypass]:
        """Those that are there now. Raises `OSError`."""
        return [
            found
            for family in (socket.AF_INET, socket.AF_INET6)
            for found in self._dump(family)
            if scope.covers(found.dest) and not self._conntrack.redirected(found.source, found.dest)
        ]

    def reset(self, bypass: Bypass) -> bool:
        """Ends it as if the other side had reset it; false when it is gone already. Raises `KernelError`."""
        return self._end(bypass.family, bypass.identity, str(bypass))

    def reset_socket(self, source: Endpoint, dest: Endpoint, cookie: int) -> bool:
        """The same for the socket with this cookie; false also when it is of another network namespace, or bound to a
        device. Raises `KernelError`."""
        packed = [ipaddress.ip_address(end.address).packed for end in (source, dest)]
        family = socket.AF_INET if len(packed[0]) == 4 else socket.AF_INET6
        identity = _ID.pack(source.port, dest.port, *packed) + struct.pack("=IQ", 0, cookie)
        return self._end(family, identity, f"{source} to {dest}")

    def _end(self, family: int, identity: bytes, what: str) -> bool:
        body = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, _STATES, identity)
        try:
            for _answer in self._ask(_SOCK_DESTROY, _NLM_F_ACK, body):
                pass
        except FileNotFoundError:
            return False
        except OSError as error:
            raise KernelError(
                f"cannot reset the connection {what}: {error.strerror or error}; the kernel needs "
                "CONFIG_INET_DIAG_DESTROY, otherwise end the process that has it"
            ) from error
        return True

    def _dump(self, family: int) -> Iterator[Bypass]:
        body = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 0, _STATES, bytes(48))
        for message in self._ask(_SOCK_DIAG_BY_FAMILY, _NLM_F_DUMP, body):
            _family, _state, _timer, _retrans, identity, *_queues, uid, _inode = _MESSAGE.unpack_from(message)
            if _mark(message[_MESSAGE.size :]) == self._mark:
                continue
            source_port, dest_port, source, dest = _ID.unpack_from(identity)
            yield Bypass(
                Endpoint(_address(family, source), source_port),
                Endpoint(_address(family, dest), dest_port),
                uid,
                family,
                identity,
            )

    def _ask(self, kind: int, flags: int, body: bytes) -> Iterator[bytes]:
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        size = _HEADER.size + len(body)
        self._socket.send(_HEADER.pack(size, kind, _NLM_F_REQUEST | flags, self._sequence, 0) + body)
        while True:
            data = self._socket.recv(1 << 18)
            while len(data) >= _HEADER.size:
                length, answer, _flags, sequence, _pid = _HEADER.unpack_from(data)
                message, data = data[_HEADER.size : length], data[max(length + 3 & ~3, _HEADER.size) :]
                if sequence != self._sequence:
                    continue
                if answer == _NLMSG_DONE:
                    return
                if answer == _NLMSG_ERROR:
                    code = -struct.unpack_from("=i", message)[0]
                    if code:
                        raise OSError(code, os.strerror(code))
                    return
                yield message


def _address(family: int, packed: bytes) -> str:
    address = ipaddress.ip_address(packed[: 4 if family == socket.AF_INET else 16])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return str(mapped or address)


def _mark(attributes: bytes) -> int:
    while len(attributes) >= 4:
        length, kind = struct.unpack_from("=HH", attributes)
        if kind == _INET_DIAG_MARK and length >= 8:
            mark: int = struct.unpack_from("=I", attributes, 4)[0]
            return mark
        attributes = attributes[max(length + 3 & ~3, 4) :]
    return 0
