"""Speaks the protocol by hand and prints, in base64, every byte that came back.

wire.py STEP…   Q:text  P:name:text  B:portal:statement:formats (0, 1, or empty)  D:S or P:name  E:portal:rows
                F:oid  S  H  X
"""

import base64
import os
import socket
import struct
import sys


def frame(kind: bytes, body: bytes = b"") -> bytes:
    return kind + struct.pack(">I", len(body) + 4) + body


def text(word: str) -> bytes:
    return word.encode() + b"\0"


def message(step: str) -> bytes:
    kind, _, rest = step.partition(":")
    match kind:
        case "Q":
            return frame(b"Q", text(rest))
        case "P":
            name, statement = rest.split(":", 1)
            return frame(b"P", text(name) + text(statement) + b"\0\0")
        case "B":
            portal, statement, formats = rest.split(":")
            codes = b"".join(struct.pack(">h", int(code)) for code in formats)
            counted = struct.pack(">h", len(formats)) + codes
            return frame(b"B", text(portal) + text(statement) + b"\0\0\0\0" + counted)
        case "D":
            what, name = rest.split(":")
            return frame(b"D", what.encode() + text(name))
        case "E":
            portal, rows = rest.split(":")
            return frame(b"E", text(portal) + struct.pack(">I", int(rows)))
        case "F":
            return frame(b"F", struct.pack(">Ihhh", int(rest), 0, 0, 0))
        case "S" | "H" | "X":
            return frame(kind.encode())
        case _:
            sys.exit(f"no such step: {step}")


def ready(received: bytes) -> int:
    """How many ReadyForQuery messages there are."""
    position = found = 0
    while position + 5 <= len(received):
        found += received[position] == 0x5A
        position += 1 + struct.unpack_from(">I", received, position + 1)[0]
    return found


steps = sys.argv[1:]
server = socket.create_connection((os.environ["PGHOST"], 5432), timeout=20)
pairs = b"".join(text(word) for word in ("user", os.environ["PGUSER"], "database", os.environ["PGDATABASE"])) + b"\0"
server.sendall(struct.pack(">II", len(pairs) + 8, 196608) + pairs)
server.sendall(b"".join(map(message, steps)))
expected = 1 + sum(step[0] in "QSF" for step in steps)
received = b""
while ready(received) < expected and (data := server.recv(65536)):
    received += data
print(base64.b64encode(received).decode())
