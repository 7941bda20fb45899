"""Connections that are older than the redirect: left and listed, or reset once, and nobody else's."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from tests.e2e import beds
from tests.e2e.beds import DATABASE, JOB, Bed

FREE, LATER = 7000, 7001
POLICY = JOB + "targets:\n" + beds.target("shop", f"{DATABASE}:5432") + beds.rules()
MORE = POLICY.replace("targets:\n", "targets:\n" + beds.target("later", f"{DATABASE}:{LATER}"))
HELD = """
import socket, sys
sock = socket.create_connection((sys.argv[1], int(sys.argv[2])))
print("connected", flush=True)
for line in sys.stdin:
    try:
        sock.sendall(b"\\0\\0\\0\\x08\\x04\\xd2\\x16\\x2f")
        print(sock.recv(100) and "answered", flush=True)
    except OSError as error:
        print(type(error).__name__, flush=True)
"""


@contextmanager
def started(adopt: str) -> Iterator[tuple[Bed, dict[str, subprocess.Popen[str]]]]:
    """A gateway that finds connections, of clients who asked for nothing yet: to a target over IPv4 and over a mapped
    address, to what becomes one later, and to what never does."""

    def answer(sock: object) -> None:
        while sock.recv(100):  # type: ignore[attr-defined]
            sock.sendall(b"x")  # type: ignore[attr-defined]

    with beds.bed("adoption", settings={"adopt": adopt}) as bed:
        bed.gateway.write_policy(POLICY)
        with (
            beds.hostile_server(bed.database, DATABASE, FREE, answer),
            beds.hostile_server(bed.database, DATABASE, LATER, answer),
        ):
            clients = {
                "plain": bed.start_python(HELD, DATABASE, "5432"),
                "mapped": bed.start_python(HELD, f"::ffff:{DATABASE}", "5432"),
                "later": bed.start_python(HELD, DATABASE, str(LATER)),
                "free": bed.start_python(HELD, DATABASE, str(FREE)),
            }
            try:
                for client in clients.values():
                    assert client.stdout is not None and client.stdout.readline() == "connected\n"
                bed.gateway.start()
                yield bed, clients
            finally:
                for client in clients.values():
                    with client:
                        client.kill()


def ask(client: subprocess.Popen[str]) -> str:
    assert client.stdin is not None and client.stdout is not None
    client.stdin.write("go\n")
    client.stdin.flush()
    return client.stdout.readline().strip()


def past(bed: Bed) -> list[str]:
    found = bed.status()["past_the_proxy"]
    assert isinstance(found, list)
    return found


def test_older_connections_are_left_and_listed() -> None:
    with started("leave") as (bed, clients):
        assert len(past(bed)) == 2
        assert all(f" to {DATABASE}:5432 of uid 0" in one for one in past(bed))
        assert {name: ask(client) for name, client in clients.items()} == dict.fromkeys(clients, "answered")
        assert bed.psql("SELECT 'through'").stdout.strip() == "through"
        assert len(past(bed)) == 2, "what goes through the proxy is not listed, nor are the proxy's own"
        clients["plain"].kill()
        clients["plain"].wait()
        beds.wait_until(lambda: len(past(bed)) == 1, "one is gone")


def test_older_connections_are_reset_once_and_nobody_elses() -> None:
    with started("reset") as (bed, clients):
        assert past(bed) == []
        answers = {name: ask(client) for name, client in clients.items()}
        assert answers.pop("plain") in ("ConnectionAbortedError", "ConnectionResetError", "BrokenPipeError")
        assert answers.pop("mapped") in ("ConnectionAbortedError", "ConnectionResetError", "BrokenPipeError")
        assert answers == {"later": "answered", "free": "answered"}

        through = bed.start_python(HELD, DATABASE, "5432")
        session = ["psql", "-X", "-A", "-t", "-q", f"host={DATABASE} dbname=shop user=agent sslmode=prefer"]
        with (
            through,
            subprocess.Popen(
                bed.gateway.inside(session), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            ) as psql,
        ):
            try:
                assert through.stdout is not None and through.stdout.readline() == "connected\n"
                assert psql.stdin is not None and psql.stdout is not None
                for word in ("before", "after"):
                    psql.stdin.write(f"SELECT '{word}';\n")
                    psql.stdin.flush()
                    assert psql.stdout.readline().strip() == word
                    bed.gateway.write_policy(MORE)
                    bed.gateway.cli("reload")
                assert ask(through) == "answered", "a connection through the proxy is left alone"
            finally:
                through.kill()
                psql.kill()
        assert ask(clients["later"]) in ("ConnectionAbortedError", "ConnectionResetError", "BrokenPipeError")
        assert ask(clients["free"]) == "answered"


def test_a_restart_does_not_take_redirected_connections_for_older_ones() -> None:
    with started("leave") as (bed, _clients):
        before = past(bed)
        bed.gateway.kill()
        bed.gateway.start()
        assert past(bed) == before
