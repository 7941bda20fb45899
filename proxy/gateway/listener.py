"""Where redirected connections arrive: whom the client is, and whom it thinks it dialled.

The listening socket is the host agent's, shared by all workers. netfilter's REDIRECT has changed the destination; the
one that the client dialled is asked of conntrack with `SO_ORIGINAL_DST` (linux/netfilter_ipv4.h,
linux/netfilter_ipv6/ip6_tables.h).
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import struct
from collections.abc import Callable

from proxy.model import Endpoint

BACKLOG = 4096
SO_ORIGINAL_DST = 80
_SOCKADDR_IN = struct.Struct("!2xH4s8x")
_SOCKADDR_IN6 = struct.Struct("!2xH4x16s4x")


def endpoint(address: str, port: int) -> Endpoint:
    """An endpoint from a socket's address; v4-mapped IPv6 becomes IPv4, a scope is dropped."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped
    return Endpoint(str(parsed), port)


def endpoints(sock: socket.socket) -> tuple[Endpoint, Endpoint]:
    """The client's endpoint, and the one that it dialled; for a connection that was not redirected that is the listener
    itself, which no policy grants. Raises OSError when the client is gone already."""
    peer = endpoint(*sock.getpeername()[:2])
    return peer, _original_destination(sock, peer) or endpoint(*sock.getsockname()[:2])


def _original_destination(sock: socket.socket, peer: Endpoint) -> Endpoint | None:
    try:
        if ":" in peer.address:
            raw = sock.getsockopt(socket.IPPROTO_IPV6, SO_ORIGINAL_DST, _SOCKADDR_IN6.size)
            port, packed = _SOCKADDR_IN6.unpack(raw)
        else:
            raw = sock.getsockopt(socket.IPPROTO_IP, SO_ORIGINAL_DST, _SOCKADDR_IN.size)
            port, packed = _SOCKADDR_IN.unpack(raw)
    except OSError:  # no conntrack entry: not redirected
        return None
    return Endpoint(str(ipaddress.ip_address(packed)), port)


async def listen(sock: socket.socket, factory: Callable[[], asyncio.BaseProtocol]) -> asyncio.Server:
    """Accepts on the inherited socket; `factory` makes the client side of a new session."""
    return await asyncio.get_running_loop().create_server(factory, sock=sock, backlog=BACKLOG)
