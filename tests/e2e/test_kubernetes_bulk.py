"""Half a gigabyte each way through the API server's proxy to a pod, and what else HTTP does with bodies: to the byte,
in bounded memory, and no faster than who is slow."""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.e2e.clients.bulk import BLOCK, blocks
from tests.e2e.clusters import CLUSTER
from tests.e2e.harbour import HERE, POD, Harbour, until
from tests.e2e.test_kubernetes_streams import GIVEN_MEMORY_KIB, memory_kib, reset_peaks
from tests.lab.namespaces import entered

BACKEND_PORT = 8090
SIZE = 500_000_000
LARGE = 150_000_000
MIDDLE = 5_000_000
WAY_BYTES = 48 * 1024 * 1024
"""What may be under way between a backend and a client that has stopped: socket buffers of three hops, for the most."""
PROXY = f"/api/v1/namespaces/default/pods/{POD}:{BACKEND_PORT}/proxy"
CONFIGMAPS = "/api/v1/namespaces/default/configmaps"
OBJECT = json.dumps(
    {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "expected"}, "data": {"a": "x" * 900_000}}
).encode()
POLICY = """\
rules:
  - {name: full-proxies, agents: full, targets: cluster, verbs: create, resources: [pods/proxy], decision: allow}
"""


class Backend:
    """What a pod serves: `/down/SIZE` with a length, `/chunks/SIZE` without one and with a trailer, `/packed/SIZE` in
    gzip; `/up` says what came, `/sleepy` does so and reads nothing for 3 s after the first block."""

    def __init__(self) -> None:
        self.moved = 0
        self.heads: list[dict[str, str]] = []
        self.paused_at: int | None = None


def handler(backend: Backend) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def _note(self) -> None:
            backend.heads.append({name.lower(): value for name, value in self.headers.items()})

        def do_GET(self) -> None:
            self._note()
            _, how, size = self.path.split("/")
            self.send_response(200)
            self.send_header("Content-Type", "application/octet-stream")
            if how == "packed":
                packed = gzip.compress(b"".join(blocks(int(size))), 1)
                self.send_header("Content-Encoding", "gzip")
                self.send_header("Content-Length", str(len(packed)))
                self.end_headers()
                self.wfile.write(packed)
                return
            chunked = how == "chunks"
            self.send_header(*(("Transfer-Encoding", "chunked") if chunked else ("Content-Length", size)))
            if chunked:
                self.send_header("Trailer", "X-Sum")
            self.end_headers()
            for block in blocks(int(size)):
                self.wfile.write(b"%x\r\n%b\r\n" % (len(block), block) if chunked else block)
                backend.moved += len(block)
            if chunked:
                self.wfile.write(b"0\r\nX-Sum: of-the-trailer\r\n\r\n")

        def do_POST(self) -> None:
            self._note()
            digest, size = hashlib.sha256(), 0
            for data in self._body():
                digest.update(data)
                if size == 0 and self.path == "/sleepy":
                    time.sleep(3)
                size += len(data)
                backend.moved = size
            said = json.dumps({"size": size, "sha256": digest.hexdigest()}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def _body(self) -> Iterator[bytes]:
            if self.headers.get("Transfer-Encoding") == "chunked":
                while length := int(self.rfile.readline().split(b";")[0], 16):
                    yield self.rfile.read(length)
                    self.rfile.readline()
                while self.rfile.readline().strip():
                    pass
                return
            left = int(self.headers.get("Content-Length", 0))
            while left:
                data = self.rfile.read(min(left, BLOCK))
                left -= len(data)
                yield data

    return Handler


@pytest.fixture(scope="module")
def backend(harbour: Harbour) -> Iterator[Backend]:
    assert harbour.server.namespace is not None
    made = Backend()
    with entered(harbour.server.namespace):
        server = ThreadingHTTPServer((CLUSTER, BACKEND_PORT), handler(made))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    harbour.gateway.write_policy(POLICY, "proxies.yaml")
    harbour.reload(harbour.policy)
    yield made
    (harbour.gateway.policy_dir / "proxies.yaml").unlink()
    harbour.reload(harbour.policy)
    server.shutdown()
    server.server_close()


@functools.cache
def digest_of(size: int) -> str:
    digest = hashlib.sha256()
    for block in blocks(size):
        digest.update(block)
    return digest.hexdigest()


def move(harbour: Harbour, way: str, path: str, *more: object) -> dict[str, Any]:
    program = [os.path.realpath(sys.executable), "-I", HERE / "clients" / "bulk.py"]
    done = harbour.run(
        "full",
        [*program, CLUSTER, "6443", harbour.gateway.ca_path, way, PROXY + path, *map(str, more)],
        timeout_s=120,
    )
    assert done.returncode == 0, done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


class Memory:
    """What the workers grow by between two calls, in KiB at the most."""

    def __init__(self, harbour: Harbour) -> None:
        self._workers = harbour.workers()
        reset_peaks(self._workers)
        self._before = memory_kib(self._workers)

    @property
    def grown_kib(self) -> int:
        now = memory_kib(self._workers)
        return max(now[pid] - self._before[pid] for pid in self._workers)


@pytest.mark.parametrize("how", ["down", "chunks"])
def test_half_a_gigabyte_comes_down(harbour: Harbour, backend: Backend, how: str) -> None:
    move(harbour, "down", f"/{how}/{MIDDLE}")
    memory = Memory(harbour)
    told = move(harbour, "down", f"/{how}/{SIZE}")
    assert (told["status"], told["size"], told["sha256"]) == (200, SIZE, digest_of(SIZE))
    assert memory.grown_kib < GIVEN_MEMORY_KIB


def test_half_a_gigabyte_goes_up(harbour: Harbour, backend: Backend) -> None:
    move(harbour, "up", "/up", MIDDLE)
    memory = Memory(harbour)
    told = move(harbour, "up", "/up", SIZE)
    assert told["status"] == 200
    assert backend.moved == SIZE
    assert told["sha256"] == hashlib.sha256(json.dumps({"size": SIZE, "sha256": digest_of(SIZE)}).encode()).hexdigest()
    assert memory.grown_kib < GIVEN_MEMORY_KIB


def test_a_client_that_stops_reading_stops_the_backend(harbour: Harbour, backend: Backend) -> None:
    memory = Memory(harbour)
    backend.moved = 0
    told: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: told.append(move(harbour, "down", f"/down/{LARGE}", 6)))
    thread.start()
    under_way = until_it_stands(backend)
    assert 0 < under_way < WAY_BYTES
    thread.join(60)
    assert (told[0]["size"], told[0]["sha256"]) == (LARGE, digest_of(LARGE))
    assert memory.grown_kib < GIVEN_MEMORY_KIB


def until_it_stands(backend: Backend) -> int:
    """How much was moved when nothing more was for a second."""
    until(lambda: backend.moved, "the first block")
    seen = -1
    for _ in range(5):
        if seen == backend.moved:
            break
        seen = backend.moved
        time.sleep(1)
    assert seen == backend.moved, "it does not stand still"
    return seen


def test_a_backend_that_stops_reading_stops_the_client(harbour: Harbour, backend: Backend) -> None:
    memory = Memory(harbour)
    told: list[dict[str, Any]] = []
    thread = threading.Thread(target=lambda: told.append(move(harbour, "up", "/sleepy", LARGE)))
    thread.start()
    time.sleep(2.5)
    assert thread.is_alive()
    assert memory.grown_kib < GIVEN_MEMORY_KIB
    thread.join(60)
    assert told[0]["status"] == 200 and backend.moved == LARGE
    assert memory.grown_kib < GIVEN_MEMORY_KIB


# --- the words of HTTP ------------------------------------------------------------------------------------------------


def test_a_trailer_is_dropped_and_the_body_is_whole(harbour: Harbour, backend: Backend) -> None:
    asked = f"GET {PROXY}/chunks/{MIDDLE} HTTP/1.1\r\nHost: cluster\r\nTE: trailers\r\nConnection: close\r\n\r\n"
    answered = harbour.converse_once("full", asked)
    assert hashlib.sha256(answered.body).hexdigest() == digest_of(MIDDLE)
    assert b"of-the-trailer" not in answered.received
    assert "te" not in backend.heads[-1]


def test_a_compressed_body_passes_as_it_is(harbour: Harbour, backend: Backend) -> None:
    asked = (
        f"GET {PROXY}/packed/{MIDDLE} HTTP/1.1\r\nHost: cluster\r\nAccept-Encoding: gzip\r\nConnection: close\r\n\r\n"
    )
    answered = harbour.converse_once("full", asked)
    assert b"content-encoding: gzip" in answered.received.lower()
    assert hashlib.sha256(answered.body).hexdigest() == digest_of(MIDDLE)


def test_chunks_and_trailers_of_a_client_are_one_body(harbour: Harbour, backend: Backend) -> None:
    pieces = [*blocks(MIDDLE)]
    body = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\nX-Sum: 1\r\n\r\n"
    asked = f"POST {PROXY}/up HTTP/1.1\r\nHost: cluster\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n"
    answered = harbour.converse_once("full", asked.encode() + body)
    assert answered.statuses == [200]
    assert json.loads(answered.body) == {"size": MIDDLE, "sha256": digest_of(MIDDLE)}


@pytest.mark.parametrize(
    "path, body", [(f"{PROXY}/up", b"x" * MIDDLE), (CONFIGMAPS, OBJECT)], ids=["streamed", "judged"]
)
def test_a_client_that_expects_is_told_to_go_on(harbour: Harbour, backend: Backend, path: str, body: bytes) -> None:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: cluster\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        "Expect: 100-continue\r\nConnection: close\r\n\r\n"
    )
    answered = harbour.converse_once("full", head, (b"HTTP/1.1 100 Continue\r\n\r\n",), body)
    try:
        assert answered.statuses in ([100, 200], [100, 201])
    finally:
        harbour.server.request("DELETE", f"{CONFIGMAPS}/expected")


def test_a_client_is_not_told_to_go_on_with_what_is_too_large(harbour: Harbour, backend: Backend) -> None:
    head = (
        f"POST {CONFIGMAPS.replace('configmaps', 'secrets')} HTTP/1.1\r\nHost: cluster\r\nContent-Length: {MIDDLE}\r\n"
        "Content-Type: application/json\r\nExpect: 100-continue\r\n\r\n"
    )
    answered = harbour.converse_once("full", head, patience_s=2)
    assert answered.statuses == [413]
