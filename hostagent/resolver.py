"""Asks for the addresses of a host name, as clients on this host would, and for how long the answer is good.

`getaddrinfo` gives the addresses. The TTL comes from a question of our own to the name servers of `/etc/resolv.conf`
(RFC 1035, over UDP), and decides nothing but when to ask again: a forged answer can make us ask sooner or later, within
bounds that the caller sets.

Blind spots: names that do not come from DNS, or only with a search domain, have no TTL here; nor has an answer that did
not fit into a datagram before its first record.
"""

from __future__ import annotations

import secrets
import socket
import struct
from collections.abc import Sequence
from pathlib import Path

import msgspec

RESOLV_CONF = Path("/etc/resolv.conf")
TIMEOUT_S = 1.0
_SERVERS_MAX = 2
_RECORDS_MAX = 512
_A, _AAAA, _IN = 1, 28, 1
_ANSWER = 0x8000
_RECURSION_DESIRED = 0x0100
_HEADER = struct.Struct("!6H")
_RECORD = struct.Struct("!HHIH")


class Answer(msgspec.Struct, frozen=True):
    """Numeric addresses, sorted; `ttl_s` is None where nobody told."""

    addresses: tuple[str, ...]
    ttl_s: float | None = None


class BadAnswer(Exception):
    """What a name server sent is no answer to the question."""


def ask(name: str) -> Answer:
    """Blocks. Raises `OSError` when the name does not resolve."""
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    addresses = tuple(sorted({str(entry[4][0]).partition("%")[0] for entry in found}))
    return Answer(addresses, ttl(name, name_servers()))


def name_servers(path: Path = RESOLV_CONF) -> list[str]:
    """The first servers that the file names; none when it cannot be read."""
    try:
        words = [line.split() for line in path.read_text(errors="replace").splitlines()]
    except OSError:
        return []
    return [each[1] for each in words if len(each) >= 2 and each[0] == "nameserver"][:_SERVERS_MAX]


def ttl(name: str, servers: Sequence[str], port: int = 53) -> float | None:
    """The shortest TTL in the answers for IPv4 and IPv6; None when no server tells."""
    for server in servers:
        told: list[float] = []
        for kind in (_A, _AAAA):
            try:
                told += [] if (one := _exchange(name, kind, server, port)) is None else [one]
            except (OSError, BadAnswer, UnicodeError):
                continue
        if told:
            return min(told)
    return None


def _exchange(name: str, kind: int, server: str, port: int) -> float | None:
    family = socket.AF_INET6 if ":" in server else socket.AF_INET
    sent = question(name, kind, secrets.randbelow(1 << 16))
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.settimeout(TIMEOUT_S)
        # connected, so that the kernel drops what comes from anybody else
        sock.connect((server, port))
        sock.send(sent)
        return shortest_ttl(sent, sock.recv(65535))


def question(name: str, kind: int, number: int) -> bytes:
    """Raises `UnicodeError` for what cannot be a name."""
    labels = name.rstrip(".").encode("idna").split(b".")
    if any(not 0 < len(label) < 64 for label in labels):
        raise UnicodeError(f"`{name}` is no name for DNS")
    wire = b"".join(bytes([len(label)]) + label for label in labels) + b"\0"
    return _HEADER.pack(number, _RECURSION_DESIRED, 1, 0, 0, 0) + wire + struct.pack("!HH", kind, _IN)


def shortest_ttl(sent: bytes, got: bytes) -> float | None:
    """The shortest TTL of the answer's records (the CNAMEs on the way count too); None without any. Raises
    `BadAnswer`."""
    try:
        number, flags, questions, answers, _authorities, _more = _HEADER.unpack_from(got)
        if number != _HEADER.unpack_from(sent)[0] or not flags & _ANSWER or questions != 1:
            raise BadAnswer("it answers something else")
        if got[_HEADER.size : len(sent)].lower() != sent[_HEADER.size :].lower():
            raise BadAnswer("it repeats another question")
        at = len(sent)
        told: list[int] = []
        for _record in range(min(answers, _RECORDS_MAX)):
            at = _past_name(got, at)
            _kind, _class, seconds, length = _RECORD.unpack_from(got, at)
            at += _RECORD.size + length
            if at > len(got):
                break
            # RFC 2181, 8: the topmost bit set means zero
            told.append(seconds if seconds < 1 << 31 else 0)
    except (struct.error, IndexError) as error:
        raise BadAnswer("it is cut off") from error
    return float(min(told)) if told else None


def _past_name(data: bytes, at: int) -> int:
    """Where what follows a name begins: a pointer ends it, and is not followed."""
    while (length := data[at]) != 0:
        if length >= 0xC0:
            return at + 2
        at += 1 + length
    return at + 1
