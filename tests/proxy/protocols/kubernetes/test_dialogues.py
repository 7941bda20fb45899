"""Real clients and a real API server with a tunnel between them: what passes, what is recorded, what is judged.

The gate here does TLS on both sides and leaves alone what is no upgrade; everything else of the machine has tests of
its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import pty
import select
import socket
import ssl
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from proxy.model import Decision, Operation, OperationKind, Reason, RequestFacts, Ruling
from proxy.protocols.base import Observed, PeerViolation, Side
from proxy.protocols.kubernetes.commands import told
from proxy.protocols.kubernetes.requests import Head, classify
from proxy.protocols.kubernetes.streams import Unspoken, offered, open_tunnel
from tests.lab import kubernetes as lab
from tests.lab.kubernetes import (
    Kubectl,
    KubernetesServer,
    Node,
    current_kubectl,
    kubectls,
    kubernetes,
    oldest_kubectl,
    running_node,
)
from tests.lab.kubernetes.presence import built_or_skipped
from tests.proxy.protocols.kubernetes.pumping import Pump, running
from tests.proxy.protocols.kubernetes.tunnels import ALLOW, CLIENT, DENY, ID, SERVER, Session

TIMEOUT_S = 60.0


@dataclass
class Seen:
    """One connection that was switched to another protocol."""

    facts: RequestFacts
    protocol: str
    session: Session


@dataclass
class Gate:
    """Listens, and puts a tunnel into every connection that is switched. `denied` and `held` are ports; a held one is
    allowed after a second."""

    server: KubernetesServer
    directory: Path
    port: int = 0
    seen: list[Seen] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    denied: set[int] = field(default_factory=set)
    held: set[int] = field(default_factory=set)

    async def serve(self, stop: asyncio.Event, ready: threading.Event) -> None:
        pair = self.server.authority.server("127.0.0.1", ["127.0.0.1"])
        certificate, key = self.directory / "gate.pem", self.directory / "gate.key"
        certificate.write_bytes(pair.certificate)
        key.write_bytes(pair.key)
        serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        serving.load_cert_chain(certificate, key)
        serving.set_alpn_protocols(["http/1.1"])
        listening = await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=serving)
        self.port = listening.sockets[0].getsockname()[1]
        ready.set()
        await stop.wait()
        listening.close()

    def rule(self, port: int) -> Ruling | None:
        if port in self.held:
            return None
        return DENY if port in self.denied else ALLOW

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            context = ssl.create_default_context(cafile=str(self.server.ca_path))
            context.set_alpn_protocols(["http/1.1"])
            upstream = await asyncio.open_connection(
                self.server.host, self.server.port, ssl=context, server_hostname=self.server.server_name
            )
            try:
                await self._pass(reader, writer, *upstream)
            finally:
                writer.close()
                upstream[1].close()

    async def _pass(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        from_server: asyncio.StreamReader,
        to_server: asyncio.StreamWriter,
    ) -> None:
        raw = await reader.readuntil(b"\r\n\r\n")
        head = _head(raw)
        session: Session | None = None
        if head.values("upgrade"):
            facts = classify(head).facts
            try:
                head = offered(head)
            except Unspoken as unspoken:
                self.refused.append(str(unspoken))
                return
            lines = [f"{head.method} {head.target} HTTP/1.1", *(f"{name}: {value}" for name, value in head.headers)]
            to_server.write("\r\n".join([*lines, "", ""]).encode("latin-1"))
            answer = await from_server.readuntil(b"\r\n\r\n")
            writer.write(answer)
            if answer.split()[1] == b"101":
                pairs = [(name.encode(), value.encode()) for name, value in _head(answer).headers]
                upgrade = next(value for name, value in pairs if name == b"upgrade")
                numbers = iter(range(ID + 1, 100_000))
                tunnel = open_tunnel(ID, facts, head, upgrade, pairs, lambda: next(numbers), record_input=True)
                session = Session(tunnel, self.rule)
                names = (b"sec-websocket-protocol", b"x-stream-protocol-version")
                chosen = next((value for name, value in pairs if name in names), b"").decode()
                self.seen.append(Seen(facts, f"{upgrade.decode()} {chosen}", session))
        else:
            to_server.write(raw)
        pumps = [
            asyncio.create_task(self._pump(CLIENT, reader, session, writer, to_server)),
            asyncio.create_task(self._pump(SERVER, from_server, session, writer, to_server)),
        ]
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
        if session is not None and not session.tunnel.closed:
            session.end()

    async def _pump(
        self,
        side: Side,
        reader: asyncio.StreamReader,
        session: Session | None,
        to_client: asyncio.StreamWriter,
        to_server: asyncio.StreamWriter,
    ) -> None:
        writers = {CLIENT: to_client, SERVER: to_server}
        other = SERVER if side is CLIENT else CLIENT
        while data := await reader.read(65536):
            if session is None:
                writers[other].write(data)
            else:
                try:
                    session.feed(side, data)
                except PeerViolation as violation:
                    self.violations.append(str(violation))
                    return
                if session.open:
                    asyncio.get_running_loop().call_later(1, self._release, session, writers)
                self._flush(session, writers)
            await writers[other].drain()

    def _release(self, session: Session, writers: dict[Side, asyncio.StreamWriter]) -> None:
        if session.open and not session.tunnel.closed:
            session.answer(ALLOW)
            self._flush(session, writers)

    def _flush(self, session: Session, writers: dict[Side, asyncio.StreamWriter]) -> None:
        for each, writer in writers.items():
            if data := session.take(each):
                writer.write(data)

    def last(self, subresource: str) -> Seen:
        """The last connection for this, once it has ended."""
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            found = [seen for seen in self.seen if seen.facts.subresource == subresource]
            if found and found[-1].session.tunnel.closed:
                return found[-1]
            time.sleep(0.02)
        raise AssertionError(f"no connection for `{subresource}` ended: {self.seen}")


def _head(raw: bytes) -> Head:
    first, *lines = raw.decode("latin-1").rstrip("\r\n").split("\r\n")
    pairs = (line.partition(":") for line in lines)
    method, target, *_ = first.split(" ")
    return Head(method, target, tuple((name.strip().lower(), value.strip()) for name, _, value in pairs))


@dataclass(frozen=True)
class Cluster:
    server: KubernetesServer
    node: Node
    gate: Gate
    kubeconfig: Path

    def environment(self, kubectl: Kubectl) -> dict[str, str]:
        return {**self.server.environment(self.kubeconfig), **kubectl.environment}

    def kubectl(
        self, kubectl: Kubectl, *arguments: str | Path, stdin: bytes = b"", status: int = 0
    ) -> subprocess.CompletedProcess[bytes]:
        done = subprocess.run(
            [str(word) for word in (kubectl.path, *arguments)],
            input=stdin,
            capture_output=True,
            timeout=TIMEOUT_S,
            env=self.environment(kubectl),
        )
        assert done.returncode == status, (done, self.gate.violations)
        return done


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    built_or_skipped()
    directory = tmp_path_factory.mktemp("gate")
    with kubernetes(controllers=True) as server, running_node(server) as node:
        gate = Gate(server, directory)
        loop = asyncio.new_event_loop()
        stop, ready = asyncio.Event(), threading.Event()
        thread = threading.Thread(target=lambda: loop.run_until_complete(gate.serve(stop, ready)))
        thread.start()
        try:
            assert ready.wait(TIMEOUT_S)
            kubeconfig = server.write_kubeconfig(
                directory / "kubeconfig", endpoint=f"https://127.0.0.1:{gate.port}", token=server.token
            )
            node.run_pod("shell", ["sh", "-c", "echo started; exec cat"], stdin=True)
            yield Cluster(server, node, gate, kubeconfig)
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join(TIMEOUT_S)
            loop.run_until_complete(asyncio.sleep(0))
            for task in asyncio.all_tasks(loop):
                task.cancel()
            loop.run_until_complete(asyncio.sleep(0.1))
            loop.close()


@pytest.fixture(params=["current", "current-spdy", "oldest"])
def kubectl(request: pytest.FixtureRequest) -> Kubectl:
    built_or_skipped()
    match request.param:
        case "current":
            return current_kubectl()
        case "oldest":
            return oldest_kubectl()
        case _:
            return kubectls()[-1]


@pytest.fixture(autouse=True)
def no_violation(cluster: Cluster) -> Iterator[None]:
    cluster.gate.denied.clear()
    cluster.gate.held.clear()
    yield
    assert not cluster.gate.violations
    assert not cluster.gate.refused


def test_exec_is_recorded_with_its_exit_code(cluster: Cluster, kubectl: Kubectl) -> None:
    script = "read x; echo got $x; echo oops >&2; exit 7"
    done = cluster.kubectl(kubectl, "exec", "-i", "shell", "--", "sh", "-c", script, stdin=b"apple\n", status=7)
    assert done.stdout == b"got apple\n"
    seen = cluster.gate.last("exec")
    expected = "SPDY/3.1 v4.channel.k8s.io" if kubectl.speaks_spdy else "websocket v5.channel.k8s.io"
    assert seen.protocol == expected
    assert seen.facts.command == ("sh", "-c", script)
    assert seen.session.seen("stdin") == b"apple\n"
    assert seen.session.seen("stdout") == b"got apple\n"
    assert seen.session.seen("stderr") == b"oops\n"
    assert [(completed.tag, completed.error) for completed in seen.session.completed] == [("exit 7", "")]


def test_a_terminal_is_recorded_with_its_size(cluster: Cluster, kubectl: Kubectl) -> None:
    leader, follower = pty.openpty()
    try:
        fcntl.ioctl(leader, termios.TIOCSWINSZ, struct.pack("HHHH", 41, 123, 0, 0))
        process = subprocess.Popen(
            [str(kubectl.path), "exec", "-it", "shell", "--", "sh"],
            stdin=follower,
            stdout=follower,
            stderr=follower,
            start_new_session=True,
            env=cluster.environment(kubectl),
        )
        os.close(follower)
        os.write(leader, b'until [ "$(stty size)" = "41 123" ]; do sleep 0.1; done; echo "<$((6*7))>"; exit 3\n')
        shown = b""
        deadline = time.monotonic() + TIMEOUT_S
        while b"<42>" not in shown and time.monotonic() < deadline:
            if select.select([leader], [], [], 0.5)[0]:
                shown += os.read(leader, 4096)
        assert process.wait(TIMEOUT_S) == 3
    finally:
        os.close(leader)
    seen = cluster.gate.last("exec")
    assert seen.session.seen("resize").startswith(b"123x41")
    assert b"<42>" in seen.session.seen("stdout")
    assert seen.session.seen("stdin").startswith(b"until [")
    assert seen.session.completed[0].tag == "exit 3"


def test_attach_is_recorded(cluster: Cluster, kubectl: Kubectl) -> None:
    marker = f"marker-{kubectl.name}".encode()
    with subprocess.Popen(
        [str(kubectl.path), "attach", "-i", "shell"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=cluster.environment(kubectl),
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(marker + b"\n")
            process.stdin.flush()
            while marker not in process.stdout.readline():
                pass
        finally:
            process.kill()
    seen = cluster.gate.last("attach")
    assert seen.session.seen("stdin") == marker + b"\n"
    assert marker + b"\n" in seen.session.seen("stdout")


def test_large_output_and_copies_pass_whole(cluster: Cluster, kubectl: Kubectl, tmp_path: Path) -> None:
    got = cluster.kubectl(kubectl, "exec", "shell", "--", "seq", "1", "200000").stdout
    assert got == b"".join(b"%d\n" % number for number in range(1, 200_001))
    assert cluster.gate.last("exec").session.seen("stdout") == got
    content = os.urandom(3_000_000)
    (tmp_path / "there").write_bytes(content)
    cluster.kubectl(kubectl, "cp", tmp_path / "there", "shell:copied")
    copied = cluster.gate.last("exec")
    assert told(copied.facts.command).startswith("copies into the pod")
    assert content in copied.session.seen("stdin")
    cluster.kubectl(kubectl, "cp", "shell:copied", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == content
    assert told(cluster.gate.last("exec").facts.command) == "copies out of the pod: copied"


def test_a_command_that_is_not_there_is_an_error(cluster: Cluster, kubectl: Kubectl) -> None:
    done = subprocess.run(
        [str(kubectl.path), "exec", "shell", "--", "/no/such/program"],
        capture_output=True,
        timeout=TIMEOUT_S,
        env=cluster.environment(kubectl),
    )
    assert done.returncode != 0
    (completed,) = cluster.gate.last("exec").session.completed
    assert completed.error or completed.tag.startswith("exit 1")


@contextlib.contextmanager
def echoing() -> Iterator[int]:
    """A port on which everything comes back in capitals."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve(connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):
                while data := connection.recv(65536):
                    connection.sendall(data.upper())

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


class Forwarding:
    """A `kubectl port-forward` and what it says."""

    def __init__(self, cluster: Cluster, kubectl: Kubectl, ports: Sequence[int]) -> None:
        self.process = subprocess.Popen(
            [str(kubectl.path), "port-forward", "pod/shell", *(f":{port}" for port in ports)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=cluster.environment(kubectl),
        )
        self.said = ""
        self.local: dict[int, int] = {}
        try:
            self._await_ports(len(ports))
        except BaseException:
            self.__exit__()
            raise

    def _await_ports(self, count: int) -> None:
        assert self.process.stdout is not None
        while len(self.local) < count:
            line = self.process.stdout.readline()
            assert line, self.said
            self.said += line
            if line.startswith("Forwarding from 127.0.0.1:"):
                local, _, remote = line.removeprefix("Forwarding from 127.0.0.1:").partition(" -> ")
                self.local[int(remote)] = int(local)

    def wait_for(self, text: str) -> None:
        assert self.process.stdout is not None
        while text not in self.said:
            line = self.process.stdout.readline()
            assert line, f"`{text}` was not said: {self.said}"
            self.said += line

    def send(self, port: int, data: bytes) -> bytes:
        with socket.create_connection(("127.0.0.1", self.local[port]), TIMEOUT_S) as client:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            received = b""
            with contextlib.suppress(ConnectionError):
                while more := client.recv(65536):
                    received += more
            return received

    def __enter__(self) -> Forwarding:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(TIMEOUT_S)
        assert self.process.stdout is not None
        self.process.stdout.close()


FORWARDS = {False: "websocket SPDY/3.1+portforward.k8s.io", True: "SPDY/3.1 portforward.k8s.io"}


def test_connections_inside_a_forward_are_judged_and_counted(cluster: Cluster, kubectl: Kubectl) -> None:
    with echoing() as port:
        with Forwarding(cluster, kubectl, [port]) as forwarding:
            for _ in range(3):
                assert forwarding.send(port, b"a" * 100_000) == b"A" * 100_000
        seen = cluster.gate.last("portforward")
    assert seen.protocol == FORWARDS[kubectl.speaks_spdy]
    assert [ask.operation.requests[0].ports for ask in seen.session.asked] == [(port,)] * 3
    tags = [completed.tag for completed in seen.session.completed]
    assert tags == ["100000 bytes sent, 100000 received"] * 3 + ["3 connections"]
    assert not seen.session.observed


def test_many_connections_at_once(cluster: Cluster, kubectl: Kubectl) -> None:
    with echoing() as port:
        with Forwarding(cluster, kubectl, [port]) as forwarding:
            results: list[bool] = []

            def run(number: int) -> None:
                data = b"%d-" % number * 5000
                results.append(forwarding.send(port, data) == data.upper())

            threads = [threading.Thread(target=run, args=(number,)) for number in range(20)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(TIMEOUT_S)
        assert results == [True] * 20
        assert cluster.gate.last("portforward").session.completed[-1].tag == "20 connections"


def test_a_held_connection_waits_and_then_goes_on(cluster: Cluster, kubectl: Kubectl) -> None:
    with echoing() as port, echoing() as free:
        cluster.gate.held.add(port)
        with Forwarding(cluster, kubectl, [port, free]) as forwarding:
            began = time.monotonic()
            assert forwarding.send(port, b"abc") == b"ABC"
            assert time.monotonic() - began >= 1
            assert forwarding.send(free, b"abc") == b"ABC"


def test_a_denied_connection_is_explained_by_kubectl(cluster: Cluster, kubectl: Kubectl) -> None:
    with echoing() as port, echoing() as free:
        cluster.gate.denied.add(port)
        with Forwarding(cluster, kubectl, [port, free]) as forwarding:
            assert forwarding.send(free, b"abc") == b"ABC"
            assert forwarding.send(port, b"abc") == b""
            forwarding.wait_for("denied for agent (ask the owners)")
        seen = cluster.gate.last("portforward")
    assert [ask.operation.requests[0].ports for ask in seen.session.asked] == [(free,), (port,)]
    assert seen.session.completed[-1].tag == "1 connection"


def test_a_port_where_nobody_listens_is_an_error_of_the_connection(cluster: Cluster, kubectl: Kubectl) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closing:
        port = closing.getsockname()[1]
    with Forwarding(cluster, kubectl, [port]) as forwarding:
        assert forwarding.send(port, b"abc") == b""
        forwarding.wait_for("refused")
    completed = cluster.gate.last("portforward").session.completed
    assert "refused" in completed[0].error


FORWARD_WITH_PYTHON = """
import sys
from kubernetes import client, config
from kubernetes.stream import portforward

kubeconfig, *ports = sys.argv[1:]
with config.new_client_from_config(kubeconfig) as api:
    call = client.CoreV1Api(api).connect_get_namespaced_pod_portforward
    forwarding = portforward(call, "shell", "default", ports=",".join(ports))
    for port in map(int, ports):
        local = forwarding.socket(port)
        local.settimeout(20)
        received = b""
        try:
            local.sendall(b"abc" * 1000)
            while len(received) < 3000 and (more := local.recv(65536)):
                received += more
        except OSError:
            pass
        print(port, len(received), received[:3].decode(), forwarding.error(port))
        local.close()
"""


def test_a_forward_over_channels_is_judged_port_by_port(cluster: Cluster) -> None:
    """The Python client's port-forward: ports in the query, two channels of a WebSocket connection for each."""
    with echoing() as port, echoing() as other:
        cluster.gate.denied.add(other)
        done = subprocess.run(
            [sys.executable, "-I", "-c", FORWARD_WITH_PYTHON, str(cluster.kubeconfig), str(port), str(other)],
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
    assert done.returncode == 0, (done, cluster.gate.violations)
    assert f"{port} 3000 ABC None" in done.stdout
    assert f"{other} 0  denied for agent (ask the owners)" in done.stdout
    seen = cluster.gate.last("portforward")
    assert seen.protocol == "websocket v4.channel.k8s.io"
    assert [completed.tag for completed in seen.session.completed] == ["3000 bytes sent, 3000 received", "1 connection"]


@pytest.mark.parametrize("library", ["kubernetes", "kr8s"])
def test_pythons_libraries_execute(cluster: Cluster, library: str) -> None:
    program = Path(lab.__file__).parent / "pyclient.py"
    done = subprocess.run(
        [
            sys.executable,
            "-I",
            str(program),
            library,
            str(cluster.kubeconfig),
            "exec",
            "shell",
            "sh",
            "-c",
            "id; exit 5",
        ],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 5, (done, cluster.gate.violations)
    session = cluster.gate.last("exec").session
    assert session.seen("stdout").decode() == done.stdout
    assert "uid=" in done.stdout
    assert session.completed[0].tag == "exit 5"


def test_client_go_executes(cluster: Cluster) -> None:
    goclient = [str(cluster.server.programs.goclient), "-kubeconfig", str(cluster.kubeconfig)]
    done = subprocess.run(
        [*goclient, "exec", "shell", "sh", "-c", "cat; exit 4"],
        input="hello",
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert (done.returncode, done.stdout) == (4, "hello"), (done, cluster.gate.violations)
    assert cluster.gate.last("exec").session.seen("stdout") == b"hello"


# --- through the whole machine ----------------------------------------------------------------------------------------

HOLD = Ruling(Decision.HOLD, (Reason("agent", "rule", Decision.HOLD, ""),), "held", "", "v1", hold_timeout_s=60)


def test_the_machine_forwards_holds_and_denies_port_by_port(cluster: Cluster, kubectl: Kubectl, tmp_path: Path) -> None:
    with echoing() as free, echoing() as held, echoing() as denied:
        rulings = {(free,): ALLOW, (held,): HOLD, (denied,): DENY}

        def judge(operation: Operation) -> Ruling:
            return rulings[operation.requests[0].ports] if operation.kind is OperationKind.FORWARD else ALLOW

        with running(Pump(cluster.server, judge)) as pump:
            kubeconfig = cluster.server.write_kubeconfig(
                tmp_path / "kubeconfig", endpoint=pump.endpoint, ca_path=pump.ca_path, token="none"
            )
            through = replace(cluster, kubeconfig=kubeconfig)
            with Forwarding(through, kubectl, [free, held, denied]) as forwarding:
                assert forwarding.send(free, b"abc") == b"ABC"
                assert forwarding.send(held, b"abc" * 50_000) == b"ABC" * 50_000
                assert forwarding.send(denied, b"abc") == b""
                forwarding.wait_for("denied for agent (ask the owners)")
            forwards = [operation for operation in pump.asked if operation.kind is OperationKind.FORWARD]
            assert [operation.requests[0].ports for operation in forwards] == [(free,), (held,), (denied,)]
            assert forwards[0].text == f"forward pods/shell in default to {free}"
            assert forwards[1].recorded_text in pump.previews
            deadline = time.monotonic() + TIMEOUT_S
            while "2 connections" not in [done.tag for done in pump.done] and time.monotonic() < deadline:
                time.sleep(0.02)
            tags = [done.tag for done in pump.done]
            assert {"3 bytes sent, 3 received", "150000 bytes sent, 150000 received", "2 connections"} <= set(tags)
            assert not pump.violations


def test_the_machine_records_what_a_command_shows(cluster: Cluster, kubectl: Kubectl, tmp_path: Path) -> None:
    with running(Pump(cluster.server)) as pump:
        kubeconfig = cluster.server.write_kubeconfig(
            tmp_path / "kubeconfig", endpoint=pump.endpoint, ca_path=pump.ca_path, token="none"
        )
        through = replace(cluster, kubeconfig=kubeconfig)
        script = "read x; echo got $x; exit 7"
        done = through.kubectl(kubectl, "exec", "-i", "shell", "--", "sh", "-c", script, stdin=b"apple\n", status=7)
        assert done.stdout == b"got apple\n"
        deadline = time.monotonic() + TIMEOUT_S
        while not any(each.tag.startswith("exit") for each in pump.done) and time.monotonic() < deadline:
            time.sleep(0.02)
        ended = [each.tag for each in pump.done if each.tag.startswith("exit")]
        assert ended == ["exit 7; stdin 6 bytes not recorded"], pump.done
        asked = [operation.text for operation in pump.asked if "exec" in operation.text]
        assert asked == [f"create pods/shell exec in default: sh -c {script}"]
        shown = [each.data for each in pump.commands if isinstance(each, Observed) and each.channel == "stdout"]
        assert b"".join(shown) == b"got apple\n"
        assert not pump.violations
