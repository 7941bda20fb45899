"""Databases where no target is: what an agent's connection begins with is seen and goes no further; all else passes."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import shutil
import socket
import struct
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
from hostagent.kernel.pins import own_netns
from proxy.model import Endpoint
from tests.kernel.bed import BEYOND, PORT, PROGRAMS, Bed, bed
from tests.lab import namespaces

HIDDEN = 6000
"""A port that the policy does not name."""

STARTUP = struct.pack("!IHH", 32, 3, 0) + b"user\0intruder\0\0\0\0\0\0\0\0\0\0\0"
CLIENTS = {
    "postgresql startup": ("postgresql", STARTUP),
    "postgresql startup of a newer minor version": ("postgresql", STARTUP[:6] + b"\x00\x02" + STARTUP[8:]),
    "postgresql startup of version 2": ("postgresql", struct.pack("!IHH", 296, 2, 0) + bytes(288)),
    "postgresql SSLRequest": ("postgresql", struct.pack("!II", 8, 80877103)),
    "postgresql GSSENCRequest": ("postgresql", struct.pack("!II", 8, 80877104)),
    "postgresql CancelRequest": ("postgresql", struct.pack("!IIII", 16, 80877102, 7, 9)),
    "tds prelogin": (
        "tds",
        bytes.fromhex(
            "1201002f0000010000001a00060100200001020021000103002200040400260001ff0e00065300000000000000000000"
        ),
    ),
    "tds login": ("tds", bytes.fromhex("1001009000000100") + struct.pack("<II", 0x88, 0x74000004) + bytes(0x80)),
    "mongodb OP_MSG": ("mongodb", struct.pack("<IIIIIB", 40, 1, 0, 2013, 0, 0) + bytes(19)),
    "mongodb OP_QUERY": ("mongodb", struct.pack("<IIIII", 58, 1, 0, 2004, 0) + b"admin.$cmd\0" + bytes(27)),
    "redis command": ("redis", b"*2\r\n$4\r\nAUTH\r\n$6\r\nsecret\r\n"),
    "redis command of many words": ("redis", b"*100001\r\n$4\r\nMSET\r\n"),
    "redis command after an empty one": ("redis", b"*-1\r\n*1\r\n$4\r\nPING\r\n"),
    "oracle connect": (
        "oracle",
        bytes.fromhex("00c8000001000000013c012c0c41ffff7f08000001008e003a00000000") + bytes(160),
    ),
}


def _hello(*protocols: bytes, name: bytes = b"postgresql", padding: int = 0) -> bytes:
    """A ClientHello for a server of this name that offers these protocols, after as many bytes of other extensions."""
    names = b"".join(bytes([len(one)]) + one for one in protocols)
    server = struct.pack("!HBH", len(name) + 3, 0, len(name)) + name
    extensions = struct.pack("!HH", 0, len(server)) + server + struct.pack("!HH", 51, padding) + bytes(padding)
    if protocols:
        extensions += struct.pack("!HHH", 16, len(names) + 2, len(names)) + names
    extensions += struct.pack("!HH", 43, 3) + b"\x02\x03\x04"
    body = b"\x03\x03" + bytes(32) + b"\x20" + bytes(32) + b"\0\x04\x13\x01\x13\x02" + b"\x01\0"
    body += struct.pack("!H", len(extensions)) + extensions
    return b"\x16\x03\x01" + struct.pack("!HBBH", len(body) + 4, 1, 0, len(body)) + body


CLIENTS |= {
    "postgresql over TLS from the first byte": ("postgresql", _hello(b"postgresql")),
    "postgresql over TLS after other protocols": (
        "postgresql",
        _hello(b"h2", b"http/1.1", b"postgresqm", b"postgresql"),
    ),
    "postgresql over TLS in a large hello": ("postgresql", _hello(b"postgresql", padding=3000)),
    "tds over TLS from the first byte": ("tds", _hello(b"tds/8.0")),
}
SHORT = {name: one for name, one in CLIENTS.items() if len(one[1]) < 1000}
SERVERS = {
    "mariadb": ("mysql", b"", b"\x6e\0\0\0\x0a5.5.5-10.11.6-MariaDB-0+deb12u1\0" + bytes(60)),
    "mysql": ("mysql", b"", b"\x49\0\0\0\x0a8.0.36\0" + bytes(60)),
    "postgresql asks for SASL": ("postgresql", b"X", b"R\0\0\0\x17\0\0\0\x0aSCRAM-SHA-256\0\0"),
    "postgresql refuses TLS first": ("postgresql", b"X", b"NR\0\0\0\x08\0\0\0\x03"),
    "postgresql begins TLS": ("postgresql", b"X", b"S\x16\x03\x03\0\x7a\x02"),
    "redis answers words": ("redis", b"PING\r\n", b"+PONG\r\n"),
    "redis takes words": ("redis", b"AUTH secret\r\n", b"+OK\r\n"),
    "redis wants a password": ("redis", b"GET key\r\n", b"-NOAUTH Authentication required.\r\n"),
    "redis answers a value": ("redis", b"GET key\r\n", b"$5\r\nvalue\r\n"),
    "redis answers nothing": ("redis", b"GET key\r\n", b"$-1\r\n"),
}
HELLO = bytes.fromhex("16030102000100") + b"\x01\xfc\x03\x03" + bytes(500)
ORDINARY = {
    "HTTP": (b"GET / HTTP/1.1\r\nHost: registry.example\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n"),
    "HTTP to what could be Kubernetes": (b"GET /api HTTP/1.1\r\nHost: x\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n"),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\0\0\x12\x04\0\0\0\0\0"),
    "TLS": (HELLO, b"\x16\x03\x03\0\x7a\x02"),
    "TLS to a server called postgresql": (_hello(b"h2", b"http/1.1"), b"\x16\x03\x03\0\x7a\x02"),
    "TLS without ALPN": (_hello(padding=2000) + b"\x17\x03\x03\0\x10" + bytes(16), b"\x16\x03\x03\0\x7a\x02"),
    "SSH": (b"SSH-2.0-OpenSSH_9.2\r\n", b"SSH-2.0-OpenSSH_9.2\r\n"),
    "git": (b"0032git-upload-pack /project\0host=x\0", b"00c8"),
    "SMTP": (b"EHLO x\r\n", b"220 mail.example ESMTP\r\n"),
    "POP3": (b"", b"+OK ready\r\n"),
    "IMAP": (b"a LOGIN x y\r\n", b"* OK ready\r\n"),
    "FTP": (b"USER x\r\n", b"220 ready\r\n"),
    "Kafka ApiVersions": (struct.pack("!IHHI", 40, 18, 3, 1) + bytes(32), struct.pack("!II", 100, 1)),
    "Kafka Metadata": (struct.pack("!IHHI", 40, 3, 0, 1) + bytes(32), struct.pack("!II", 100, 1)),
    "NATS": (b"CONNECT {}\r\n", b"INFO {}\r\n"),
    "memcached": (b"get key\r\n", b"VALUE key 0 1\r\n"),
    "DNS": (struct.pack("!HHHHHHH", 29, 7, 0x0100, 1, 0, 0, 0) + b"\7example\0\0\1\0\1", b"\0\x2d\0\7"),
    "one byte": (b"\0", b"\0"),
    "nothing from the client": (b"", b"hello\n"),
    "zeros": (bytes(64), bytes(64)),
    "a server's S": (b"X", b"S"),
}


class Server:
    """Listens in the namespace beyond: says `greeting` first, or when something came, and keeps what it got. Without
    `greeting` it sends back what it gets."""

    def __init__(self, made: Bed, port: int = HIDDEN, greeting: bytes | None = None, *, asked: bool = False) -> None:
        with namespaces.entered(made.beyond):
            self._listener = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
        self._listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 16)
        self._greeting, self._asked = greeting, asked
        self.got: list[bytes] = []
        self.peers: list[Endpoint] = []
        self._connections: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._serve)]
        self._threads[0].start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._connections:
            # what was closed for data does not end by itself
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(15)

    def first_peer(self) -> Endpoint:
        """Who connected, once the thread that accepts has come to it."""
        deadline = time.monotonic() + 10
        while not self.peers and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.peers[0]

    def _serve(self) -> None:
        while True:
            try:
                connection, address = self._listener.accept()
            except OSError:
                return
            self._connections.append(connection)
            self.peers.append(Endpoint(address[0].removeprefix("::ffff:"), address[1]))
            thread = threading.Thread(target=self._talk, args=(connection,))
            self._threads.append(thread)
            thread.start()

    def _talk(self, connection: socket.socket) -> None:
        index = len(self.got)
        self.got.append(b"")
        with connection:
            connection.settimeout(10)
            try:
                if self._greeting is not None and not self._asked:
                    connection.sendall(self._greeting)
                while data := connection.recv(1 << 16):
                    self.got[index] += data
                    if self._greeting is None:
                        connection.sendall(data)
                    elif self._asked:
                        connection.sendall(self._greeting)
                        self._asked = False
            except OSError:
                return


@contextmanager
def serving(made: Bed, port: int = HIDDEN, greeting: bytes | None = None, *, asked: bool = False) -> Iterator[Server]:
    server = Server(made, port, greeting, asked=asked)
    try:
        yield server
    finally:
        server.close()


def _ours(events: kernel.Events) -> list[kernel.Event]:
    """Without what is told of packet sockets, which may be anybody's on this machine."""
    return [event for event in events.read(1000) if event.type != abi.EVENTS["EVENT_SENT_RAW"]]


class Intercepted:
    """A bed where `agent` is a shell of its own that is intercepted, and the ring is read."""

    def __init__(self, made: Bed, agent: Path) -> None:
        self.made = made
        self.agent = agent
        status = agent.stat()
        self.scope = dataclasses.replace(made.scope, agents=frozenset({(status.st_dev, status.st_ino)}))
        self.apply(self.scope)
        self.events = kernel.Events.open(made.settings.pin_dir)

    def apply(self, scope: kernel.Scope) -> None:
        with namespaces.entered(self.made.netns):
            kernel.apply_scope(self.made.settings, self.made.pins, scope)

    def command(self, name: str, *arguments: object, address: str = BEYOND[0], port: int = HIDDEN) -> list[str]:
        """A client below the agent."""
        return [
            str(self.agent),
            "-c",
            '"$@"; exit $?',
            "agent",
            *self.plain(name, *arguments, address=address, port=port),
        ]

    def plain(self, name: str, *arguments: object, address: str = BEYOND[0], port: int = HIDDEN) -> list[str]:
        return [sys.executable, "-I", "-S", str(PROGRAMS), name, address, str(port), "tag", *map(str, arguments)]

    def talk(self, *steps: str, address: str = BEYOND[0], port: int = HIDDEN) -> list[str]:
        return self.made.run(self.command("talk", *steps, address=address, port=port)).split("\n")

    def read(self) -> list[kernel.Event]:
        return _ours(self.events)

    def told(self, timeout_s: float = 3) -> kernel.Event:
        """The one event that there is."""
        deadline = time.monotonic() + timeout_s
        while not (events := self.read()) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(events) == 1, events
        return events[0]


@pytest.fixture(scope="module")
def intercepted(shared: Bed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Intercepted]:
    agent = tmp_path_factory.mktemp("agent") / "agent"
    shutil.copy("/bin/dash", agent)
    for netns in (shared.netns, shared.beyond):
        namespaces.sysctl(netns, "net.ipv4.tcp_fastopen", "3")
    made = Intercepted(shared, agent)
    try:
        yield made
    finally:
        made.events.close()
        made.apply(shared.scope)


@pytest.fixture(autouse=True)
def quiet(intercepted: Intercepted) -> Iterator[None]:
    """Nothing is told but what a test looks for."""
    assert intercepted.read() == []
    yield
    assert intercepted.read() == []


# --- what is recognised -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", [*BEYOND, f"::ffff:{BEYOND[0]}"])
@pytest.mark.parametrize("protocol,data", CLIENTS.values(), ids=list(CLIENTS))
def test_a_client_is_known_by_its_first_bytes(
    intercepted: Intercepted, address: str, protocol: str, data: bytes
) -> None:
    with serving(intercepted.made) as server:
        before = time.monotonic_ns()
        command = intercepted.command("talk", f"send:{data.hex()}", "line", address=address)
        with intercepted.made.start(command) as process:
            event = intercepted.told()
            process.communicate("\n", timeout=10)
        assert b"".join(server.got) == b""
        assert (event.type, abi.PROTOCOLS[event.detail]) == (abi.EVENTS["EVENT_HIDDEN"], protocol)
        assert event.dest == Endpoint(address.removeprefix("::ffff:"), HIDDEN)
        assert event.source == server.first_peer()
        assert before < event.time_ns < time.monotonic_ns()
        with namespaces.entered(intercepted.made.netns):
            assert event.netns == own_netns()
    lineage = intercepted.made.pins.lineage(event.node)
    assert lineage is not None
    assert lineage[-1].tgid == event.tgid
    assert "talk" in lineage[-1].argv
    assert any(image.inode == intercepted.agent.stat().st_ino for image in lineage)


@pytest.mark.parametrize("address", BEYOND)
@pytest.mark.parametrize("protocol,data", SHORT.values(), ids=list(SHORT))
def test_one_byte_in_each_segment_changes_nothing(
    intercepted: Intercepted, address: str, protocol: str, data: bytes
) -> None:
    with serving(intercepted.made) as server:
        enough = 300 if data.startswith(b"\x16\x03") else 40
        intercepted.talk(f"bytes:{data[:enough].hex()}", address=address)
        assert abi.PROTOCOLS[intercepted.told().detail] == protocol
    assert len(b"".join(server.got)) < min(len(data), 160)


@pytest.mark.parametrize("address", BEYOND)
@pytest.mark.parametrize("protocol,asked,greeting", SERVERS.values(), ids=list(SERVERS))
def test_a_server_is_known_by_its_first_bytes(
    intercepted: Intercepted, address: str, protocol: str, asked: bytes, greeting: bytes
) -> None:
    with serving(intercepted.made, greeting=greeting, asked=bool(asked)):
        steps = [f"send:{asked.hex()}"] if asked else []
        assert intercepted.talk(*steps, "recv", address=address)[0] == "TimeoutError"
        event = intercepted.told()
        assert abi.PROTOCOLS[event.detail] == protocol
        assert event.dest == Endpoint(address, HIDDEN)


def test_headers_before_tcp_hide_nothing(intercepted: Intercepted) -> None:
    with serving(intercepted.made) as server:
        for address, options in ((BEYOND[0], "options4"), (BEYOND[1], "options6")):
            intercepted.talk(options, f"send:{STARTUP.hex()}", address=address)
            assert abi.PROTOCOLS[intercepted.told().detail] == "postgresql"
        assert server.got == [b"", b""]
        assert intercepted.talk("options6", "send:6162", "recv", address=BEYOND[1])[0] == "6162"


@pytest.mark.parametrize("address", BEYOND)
def test_data_in_the_syn_is_seen(intercepted: Intercepted, address: str) -> None:
    with serving(intercepted.made) as server:
        # the first gets the cookie, the second uses it: TCPI_OPT_SYN_DATA
        for _ in range(2):
            said = intercepted.talk("fast:6162", "recv", address=address)
        assert said[0] == "6162" and int(said[1].split()[1], 16) & 0x20, said
        server.got.clear()
        intercepted.talk(f"fast:{STARTUP.hex()}", "recv", address=address)
        assert abi.PROTOCOLS[intercepted.told().detail] == "postgresql"
        assert b"".join(server.got) == b""


def test_a_socket_that_cannot_be_looked_at_is_closed_for_data(intercepted: Intercepted) -> None:
    """Whoever fills what memory a socket may have leaves no room for the storage."""
    made = intercepted.made
    namespaces.sysctl(made.netns, "net.core.optmem_max", "9000")
    try:
        with serving(made) as server:
            said = intercepted.talk("filter", "send:6162", "recv")
            event = intercepted.told()
        assert event.type == abi.EVENTS["EVENT_UNWATCHED"] and event.source is not None and event.dest is not None
        with namespaces.entered(made.netns):
            sockets = kernel.Sockets(made.settings.listen_port, made.settings.mark)
        assert sockets.reset_socket(event.source, event.dest, event.socket)
        assert not sockets.reset_socket(event.source, event.dest, event.socket)
        sockets.close()
        assert event.dest == Endpoint(BEYOND[0], HIDDEN)
        assert said[0] == "TimeoutError" and server.got == [b""]
    finally:
        namespaces.sysctl(made.netns, "net.core.optmem_max", "131072")
    until_empty = time.monotonic() + 10
    unwatched = bpf.Map.pinned(made.settings.pin_dir / "unwatched", *abi.MAPS["unwatched"])
    try:
        while list(unwatched.keys()):
            assert time.monotonic() < until_empty, "sockets that were closed are kept"
            time.sleep(0.05)
    finally:
        unwatched.close()
    with serving(made):
        assert intercepted.talk("send:6162", "recv")[0] == "6162"


# --- what is not ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", BEYOND)
@pytest.mark.parametrize("sent,answer", ORDINARY.values(), ids=list(ORDINARY))
def test_other_protocols_pass(intercepted: Intercepted, address: str, sent: bytes, answer: bytes) -> None:
    for way in ("send", "bytes"):
        with serving(intercepted.made, greeting=answer, asked=bool(sent)) as server:
            steps = [f"{way}:{sent[:60].hex()}"] if sent else []
            said = intercepted.talk(*steps, "recv", "close", address=address)
            assert answer.startswith(bytes.fromhex(said[0]))
        assert server.got == [sent[:60]]


def test_what_begins_at_random_passes(intercepted: Intercepted) -> None:
    with serving(intercepted.made):
        assert intercepted.made.run(intercepted.command("noise", 1000, 7)).split() == ["1000"]


def test_a_large_transfer_is_the_same_at_the_other_end(intercepted: Intercepted) -> None:
    data = os.urandom(1 << 20) * 8
    with serving(intercepted.made) as server:
        source = (
            "import hashlib, os, socket, sys, threading\n"
            f"client = socket.create_connection(({BEYOND[0]!r}, {HIDDEN}))\n"
            "data = sys.stdin.buffer.read()\n"
            "def send():\n client.sendall(data); client.shutdown(1)\n"
            "threading.Thread(target=send).start()\n"
            "came = hashlib.sha256()\n"
            "while more := client.recv(1 << 16): came.update(more)\n"
            "print(came.hexdigest())"
        )
        command = [str(intercepted.agent), "-c", '"$@"; exit $?', "agent", sys.executable, "-c", source]
        with intercepted.made.start(command, text=False) as process:
            said, _ = process.communicate(data, timeout=60)
        assert said.split() == [hashlib.sha256(data).hexdigest().encode()]
        assert server.got == [data]


def test_who_is_below_no_agent_is_left_alone(intercepted: Intercepted) -> None:
    with serving(intercepted.made) as server:
        said = intercepted.made.run(intercepted.plain("talk", f"send:{STARTUP.hex()}", "recv"))
        assert said.split("\n")[0] == STARTUP.hex()
    assert server.got == [STARTUP]


def test_who_was_declared_is_looked_at(intercepted: Intercepted) -> None:
    made = intercepted.made
    with serving(made) as server, made.start(intercepted.plain("on_line")) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        tgid = int(children[0]) if children else process.pid
        node = made.pins.node_of(tgid)
        assert node is not None
        made.pins.declare(node, "declared")
        process.communicate("self\n", timeout=10)
        assert len(server.got) == 1
        assert made.pins.lineage(node) is not None


def test_who_is_spared_goes_on_where_it_was_stopped(intercepted: Intercepted) -> None:
    """The segment that was dropped comes again, and nothing of it is lost or doubled."""
    with serving(intercepted.made) as server:
        with intercepted.made.start(
            intercepted.command("talk", f"send:{STARTUP.hex()}", "recv", "line", "recv")
        ) as one:
            event = intercepted.told()
            intercepted.made.pins.spare(event.node)
            assert one.stdout is not None
            assert one.stdout.readline() == STARTUP.hex() + "\n"
            one.kill()
        assert server.got == [STARTUP]
    greeting = SERVERS["mysql"][2]
    command = intercepted.command("talk", "recv")
    with serving(intercepted.made, greeting=greeting), intercepted.made.start(command) as other:
        intercepted.made.pins.spare(intercepted.told().node)
        assert other.communicate(timeout=10)[0].split()[0] == greeting.hex()


def test_the_spared_are_forgotten_with_their_image_and_with_the_policy(intercepted: Intercepted) -> None:
    pins = intercepted.made.pins
    with intercepted.made.start(intercepted.plain("on_line")) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        node = pins.node_of(int(children[0]) if children else process.pid)
        assert node is not None
        pins.spare(node)
        assert node in pins.spared()
        intercepted.apply(intercepted.scope)
        assert pins.spared() == frozenset()
        process.communicate("", timeout=10)
    with pytest.raises(AssertionError):
        pins.spare(1 << 60)
        assert pins.spared()


def test_what_is_in_scope_is_the_proxys(intercepted: Intercepted) -> None:
    made = intercepted.made
    with made.start(intercepted.command("talk", f"send:{STARTUP.hex()}", "line", port=PORT)) as process:
        connection, _ = made.listener.accept()
        with connection:
            connection.settimeout(5)
            assert connection.recv(100) == STARTUP
        process.communicate("\n", timeout=10)


# --- while it is off --------------------------------------------------------------------------------------------------


def test_nobody_is_looked_at_unless_the_policy_asks(intercepted: Intercepted) -> None:
    made = intercepted.made
    links = [made.settings.pin_dir / f"link_{name}" for name in abi.PACKET_HOOKS]
    assert all(link.exists() for link in links)
    attached = _programs_on(made.cgroup)
    intercepted.apply(made.scope)
    try:
        assert not any(link.exists() for link in links)
        assert {"on_egress", "on_ingress"} == attached - _programs_on(made.cgroup)
        with serving(made) as server:
            command = intercepted.command(
                "talk", f"send:{b'hello'.hex()}", "recv", "line", f"send:{STARTUP.hex()}", "recv"
            )
            with made.start(command) as process:
                assert process.stdout is not None and process.stdin is not None
                assert process.stdout.readline() == b"hello".hex() + "\n"
                assert process.stdout.readline() == "ready\n"
                # a connection that is older than the programs is left alone
                intercepted.apply(intercepted.scope)
                said, _ = process.communicate("\n", timeout=10)
                assert said.split()[0] == STARTUP.hex()
            assert server.got == [b"hello" + STARTUP]
    finally:
        intercepted.apply(intercepted.scope)


def test_a_daemon_that_comes_back_finds_it_as_it_was(intercepted: Intercepted) -> None:
    """Without a gap: programs, agents and what was seen of connections stay."""
    made = intercepted.made
    began = made.pins.config().intercept
    assert began
    with namespaces.entered(made.netns):
        assert kernel.agents_found(made.settings) == intercepted.scope.agents
        with kernel.start(made.settings, intercepted.scope) as pins:
            assert pins.config().intercept == began
            pins.agents_here = None
    with serving(made):
        intercepted.talk(f"send:{STARTUP.hex()}")
    assert abi.PROTOCOLS[intercepted.told().detail] == "postgresql"


def test_what_somebody_detaches_comes_back(intercepted: Intercepted) -> None:
    made = intercepted.made
    with namespaces.entered(made.netns):
        guard = kernel.Guard(made.settings, made.pins, intercepted.scope)
        try:
            assert guard.repair() == []
            for name in abi.PACKET_HOOKS:
                link = str(made.settings.pin_dir / f"link_{name}")
                subprocess.run(["bpftool", "link", "detach", "pinned", link], check=True)
            made.pins.agents_here, kept = frozenset(), made.pins.agents_here
            found = guard.repair()
            made.pins.agents_here = kept
            assert sum("was detached from the cgroup" in line for line in found) == 2
            assert "the files of agents that are intercepted were changed" in found
            guard.repair()
            assert guard.repair() == []
        finally:
            guard.close()
    assert {"on_egress", "on_ingress"} <= _programs_on(made.cgroup)
    with serving(made):
        intercepted.talk(f"send:{STARTUP.hex()}")
    assert abi.PROTOCOLS[intercepted.told().detail] == "postgresql"


def _programs_on(cgroup: Path) -> set[str]:
    shown = subprocess.run(["bpftool", "cgroup", "show", str(cgroup)], check=True, capture_output=True, text=True)
    return {line.split()[-1] for line in shown.stdout.splitlines()[1:]}


def test_another_build_looks_on_without_a_gap() -> None:
    with bed("intercept-replace") as made:
        scope = dataclasses.replace(made.scope, agents=frozenset({_file(sys.executable)}))
        with namespaces.entered(made.netns):
            kernel.apply_scope(made.settings, made.pins, scope)
        began = made.pins.config().intercept
        made.pins.close()
        made.settings = dataclasses.replace(made.settings, mark=0x77)
        made.scope = scope
        made.load()
        assert made.pins.config().intercept == began
        assert {"on_egress", "on_ingress"} <= _programs_on(made.cgroup)
        events = kernel.Events.open(made.settings.pin_dir)
        try:
            with serving(made):
                made.run(made.command("talk", f"send:{STARTUP.hex()}", port=HIDDEN, address=BEYOND[0]))
            deadline = time.monotonic() + 3
            while not (told := _ours(events)) and time.monotonic() < deadline:
                time.sleep(0.01)
            assert [abi.PROTOCOLS[event.detail] for event in told] == ["postgresql"]
        finally:
            events.close()


def _file(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def test_a_full_ring_stops_no_drop() -> None:
    """A flood of matches loses events, which is counted; not one of them gets through."""
    with bed("intercept-flood", _SMALL_RING) as made:
        scope = dataclasses.replace(made.scope, agents=frozenset({_file(sys.executable)}))
        with namespaces.entered(made.netns):
            kernel.apply_scope(made.settings, made.pins, scope)
        with serving(made) as server:
            source = (
                "import socket\nfor _ in range(200):\n"
                f" client = socket.create_connection(({BEYOND[0]!r}, {HIDDEN}))\n"
                f" client.send(bytes.fromhex({STARTUP.hex()!r})); client.close()\n"
            )
            made.run([sys.executable, "-c", source])
            deadline = time.monotonic() + 10
            while len(server.peers) < 200 and time.monotonic() < deadline:
                time.sleep(0.05)
            assert len(server.peers) == 200
            assert b"".join(server.got) == b""
        counters = made.pins.counters()
        assert counters["hidden"] == 200
        events = kernel.Events.open(made.settings.pin_dir)
        assert len(_ours(events)) < 200
        assert counters["events_lost"] > 0, "the ring was never full: this test shows nothing"
        events.close()


_SMALL_RING = kernel.MapSizes(procs=8192, nodes=32_768, graveyard=16_384, connects=16_384, event_bytes=4096)
