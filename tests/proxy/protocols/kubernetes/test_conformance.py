"""The conformance suite over the Kubernetes machine.

What is streamed is framed by pieces as they come, so that transcripts are compared as messages, chunks put together.
"""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.model import Operation, Ruling
from proxy.protocols.base import Side
from proxy.protocols.kubernetes import Machine
from tests.proxy.protocols import conformance
from tests.proxy.protocols.conformance import Dialogue, Transcript
from tests.proxy.protocols.kubernetes.playing import (
    ALLOW,
    APPROVED,
    DENY,
    REDACT,
    C,
    S,
    chunked,
    login,
    read_answers,
    read_requests,
    request,
    response,
)

PODS = "/api/v1/namespaces/shop/pods"
SECRETS = "/api/v1/namespaces/shop/secrets"
VALUE = base64.b64encode(b"hunter2").decode()
POD = json.dumps({"kind": "Pod", "apiVersion": "v1", "metadata": {"name": "web"}, "spec": {"n": "ä" * 40}}).encode()
SECRET = json.dumps({"kind": "Secret", "apiVersion": "v1", "metadata": {"name": "s"}, "data": {"p": VALUE}}).encode()
LIST = b'{"kind":"SecretList","apiVersion":"v1","metadata":{},"items":[' + b",".join([SECRET] * 5) + b"]}"
EVENT = b'{"type":"ADDED","object":' + SECRET + b"}\n"
STREAMED = ("200 OK", "Transfer-Encoding: chunked")


def ruling(operation: Operation) -> Ruling:
    if operation.unclassified or "forbidden" in operation.text:
        return DENY
    return APPROVED if "approved" in operation.text else ALLOW


PLAIN = Dialogue(
    "plain",
    Machine,
    login(),
    (
        (C, request("GET", PODS, None, "Accept: application/json", "Authorization: Bearer x")),
        (S, response(POD)),
        (C, request("POST", PODS, POD, "Expect: 100-continue")),
        (S, b"HTTP/1.1 103 Early Hints\r\n\r\n" + response(POD, "201 Created")),
        (C, request("DELETE", PODS + "/forbidden", b"{}") + request("GET", PODS + "/approved")),
        (S, response(b'{"kind":"Status","message":"gone"}', "404 Not Found")),
        (C, request("HEAD", PODS)),
        (S, response(POD)[: -len(POD)]),
        (C, request("GET", "/api/v1/../secrets") + request("GET", PODS + "/a") + request("GET", PODS + "/b")),
        (S, response(b"1")),
        (S, response(b"2", "200 OK", "Connection: close")),
    ),
)
CHUNKED = Dialogue(
    "chunked",
    Machine,
    login(),
    (
        (C, request("POST", PODS, None, "Transfer-Encoding: chunked", "Content-Type: application/json")),
        (C, chunked(POD[:20], POD[20:])),
        (S, response(b"", *STREAMED, length=False)),
        (S, b"3\r\nabc\r\n00000A\r\n0123456789\r\n0\r\nX-Trailer: 1\r\n\r\n"),
        (C, request("PUT", PODS + "/web/proxy/x", None, "Transfer-Encoding: chunked")),
        (C, chunked(b"x" * 300, b"y" * 5)),
        (S, response(b"ok", "201 Created")),
        (C, request("PUT", PODS + "/forbidden/proxy/x", None, "Transfer-Encoding: chunked")),
        (C, chunked(b"x" * 300)),
    ),
)
MASKED = Dialogue(
    "masked",
    Machine,
    login((REDACT,)),
    (
        (C, request("GET", SECRETS, None, "Accept: application/json", "Accept-Encoding: gzip")),
        (S, response(LIST)),
        (C, request("GET", SECRETS + "?watch=1")),
        (S, response(b"", *STREAMED, length=False)),
        (S, chunked(EVENT, EVENT[:30], EVENT[30:])),
        (C, request("GET", SECRETS + "/s")),
        (S, b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n"),
        (S, SECRET),
    ),
)
TLS = Dialogue("tls", Machine, login(), PLAIN.steps[:4], offer_tls=True)
DIALOGUES = (PLAIN, CHUNKED, MASKED, TLS)
dialogues = pytest.mark.parametrize("dialogue", DIALOGUES, ids=lambda dialogue: dialogue.name)
METHODS = {"plain": ("GET", "GET", "GET", "GET", "GET", "HEAD")}


def messages(dialogue: Dialogue) -> conformance.Comparable:
    def comparable(transcript: Transcript) -> object:
        answers = read_answers(bytes(transcript.sent[C]), METHODS.get(dialogue.name, ()))
        requests = read_requests(bytes(transcript.sent[S]))
        return answers, requests, [repr(command) for command in transcript.said]

    return comparable


@dialogues
def test_the_dialogues_go_as_they_should(dialogue: Dialogue) -> None:
    _, transcript = conformance.play(dialogue, ruling)
    statuses = [answer.status for answer in read_answers(bytes(transcript.sent[C]), METHODS.get(dialogue.name, ()))]
    assert (
        statuses
        == {
            "plain": [200, 100, 201, 403, 404, 200, 403, 200, 200],
            "chunked": [200, 201, 403],
            "masked": [200, 200],
            "tls": [200, 100, 201],
        }[dialogue.name]
    )
    assert transcript.closed is (dialogue.name in ("plain", "chunked"))


@dialogues
@settings(max_examples=60, deadline=None)
@given(positions=st.lists(st.integers(0, 2000), max_size=60))
def test_any_chunking_gives_the_same_commands(dialogue: Dialogue, positions: list[int]) -> None:
    conformance.check_chunking(dialogue, ruling, positions, messages(dialogue))


@dialogues
def test_every_byte_alone_gives_the_same_commands(dialogue: Dialogue) -> None:
    conformance.check_every_byte_alone(dialogue, ruling, messages(dialogue))


PIECES = [
    b"GET / HTTP/1.1\r\n",
    b"POST /api/v1/namespaces/a/pods HTTP/1.1\r\n",
    b"HTTP/1.1 200 OK\r\n",
    b"HTTP/1.1 101 Switching Protocols\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\n",
    b"Host: a\r\n",
    b"Content-Length: 5\r\n",
    b"Content-Length: 0\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Connection: close\r\n",
    b"Upgrade: websocket\r\n",
    b"Content-Type: application/json\r\n",
    b"Expect: 100-continue\r\n",
    b"\r\n",
    b"\r\n\r\n",
    b"5\r\nabcde\r\n",
    b"0\r\n\r\n",
    b"{}",
    b"\n",
    b"\0",
    b"FFFFFFFFFFFFFFFF\r\n",
    b" folded\r\n",
]
fragments = st.lists(st.sampled_from(PIECES), max_size=8).map(b"".join)
noise = st.lists(st.tuples(st.sampled_from([C, S]), st.one_of(fragments, st.binary(max_size=60))), max_size=12)


@dialogues
@settings(max_examples=300, deadline=None)
@given(steps=st.integers(0, 12), noise=noise)
def test_arbitrary_bytes_raise_only_peer_violations(
    dialogue: Dialogue, steps: int, noise: list[tuple[Side, bytes]]
) -> None:
    conformance.check_garbage(dialogue, ruling, steps, noise)


@dialogues
@settings(max_examples=300, deadline=None)
@given(step=st.integers(0, 12), position=st.integers(0, 2000), flip=st.integers(1, 255))
def test_one_wrong_byte_raises_only_peer_violations(dialogue: Dialogue, step: int, position: int, flip: int) -> None:
    step %= len(dialogue.steps)
    side, data = dialogue.steps[step]
    broken = bytearray(data)
    broken[position % len(data)] ^= flip
    conformance.check_garbage(dialogue, ruling, step, [(side, bytes(broken)), *dialogue.steps[step + 1 :]])


@dialogues
@pytest.mark.parametrize("side", [C, S])
def test_the_end_of_either_side_closes(dialogue: Dialogue, side: Side) -> None:
    for steps in range(len(dialogue.steps) + 1):
        conformance.check_end(dialogue, ruling, steps, side)


KIB = 1024
MIB = 1024 * KIB
CHUNK = b"a" * (256 * KIB)


def endless(side: Side, *first: bytes, piece: bytes = CHUNK) -> Iterator[tuple[Side, bytes]]:
    yield from ((side, data) for data in first)
    yield from itertools.repeat((side, piece), 80)


ASKED = (C, request("GET", PODS))
FLOODS = {
    "head": (PLAIN, 0, 128 * KIB + MIB, lambda: endless(C, b"GET /", piece=b"a" * 8000)),
    "headers": (PLAIN, 0, 128 * KIB + MIB, lambda: endless(C, b"GET / HTTP/1.1\r\n", piece=b"a: b\r\n" * 1000)),
    "judged body": (PLAIN, 0, 21 * MIB, lambda: endless(C, request("POST", PODS, None, "Content-Length: 8000000"))),
    "judged body in chunks": (
        PLAIN,
        0,
        21 * MIB,
        lambda: endless(
            C,
            request("POST", PODS, None, "Transfer-Encoding: chunked"),
            piece=b"40000\r\n" + CHUNK + b"\r\n",
        ),
    ),
    "tiny chunks": (
        PLAIN,
        0,
        MIB,
        lambda: endless(C, request("POST", PODS, None, "Transfer-Encoding: chunked"), piece=b"1\r\na\r\n" * 500),
    ),
    "streamed body": (
        PLAIN,
        0,
        MIB,
        lambda: endless(C, request("POST", PODS + "/a/proxy/", None, "Content-Length: 999999999")),
    ),
    "refused body": (
        PLAIN,
        0,
        MIB,
        lambda: endless(C, request("POST", PODS + "/forbidden/proxy/", None, "Content-Length: 999999999")),
    ),
    "pipeline": (PLAIN, 0, 5 * MIB, lambda: itertools.repeat((C, request() * 2000), 80)),
    "server's head": (PLAIN, 0, MIB, lambda: [ASKED, *endless(S, b"HTTP/1.1 200 OK\r\n", piece=b"a: " + b"b" * 9000)]),
    "interim answers": (PLAIN, 0, MIB, lambda: [ASKED, *endless(S, piece=b"HTTP/1.1 103 Early\r\n\r\n" * 20)]),
    "answer": (PLAIN, 0, MIB, lambda: [ASKED, *endless(S, b"HTTP/1.1 200 OK\r\n\r\n")]),
    "failure": (PLAIN, 0, MIB, lambda: [ASKED, *endless(S, response(b"", "500 No", length=False))]),
    "trailers": (
        PLAIN,
        0,
        MIB,
        lambda: [ASKED, *endless(S, response(b"", *STREAMED, length=False), b"0\r\n", piece=b"a: b\r\n" * 500)],
    ),
}


@pytest.mark.parametrize("name", FLOODS)
def test_every_buffer_is_bounded(name: str) -> None:
    dialogue, steps, bound, flood = FLOODS[name]
    conformance.check_bounded(dialogue, ruling, steps, flood(), bound=bound)


@pytest.mark.parametrize("verdict", ["", "/forbidden"])
@pytest.mark.parametrize("dialogue", [PLAIN, MASKED], ids=["plain", "masked"])
def test_no_byte_goes_to_the_server_before_its_ruling(dialogue: Dialogue, verdict: str) -> None:
    for method, path in (
        ("GET", "/api/v1/namespaces/marker4711/pods"),
        ("DELETE", "/api/v1/namespaces/marker4711/pods"),
        ("POST", "/api/v1/namespaces/marker4711/pods/web/proxy/x"),
    ):
        operation = request(method, path + verdict, b"{}" if method != "GET" else None)
        conformance.check_nothing_before_its_ruling(dialogue, ruling, 0, operation, b"marker4711")


def test_masked_values_are_in_no_byte_for_the_client() -> None:
    for cuts in (lambda data: (data,), lambda data: [data[i : i + 1] for i in range(len(data))]):
        _, transcript = conformance.play(MASKED, ruling, cuts=cuts)
        assert VALUE.encode() not in transcript.sent[C]
        assert transcript.sent[C].count(b"Kioq") == 7
