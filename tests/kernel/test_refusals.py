"""What must not be attributed, and what must not get to the listener at all."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hostagent import kernel
from hostagent.kernel import abi, bpf
from hostagent.kernel import pins as pins_module
from proxy.model import Endpoint
from tests.kernel.bed import BEYOND, HERE, LISTEN_PORT, PORT, Bed, bed
from tests.lab import cgroups, namespaces

RAW = Path(__file__).with_name("raw.py")
ELSEWHERE = "198.51.100.7"
"""An address behind the listener's namespace, which for the namespace beyond is a gateway."""


@pytest.fixture(scope="module")
def routed() -> Iterator[Bed]:
    """What the namespace beyond sends to ELSEWHERE passes through the listener's namespace."""
    with bed("refusals") as made:
        namespaces.ip("-n", made.beyond, "route", "add", ELSEWHERE, "via", HERE[0])
        yield made


def connect_by_hand(made: Bed, source_port: int) -> None:
    """From the namespace beyond, outside of the hooked cgroup, to ELSEWHERE."""
    arguments = [BEYOND[0], str(source_port), ELSEWHERE, str(PORT)]
    done = cgroups.run([sys.executable, str(RAW), *arguments], netns=made.beyond)
    assert done.returncode == 0, done.stderr


@contextmanager
def silenced(made: Bed, *matches: str) -> Iterator[None]:
    """Within the block the namespace beyond drops what it would send that matches. Packets sockets are not
    concerned."""
    rules = [["OUTPUT", "-p", "tcp", *match.split(), "-j", "DROP"] for match in matches]
    for rule in rules:
        _iptables(made.beyond, "-A", *rule)
    try:
        yield
    finally:
        for rule in rules:
            _iptables(made.beyond, "-D", *rule)


def _iptables(netns: str, *arguments: str) -> None:
    subprocess.run(["nsenter", f"--net=/run/netns/{netns}", "iptables", "-w", *arguments], check=True)


def test_a_client_in_another_namespace_is_attributed(routed: Bed) -> None:
    routed.run(routed.command("connect", address=ELSEWHERE, tag="tag-routed"), netns=routed.beyond)
    assert routed.tags() == ["tag-routed"]


def test_a_raw_syn_arrives_unattributed(routed: Bed) -> None:
    with silenced(routed, "--tcp-flags RST RST"):
        connect_by_hand(routed, 41_001)
    accepted, record = routed.take()
    assert accepted.tag == "raw"
    assert accepted.dialled == Endpoint(ELSEWHERE, PORT)
    assert isinstance(record, kernel.Refused)
    assert "no record" in record.reason


def test_a_record_that_was_never_established_cannot_be_claimed(routed: Bed) -> None:
    """Somebody's SYN got lost; somebody else speaks from the same port."""
    port = 41_002
    only_by_hand = silenced(routed, "--tcp-flags RST RST", f"--sport {port}")
    with only_by_hand, pending(routed, routed.beyond, port, ELSEWHERE):
        connect_by_hand(routed, port)
        accepted, record = routed.take()
    assert accepted.peer == Endpoint(BEYOND[0], port)
    assert isinstance(record, kernel.Refused)
    assert "never established" in record.reason


def test_a_record_goes_when_its_socket_closes_unestablished(routed: Bed) -> None:
    port = 41_003
    with silenced(routed, "--tcp-flags RST RST", f"--sport {port}"):
        with pending(routed, routed.beyond, port, ELSEWHERE):
            pass
        connect_by_hand(routed, port)
        _accepted, record = routed.take()
    assert isinstance(record, kernel.Refused)
    assert "no record" in record.reason


def test_the_port_of_a_taken_connection_gives_nothing(routed: Bed) -> None:
    port = 41_004
    routed.run(routed.command("from_port", port, address=ELSEWHERE, tag="tag-first"), netns=routed.beyond)
    assert routed.tags() == ["tag-first"]
    with silenced(routed, "--tcp-flags RST RST"):
        # what conntrack and the listener still know of the first one has to go, or the SYN is not a new connection
        subprocess.run(
            ["nsenter", f"--net=/run/netns/{routed.netns}", "conntrack", "-D", "-p", "tcp", "--sport", str(port)],
            check=True,
            capture_output=True,
        )
        connect_by_hand(routed, port)
    _accepted, record = routed.take()
    assert isinstance(record, kernel.Refused)


def test_a_closed_client_is_believed_for_a_short_time_only(routed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    routed.run(routed.command("connect", tag="tag-late"))
    accepted = routed.accept()
    monkeypatch.setattr(pins_module, "CLOSED_S", 0.05)
    time.sleep(0.1)
    record = routed.pins.take(accepted.peer, accepted.dialled)
    assert isinstance(record, kernel.Refused)
    assert "stale" in record.reason


@contextmanager
def twin_of(address: str, route_to: str) -> Iterator[str]:
    """A namespace with the same address, whose packets to `route_to` go nowhere."""
    with namespaces.namespace(address) as twin:
        namespaces.ip("-n", twin, "link", "add", "void", "type", "veth", "peer", "name", "nowhere")
        namespaces.ip("-n", twin, "link", "set", "void", "up")
        namespaces.ip("-n", twin, "link", "set", "nowhere", "up")
        namespaces.ip("-n", twin, "route", "add", route_to, "dev", "void", "src", address)
        yield twin


@contextmanager
def pending(made: Bed, netns: str, port: int, address: str) -> Iterator[None]:
    """A client of the namespace that has called connect from this port, and keeps its socket within the block."""
    client = made.start(made.command("pending", port, address=address, tag="tag-pending"), netns=netns)
    assert client.stdout is not None and client.stdout.readline() == "connecting\n"
    try:
        yield
    finally:
        client.communicate()


def test_two_namespaces_with_the_same_addresses_are_refused(routed: Bed) -> None:
    port = 41_005
    with twin_of(BEYOND[0], ELSEWHERE) as twin, pending(routed, routed.beyond, port, ELSEWHERE):
        connection, address = routed.listener.accept()
        with connection, pending(routed, twin, port, ELSEWHERE):
            record = routed.pins.take(Endpoint(BEYOND[0], address[1]), Endpoint(ELSEWHERE, PORT))
    assert isinstance(record, kernel.Refused)
    assert "two network namespaces" in record.reason
    assert routed.pins.counters()["ambiguous_connects"] == 1


def test_a_foreign_namespace_cannot_disturb_the_hosts_own_clients(routed: Bed) -> None:
    """A namespace that somebody made, with the host's own address and the same port and destination."""
    port = 41_010
    with twin_of(HERE[0], BEYOND[0]) as twin, pending(routed, twin, port, BEYOND[0]):
        routed.run(routed.command("from_port", port, tag="tag-own"))
        assert routed.tags() == ["tag-own"]


@pytest.mark.parametrize("address", [*HERE, "127.0.0.1", "::1"])
def test_the_listeners_port_cannot_be_reached_directly(routed: Bed, address: str) -> None:
    for netns in [routed.netns, routed.beyond] if address in HERE else [routed.netns]:
        with namespaces.entered(netns), pytest.raises(ConnectionRefusedError):
            socket.create_connection((address, LISTEN_PORT), timeout=2)


@pytest.mark.parametrize("address", BEYOND)
def test_protected_datagrams_are_rejected(routed: Bed, address: str) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with namespaces.entered(routed.beyond), socket.socket(family, socket.SOCK_DGRAM) as server:
        server.bind((address, PORT))
        server.setblocking(False)
        assert routed.run(routed.command("datagram", address=address)).strip() == "PermissionError"
        with pytest.raises(BlockingIOError):
            server.recv(1)


def test_a_port_that_is_not_protected_is_left_alone(routed: Bed) -> None:
    with namespaces.entered(routed.beyond), socket.create_server((BEYOND[0], 8080)) as server:
        server.settimeout(5)
        routed.run(routed.command("connect", port=8080, tag="tag-free"))
        connection, _address = server.accept()
        connection.close()
    assert routed.run(routed.command("datagram", port=8080)).strip() == "ConnectionRefusedError"


# --- exemption --------------------------------------------------------------------------------------------------------


@contextmanager
def target(made: Bed, *, local: bool = False) -> Iterator[str]:
    """A server at a protected port, which greets; its address."""
    netns, address = (made.netns, HERE[0]) if local else (made.beyond, BEYOND[0])
    with namespaces.entered(netns), socket.create_server((address, PORT)) as server:
        server.settimeout(0.2)
        stop = threading.Event()

        def serve() -> None:
            while not stop.is_set():
                try:
                    connection, _address = server.accept()
                except TimeoutError:
                    continue
                with connection:
                    connection.sendall(b"target")

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield address
        finally:
            stop.set()
            thread.join()


def _muster(made: Bed, process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    source = int(process.stdout.readline())
    assert made.scope.muster is not None
    record = made.pins.take(Endpoint("127.0.0.1", source), made.scope.muster)
    assert isinstance(record, kernel.ConnectRecord), record
    return record.node


def _start_worker(made: Bed, address: str, cgroup: Path) -> subprocess.Popen[str]:
    assert made.scope.muster is not None
    muster = made.scope.muster
    return made.start(made.command("muster", muster.address, muster.port, address=address), cgroup=cgroup)


def _greeting(process: subprocess.Popen[str]) -> str:
    out, _err = process.communicate("go\n")
    return out.strip()


@pytest.mark.parametrize("local", [False, True], ids=["remote", "on-this-host"])
def test_an_exempt_worker_reaches_the_target_itself(routed: Bed, local: bool) -> None:
    with target(routed, local=local) as address:
        worker = _start_worker(routed, address, routed.workers)
        node = _muster(routed, worker)
        routed.pins.exempt(node)
        assert routed.pins.exempted() == {node}
        assert _greeting(worker) == "target"
        # nothing is let past any longer than until it is answered
        passing = bpf.Map.pinned(routed.settings.pin_dir / "passing", *abi.MAPS["passing"])
        assert list(passing.keys()) == []
        passing.close()
        routed.pins.unexempt(node)
        assert routed.pins.exempted() == frozenset()


@pytest.mark.parametrize("inside", [True, False], ids=["not-exempt", "wrong-cgroup"])
def test_one_of_mark_and_cgroup_is_not_enough(routed: Bed, inside: bool) -> None:
    """In the workers' cgroup and not exempt; or exempt and elsewhere."""
    with target(routed) as address:
        worker = _start_worker(routed, address, routed.workers if inside else routed.cgroup)
        node = _muster(routed, worker)
        if not inside:
            routed.pins.exempt(node)
        closer = threading.Thread(target=lambda: routed.listener.accept()[0].close())
        closer.start()
        assert _greeting(worker) == ""
        closer.join()
        routed.pins.unexempt(node)


def test_a_forged_mark_is_taken_off(routed: Bed) -> None:
    """By a process in the workers' own cgroup, even."""
    before = routed.pins.counters()["forged_marks"]
    with target(routed):
        out = routed.run(routed.command("marked", routed.settings.mark, tag="tag-forger"), cgroup=routed.workers)
    assert out.strip() == "0"
    assert routed.tags() == ["tag-forger"]
    assert routed.pins.counters()["forged_marks"] == before + 1


def test_another_mark_is_left_alone(routed: Bed) -> None:
    out = routed.run(routed.command("marked", 77, tag="tag-marked"))
    assert out.strip() == "77"
    assert routed.tags() == ["tag-marked"]


_FLOOD = """
import ctypes, fcntl, os, socket, struct, sys
flags = int(sys.argv[1], 0)
if flags & 0x10000000:
    os.setresgid(61001, 61001, 61001)
    os.setresuid(61001, 61001, 61001)
if ctypes.CDLL(None).unshare(flags):
    sys.exit("no namespace")
with socket.socket() as any_socket:
    fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh22x", b"lo", 0x41))  # SIOCSIFFLAGS: up and running
server = socket.create_server(("0.0.0.0", 5432), backlog=64)
for number in range(int(sys.argv[2])):
    with socket.socket() as client:
        client.bind(("127.0.0.1", 10_000 + number))
        client.connect(("127.0.0.1", 5432))
        server.accept()[0].close()
"""
_NEW_NET, _NEW_USER = 0x40000000, 0x10000000


def _flooded(made: Bed, flags: int, number: int) -> None:
    made.run([sys.executable, "-I", "-S", "-c", _FLOOD, hex(flags), str(number)])


def test_users_who_fill_their_table_harm_neither_the_host_nor_containers() -> None:
    sizes = kernel.MapSizes(procs=8192, nodes=32_768, graveyard=16_384, connects=1024)
    with bed("shares", sizes) as made:
        _flooded(made, _NEW_USER | _NEW_NET, 300)
        assert made.pins.counters()["users_full"] >= 300 - 1024 // 8 and not made.pins.overflowed()
        # root's own namespaces, as containers have, are another table
        _flooded(made, _NEW_NET, 500)
        assert not made.pins.overflowed()
        _flooded(made, _NEW_NET, 600)
        assert made.pins.overflowed(), "a container can fill the table of the containers"
        for _ in range(20):
            made.run(made.command("connect"))
            assert isinstance(made.take()[1], kernel.ConnectRecord)
        assert len(made.pins.sweep(0)) >= 1024 // 2 + 1024 // 8
        _flooded(made, _NEW_USER | _NEW_NET, 10)
        assert len(made.pins.sweep(0)) == 10
