"""A PostgreSQL client that does nothing with a large result but count its bytes: `bulk.py HOST PORT DATABASE USER SQL`.

It prints the bytes of the reply and the seconds from the query to ReadyForQuery. libpq would parse each row, and the
bench would measure libpq. The password, where one is asked for, is `PGPASSWORD`; SCRAM-SHA-256 only, no TLS.
"""

from __future__ import annotations

import os
import socket
import struct
import sys
import time

from scramp import ScramClient

BUFFER = 1 << 20
READY = b"Z\0\0\0\5I"


def main() -> None:
    host, port, database, user, sql = sys.argv[1:]
    with socket.create_connection((host, int(port))) as server:
        _log_in(server, user, database)
        body = sql.encode() + b"\0"
        started = time.perf_counter()
        server.sendall(b"Q" + struct.pack(">I", len(body) + 4) + body)
        size = _drain(server)
        print(size, time.perf_counter() - started)


def _log_in(server: socket.socket, user: str, database: str) -> None:
    words = f"user\0{user}\0database\0{database}\0\0".encode()
    server.sendall(struct.pack(">II", len(words) + 8, 196608) + words)
    scram = ScramClient(["SCRAM-SHA-256"], user, os.environ.get("PGPASSWORD", ""))
    while True:
        kind, size = struct.unpack(">cI", _exactly(server, 5))
        body = _exactly(server, size - 4)
        match kind, int.from_bytes(body[:4], "big"):
            case b"R", 10:
                first = scram.get_client_first().encode()
                _send(server, b"SCRAM-SHA-256\0" + struct.pack(">I", len(first)) + first)
            case b"R", 11:
                scram.set_server_first(body[4:].decode())
                _send(server, scram.get_client_final().encode())
            case b"R", 12:
                scram.set_server_final(body[4:].decode())
            case b"E", _:
                sys.exit(body.replace(b"\0", b" ").decode(errors="replace"))
            case b"Z", _:
                return


def _send(server: socket.socket, body: bytes) -> None:
    server.sendall(b"p" + struct.pack(">I", len(body) + 4) + body)


def _exactly(server: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        chunk = server.recv(size - len(data))
        if not chunk:
            sys.exit("the server closed the connection during the login")
        data += chunk
    return data


def _drain(server: socket.socket) -> int:
    """Reads up to the last message, ReadyForQuery, and returns how many bytes came."""
    buffer = bytearray(BUFFER)
    size = 0
    tail = b""
    while not tail.endswith(READY):
        got = server.recv_into(buffer)
        if not got:
            sys.exit(f"the server closed the connection after {size} bytes")
        size += got
        tail = (tail + buffer[max(got - len(READY), 0) : got])[-len(READY) :]
    if size < BUFFER and buffer.startswith(b"E"):
        sys.exit(bytes(buffer[:size]).replace(b"\0", b" ").decode(errors="replace"))
    return size


if __name__ == "__main__":
    main()
