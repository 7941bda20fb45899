"""A name server in a namespace: answers every question for IPv4 with the addresses that it is told."""

from __future__ import annotations

import contextlib
import ipaddress
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.e2e.beds import Bed
from tests.lab.namespaces import entered

TTL_S = 5
_A = 1
_NO_SUCH_NAME = 3


class NameServer:
    """Without `addresses`, there is no such name."""

    bed: Bed

    def __init__(self, address: str) -> None:
        self.address = address
        self.ttl_s = TTL_S
        self._addresses: list[str] = []
        self._changed_s = 0.0
        self._asked_s: list[float] = []

    @property
    def addresses(self) -> list[str]:
        return self._addresses

    @addresses.setter
    def addresses(self, addresses: list[str]) -> None:
        self._addresses = addresses
        self.forget()

    def forget(self) -> None:
        self._changed_s = time.monotonic()

    def asked_since_change(self) -> int:
        """How many questions came since `addresses` was set, or `forget` was called."""
        return sum(asked_s > self._changed_s for asked_s in self._asked_s)

    def reply(self, sent: bytes) -> bytes:
        self._asked_s.append(time.monotonic())
        end = sent.index(0, 12) + 5
        (kind,) = struct.unpack_from("!H", sent, end - 4)
        found = self._addresses if kind == _A else []
        flags = 0x8180 | (0 if self._addresses else _NO_SUCH_NAME)
        records = b"".join(
            b"\xc0\x0c" + struct.pack("!HHIH", _A, 1, self.ttl_s, 4) + ipaddress.ip_address(address).packed
            for address in found
        )
        return sent[:2] + struct.pack("!5H", flags, 1, len(found), 0, 0) + sent[12:end] + records


@contextmanager
def name_server(namespace: str, address: str) -> Iterator[NameServer]:
    made = NameServer(address)
    with entered(namespace):
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((address, 53))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                sent, peer = sock.recvfrom(4096)
                if not sent:
                    return
                sock.sendto(made.reply(sent), peer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        with entered(namespace), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
            last.sendto(b"", (address, 53))
        thread.join(5)
        sock.close()
