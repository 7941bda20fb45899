"""The laboratory's cluster is a real one: what kubectl, helm and libraries do directly, without a gateway."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import pty
import select
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.lab.kubernetes import (
    GATEWAY,
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
from tests.lab.namespaces import namespace

TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Cluster:
    server: KubernetesServer
    node: Node
    kubeconfig: Path
    """Of the gateway's user, by token."""

    def environment(self, kubectl: Kubectl | None = None) -> dict[str, str]:
        return {**self.server.environment(self.kubeconfig), **(kubectl.environment if kubectl else {})}

    def run(
        self, command: Sequence[str | Path], *, kubectl: Kubectl | None = None, stdin: str = "", status: int = 0
    ) -> str:
        done = subprocess.run(
            [str(word) for word in command],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            env=self.environment(kubectl),
        )
        assert done.returncode == status, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    built_or_skipped()
    with kubernetes(controllers=True) as server, running_node(server) as node:
        kubeconfig = server.write_kubeconfig(server.directory / "gateway.kubeconfig", token=server.token)
        node.run_pod("shell", ["sh", "-c", "echo started; exec cat"], stdin=True, env={"COLOUR": "green"})
        yield Cluster(server, node, kubeconfig)


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


@contextmanager
def started(cluster: Cluster, kubectl: Kubectl, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [str(kubectl.path), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        bufsize=1,
        env=cluster.environment(kubectl),
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def await_line(process: subprocess.Popen[str], wanted: str) -> str:
    assert process.stdout is not None
    deadline = time.monotonic() + TIMEOUT_S
    seen = ""
    while time.monotonic() < deadline:
        line = process.stdout.readline()
        seen += line
        if wanted in line:
            return line
        if not line:
            break
    raise AssertionError(f"`{wanted}` did not come: {seen}")


def test_objects_are_made_read_changed_and_deleted(cluster: Cluster, kubectl: Kubectl) -> None:
    def run(*arguments: str, stdin: str = "") -> str:
        return cluster.run([kubectl.path, *arguments], kubectl=kubectl, stdin=stdin)

    mark = cluster.server.audit_size()
    manifest = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "colours"}, "data": {"a": "green"}}
    run("create", "-f", "-", stdin=json.dumps(manifest))
    run("patch", "configmap", "colours", "--type=merge", '-p={"data": {"b": "red"}}')
    manifest["data"] = {"a": "blue"}
    run("apply", "--server-side", "--force-conflicts", "-f", "-", stdin=json.dumps(manifest))
    assert json.loads(run("get", "configmap", "colours", "-o", "json"))["data"] == {"a": "blue", "b": "red"}
    assert "colours" in run("get", "configmaps")
    run("delete", "configmap", "colours")
    seen = [
        event["verb"]
        for event in cluster.server.audit(user=GATEWAY, since=mark)
        if event.get("objectRef", {}).get("resource") == "configmaps"
    ]
    assert [verb for verb in seen if verb in ("create", "patch", "delete")] == ["create", "patch", "patch", "delete"]
    assert "list" in seen


def test_a_watch_tells_what_comes(cluster: Cluster, kubectl: Kubectl) -> None:
    with started(cluster, kubectl, "get", "configmaps", "--watch") as watching:
        await_line(watching, "kube-root-ca.crt")
        cluster.server.kubectl("create", "configmap", "late")
        await_line(watching, "late")
    cluster.server.kubectl("delete", "configmap", "late")


def test_logs_are_read_and_followed(cluster: Cluster, kubectl: Kubectl) -> None:
    cluster.node.run_pod("ticker", ["sh", "-c", "i=0; while true; do i=$((i+1)); echo tick $i; sleep 0.2; done"])
    with started(cluster, kubectl, "logs", "--follow", "ticker") as following:
        first = int(await_line(following, "tick").split()[-1])
        await_line(following, f"tick {first + 5}")
    run = cluster.run([kubectl.path, "logs", "--tail=2", "--timestamps", "ticker"], kubectl=kubectl)
    assert [line.split()[1] for line in run.splitlines()] == ["tick", "tick"]
    cluster.server.kubectl("delete", "pod", "ticker", "--force")


def test_exec_passes_input_output_and_the_exit_code(cluster: Cluster, kubectl: Kubectl) -> None:
    command = [kubectl.path, "exec", "-i", "shell", "--", "sh", "-c", "read x; echo $x $COLOUR; echo oops >&2; exit 7"]
    mark = cluster.server.audit_size()
    done = subprocess.run(
        [str(word) for word in command],
        input="apple\n",
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        env=cluster.environment(kubectl),
    )
    assert (done.stdout, done.returncode) == ("apple green\n", 7)
    assert "oops" in done.stderr
    # WebSocket is a GET: the method says nothing about what is asked
    verbs = [
        event["verb"]
        for event in cluster.server.audit(user=GATEWAY, since=mark)
        if event.get("objectRef", {}).get("subresource") == "exec"
    ]
    assert set(verbs) == {"create" if kubectl.speaks_spdy else "get"}


def test_a_large_output_arrives_whole(cluster: Cluster, kubectl: Kubectl) -> None:
    got = cluster.run([kubectl.path, "exec", "shell", "--", "sh", "-c", "seq 1 200000"], kubectl=kubectl)
    assert got == "".join(f"{number}\n" for number in range(1, 200_001))


def test_exec_has_a_terminal_of_the_clients_size(cluster: Cluster, kubectl: Kubectl) -> None:
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
        # the first size travels beside the command: wait until it has arrived
        os.write(leader, b'until [ "$(stty size)" = "41 123" ]; do sleep 0.1; done; tty; echo "<$((6*7))>"; exit 3\n')
        seen = b""
        deadline = time.monotonic() + TIMEOUT_S
        while b"<42>" not in seen and time.monotonic() < deadline:
            if select.select([leader], [], [], 0.5)[0]:
                seen += os.read(leader, 4096)
        assert b"/dev/pts/" in seen, seen
        assert process.wait(TIMEOUT_S) == 3
    finally:
        os.close(leader)


def test_attach_reaches_the_main_process(cluster: Cluster, kubectl: Kubectl) -> None:
    with started(cluster, kubectl, "attach", "-i", "shell") as attached:
        assert attached.stdin is not None
        marker = f"marker-{kubectl.name}"
        attached.stdin.write(f"{marker}\n")
        attached.stdin.flush()
        await_line(attached, marker)
    assert marker in cluster.run([kubectl.path, "logs", "shell"], kubectl=kubectl)


def test_files_are_copied_both_ways(cluster: Cluster, kubectl: Kubectl, tmp_path: Path) -> None:
    content = os.urandom(300_000)
    (tmp_path / "there").write_bytes(content)
    cluster.run([kubectl.path, "cp", tmp_path / "there", "shell:copied"], kubectl=kubectl)
    cluster.run([kubectl.path, "cp", "shell:copied", tmp_path / "back"], kubectl=kubectl)
    assert (tmp_path / "back").read_bytes() == content


def test_a_port_is_forwarded(cluster: Cluster, kubectl: Kubectl) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def echo() -> None:
            for _ in range(2):
                connection, _peer = listener.accept()
                with connection:
                    while data := connection.recv(65536):
                        connection.sendall(data.upper())

        thread = threading.Thread(target=echo, daemon=True)
        thread.start()
        port = listener.getsockname()[1]
        with started(cluster, kubectl, "port-forward", "pod/shell", f":{port}") as forwarding:
            local = int(await_line(forwarding, "Forwarding from 127.0.0.1").split("127.0.0.1:")[1].split()[0])
            for _ in range(2):
                with socket.create_connection(("127.0.0.1", local), TIMEOUT_S) as client:
                    client.sendall(b"a" * 100_000)
                    client.shutdown(socket.SHUT_WR)
                    received = b""
                    while data := client.recv(65536):
                        received += data
                    assert received == b"A" * 100_000
        thread.join(TIMEOUT_S)


def test_helm_installs_upgrades_and_removes_a_release(cluster: Cluster) -> None:
    helm = cluster.server.programs.helm
    chart = Path(__file__).parent / "chart"
    cluster.run([helm, "install", "shop", chart, "--wait", "--timeout=60s"])
    pods = json.loads(cluster.server.kubectl("get", "pods", "-l", "app=shop", "-o", "json"))["items"]
    assert [pod["status"]["phase"] for pod in pods] == ["Running", "Running"]
    secret = json.loads(cluster.server.kubectl("get", "secret", "shop-database", "-o", "json"))
    assert base64.b64decode(secret["data"]["password"]) == b"hunter2"
    cluster.run([helm, "upgrade", "shop", chart, "--set", "replicas=1"])
    assert json.loads(cluster.run([helm, "list", "-o", "json"]))[0]["revision"] == "2"
    cluster.run([helm, "uninstall", "shop", "--wait"])
    assert "shop" not in cluster.server.kubectl("get", "deployments,secrets")


@pytest.mark.parametrize("library", ["kubernetes", "kr8s", "lightkube"])
def test_pythons_libraries_list_watch_and_execute(cluster: Cluster, library: str) -> None:
    program = Path(__file__).parent / "pyclient.py"
    pyclient = [sys.executable, "-I", program, library, cluster.kubeconfig]
    assert "pod shell\n" in cluster.run([*pyclient, "list", "pods"])
    assert "configmap kube-root-ca.crt ca.crt=" in cluster.run([*pyclient, "list", "configmaps"])
    assert "ADDED kube-root-ca.crt" in cluster.run([*pyclient, "watch", "1"])
    if library != "lightkube":
        got = cluster.run([*pyclient, "exec", "shell", "sh", "-c", "echo over; exit 5"], status=5)
        assert got == "over\n"


@pytest.mark.parametrize("encoding", ["json", "protobuf"])
def test_client_go_lists_applies_watches_and_executes(cluster: Cluster, encoding: str) -> None:
    goclient = [cluster.server.programs.goclient, "-kubeconfig", cluster.kubeconfig]
    if encoding == "protobuf":
        goclient.append("-protobuf")
    assert "pod shell Running" in cluster.run([*goclient, "list", "pods"])
    assert cluster.run([*goclient, "apply", "fruit", "a", "apple"]) == "configmap fruit a=apple\n"
    assert "configmap fruit a=apple" in cluster.run([*goclient, "list", "configmaps"])
    assert sorted(cluster.run([*goclient, "watch", "2"]).splitlines()) == ["added fruit", "added kube-root-ca.crt"]
    assert cluster.run([*goclient, "exec", "shell", "sh", "-c", "cat; exit 4"], stdin="hello", status=4) == "hello"
    cluster.server.kubectl("delete", "configmap", "fruit")


def test_a_namespace_is_deleted_and_a_service_account_gets_a_token(cluster: Cluster) -> None:
    cluster.server.kubectl("create", "namespace", "brief")
    token = cluster.server.kubectl("create", "token", "default").strip()
    answer = cluster.server.request("GET", "/api/v1/namespaces/default/pods", token=token)
    assert answer.status == 403 and "system:serviceaccount:default:default" in answer.json()["message"]
    cluster.server.kubectl("delete", "namespace", "brief", "--timeout=50s")


@pytest.mark.kernel
def test_a_cluster_in_a_network_namespace_has_proxied_nodes_and_pods() -> None:
    built_or_skipped()
    with (
        namespace("192.0.2.10") as name,
        kubernetes(address="192.0.2.10", namespace=name) as server,
        running_node(server) as node,
    ):
        node.run_pod("shell", ["sleep", "infinity"])
        assert server.kubectl("exec", "shell", "--", "echo", "hello") == "hello\n"
        assert server.request("GET", "/api/v1/nodes/node/proxy/healthz").body == b"ok"
        listed = server.request("GET", "/api/v1/nodes/node/proxy/pods").json()
        assert [pod["metadata"]["name"] for pod in listed["items"]] == ["shell"]
