"""A masked value leaves in no form: markers in 50 Secrets and 50 ConfigMaps, read in every way that kubectl offers, and
0 of them in what it prints, in recordings, in the log, in what approvers see."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.e2e.harbour import Harbour, Lines
from tests.lab.kubernetes import Kubectl, current_kubectl, oldest_kubectl

MARKER = "marzipan"
COUNT = 50
NAMESPACE = "vault"
NOTE = "example.test/note"
HOPS = (["masked"], ["full", "masked"], ["masked", "full"])


def forms(marker: bytes = MARKER.encode()) -> list[bytes]:
    """The marker as it is, and in base64 at each of its three positions."""
    found = [marker, marker.hex().encode()]
    for shift in range(3):
        encoded = base64.b64encode(b"\0" * shift + marker)
        # the first and last digits depend on the neighbours
        found.append(encoded[4 if shift else 0 : -4])
    return found


FORMS = forms()


def assert_no_marker(where: str, data: bytes) -> None:
    for form in FORMS:
        at = data.find(form)
        assert at < 0, f"{where}: {data[max(0, at - 200) : at + 100]!r}"


def secret(number: int) -> dict[str, object]:
    plain = {"kind": "Secret", "apiVersion": "v1", "metadata": {"name": f"secret-{number}", "namespace": NAMESPACE}}
    data = {"password": base64.b64encode(f"x{MARKER}-{number}".encode()).decode()}
    last = json.dumps({**plain, "data": data, "stringData": {"token": f"{MARKER} {number}"}})
    return {
        **plain,
        "metadata": {
            "name": f"{'hidden' if number % 10 == 9 else 'secret'}-{number}",
            "namespace": NAMESPACE,
            "labels": {"app": "vault"},
            "annotations": {"kubectl.kubernetes.io/last-applied-configuration": last, NOTE: f"{MARKER}{number}"},
        },
        "data": data,
        "stringData": {"token": f"{MARKER} {number}"},
    }


def configmap(number: int) -> dict[str, object]:
    plain = {"kind": "ConfigMap", "apiVersion": "v1", "metadata": {"name": f"config-{number}", "namespace": NAMESPACE}}
    data = {"settings.ini": f"[a]\npassword = {MARKER}{number}\n" * (number % 3 + 1)}
    return {
        **plain,
        "metadata": {
            "name": f"config-{number}",
            "namespace": NAMESPACE,
            "labels": {"app": "vault"},
            "annotations": {
                "kubectl.kubernetes.io/last-applied-configuration": json.dumps({**plain, "data": data}),
                NOTE: f"{MARKER}{number}",
            },
        },
        "data": data,
        "binaryData": {"blob": base64.b64encode(f"\0{MARKER}".encode()).decode()},
    }


@pytest.fixture(scope="module")
def vault(harbour: Harbour) -> Iterator[str]:
    server = harbour.server
    server.create("/api/v1/namespaces", {"metadata": {"name": NAMESPACE}})
    for number in range(COUNT):
        server.create(f"/api/v1/namespaces/{NAMESPACE}/secrets", secret(number))
        server.create(f"/api/v1/namespaces/{NAMESPACE}/configmaps", configmap(number))
    server.create(f"/api/v1/namespaces/{NAMESPACE}/configmaps", {**configmap(1), "metadata": {"name": "held-1"}})
    harbour.bed.node.run_pod(
        "keeper", ["sh", "-c", "echo kept; exec sleep infinity"], namespace=NAMESPACE, env={"PASSWORD": f"{MARKER}-pod"}
    )
    # the markers are there for whoever has no masks
    everything = harbour.kubectl("full", "get", "secrets,configmaps,pods", "-n", NAMESPACE, "-o", "yaml").stdout
    assert sum(everything.count(form.decode()) for form in FORMS) > 4 * COUNT
    yield NAMESPACE
    for kind in ("secrets", "configmaps"):
        server.request("DELETE", f"/api/v1/namespaces/{NAMESPACE}/{kind}")
    server.request("DELETE", f"/api/v1/namespaces/{NAMESPACE}/pods/keeper?gracePeriodSeconds=0")


READS = [
    *(
        f"get {what} -o {how}"
        for what in ("secrets", "configmaps", "pods", "secret/secret-1", "configmap/config-1")
        for how in ("yaml", "json", "wide", "name", "jsonpath={.data}{.items[*].data}{..value}")
    ),
    "get secrets",
    "get configmaps --show-labels",
    "get secrets,configmaps,pods -o yaml",
    "get secrets --show-managed-fields -o yaml",
    "get secrets -l app=vault -o yaml",
    "get secrets --field-selector metadata.name=secret-1 -o yaml",
    "get secrets --chunk-size=7 -o json",
    "get secrets --sort-by=.data.password",
    "get secrets --sort-by=.metadata.name -o yaml",
    "get all -o yaml",
    "get events -o yaml",
    "get secrets -o go-template={{range.items}}{{.data.password|base64decode}}{{.metadata.annotations}}{{end}}",
    "get secrets -o custom-columns=A:.data.password,B:.metadata.annotations,C:.data",
    "get configmaps -o custom-columns=A:.data,B:.binaryData",
    "get secrets -o jsonpath-as-json={.items[*]}",
    "get secrets -A -o yaml",
    "get secrets --server-print=false",
    "get secret hidden-9 -o yaml",
    "describe secrets",
    "describe configmaps",
    "describe secret secret-1",
    "describe configmap config-1",
    "describe pods",
    "explain secret.data",
    "annotate secrets --list --all",
    "label secret secret-1 a=b --overwrite -o yaml",
    "label configmap config-1 a=b --overwrite -o json",
    "annotate configmap config-1 a=b --overwrite -o yaml",
    'patch secret secret-1 --type=merge -p {"metadata":{"labels":{"a":"c"}}} -o yaml',
    'patch configmap config-1 -p {"metadata":{"labels":{"a":"c"}}} -o json',
    'patch configmap config-1 -p {"metadata":{"labels":{"a":"d"}}} --dry-run=server -o yaml',
    'patch secret secret-1 --type=json -p [{"op":"copy","from":"/data/password","path":"/metadata/labels/a"}] -o yaml',
    'patch secret secret-1 --type=json -p [{"op":"test","path":"/data/password","value":"eA=="}] -o yaml',
    "apply view-last-applied secret secret-1",
    "apply view-last-applied configmap config-1 -o json",
    "edit secret secret-1",
    "edit configmap config-1",
    "create secret generic new-one --from-literal=a=b --dry-run=server -o yaml",
    "debug keeper --image=x",
    "set env pod/keeper --list",
    "set env --from=secret/secret-1 pod/keeper --dry-run=server -o yaml",
    "set env --from=configmap/config-1 --list pod/keeper",
    "cluster-info dump --namespaces vault",
    "auth can-i --list",
    "api-resources",
    "exec keeper -- env",
    "attach keeper",
    "cp keeper:x /nonexistent",
    "logs keeper",
    "port-forward keeper :8080",
    "delete secret hidden-9 --dry-run=server",
    "delete configmap config-1 --dry-run=server -o yaml",
    "replace --raw /api/v1/namespaces/vault/secrets/secret-1 -f /dev/null",
    "wait secret/secret-1 --for=jsonpath={.data.password}=eA== --timeout=1s",
]
RAW = [
    "/api/v1/namespaces/vault/secrets",
    "/api/v1/secrets",
    "/api/v1/namespaces/vault/secrets/secret-1",
    "/api/v1/namespaces/vault/secrets/secret-1/",
    "/api/v1/namespaces/vault/secrets/secret%2D1",
    "/api/v1/namespaces/vault/%73ecrets/secret-1",
    "/api/v1/namespaces/vault/secrets?pretty=true",
    "/api/v1/namespaces/vault/secrets?limit=3",
    "/api/v1/namespaces/vault/secrets?as=Table",
    "/api/v1/namespaces/vault/secrets?includeObject=Object",
    "/api/v1/namespaces/vault/secrets?watch=1&timeoutSeconds=1",
    "/api/v1/namespaces/vault/secrets?watch=true&timeoutSeconds=1&allowWatchBookmarks=true",
    "/api/v1/namespaces/vault/secrets?watch=1&timeoutSeconds=1&sendInitialEvents=true&resourceVersionMatch=NotOlderThan",
    "/api/v1/watch/namespaces/vault/secrets?timeoutSeconds=1",
    "/api/v1/watch/secrets?timeoutSeconds=1",
    "/api/v1/watch/namespaces/vault/secrets/secret-1?timeoutSeconds=1",
    "/api/v1/namespaces/vault/secrets?fieldSelector=metadata.name%3Dsecret-1",
    "/api/v1/namespaces/vault/configmaps",
    "/api/v1/namespaces/vault/configmaps?watch=1&timeoutSeconds=1",
    "/api/v1/configmaps?pretty=1",
    "/api/v1/namespaces/vault/pods",
    "/api/v1/namespaces/vault/pods/keeper",
    "/api/v1/namespaces/vault/pods/keeper/status",
    "/api/v1/namespaces/vault/pods/keeper/log",
    "/api/v1/namespaces/vault/pods/keeper/proxy/",
    "/api/v1/nodes/node/proxy/pods",
    "/api/v1/nodes/node/proxy/runningpods/",
    "//api/v1/namespaces/vault/secrets",
    "/api//v1/namespaces/vault/secrets",
    "/api/v1/namespaces/vault/./secrets",
    "/api/v1/namespaces/x/../vault/secrets",
    "/metrics",
    "/openapi/v2",
    "/debug/pprof/",
    "/logs/",
]
ACCEPTED = [
    "application/json;as=Table;v=v1;g=meta.k8s.io,application/json",
    "application/json;as=Table;v=v1beta1;g=meta.k8s.io",
    "application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io",
    "application/json;as=PartialObjectMetadata;v=v1;g=meta.k8s.io",
    "application/vnd.kubernetes.protobuf",
    "application/vnd.kubernetes.protobuf;stream=watch",
    "application/cbor",
    "application/cbor-seq, application/cbor",
    "application/yaml",
    "text/yaml",
    "*/*",
    "application/json, application/vnd.kubernetes.protobuf;q=0.9",
    "application/json;stream=watch",
]


def said_by(
    harbour: Harbour, hops: Sequence[str], arguments: Sequence[str], kubectl: Kubectl, stdin: str = ""
) -> bytes:
    done = harbour.kubectl(
        hops, *arguments, "-n", NAMESPACE, kubectl=kubectl, stdin=stdin, KUBE_EDITOR="cat", EDITOR="cat"
    )
    return (done.stdout + done.stderr).encode()


def test_nothing_that_kubectl_prints_has_a_marker(harbour: Harbour, vault: str) -> None:
    shown = 0
    for number, command in enumerate(READS):
        hops = HOPS[number % len(HOPS)]
        words = command.split(" ")
        if "--" in words:
            words = ["-n", NAMESPACE, *words]
            done = harbour.kubectl(hops, *words)
            said = (done.stdout + done.stderr).encode()
        else:
            said = said_by(harbour, hops, words, current_kubectl())
        assert_no_marker(command, said)
        assert said.strip(), command
        shown += said.count(b"***") + said.count(b"Kioq")
    assert shown > 10 * COUNT


def test_an_old_kubectl_shows_no_more(harbour: Harbour, vault: str) -> None:
    for command in (
        "get secrets -o yaml",
        "get configmaps",
        "describe configmaps",
        "get pods -o json",
        "edit secret secret-1",
    ):
        said = said_by(harbour, ["masked"], command.split(), oldest_kubectl())
        assert_no_marker(command, said)
        assert said.strip()


def test_nothing_that_raw_paths_show_has_a_marker(harbour: Harbour, vault: str) -> None:
    asked = [(path, "application/json") for path in RAW]
    asked += [
        (f"/api/v1/namespaces/{vault}/{path}", accept)
        for accept in ACCEPTED
        for path in ("secrets", "configmaps/config-1", "secrets?watch=1&timeoutSeconds=1", "pods")
    ]
    rest = "Host: cluster\r\nAccept-Encoding: gzip\r\nConnection: close\r\n\r\n"
    heads = [f"GET {path} HTTP/1.1\r\nAccept: {accept}\r\n{rest}" for path, accept in asked]
    masked = 0
    answers = harbour.converse("masked", [[head] for head in heads])
    for head, answered in zip(heads, answers, strict=True):
        assert_no_marker(head, answered.received)
        assert answered.statuses, head
        if answered.end == "eof":
            assert_no_marker(head, answered.body)
        masked += answered.received.count(b"Kioq") + answered.received.count(b"***")
    assert masked > 5 * COUNT


def test_what_is_written_comes_back_without_a_marker(harbour: Harbour, vault: str, tmp_path: Path) -> None:
    shown = harbour.kubectl("masked", "get", "secret", "secret-1", "-n", vault, "-o", "json").stdout
    clean = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "config-2"}, "data": {"other": "1"}}
    files = {
        "shown": shown,
        "clean": json.dumps(clean),
        "labelled": json.dumps({**clean, "metadata": {"name": "config-2", "labels": {"a": "b"}}, "data": {}}),
    }
    for name, text in files.items():
        for command in (
            "apply -f - -o yaml",
            "apply --server-side -f - -o yaml",
            "apply --server-side --force-conflicts --dry-run=server -f - -o yaml",
            "apply --dry-run=server -f - -o json",
            "diff -f -",
            "diff --server-side --force-conflicts -f -",
            "replace -f - -o yaml",
            "create -f - -o yaml",
            'patch -f - --type=merge -p {"metadata":{"labels":{"q":"r"}}} -o yaml',
            "get -f - -o yaml",
            "delete -f - --dry-run=server -o yaml",
        ):
            said = said_by(harbour, ["masked"], command.split(" "), current_kubectl(), stdin=text)
            assert_no_marker(f"{command} < {name}", said)
    # and nothing that was shown as stars was written as stars
    kept = harbour.server.request("GET", f"/api/v1/namespaces/{vault}/secrets/secret-1").json()
    assert base64.b64decode(kept["data"]["password"]).decode() == f"x{MARKER}-1"


def test_a_watch_shows_no_marker(harbour: Harbour, vault: str) -> None:
    with harbour.start("masked", "get", "secrets,configmaps", "-n", vault, "-o", "yaml", "--watch") as refused:
        said = refused.communicate(timeout=20)[0]
        assert_no_marker("watch of two kinds", said.encode())
    for kind, made in (("secrets", secret(100)), ("configmaps", configmap(100))):
        with harbour.start(
            "masked", "get", kind, "-n", vault, "-o", "yaml", "--watch", "--output-watch-events"
        ) as watching:
            lines = Lines(watching)
            lines.await_text("-49")
            harbour.server.create(f"/api/v1/namespaces/{vault}/{kind}", made)
            lines.await_text("-100")
            name = made["metadata"]["name"]  # type: ignore[index]
            harbour.server.request("DELETE", f"/api/v1/namespaces/{vault}/{kind}/{name}")
            lines.await_text("DELETED")
            assert_no_marker(f"watch of {kind}", lines.text.encode())
            assert "hidden" not in lines.text


def test_a_guess_is_not_confirmed(harbour: Harbour, vault: str) -> None:
    """Writing a guess over a masked value in a way that changes nothing when it is right. It comes from a file, since
    the command line of a client is recorded as it is."""
    right, wrong = (base64.b64encode(f"x{MARKER}-{number}".encode()).decode() for number in (1, 2))
    for how, patch in (
        ("--type=merge --dry-run=server", {"data": {"password": "GUESS"}}),
        ("--type=json", [{"op": "test", "path": "/data/password", "value": "GUESS"}]),
    ):
        command = ["patch", "secret", "secret-1", *how.split(), "--patch-file=/dev/stdin"]
        told = [
            said_by(harbour, ["masked"], command, current_kubectl(), stdin=json.dumps(patch).replace("GUESS", guess))
            for guess in (right, wrong)
        ]
        assert told[0] == told[1]
        assert b"(Forbidden)" in told[0] and b"masked-fields" in told[0]


def test_the_approver_sees_no_marker(harbour: Harbour, vault: str) -> None:
    body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "held-1"}, "data": {"other": "2"}}
    with harbour.start("masked", "replace", "-n", vault, "-f", "-") as process:
        assert process.stdin is not None
        process.stdin.write(json.dumps(body))
        process.stdin.close()
        waiting = harbour.await_pending()
        listed = harbour.gateway.cli("approvals").stdout
        harbour.decide(waiting.id, False)
        process.wait(20)
    assert "held-1" in waiting.preview and "***" in waiting.preview
    assert_no_marker("the preview", waiting.preview.encode())
    assert_no_marker("hopgate approvals", listed.encode())


def test_nothing_that_the_gateway_wrote_has_a_marker(harbour: Harbour, vault: str) -> None:
    """Last: whatever the tests above made it write. A guess that a client wrote itself is in no recording either."""
    mark = harbour.mark()
    harbour.kubectl("masked", "get", "secrets,configmaps", "-n", vault, "-o", "yaml")
    assert harbour.sessions_since(mark)
    for what, written in harbour.everything_written():
        assert_no_marker(what, written)
    for session in harbour.sessions()[:3]:
        assert_no_marker(session.id, harbour.gateway.cli("replay", session.id).stdout.encode())
