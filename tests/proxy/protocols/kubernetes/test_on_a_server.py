"""The session machine between real clients and a real API server: kubectl, and plain HTTP of the standard library."""

from __future__ import annotations

import contextlib
import gzip
import http.client
import json
import os
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from proxy.masking import masker
from proxy.model import Decision, FieldMask, Operation, Ruling
from tests.lab.kubernetes import GoMissing, KubernetesServer, Node, kubernetes, running_node
from tests.proxy.protocols.kubernetes.playing import ALLOW, APPROVED, DENY
from tests.proxy.protocols.kubernetes.pumping import Pump, running

pytestmark = pytest.mark.e2e

HOLD = replace(ALLOW, decision=Decision.HOLD, message="somebody has to approve", hold_timeout_s=60.0)
REDACT = FieldMask("secrets", (), (), "data.*", "redact", masker("redact", b"k" * 32))


def ruling(operation: Operation) -> Ruling:
    if operation.unclassified or "forbidden" in operation.text:
        return DENY
    return HOLD if "held" in operation.text and operation.requests[0].verb not in ("get", "list") else ALLOW


@pytest.fixture(scope="module")
def server() -> Iterator[KubernetesServer]:
    try:
        started = kubernetes()
        with started as server:
            yield server
    except GoMissing as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def node(server: KubernetesServer) -> Iterator[Node]:
    with running_node(server) as node:
        node.run_pod("shell", ["sh", "-c", "echo started; exec cat"], stdin=True)
        yield node


@pytest.fixture
def pump(server: KubernetesServer) -> Iterator[Pump]:
    with running(Pump(server, ruling)) as pump:
        yield pump
    assert not pump.violations


def kubeconfig(pump: Pump, directory: Path) -> Path:
    """Without a credential: but kubectl asks for a name and password where there is not even a word in its place."""
    return pump.server.write_kubeconfig(
        directory / "kubeconfig", endpoint=pump.endpoint, ca_path=pump.ca_path, token="the-gateway-has-it"
    )


Kubectl = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def kubectl(pump: Pump, tmp_path: Path) -> Kubectl:
    """kubectl, through the gateway."""
    path = kubeconfig(pump, tmp_path)

    def run(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [pump.server.programs.kubectl, *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            env=pump.server.environment(path),
        )

    return run


@contextlib.contextmanager
def connected(pump: Pump) -> Iterator[http.client.HTTPSConnection]:
    context = ssl.create_default_context(cafile=str(pump.ca_path))
    with contextlib.closing(
        http.client.HTTPSConnection("127.0.0.1", pump.port, context=context, timeout=30)
    ) as connection:
        yield connection


def read(connection: http.client.HTTPSConnection, method: str, path: str, *args: object) -> tuple[int, bytes]:
    connection.request(method, path, *args)  # type: ignore[arg-type]
    response = connection.getresponse()
    return response.status, response.read()


def test_kubectl_creates_reads_changes_and_deletes(kubectl: Kubectl, pump: Pump) -> None:
    manifest = json.dumps({"kind": "ConfigMap", "apiVersion": "v1", "metadata": {"name": "a"}, "data": {"k": "v"}})
    assert kubectl("create", "-f", "-", stdin=manifest).stdout == "configmap/a created\n"
    for words, said in (
        (("get", "configmap", "a", "-o", "jsonpath={.data.k}"), "v"),
        (("patch", "configmap", "a", "-p", '{"data":{"k":"w"}}'), "configmap/a patched"),
        (("get", "configmaps"), "a "),
        (("label", "configmap", "a", "x=y"), "configmap/a labeled"),
        (("get", "configmap", "a", "-o", "yaml"), "k: w"),
        (("explain", "pod.spec"), "containers"),
        (("delete", "configmap", "a"), 'configmap "a" deleted'),
    ):
        done = kubectl(*words)
        assert done.returncode == 0 and said in done.stdout, (words, done)
    manifest = manifest.replace('"a"', '"b"')
    for flags in ((), ("--server-side", "--force-conflicts")):
        assert kubectl("apply", "-f", "-", *flags, stdin=manifest).returncode == 0
    assert all(not operation.unclassified for operation in pump.asked)


def test_kubectl_prints_a_denial_as_a_sentence(kubectl: Kubectl, pump: Pump) -> None:
    done = kubectl("get", "pods", "-n", "forbidden")
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "Error from server (Forbidden): hop `a` may not do this (rule `no`); ask the owners of the policy"
    )


def test_a_held_change_is_shown_with_the_servers_own_dry_run_and_said_to_be_approved(
    kubectl: Kubectl, pump: Pump
) -> None:
    pump.server.kubectl("create", "deployment", "web-held", "--image=one", "--replicas=2")
    pump.commands.clear()
    done = kubectl("scale", "deployment", "web-held", "--replicas=0")
    assert done.returncode == 0 and "scaled" in done.stdout
    assert "Warning: approved by ada" in done.stderr
    assert "-  replicas: 2\n" in pump.previews[0]
    done = kubectl("set", "image", "deployment/web-held", "one=two")
    assert done.returncode == 0
    assert "image: one" in pump.previews[-1] and "+" in pump.previews[-1] and "image: two" in pump.previews[-1]
    pump.decide = lambda operation: DENY
    done = kubectl("delete", "deployment", "web-held")
    assert "Forbidden" in done.stderr and "name: web-held" in pump.previews[-1]
    assert kubectl("get", "deployment", "web-held").returncode == 0
    pump.decide = lambda operation: APPROVED
    assert kubectl("delete", "deployment", "web-held").returncode == 0
    assert kubectl("get", "deployment", "web-held").returncode == 1


def test_a_denied_delete_with_options_deletes_nothing(pump: Pump) -> None:
    """The server looks at the body and not at the query for what a dry run is: a preview must not delete."""
    path = "/api/v1/namespaces/default/configmaps"
    pump.decide = lambda operation: DENY
    pump.server.create(path, {"kind": "ConfigMap", "apiVersion": "v1", "metadata": {"name": "kept-held"}})
    bodies = [
        None,
        "{}",
        '{"propagationPolicy":"Foreground"}',
        '{"kind":"DeleteOptions","apiVersion":"v1","dryRun":[]}',
    ]
    with connected(pump) as connection:
        for body in bodies:
            status, _ = read(connection, "DELETE", f"{path}/kept-held", body, {"Content-Type": "application/json"})
            assert status == 403
            assert pump.server.request("GET", f"{path}/kept-held").status == 200
    assert len(pump.previews) == len(bodies) and all("name: kept-held" in text for text in pump.previews)


def test_a_denied_eviction_or_deletion_of_many_does_nothing_and_was_shown(pump: Pump) -> None:
    pump.decide = lambda operation: DENY
    pod = {"kind": "Pod", "apiVersion": "v1", "metadata": {"name": "evicted-held", "labels": {"many": "held"}}}
    pump.server.create(
        "/api/v1/namespaces/default/pods", {**pod, "spec": {"containers": [{"name": "c", "image": "i"}]}}
    )
    eviction = {"kind": "Eviction", "apiVersion": "policy/v1", "metadata": {"name": "evicted-held"}}
    bodies = [
        {},
        {"deleteOptions": {}},
        {"deleteOptions": {"gracePeriodSeconds": 0}},
        {"deleteOptions": {"dryRun": []}},
    ]
    pods = "/api/v1/namespaces/default/pods"
    asked = [("POST", f"{pods}/evicted-held/eviction", {**eviction, **body}) for body in bodies]
    asked += [("DELETE", f"{pods}?labelSelector=many%3Dheld", body) for body in (None, {}, {"gracePeriodSeconds": 0})]
    with connected(pump) as connection:
        for method, path, body in asked:
            sent = None if body is None else json.dumps(body)
            assert read(connection, method, path, sent, {"Content-Type": "application/json"})[0] == 403
            assert "deletionTimestamp" not in pump.server.request("GET", f"{pods}/evicted-held").json()["metadata"]
    assert len(pump.previews) == len(asked)
    assert all("-  name: evicted-held" in text for text in pump.previews[: len(bodies)]), pump.previews
    assert all("would delete 1)\n-evicted-held in default" in text for text in pump.previews[len(bodies) :])
    pump.server.request("DELETE", f"{pods}/evicted-held?gracePeriodSeconds=0")


def test_a_refusal_by_the_server_is_in_the_preview(kubectl: Kubectl, pump: Pump) -> None:
    manifest = json.dumps({"kind": "Service", "apiVersion": "v1", "metadata": {"name": "held"}, "spec": {"ports": []}})
    done = kubectl("create", "--validate=false", "-f", "-", stdin=manifest)
    assert done.returncode == 1 and "422" in pump.previews[0] and "spec.ports" in pump.previews[0]


def test_secrets_are_masked_for_kubectl(server: KubernetesServer, tmp_path: Path) -> None:
    server.kubectl("create", "secret", "generic", "s", "--from-literal=p=marker-4711")
    with running(Pump(server, masks=(REDACT,))) as pump:
        path = kubeconfig(pump, tmp_path)
        for words in (
            ("get", "secret", "s", "-o", "yaml"),
            ("get", "secrets", "-o", "json"),
            ("describe", "secret", "s"),
        ):
            done = subprocess.run(
                [server.programs.kubectl, *words],
                capture_output=True,
                text=True,
                env=server.environment(path),
                timeout=60,
            )
            assert done.returncode == 0 and "marker-4711" not in done.stdout and "bWFya2VyLTQ3MTE" not in done.stdout
        with connected(pump) as connection:
            _, body = read(connection, "GET", "/api/v1/namespaces/default/secrets", None, {"Accept-Encoding": "gzip"})
            assert b"bWFya2VyLTQ3MTE" not in body and b"Kioq" in body
    assert any("secrets data.*" in done.masked for done in pump.done)


def test_what_the_server_quotes_of_an_object_is_not_recorded(kubectl: Kubectl, pump: Pump) -> None:
    """A patch that does not fit makes the server quote the whole object."""
    pump.server.kubectl("create", "secret", "generic", "quoted", "--from-literal=p=marker-4711")
    pump.server.kubectl("create", "configmap", "quoted", "--from-literal=p=marker-4711")
    for kind, marker in (("secret", "bWFya2VyLTQ3MTE"), ("configmap", "marker-4711")):
        done = kubectl("patch", kind, "quoted", "--type=merge", "-p", '{"metadata":{"labels":5}}')
        assert done.returncode == 1 and marker in done.stderr
    errors = [done.error for done in pump.done if done.error]
    assert len(errors) == 2 and all(error.startswith("422") and "4711" not in error for error in errors)
    assert not any("bWFya2VyLTQ3MTE" in error for error in errors)


def test_a_watch_tells_what_happens_as_it_happens(pump: Pump) -> None:
    path = "/api/v1/namespaces/default/configmaps"
    events: list[dict[str, object]] = []
    with connected(pump) as connection:
        connection.request("GET", f"{path}?watch=true&fieldSelector=metadata.name%3Dwatched")
        response = connection.getresponse()
        assert response.status == 200
        pump.server.create(path, {"kind": "ConfigMap", "apiVersion": "v1", "metadata": {"name": "watched"}})
        events.append(json.loads(response.readline()))
        pump.server.request("DELETE", f"{path}/watched")
        events.append(json.loads(response.readline()))
    assert [event["type"] for event in events] == ["ADDED", "DELETED"]
    deadline = time.monotonic() + 10
    while not pump.done and time.monotonic() < deadline:
        time.sleep(0.05)
    assert pump.done[-1].tag == "200 OK" and "client left" in pump.done[-1].error


def test_a_kept_connection_serves_many_requests_and_the_server_sees_each(pump: Pump) -> None:
    since = pump.server.audit_size()
    with connected(pump) as connection:
        for number in range(50):
            assert read(connection, "GET", f"/api/v1/namespaces/default/pods?limit={number + 1}")[0] == 200
    time.sleep(0.5)
    assert len(pump.done) == 50
    seen = [event["requestURI"] for event in pump.server.audit(since=since) if "limit=" in event["requestURI"]]
    assert len(set(seen)) == 50


def test_large_lists_arrive_whole_compressed_and_not(pump: Pump) -> None:
    path = "/api/v1/namespaces/default/configmaps"
    data = {"blob": os.urandom(100_000).hex()}
    for number in range(25):
        metadata = {"name": f"large-{number}", "labels": {"large": "yes"}}
        pump.server.create(path, {"kind": "ConfigMap", "apiVersion": "v1", "metadata": metadata, "data": data})
    direct = pump.server.request("GET", f"{path}?labelSelector=large%3Dyes").body
    with connected(pump) as connection:
        for encoding in ("identity", "gzip"):
            headers = {"Accept-Encoding": encoding, "Accept": "application/json"}
            connection.request("GET", f"{path}?labelSelector=large%3Dyes", None, headers)
            response = connection.getresponse()
            body = response.read()
            if response.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            assert len(body) > 5_000_000 and json.loads(body)["items"] == json.loads(direct)["items"]


def test_bodies_are_waited_for_and_bounded_as_the_server_has_it(pump: Pump) -> None:
    path = "/api/v1/namespaces/default/configmaps"
    value = {"kind": "ConfigMap", "apiVersion": "v1", "metadata": {"name": "big"}, "data": {"x": "y" * 900_000}}
    with connected(pump) as connection:
        status, _ = read(connection, "POST", path, json.dumps(value).encode(), {"Content-Type": "application/json"})
        assert status == 201
        value["data"] = {"x": "y" * 4_000_000}
        status, body = read(connection, "POST", path, json.dumps(value).encode(), {"Content-Type": "application/json"})
        assert status == 413 and json.loads(body)["kind"] == "Status"
    with connected(pump) as connection:
        status, body = read(connection, "POST", path, b"x" * 9_000_000, {"Content-Type": "application/json"})
        assert (status, json.loads(body)["reason"]) == (413, "RequestEntityTooLarge")


def test_a_credential_that_the_server_does_not_take_is_the_servers_401(server: KubernetesServer) -> None:
    with running(Pump(server, token="wrong")) as pump, connected(pump) as connection:
        status, body = read(connection, "GET", "/api/v1/pods")
        assert status == 401 and json.loads(body)["reason"] == "Unauthorized"
        status, _ = read(connection, "GET", "/version", None, {"Authorization": f"Bearer {server.token}"})
    assert status == 401 and pump.done[0].error.startswith("401 Unauthorized")


def test_exec_logs_and_their_denial_go_through(kubectl: Kubectl, pump: Pump, node: Node) -> None:
    done = kubectl("exec", "shell", "--", "echo", "hello")
    assert (done.returncode, done.stdout) == (0, "hello\n"), done
    done = kubectl("exec", "-i", "shell", "--", "sh", "-c", "cat; exit 3", stdin="typed")
    assert (done.returncode, done.stdout) == (3, "typed"), done
    assert "started" in kubectl("logs", "shell").stdout
    done = kubectl("exec", "shell", "--", "sh", "-c", "echo one\n\techo two\n")
    assert done.stdout == "one\ntwo\n"
    done = kubectl("exec", "shell", "--", "forbidden")
    assert done.returncode == 1 and "rule `no`" in done.stderr, done


def test_followed_logs_come_as_they_are_written(pump: Pump, node: Node) -> None:
    node.run_pod("writer", ["sh", "-c", "while read line; do echo got $line; done"], stdin=True)
    with connected(pump) as connection:
        connection.request("GET", "/api/v1/namespaces/default/pods/shell/log?follow=true")
        response = connection.getresponse()
        lines: list[bytes] = []
        reader = threading.Thread(target=lambda: lines.append(response.readline()))
        reader.start()
        reader.join(10)
        assert lines == [b"started\n"]
