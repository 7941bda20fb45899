"""Targets by network and by name: a name server of the test's own, a real daemon that follows it, real sessions."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e import beds
from tests.e2e.beds import DATABASE, JOB, SERVER_NAME, Bed, wait_until
from tests.e2e.nameserver import NameServer, name_server

FIRST, SECOND, OTHER = DATABASE, "192.0.2.11", "192.0.2.12"
UNPROTECTED = 7000
POLICY = (
    JOB
    + "targets:\n"
    + beds.target("named", f"{SERVER_NAME}:5432")
    + beds.target("elsewhere", f"{SERVER_NAME}:{UNPROTECTED}")
    + beds.target("network", "192.0.2.16/30:5432")
    + beds.target("single", "192.0.2.18:5432")
    + beds.rules()
)
WHO_ANSWERS = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=5) as sock:
    sock.settimeout(1)
    try:
        print(sock.recv(100).decode())
    except TimeoutError:
        print("the gateway")
"""


@pytest.fixture(scope="module")
def names() -> Iterator[NameServer]:
    with beds.bed("names") as bed, name_server(bed.database, DATABASE) as server:
        server.addresses = [FIRST]
        server.bed = bed
        _ask_it(bed, server.address)
        bed.gateway.write_policy(POLICY)
        bed.gateway.start()
        with beds.hostile_server(bed.database, "0.0.0.0", UNPROTECTED, lambda sock: sock.sendall(b"the server")):
            yield server


def _ask_it(bed: Bed, address: str) -> None:
    """The daemon alone, in a mount namespace of its own, asks the name server of the test."""
    resolv, hosts = bed.directory / "resolv.conf", bed.directory / "nsswitch.conf"
    resolv.write_text(f"nameserver {address}\noptions timeout:1 attempts:1\n")
    hosts.write_text("hosts: dns\n")
    inside = bed.gateway.inside
    mounts = f'mount --bind {resolv} /etc/resolv.conf && mount --bind {hosts} /etc/nsswitch.conf && exec "$@"'

    def with_names(command: Sequence[str], group: str = "jobs") -> list[str]:
        return inside(["unshare", "-m", "sh", "-c", mounts, "sh", *command] if group == "daemon" else command, group)

    bed.gateway.inside = with_names  # type: ignore[method-assign]


def _psql(bed: Bed, address: str, *, host: str = SERVER_NAME, tls: str = "verify-full") -> str:
    done = bed.gateway.run(
        [
            *("psql", "-X", "-A", "-t", "-c", "SELECT 'served'"),
            f"host={host} hostaddr={address} dbname=shop user=agent sslmode={tls} sslrootcert={bed.gateway.ca_path}",
        ]
    )
    return done.stdout.strip() or done.stderr


def _who_answers(bed: Bed, address: str) -> str:
    return bed.python(WHO_ANSWERS, address, str(UNPROTECTED)).strip()


def _newest_target(bed: Bed) -> object:
    return bed.sessions()[0]["target"]


@contextmanager
def _session(bed: Bed, address: str) -> Iterator[subprocess.Popen[str]]:
    command = ["psql", "-X", "-A", "-t", "-q", f"host={address} dbname=shop user=agent sslmode=prefer"]
    process = subprocess.Popen(
        bed.gateway.inside(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        with process:
            yield process
            process.kill()
    finally:
        process.kill()


def _ask(process: subprocess.Popen[str], word: str) -> str:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(f"SELECT '{word}';\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


@pytest.mark.parametrize("address", ["192.0.2.16", "192.0.2.17", "192.0.2.19"])
def test_any_address_of_a_network_is_the_target_and_has_its_certificate(names: NameServer, address: str) -> None:
    assert _psql(names.bed, address) == "served"
    assert _psql(names.bed, address, host=address) == "served"
    assert _newest_target(names.bed) == "network"


def test_the_narrower_target_counts(names: NameServer) -> None:
    assert _psql(names.bed, "192.0.2.18") == "served"
    assert _newest_target(names.bed) == "single"


def test_what_is_beside_the_network_is_no_target(names: NameServer) -> None:
    for address in ("192.0.2.15", OTHER):
        assert f"{address}:5432 is no target" in _psql(names.bed, address, tls="prefer")


def test_a_name_is_followed_without_a_gap_and_sessions_stay(names: NameServer) -> None:
    bed = names.bed
    assert _psql(bed, FIRST) == "served"
    assert "is no target" in _psql(bed, SECOND, tls="prefer")
    assert (_who_answers(bed, FIRST), _who_answers(bed, SECOND)) == ("the gateway", "the server")
    version = bed.status()["policy"]

    with _session(bed, FIRST) as session:
        assert _ask(session, "before") == "before"
        names.addresses = [SECOND]
        wait_until(lambda: _who_answers(bed, SECOND) == "the gateway", "the new address is redirected", 15)
        assert _psql(bed, SECOND) == "served"
        assert _newest_target(bed) == "named"
        assert _ask(session, "after") == "after", "the session at the old address goes on"
        assert _who_answers(bed, FIRST) == "the gateway", "the old address is kept"
        bed.gateway.write_policy(POLICY + "# changed\n")
        bed.gateway.cli("reload")
        assert _ask(session, "reloaded") == "reloaded", "also over a reload"
    assert _psql(bed, FIRST) == "served"
    assert bed.status()["policy"] == version


def test_a_name_that_stops_resolving_keeps_its_addresses_and_alerts(names: NameServer) -> None:
    bed = names.bed
    names.addresses = []

    def alerted() -> bool:
        return any(f"`{SERVER_NAME}` does not resolve any more" in str(line.get("what")) for line in bed.log_lines())

    wait_until(alerted, "an alert for the name", 15)
    assert _psql(bed, SECOND) == "served"
    bed.gateway.cli("reload")
    assert _psql(bed, SECOND) == "served", "also when the policy is loaded again meanwhile"


def test_a_name_cannot_take_another_targets_address(names: NameServer) -> None:
    bed = names.bed
    names.addresses = ["192.0.2.18"]

    def alerted() -> bool:
        return any("are not taken" in str(line.get("what")) for line in bed.log_lines())

    wait_until(alerted, "an alert for the name", 45)
    assert _psql(bed, "192.0.2.18") == "served"
    assert _newest_target(bed) == "single"
    assert _psql(bed, SECOND) == "served"


def test_the_name_servers_ttl_says_when_it_is_asked_again(names: NameServer) -> None:
    names.addresses = [SECOND]
    wait_until(lambda: names.asked_since_change() > 0, "the name is asked again", 45)
    time.sleep(0.5)
    names.forget()
    begun = time.monotonic()
    wait_until(lambda: names.asked_since_change() > 0, "… and again, as its TTL of 5 s says", 10)
    assert time.monotonic() - begun > 3


def test_a_client_that_hears_of_an_address_first_is_served_soon(names: NameServer) -> None:
    names.ttl_s = 200
    names.forget()
    wait_until(lambda: names.asked_since_change() > 0, "the name has a long TTL from now on", 15)
    time.sleep(0.5)
    names.addresses = [OTHER]
    assert "is no target" in _psql(names.bed, OTHER, tls="prefer")
    wait_until(lambda: _psql(names.bed, OTHER) == "served", "the daemon has asked", 12)


def test_nothing_of_it_is_left_behind(names: NameServer) -> None:
    assert Path("/etc/resolv.conf").read_bytes() != (names.bed.directory / "resolv.conf").read_bytes()
