"""The far end of a TLS connection, under control byte by byte; certificates for both; keys to forge records with."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from hostagent.certificates import open_authority

NAME = "db.example"
DEADLINE_S = 30.0
VERSIONS = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}


@dataclass
class Papers:
    """A CA, and contexts of a server with its certificate and of a client that trusts it."""

    folder: Path
    ca_pem: str
    pem: bytes

    def serving(self, version: str = "1.3") -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.folder / "leaf.pem")
        context.minimum_version = context.maximum_version = VERSIONS[version]
        return context

    def trusting(self, version: str = "1.3") -> ssl.SSLContext:
        context = ssl.create_default_context(cadata=self.ca_pem)
        context.minimum_version = context.maximum_version = VERSIONS[version]
        return context


def papers(folder: Path) -> Papers:
    authority = open_authority(folder)
    leaf = authority.leaf(NAME, ["127.0.0.1"])
    (folder / "leaf.pem").write_bytes(leaf.pem)
    return Papers(folder, authority.pem.decode(), leaf.pem)


def sockets() -> tuple[socket.socket, socket.socket]:
    """Two ends of one TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        far = socket.create_connection(listening.getsockname())
        near, _ = listening.accept()
    for each in (near, far):
        each.setblocking(False)
        each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return near, far


class Far:
    """Speaks TLS on its socket when it is told to, and not before."""

    def __init__(self, connection: socket.socket, context: ssl.SSLContext, *, serves: bool) -> None:
        self.socket = connection
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(
            self.incoming, self.outgoing, server_side=serves, server_hostname=None if serves else NAME
        )

    async def shake_hands(self, step: int = 1 << 20, *, then: bytes = b"") -> None:
        """`step` bytes at a time; what comes `then` leaves together with the last flight."""
        while True:
            try:
                self.tls.do_handshake()
            except ssl.SSLWantReadError:
                await self.flush(step)
                await self.fill()
            else:
                break
        if then:
            self.tls.write(then)
        await self.flush(step)

    async def fill(self) -> None:
        data = await asyncio.get_running_loop().sock_recv(self.socket, 1 << 16)
        self.incoming.write(data) if data else self.incoming.write_eof()

    async def flush(self, step: int = 1 << 20) -> None:
        data = self.outgoing.read()
        for start in range(0, len(data), step):
            await self.send_raw(data[start : start + step])
            if step < len(data):
                await asyncio.sleep(0.0005)

    async def send_raw(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.socket, data)

    async def send(self, data: bytes) -> None:
        for start in range(0, len(data), 1 << 20):
            self.tls.write(data[start : start + (1 << 20)])
            await self.flush()

    async def receive(self, size: int | None = None) -> bytes:
        """So much, or all until the peer ends in good order."""
        got = bytearray()
        while size is None or len(got) < size:
            try:
                data = self.tls.read(1 << 16)
            except ssl.SSLWantReadError:
                await self.fill()
                continue
            if not data:
                assert size is None, f"it ended after `{len(got)}` bytes"
                break
            got += data
        return bytes(got)

    async def raw_rest(self) -> bytes:
        """What comes until the end, as it is on the wire."""
        got = bytearray()
        while data := await asyncio.get_running_loop().sock_recv(self.socket, 1 << 16):
            got += data
        return bytes(got)

    async def end(self) -> None:
        """close_notify and FIN."""
        with contextlib.suppress(ssl.SSLWantReadError):
            self.tls.unwrap()
        await self.flush()
        self.socket.shutdown(socket.SHUT_WR)


class Forger:
    """Seals TLS 1.3 records (RFC 8446, sections 5.2 and 7) with the secret that a key log tells: those that OpenSSL has
    no call for."""

    def __init__(self, secret: bytes) -> None:
        self._hash = hashlib.sha384 if len(secret) == 48 else hashlib.sha256
        self._key_bytes = 32 if len(secret) == 48 else 16
        self._secret = secret
        self._turn()

    def _expand(self, label: bytes, size: int) -> bytes:
        label = b"tls13 " + label
        info = size.to_bytes(2, "big") + bytes([len(label)]) + label + b"\0"
        return hmac.new(self._secret, info + b"\1", self._hash).digest()[:size]

    def _turn(self) -> None:
        self._aead, self._iv = AESGCM(self._expand(b"key", self._key_bytes)), self._expand(b"iv", 12)
        self._sequence = 0

    def seal(self, content: bytes, kind: int) -> bytes:
        inner = content + bytes([kind])
        head = b"\x17\x03\x03" + (len(inner) + 16).to_bytes(2, "big")
        nonce = (int.from_bytes(self._iv, "big") ^ self._sequence).to_bytes(12, "big")
        self._sequence += 1
        return head + self._aead.encrypt(nonce, inner, head)

    def data(self, content: bytes) -> bytes:
        return self.seal(content, 23)

    def key_update(self) -> bytes:
        """One that wants one in return; what follows is sealed with the next secret."""
        sealed = self.seal(b"\x18\x00\x00\x01\x01", 22)
        self._secret = self._expand(b"traffic upd", len(self._secret))
        self._turn()
        return sealed
