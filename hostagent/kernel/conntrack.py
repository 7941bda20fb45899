"""Asks conntrack which connection an accepted one was before it was redirected.

conntrack may have to give a redirected connection another source port (the client used one port for two destinations):
the peer address that the listener sees is then not the one that the client's record is written under, and could even be
somebody else's. The original tuple is exact. One netlink round trip each.

Source: include/uapi/linux/netfilter/nfnetlink_conntrack.h. Needs CAP_NET_ADMIN in the network namespace in which it was
made.
"""

from __future__ import annotations

import ipaddress
import socket
import struct

from proxy.model import Endpoint

_NETLINK_NETFILTER = 12
_IPCTNL_MSG_CT_GET = 1 << 8 | 1
_NLM_F_REQUEST = 1
_NLMSG_ERROR = 2
_NESTED = 0x8000
_TUPLE_ORIG, _TUPLE_REPLY = 1, 2
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_ADDRESSES = {4: (1, 2), 6: (3, 4)}
_PROTO_NUM, _PROTO_SRC_PORT, _PROTO_DST_PORT = 1, 2, 3
_TIMEOUT_S = 1.0


class Conntrack:
    """One netlink socket in the network namespace of its maker."""

    def __init__(self, listen_port: int) -> None:
        self._listen_port = listen_port
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
        self._socket.settimeout(_TIMEOUT_S)
        self._socket.bind((0, 0))
        self._sequence = 0

    def close(self) -> None:
        self._socket.close()

    def source(self, peer: Endpoint, dialled: Endpoint) -> tuple[Endpoint, bool] | None:
        """Where the connection that the listener sees coming from `peer` really came from, and whether from this
        network namespace itself; None when conntrack knows no such connection to `dialled`. Raises `OSError` when it
        cannot be asked."""
        # what is redirected in OUTPUT goes to the loopback address, so the tuple of the replies is known
        loopback = "::1" if ":" in peer.address else "127.0.0.1"
        found = self._get(_TUPLE_REPLY, Endpoint(loopback, self._listen_port), peer)
        if found is not None:
            (source, dest), _reply = found
            return (source, True) if dest == dialled else None
        # through PREROUTING the listener's address is one of the host's: ask the other way round and compare
        found = self._get(_TUPLE_ORIG, peer, dialled)
        if found is not None:
            _original, (answers_from, answers_to) = found
            if answers_to == peer and answers_from.port == self._listen_port:
                return peer, False
        return None

    def redirected(self, source: Endpoint, dest: Endpoint) -> bool:
        """Whether the connection that a client has from `source` to `dest` ends at the listener. Raises `OSError`."""
        found = self._get(_TUPLE_ORIG, source, dest)
        return found is not None and found[1][0].port == self._listen_port and found[1][0] != dest

    def _get(self, which: int, source: Endpoint, dest: Endpoint) -> tuple[_Tuple, _Tuple] | None:
        self._sequence = (self._sequence + 1) & 0xFFFFFFFF
        version = ipaddress.ip_address(source.address).version
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        body = struct.pack("=BBH", family, 0, 0) + _attribute(which | _NESTED, _tuple(source, dest))
        header = struct.pack("=IHHII", 16 + len(body), _IPCTNL_MSG_CT_GET, _NLM_F_REQUEST, self._sequence, 0)
        self._socket.send(header + body)
        while True:
            message = self._socket.recv(65536)
            _length, kind, _flags, sequence, _pid = struct.unpack_from("=IHHII", message)
            if sequence != self._sequence:
                continue
            if kind == _NLMSG_ERROR:
                code = -struct.unpack_from("=i", message, 16)[0]
                if code == 2:
                    return None
                raise OSError(code, "conntrack refuses to answer")
            attributes = _attributes(message[20:])
            return _read_tuple(attributes[_TUPLE_ORIG]), _read_tuple(attributes[_TUPLE_REPLY])


_Tuple = tuple[Endpoint, Endpoint]


def _attribute(kind: int, value: bytes) -> bytes:
    length = 4 + len(value)
    return struct.pack("=HH", length, kind) + value + bytes(-length % 4)


def _tuple(source: Endpoint, dest: Endpoint) -> bytes:
    source_ip, dest_ip = ipaddress.ip_address(source.address), ipaddress.ip_address(dest.address)
    source_kind, dest_kind = _ADDRESSES[source_ip.version]
    addresses = _attribute(source_kind, source_ip.packed) + _attribute(dest_kind, dest_ip.packed)
    protocol = (
        _attribute(_PROTO_NUM, bytes([socket.IPPROTO_TCP]))
        + _attribute(_PROTO_SRC_PORT, struct.pack("!H", source.port))
        + _attribute(_PROTO_DST_PORT, struct.pack("!H", dest.port))
    )
    return _attribute(_TUPLE_IP | _NESTED, addresses) + _attribute(_TUPLE_PROTO | _NESTED, protocol)


def _attributes(data: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    start = 0
    while start + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, start)
        if length < 4:
            break
        found[kind & 0x3FFF] = data[start + 4 : start + length]
        start += length + (-length % 4)
    return found


def _read_tuple(data: bytes) -> _Tuple:
    parts = _attributes(data)
    addresses, protocol = _attributes(parts[_TUPLE_IP]), _attributes(parts[_TUPLE_PROTO])
    source_kind, dest_kind = _ADDRESSES[4 if _ADDRESSES[4][0] in addresses else 6]
    return (
        Endpoint(str(ipaddress.ip_address(addresses[source_kind])), _port(protocol[_PROTO_SRC_PORT])),
        Endpoint(str(ipaddress.ip_address(addresses[dest_kind])), _port(protocol[_PROTO_DST_PORT])),
    )


def _port(data: bytes) -> int:
    port: int = struct.unpack("!H", data)[0]
    return port
