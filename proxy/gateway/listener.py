"""Where redirected connections arrive: whom the client is, and whom it thinks it dialled.

The listening socket is the host agent's, shared by all workers. netfilter's REDIRECT has changed the destination; the
one that the client dialled is asked of conntrack with `SO_ORIGINAL_DST` (linux/netfilter_ipv4.h,
linux/netfilter_ipv6/ip6_tables.h).
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import socket
import struct
from collections.abc import Callable

import structlog

from proxy.model import Endpoint

log = structlog.get_logger()

BACKLOG = 4096
ACCEPTS_AT_ONCE = 64
"""Connections that are accepted before those that exist have their turn."""
ACCEPT_RETRY_S = 0.1
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


class Listener:
    """Accepts on the inherited socket, and gives each connection to `accepted` before a byte of it is read: a loop that
    accepts by itself would read at once, and a client may start with its TLS handshake."""

    def __init__(self, sock: socket.socket, accepted: Callable[[socket.socket], None]) -> None:
        self._sock = sock
        self._accepted = accepted
        self._loop = asyncio.get_running_loop()
        sock.setblocking(False)
        sock.listen(BACKLOG)
        self._watch()

    def _watch(self) -> None:
        if self._sock.fileno() >= 0:
            self._loop.add_reader(self._sock, self._accept)

    def _accept(self) -> None:
        for _ in range(ACCEPTS_AT_ONCE):
            try:
                connection, _ = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                # no descriptor, or no memory: what waits can wait, or be another worker's
                log.error("cannot accept", why=os.strerror(error.errno or 0).lower())
                self._loop.remove_reader(self._sock)
                self._loop.call_later(ACCEPT_RETRY_S, self._watch)
                return
            connection.setblocking(False)
            self._accepted(connection)

    def close(self) -> None:
        """Takes no more connections."""
        self._loop.remove_reader(self._sock)
        self._sock.close()
