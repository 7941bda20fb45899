from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hostagent import resolver

NAME = "db.internal"


def answer(sent: bytes, *ttls: int, alias: bool = False) -> bytes:
    """What a server says: its records point to the question's name, or spell it out."""
    header = sent[:2] + struct.pack("!5H", 0x8180, 1, len(ttls), 0, 0)
    name = sent[12:-4] if alias else b"\xc0\x0c"
    records = b"".join(name + struct.pack("!HHIH", 1, 1, ttl, 4) + bytes(4) for ttl in ttls)
    return header + sent[12:] + records


@contextmanager
def server(behave: Callable[[bytes], bytes | None]) -> Iterator[int]:
    """A name server on loopback; its port."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))

        def serve() -> None:
            while data := sock.recvfrom(4096):
                if data[0] == b"stop":
                    return
                if (reply := behave(data[0])) is not None:
                    sock.sendto(reply, data[1])

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield sock.getsockname()[1]
        finally:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
                last.sendto(b"stop", sock.getsockname())
            thread.join()


def test_the_shortest_ttl_of_both_families_counts() -> None:
    def behave(sent: bytes) -> bytes:
        return answer(sent, 300, 90, alias=True) if sent[-3] == 1 else answer(sent, 120)

    with server(behave) as port:
        assert resolver.ttl(NAME, ["127.0.0.1"], port) == 90.0


def test_a_server_that_does_not_know_tells_nothing() -> None:
    with server(lambda sent: answer(sent)) as port:
        assert resolver.ttl(NAME, ["127.0.0.1"], port) is None


def test_a_server_that_is_silent_or_lies_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resolver, "TIMEOUT_S", 0.1)
    other = resolver.question("other.internal", 1, 0)
    for behave in (lambda sent: None, lambda sent: b"", lambda sent: answer(sent[:2] + other[2:], 5)):
        with server(behave) as port:
            assert resolver.ttl(NAME, ["127.0.0.1"], port) is None


def test_a_negative_ttl_is_none_at_all() -> None:
    sent = resolver.question(NAME, 1, 7)
    assert resolver.shortest_ttl(sent, answer(sent, 1 << 31)) == 0.0


@given(st.binary(max_size=200), st.integers(0, 200))
@example(b"\xc0" * 40, 0)
@example(b"\x3f" * 200, 12)
def test_any_bytes_are_an_answer_or_a_bad_one(data: bytes, kept: int) -> None:
    sent = resolver.question(NAME, 1, 7)
    got = answer(sent, 60, 60)[:kept] + data
    with suppress(resolver.BadAnswer):
        assert (resolver.shortest_ttl(sent, got) or 0) >= 0


@pytest.mark.parametrize("name", ["", "a..b", "x" * 64])
def test_what_is_no_name_is_not_asked_for(name: str) -> None:
    assert resolver.ttl(name, ["127.0.0.1"], 1) is None


def test_the_hosts_own_names_have_no_ttl() -> None:
    assert "127.0.0.1" in resolver.Answer(resolver.ask("localhost").addresses).addresses


def test_name_servers_are_read_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    assert resolver.name_servers(path) == []
    path.write_text("# nameserver 192.0.2.1\nsearch example\nnameserver 192.0.2.9\nnameserver\nnameserver ::1\n")
    assert resolver.name_servers(path) == ["192.0.2.9", "::1"]
