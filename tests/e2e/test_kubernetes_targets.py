"""What a target is spoken to with, and what happens when it is not what it should be: certificates, names, credentials
of every kind, and those that change or end."""

from __future__ import annotations

import base64
import contextlib
import datetime
import json
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.beds import Behaviour, hostile_server
from tests.e2e.clusters import CLUSTER
from tests.e2e.harbour import Harbour, until
from tests.lab.kubernetes import SERVER_NAME
from tests.lab.namespaces import entered

FIRST_PORT = 7143
CERTIFIED = "robot-by-certificate"
PLUGGED = "robot-by-plugin"
KINDS = ("down", "other-ca", "wrong-name", "by-name", "token", "plugin", "certificate", "serving", "expired", "missing")


def passes_on(harbour: Harbour) -> Behaviour:
    """A relay in front of the real server: another address of it."""

    def behave(client: socket.socket) -> None:
        assert harbour.server.namespace is not None
        with entered(harbour.server.namespace):
            server = socket.create_connection((harbour.server.host, harbour.server.port), 10)
        with server:
            server.settimeout(None)
            thread = threading.Thread(target=_copy, args=(client, server), daemon=True)
            thread.start()
            _copy(server, client)

    return behave


def _copy(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def ports(harbour: Harbour) -> Iterator[dict[str, int]]:
    """A target for each of `KINDS`, all of them the real server by a relay, but for the one that is down."""
    server, gateway = harbour.server, harbour.gateway
    found = {name: FIRST_PORT + number for number, name in enumerate(KINDS)}
    shutil.copy(server.other_ca_path, gateway.policy_dir / "other-ca.pem")
    secrets = harbour.bed.directory / "secrets"
    secrets.mkdir(mode=0o700)
    (secrets / "token").touch(0o600)
    (secrets / "token").write_text(server.token)
    server.bind(CERTIFIED, "view")
    server.bind(PLUGGED, "view")
    chain, key = server.client_certificate(CERTIFIED)
    old_chain, old_key = server.client_certificate(CERTIFIED, expired=True)
    for path in (chain, key, old_chain, old_key):
        path.chmod(0o600)
    gateway.write_entry("rotated", {"token_file": str(secrets / "token")})
    gateway.write_entry("certified", {"client_certificate": str(chain), "client_key": str(key)})
    gateway.write_entry("expired", {"client_certificate": str(old_chain), "client_key": str(old_key)})
    gateway.write_entry("plugged", {"exec": {"command": str(_plugin(harbour, secrets)), "env": {"WHO": "x"}}})
    serving = server.authority.server("gateway", [CLUSTER])
    for name, data in (("serving.pem", serving.certificate), ("serving.key", serving.key)):
        (secrets / name).touch(0o600)
        (secrets / name).write_bytes(data)
    gateway.write_entry(
        "serving", {"client_certificate": str(secrets / "serving.pem"), "client_key": str(secrets / "serving.key")}
    )
    more = {
        "other-ca": "tls: {ca: other-ca.pem}, credential: cluster",
        "wrong-name": "tls: {ca: cluster-ca.pem}, credential: cluster, server_name: other.example",
        "by-name": f"tls: {{ca: cluster-ca.pem}}, credential: cluster, server_name: {SERVER_NAME}",
        "token": "tls: {ca: cluster-ca.pem}, credential: rotated",
        "plugin": "tls: {ca: cluster-ca.pem}, credential: plugged",
        "certificate": "tls: {ca: cluster-ca.pem}, credential: certified",
        "serving": "tls: {ca: cluster-ca.pem}, credential: cluster, serving: serving",
        "expired": "tls: {ca: cluster-ca.pem}, credential: expired",
        "missing": "tls: {ca: cluster-ca.pem}, credential: nobody-wrote-it",
    }
    text = "targets:\n" + "".join(
        f"  {name}: {{protocol: kubernetes, addresses: '{CLUSTER}:{port}', "
        f"{more.get(name, 'tls: {ca: cluster-ca.pem}, credential: cluster')}}}\n"
        for name, port in found.items()
    )
    gateway.write_policy(text, "targets.yaml")
    assert server.namespace is not None
    with contextlib.ExitStack() as stack:
        for name, port in found.items():
            if name != "down":
                stack.enter_context(hostile_server(server.namespace, CLUSTER, port, passes_on(harbour)))
        harbour.reload(harbour.policy)
        yield found
    (gateway.policy_dir / "targets.yaml").unlink()
    harbour.reload(harbour.policy)


def _plugin(harbour: Harbour, directory: Path) -> Path:
    """A credential plug-in that gives a certificate of an hour."""
    chain, key = harbour.server.client_certificate(PLUGGED)
    until_when = datetime.datetime.now(datetime.UTC) + datetime.timedelta(hours=1)
    given = {
        "apiVersion": "client.authentication.k8s.io/v1",
        "kind": "ExecCredential",
        "status": {
            "clientCertificateData": chain.read_text(),
            "clientKeyData": key.read_text(),
            "expirationTimestamp": until_when.strftime("%Y-%m-%dT%H:%M:%SZ"),
        },
    }
    made = directory / "plugin"
    made.touch(0o700)
    made.write_text(f"#!/bin/sh\necho {base64.b64encode(json.dumps(given).encode()).decode()} | base64 -d\n")
    made.chmod(0o700)
    return made


WHOAMI = "auth whoami -o jsonpath={.status.userInfo.username}"


def told(harbour: Harbour, port: int, command: str = "get pods", *, ca_path: Path | None = None, name: str = "") -> str:
    """What kubectl prints, or says why not."""
    config = harbour.server.write_kubeconfig(
        harbour.bed.directory / f"target-{port}.kubeconfig",
        endpoint=f"https://{CLUSTER}:{port}",
        ca_path=ca_path or harbour.gateway.ca_path,
        token="the-gateway-holds-it",
        server_name=name,
    )
    done = harbour.kubectl("full", "--kubeconfig", config, *command.split())
    return done.stdout or done.stderr


def answered(harbour: Harbour, port: int) -> tuple[list[int], str]:
    """What a request by hand is answered with: kubectl's own words hide those of a failed discovery."""
    asked = "GET /api/v1/namespaces/default/pods HTTP/1.1\r\nHost: cluster\r\nConnection: close\r\n\r\n"
    got = harbour.converse_once("full", asked, port=port)
    return got.statuses, json.loads(got.body)["message"]


def test_a_server_that_is_down_is_told_of(harbour: Harbour, ports: dict[str, int]) -> None:
    statuses, said = answered(harbour, ports["down"])
    assert statuses == [503] and "target `down`" in said and "refused" in said
    # kubectl, which has asked nothing there before, begins with discovery, and prints other failures of it only
    said = told(harbour, ports["down"])
    assert 'Error from server (InternalError): an error on the server ("' in said and "target `down`" in said


@pytest.mark.parametrize("kind", ["other-ca", "wrong-name"])
def test_a_server_that_cannot_show_who_it_is_gets_nothing(harbour: Harbour, ports: dict[str, int], kind: str) -> None:
    mark, size = harbour.mark(), harbour.server.audit_size()
    statuses, said = answered(harbour, ports[kind])
    assert statuses == [503] and f"target `{kind}`" in said and "certificate" in said
    assert harbour.server.audit(since=size) == []
    assert all(row.target == kind for row in harbour.sessions_since(mark))


def test_a_server_is_known_by_the_name_that_the_policy_gives_it(harbour: Harbour, ports: dict[str, int]) -> None:
    assert told(harbour, ports["by-name"], "get pods -o name", name=SERVER_NAME) == "pod/shell\n"


@pytest.mark.parametrize("kind, user", [("certificate", CERTIFIED), ("plugin", PLUGGED)])
def test_the_gateway_shows_a_client_certificate(harbour: Harbour, ports: dict[str, int], kind: str, user: str) -> None:
    assert told(harbour, ports[kind], WHOAMI) == user


def test_an_expired_certificate_is_the_servers_to_refuse(harbour: Harbour, ports: dict[str, int]) -> None:
    statuses, said = answered(harbour, ports["expired"])
    assert (statuses, said) == ([401], "Unauthorized")


def test_a_credential_that_is_not_there_is_told_of(harbour: Harbour, ports: dict[str, int]) -> None:
    size = harbour.server.audit_size()
    statuses, said = answered(harbour, ports["missing"])
    assert statuses == [403] and "credential" in said
    assert "/credentials/" not in said
    assert harbour.server.audit(since=size) == []


def test_a_certificate_of_the_clusters_own_authority_is_served(harbour: Harbour, ports: dict[str, int]) -> None:
    """A kubeconfig of the cluster, with its own CA in it, works as it is."""
    assert told(harbour, ports["serving"], WHOAMI, ca_path=harbour.server.ca_path) == "hopgate"
    assert "certificate" in told(harbour, ports["token"], ca_path=harbour.server.ca_path)
    made = harbour.gateway.cli("kubeconfig", "serving").stdout
    assert base64.b64encode(harbour.server.ca_pem).decode() in made.replace("\n", "").replace(" ", "")


def test_a_token_is_rotated_under_a_kept_connection(harbour: Harbour, ports: dict[str, int]) -> None:
    """The first is refused by the server from the moment that the file is another's; nobody connects anew."""
    path = harbour.bed.directory / "secrets" / "token"
    ask = "POST /apis/authentication.k8s.io/v1/selfsubjectreviews HTTP/1.1\r\nHost: x\r\n"
    body = '{"apiVersion":"authentication.k8s.io/v1","kind":"SelfSubjectReview"}'
    asked = f"{ask}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    said: list[bytes] = []
    thread = threading.Thread(
        target=lambda: said.append(
            harbour.converse_once(
                "full", asked, (b'"hopgate"',), 34.0, asked, port=ports["token"], patience_s=2
            ).received
        )
    )
    thread.start()
    size = harbour.server.audit_size()
    until(lambda: harbour.server.audit(since=size), "the first request")
    try:
        path.write_text(harbour.server.tokens["developer"])
        thread.join(60)
    finally:
        path.write_text(harbour.server.token)
    assert said[0].count(b"HTTP/1.1 201") == 2
    assert said[0].count(b'"username":"hopgate"') == 1
    assert said[0].count(b'"username":"developer"') == 1
