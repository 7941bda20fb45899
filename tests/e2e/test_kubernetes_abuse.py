"""Hostile clients and hostile servers against the running gateway: refused, bounded, and nothing of it reaches the
other side. The families are those of the unit tests (`tests/proxy/protocols/kubernetes/test_abuse.py`); here they come
over TLS, through worker and session, to a server that logs what it got.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.beds import hostile_server
from tests.e2e.clusters import CLUSTER
from tests.e2e.harbour import Answered, Harbour
from tests.e2e.test_kubernetes_streams import memory_kib, reset_peaks

HOST = "Host: cluster\r\n"
POST = f"POST /api/v1/namespaces/default/configmaps HTTP/1.1\r\n{HOST}Content-Type: application/json\r\n"
GET = f"GET /api/v1/namespaces/default/pods HTTP/1.1\r\n{HOST}"
BODY = '{"apiVersion":"v1","kind":"ConfigMap","metadata":{"name":"smuggled"}}'
SMUGGLED = f"DELETE /api/v1/namespaces/default/configmaps/a HTTP/1.1\r\n{HOST}\r\n"
CHUNK = f"{len(BODY):x}\r\n{BODY}\r\n"
HOSTILE_PORT = 7443
WAITING_S = 4.0

REFUSED = {
    "CL.TE": f"{POST}Content-Length: {len(BODY)}\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{SMUGGLED}",
    "TE.CL": f"{POST}Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n{CHUNK}0\r\n\r\n",
    "two lengths": f"{POST}Content-Length: {len(BODY)}\r\nContent-Length: 0\r\n\r\n{BODY}",
    "two encodings": f"{POST}Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n{CHUNK}0\r\n\r\n",
    "an encoding that is hidden": f"{POST}Transfer-Encoding: \x0bchunked\r\n\r\n{CHUNK}0\r\n\r\n",
    "a space before the colon": f"{POST}Transfer-Encoding : chunked\r\n\r\n{CHUNK}0\r\n\r\n",
    "obs-fold": f"{POST}X: a\r\n b\r\nContent-Length: {len(BODY)}\r\n\r\n{BODY}",
    "a bare LF": f"{POST}X: y\nContent-Length: {len(BODY)}\r\n\r\n{BODY}",
    "a bare CR": f"{POST}X: y\rContent-Length: {len(BODY)}\r\n\r\n{BODY}",
    "a signed length": f"{POST}Content-Length: +{len(BODY)}\r\n\r\n{BODY}",
    "a negative chunk": f"{POST}Transfer-Encoding: chunked\r\n\r\n-1\r\n{BODY}\r\n0\r\n\r\n",
    "a chunk beyond counting": f"{POST}Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n{BODY}\r\n0\r\n\r\n",
    "a chunk that ends too late": f"{POST}Transfer-Encoding: chunked\r\n\r\n{len(BODY):x}\r\n{BODY}XX0\r\n\r\n",
    "an endless extension": f"{POST}Transfer-Encoding: chunked\r\n\r\n4;{'a' * 70_000}\r\n{BODY}\r\n0\r\n\r\n",
    "a chunk's line without CR": f"{POST}Transfer-Encoding: chunked\r\n\r\n{len(BODY):x}\n{BODY}\r\n0\r\n\r\n",
    "two hosts": f"{GET}Host: other\r\n\r\n",
    "no host": "GET /api/v1/namespaces/default/pods HTTP/1.1\r\n\r\n",
    "HTTP/0.9": "GET /api/v1/namespaces/default/pods\r\n\r\n",
    "HTTP/2's preface": "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "CONNECT": f"CONNECT 127.0.0.1:22 HTTP/1.1\r\n{HOST}\r\n",
    "TRACE": f"TRACE /api HTTP/1.1\r\n{HOST}\r\n",
    "an absolute target": f"GET https://127.0.0.1:2379/ HTTP/1.1\r\n{HOST}\r\n",
    "a body of a GET": f"{GET}Content-Length: {len(SMUGGLED)}\r\n\r\n{SMUGGLED}",
    "a head of many bytes": f"{GET}X: {'a' * 200_000}\r\n\r\n",
    "a head of many lines": GET + "".join(f"X-{number}: a\r\n" for number in range(20_000)) + "\r\n",
    "a target of many bytes": f"GET /api/v1/{'a' * 100_000} HTTP/1.1\r\n{HOST}\r\n",
    "no HTTP": "\x16\x03\x01\x02\0\x01\0\r\n\r\n",
    "SSH": "SSH-2.0-OpenSSH_9.2\r\n\r\n",
    "dots": f"GET /api/v1/namespaces/default/../../../../metrics HTTP/1.1\r\n{HOST}\r\n",
    "an encoded slash": f"GET /api/v1/namespaces/default%2Fpods HTTP/1.1\r\n{HOST}\r\n",
    "an unknown upgrade": f"{GET}Connection: Upgrade\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQ\r\n\r\n{SMUGGLED}",
    "WebSocket to what has none": f"{GET}Connection: Upgrade\r\nUpgrade: websocket\r\n"
    f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n{SMUGGLED}",
    "an upgrade of exec to h2c": "POST /api/v1/namespaces/default/pods/shell/exec?command=id&stdout=1 HTTP/1.1\r\n"
    f"{HOST}Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n{SMUGGLED}",
    "the body of an upgrade": "POST /api/v1/namespaces/default/pods/shell/exec?command=id&stdout=1 HTTP/1.1\r\n"
    f"{HOST}Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\nContent-Length: {len(SMUGGLED)}\r\n\r\n{SMUGGLED}",
    "exec without an upgrade": "POST /api/v1/namespaces/default/pods/shell/exec?command=id&stdout=1 HTTP/1.1\r\n"
    f"{HOST}Content-Length: 0\r\nConnection: close\r\n\r\n",
    "a compressed body": f"{POST}Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\n\x1f\x8b\x08\0",
    "JSON nested deeply": f"{POST}Content-Length: 200000\r\nConnection: close\r\n\r\n{'[' * 200_000}",
}


def test_what_two_could_read_differently_is_refused(harbour: Harbour) -> None:
    size = harbour.server.audit_size()
    workers = harbour.workers()
    reset_peaks(workers)
    before = memory_kib(workers)
    answers = harbour.converse("limited", [[text] for text in REFUSED.values()], patience_s=5)
    for name, answered in zip(REFUSED, answers, strict=True):
        assert all(400 <= status < 600 for status in answered.statuses), (name, answered)
        # what follows a refused upgrade is the next request, and judged
        assert len(answered.statuses) <= 1 or answered.statuses == [400, 403], (name, answered)
        # after a denial that cost it nothing the connection goes on
        assert answered.end != "open" or answered.statuses[-1:] == [403], (name, answered)
    assert [verb for verb, _ in harbour.audited(size) if verb not in ("get", "list")] == []
    assert harbour.workers() == workers
    assert max(memory_kib(workers)[pid] - before[pid] for pid in workers) < 40 * 1024
    assert harbour.server.request("GET", "/api/v1/namespaces/default/configmaps/smuggled").status == 404
    assert harbour.server.request("GET", "/api/v1/namespaces/default/pods/shell").status == 200


def test_pipelined_requests_are_judged_one_by_one(harbour: Harbour) -> None:
    mark, size = harbour.mark(), harbour.server.audit_size()
    delete = f"DELETE /api/v1/namespaces/default/configmaps/a HTTP/1.1\r\n{HOST}\r\n"
    last = GET + "Connection: close\r\n\r\n"
    answered = harbour.converse_once("limited", GET + "\r\n" + delete + GET + "\r\n" + delete + last)
    assert answered.statuses == [200, 403, 200, 403, 200]
    assert [each.decision for each in harbour.ruled_since(mark)] == ["allow", "deny", "allow", "deny", "allow"]
    assert [verb for verb, _ in harbour.audited(size)] == ["list"] * 3


def test_what_does_not_end_holds_nobody_up(harbour: Harbour) -> None:
    """Heads and bodies that come slowly, or not at all, and one client that is in a hurry."""
    workers = harbour.workers()
    reset_peaks(workers)
    before = memory_kib(workers)
    slow = [
        [GET, 0.5, "X: y\r\n", 0.5, "X: y\r\n", 2.0],
        [f"{POST}Content-Length: 1000000\r\n\r\n", "{", 1.0, " ", 2.0],
        [f"{POST}Transfer-Encoding: chunked\r\n\r\n", "1\r\n{\r\n", 1.0, "1\r\n \r\n", 2.0],
        [3.0],
    ]
    said: list[list[Answered]] = []
    thread = threading.Thread(target=lambda: said.append(harbour.converse("full", slow * 4, patience_s=0.1)))
    thread.start()
    time.sleep(1)
    begun = time.monotonic()
    done = harbour.kubectl("reader", "get", "pods")
    assert done.returncode == 0 and time.monotonic() - begun < 5
    thread.join(60)
    assert not [each for each in said[0] if 200 in each.statuses]
    assert max(memory_kib(workers)[pid] - before[pid] for pid in workers) < 40 * 1024


# --- hostile servers --------------------------------------------------------------------------------------------------

OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
Speak = Callable[[ssl.SSLSocket], None]


def read_head(connection: ssl.SSLSocket) -> bytes:
    head = b""
    while b"\r\n\r\n" not in head:
        data = connection.recv(65536)
        if not data:
            break
        head += data
    return head


def says(*pieces: bytes, times: int = 1) -> Speak:
    """Answers a request with these bytes, and waits until the gateway leaves."""

    def speak(connection: ssl.SSLSocket) -> None:
        read_head(connection)
        for _ in range(times):
            for piece in pieces:
                connection.sendall(piece)
        while connection.recv(65536):
            pass

    return speak


def says_unasked(data: bytes) -> Speak:
    def speak(connection: ssl.SSLSocket) -> None:
        connection.sendall(data)
        read_head(connection)

    return speak


def leaves(connection: ssl.SSLSocket) -> None:
    read_head(connection)


def leaves_midway(connection: ssl.SSLSocket) -> None:
    read_head(connection)
    connection.sendall(OK + b"Content-Length: 1000\r\n\r\n{")


SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\r\n"
HOSTILE: dict[str, tuple[Speak, int]] = {
    "garbage": (says(b"\xff\xfe\xfd\xfc" * 100_000), 502),
    "another protocol": (says(b"SSH-2.0-OpenSSH_9.2\r\n\r\n"), 502),
    "an endless head": (says(b"HTTP/1.1 200 OK\r\n", *[b"X: " + b"a" * 1000 + b"\r\n"] * 400), 502),
    "endless interim answers": (says(b"HTTP/1.1 103 Early Hints\r\n\r\n", times=200), 502),
    "a chunk without a size": (says(OK + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n{}\r\n0\r\n\r\n"), 502),
    "a chunk beyond counting": (says(OK + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 40 + b"\r\n"), 502),
    "two lengths": (says(OK + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}}"), 502),
    "length and chunks": (says(OK + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"), 502),
    "101 unasked": (says(SWITCH + b"HTTP/1.1 200 OK\r\n\r\n"), 502),
    "a split header": (says(OK + b"X: a\r\r\nContent-Length: 2\r\n\r\n{}"), 502),
    "nothing": (leaves, 502),
}
UNASKED = "an answer before the request"
BROKEN = "an answer that breaks off"


@contextlib.contextmanager
def tls_server(harbour: Harbour, port: int, speak: Speak, *, name: str = CLUSTER) -> Iterator[None]:
    """A server with a certificate of the cluster's CA, which `speak` decides what it says."""
    pair = harbour.server.authority.server("hostile", [name])
    directory = Path(harbour.bed.directory)
    chain = directory / f"hostile-{port}.pem"
    chain.touch(0o600)
    chain.write_bytes(pair.key + pair.certificate)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain)

    def behave(connection: socket.socket) -> None:
        with contextlib.suppress(ssl.SSLError), context.wrap_socket(connection, server_side=True) as secured:
            speak(secured)

    assert harbour.server.namespace is not None
    with hostile_server(harbour.server.namespace, CLUSTER, port, behave):
        yield


@pytest.fixture(scope="module")
def hostile_targets(harbour: Harbour) -> Iterator[dict[str, int]]:
    """A port for each hostile server, all at the cluster's address, each a target."""
    speaking = {name: speak for name, (speak, _) in HOSTILE.items()}
    speaking[UNASKED] = says_unasked(OK + b"Content-Length: 2\r\n\r\n{}")
    speaking[BROKEN] = leaves_midway
    ports = {name: HOSTILE_PORT + number for number, name in enumerate(speaking)}
    harbour.gateway.write_policy(
        "targets:\n"
        + "".join(
            f"  hostile-{port}: {{protocol: kubernetes, addresses: '{CLUSTER}:{port}', tls: {{ca: cluster-ca.pem}}, "
            "credential: cluster}\n"
            for port in ports.values()
        ),
        "hostile.yaml",
    )
    with contextlib.ExitStack() as stack:
        for name, speak in speaking.items():
            stack.enter_context(tls_server(harbour, ports[name], speak))
        harbour.reload(harbour.policy)
        yield ports
    (harbour.gateway.policy_dir / "hostile.yaml").unlink()
    harbour.reload(harbour.policy)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_server_is_told_of_and_nothing_of_it_is_believed(
    harbour: Harbour, hostile_targets: dict[str, int], name: str
) -> None:
    mark = harbour.mark()
    answered = harbour.converse_once("full", GET + "\r\n", port=hostile_targets[name], patience_s=WAITING_S)
    expected = HOSTILE[name][1]
    begun = b"transfer-encoding: chunked" in answered.received.lower() and answered.statuses == [200]
    assert answered.statuses == [expected] or begun, answered
    assert answered.end != "open", answered
    if begun:
        # it had begun as an answer: the client must not take it for a whole one
        assert not answered.received.endswith(b"0\r\n\r\n")
    else:
        assert b"hostile-" in answered.received or b"server" in answered.received
    (session,) = harbour.sessions_since(mark)
    assert session.reason


def test_an_answer_that_nobody_asked_for_answers_nothing(harbour: Harbour, hostile_targets: dict[str, int]) -> None:
    answered = harbour.converse_once("full", 1.0, GET + "\r\n", port=hostile_targets[UNASKED], patience_s=WAITING_S)
    assert b"{}" not in answered.received and answered.end != "open"


def test_an_answer_that_breaks_off_is_not_taken_for_whole(harbour: Harbour, hostile_targets: dict[str, int]) -> None:
    mark = harbour.mark()
    answered = harbour.converse_once("full", GET + "\r\n", port=hostile_targets[BROKEN], patience_s=WAITING_S)
    assert answered.statuses == [200] and answered.end != "open"
    head, _, body = answered.received.partition(b"\r\n\r\n")
    assert b"content-length: 1000" in head.lower() and body == b"{"
    (session,) = harbour.sessions_since(mark)
    assert "server" in session.reason
