"""Request smuggling and other abuse: what two readers could read differently is refused, and nothing of it reaches the
other side. Both peers are hostile.

Sources: RFC 9112 (sections 5 to 7 and 11.2), and the published families of request smuggling: CL.TE, TE.CL, TE.TE,
CL.0, 0.CL, TERM.EXT, EXT.TERM, header injection, h2c upgrade, absolute-form routing.
"""

from __future__ import annotations

import contextlib
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.model import Operation, Ruling
from proxy.protocols.base import AskCredential, AskRuling, PeerViolation
from proxy.protocols.kubernetes import http
from proxy.protocols.kubernetes.http import Chunks, HeadReader, Malformed
from tests.proxy.protocols.kubernetes.playing import ALLOW, DENY, TOKEN, C, Player, S, chunked, request, response

POST = "POST /api/v1/namespaces/shop/pods HTTP/1.1\r\nHost: cluster\r\nContent-Type: application/json\r\n"
GET = "GET /api/v1/namespaces/shop/pods HTTP/1.1\r\nHost: cluster\r\n"
SMUGGLED = "DELETE /smuggled HTTP/1.1\r\nHost: cluster\r\n\r\n"


def refused(player: Player, *pieces: bytes) -> int:
    """Feeds what a session would, to the end; the status of the only answer."""
    try:
        for piece in pieces:
            if not player.closed:
                player.client(piece)
    except PeerViolation as violation:
        assert violation.side is C
        player.carry_out(player.machine.farewell(f"the client broke the protocol: {violation}"))
    (answer,) = [answer for answer in player.answers() if answer.status != 100]
    assert answer.header("connection") == "close" and answer.whole
    return answer.status


REFUSED = {
    # two framings
    "CL.TE": POST + "Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nG",
    "TE.CL": POST + "Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n8\r\nSMUGGLED\r\n0\r\n\r\n",
    "TE and CL in other cases": POST + "transfer-ENCODING: chunked\r\ncontent-LENGTH: 3\r\n\r\n0\r\n\r\n",
    "two lengths": POST + "Content-Length: 2\r\nContent-Length: 4\r\n\r\n{}",
    "two equal lengths": POST + "Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}",
    "two lengths in one": POST + "Content-Length: 2, 2\r\n\r\n{}",
    "two encodings": POST + "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "a list of encodings": POST + "Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "chunked and identity": POST + "Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "identity": POST + "Transfer-Encoding: identity\r\nContent-Length: 2\r\n\r\n{}",
    "xchunked": POST + "Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "quoted": POST + 'Transfer-Encoding: "chunked"\r\n\r\n0\r\n\r\n',
    "a control character before chunked": POST + "Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "a space before the colon": POST + "Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "a tab before the colon": POST + "Content-Length\t: 2\r\n\r\n{}",
    "a folded encoding": POST + "Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
    "a folded header": POST + "X: a\r\n\tb\r\nContent-Length: 2\r\n\r\n{}",
    "a header in front of the request": " X: y\r\n" + POST + "\r\n",
    "a header with a space in front": POST + " Content-Length: 2\r\n\r\n{}",
    "a line break inside the encoding": POST + "X: y\rTransfer-Encoding: chunked\r\n\r\n",
    "a bare LF": POST + "X: y\nTransfer-Encoding: chunked\r\n\r\n",
    "LF only": "GET /api HTTP/1.1\nHost: cluster\n\n",
    "LF LF inside": POST + "X: y\n\n" + SMUGGLED,
    # lengths
    "a negative length": POST + "Content-Length: -1\r\n\r\n",
    "a signed length": POST + "Content-Length: +2\r\n\r\n{}",
    "a hexadecimal length": POST + "Content-Length: 0x2\r\n\r\n{}",
    "an empty length": POST + "Content-Length: \r\n\r\n{}",
    "a length with an underscore": POST + "Content-Length: 1_0\r\n\r\n{}",
    "a length with a space": POST + "Content-Length: 1 0\r\n\r\n{}",
    "a length beyond counting": POST + f"Content-Length: {10**19}\r\n\r\n{{}}",
    "a length of other digits": POST + "Content-Length: \xb2\r\n\r\n{}",
    # heads
    "NUL": GET + "X: a\0b\r\n\r\n",
    "an escape": GET + "X: a\x1b[2Jb\r\n\r\n",
    "a delete": GET + "X: a\x7fb\r\n\r\n",
    "no colon": GET + "X\r\n\r\n",
    "an empty name": GET + ": x\r\n\r\n",
    "a name with a space": GET + "X Y: z\r\n\r\n",
    "a name with a parenthesis": GET + "X(: z\r\n\r\n",
    "no host": "GET /api HTTP/1.1\r\n\r\n",
    "two hosts": GET + "Host: other\r\n\r\n",
    "a host with a path": "GET /api HTTP/1.1\r\nHost: a/b\r\n\r\n",
    "a host with a user": "GET /api HTTP/1.1\r\nHost: a@b\r\n\r\n",
    "an empty host": "GET /api HTTP/1.1\r\nHost:\r\n\r\n",
    "an empty line in front": "\r\n" + GET + "\r\n",
    "a space in the target": "GET /api HTTP/1.1 HTTP/1.1\r\nHost: a\r\n\r\n",
    "a tab in the request line": "GET\t/api HTTP/1.1\r\nHost: a\r\n\r\n",
    "two spaces": "GET  /api HTTP/1.1\r\nHost: a\r\n\r\n",
    "absolute form": "GET http://other/api HTTP/1.1\r\nHost: a\r\n\r\n",
    "asterisk form": "OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n",
    "a relative path": "GET api HTTP/1.1\r\nHost: a\r\n\r\n",
    "a fragment": "GET /api#x HTTP/1.1\r\nHost: a\r\n\r\n",
    "letters beyond ASCII in the target": "GET /\xe4 HTTP/1.1\r\nHost: a\r\n\r\n",
    "no version": "GET /api\r\nHost: a\r\n\r\n",
    "HTTP/0.9": "GET /api\r\n\r\n",
    "HTTP/1.0": "GET /api HTTP/1.0\r\nHost: a\r\n\r\n",
    "HTTP/2.0": "GET /api HTTP/2.0\r\nHost: a\r\n\r\n",
    "HTTP/1.9": "GET /api HTTP/1.9\r\nHost: a\r\n\r\n",
    "the preface of HTTP/2": "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a version in lower case": "GET /api http/1.1\r\nHost: a\r\n\r\n",
    "TLS": "\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03",
    "an answer": "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
    # what takes a judged header away
    "impersonation as hop-by-hop": GET + "Impersonate-User: ada\r\nConnection: close, Impersonate-User\r\n\r\n",
    "the host as hop-by-hop": GET + "Connection: host\r\n\r\n",
}
STATUS = {
    "authority form": (405, "CONNECT cluster:6443 HTTP/1.1\r\nHost: cluster:6443\r\n\r\n"),
    "TRACE": (405, "TRACE /api HTTP/1.1\r\nHost: a\r\nAuthorization: x\r\n\r\n"),
    "another method": (405, "get /api HTTP/1.1\r\nHost: a\r\n\r\n"),
    "an expectation": (417, POST + "Expect: 200-ok\r\nContent-Length: 2\r\n\r\n{}"),
    "a huge head": (431, GET + "X: " + "a" * 70_000 + "\r\n\r\n"),
    "a huge target": (431, "GET /" + "a" * 70_000),
    "many headers": (431, GET + "".join(f"X-{n}: y\r\n" for n in range(300)) + "\r\n"),
}
CASES = {**{name: (400, raw) for name, raw in REFUSED.items()}, **STATUS}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("bytewise", [False, True], ids=["whole", "byte by byte"])
def test_what_could_be_read_in_two_ways_is_refused(name: str, bytewise: bool) -> None:
    status, raw = CASES[name]
    data = raw.encode("latin-1")
    player = Player()
    answered = refused(player, *([data[at : at + 1] for at in range(len(data))] if bytewise else [data]))
    # `Transfer-Encoding`s that are not known have a status of their own (RFC 9112, 6.1)
    assert answered in ((400, 501) if status == 400 else (status,))
    assert player.closed and not player.sent[S] and not player.of(AskRuling)


BROKEN_CHUNKS = {
    "an extension": b"2;a=b\r\n{}\r\n0\r\n\r\n",
    "an extension that hides a line end": b"2;\n{}\r\n0\r\n\r\n",
    "a space behind the size": b"2 \r\n{}\r\n0\r\n\r\n",
    "a space before the size": b" 2\r\n{}\r\n0\r\n\r\n",
    "a signed size": b"+2\r\n{}\r\n0\r\n\r\n",
    "a negative size": b"-2\r\n{}\r\n0\r\n\r\n",
    "0x": b"0x2\r\n{}\r\n0\r\n\r\n",
    "an underscore": b"0_2\r\n{}\r\n0\r\n\r\n",
    "no size": b"\r\n{}\r\n0\r\n\r\n",
    "no number": b"zz\r\n{}\r\n0\r\n\r\n",
    "a size beyond 64 bits": b"1FFFFFFFFFFFFFFFF\r\n{}\r\n0\r\n\r\n",
    "leading zeros without end": b"0" * 40,
    "LF": b"2\n{}\n0\n\n",
    "CR": b"2\r{}\r0\r\r",
    "a longer chunk": b"2\r\n{}}\r\n0\r\n\r\n",
    "no line end behind a chunk": b"2\r\n{}0\r\n\r\n",
    "LF behind a chunk": b"2\r\n{}\n0\r\n\r\n",
    "a folded trailer": b"2\r\n{}\r\n0\r\nX: y\r\n z\r\n\r\n",
    "a trailer with a bare LF": b"2\r\n{}\r\n0\r\nX: y\nZ: a\r\n\r\n",
    "a trailer that is a request": b"2\r\n{}\r\n0\r\nGET /smuggled HTTP/1.1\r\n\r\n",
    "many trailers": b"2\r\n{}\r\n0\r\n" + b"X: y\r\n" * 2000 + b"\r\n",
    "one long trailer": b"2\r\n{}\r\n0\r\nX: " + b"y" * 9000 + b"\r\n\r\n",
}


@pytest.mark.parametrize("name", BROKEN_CHUNKS)
@pytest.mark.parametrize("path", ["/api/v1/namespaces/shop/pods", "/api/v1/namespaces/shop/pods/web/proxy/x"])
def test_chunks_that_could_be_read_in_two_ways_are_refused(name: str, path: str) -> None:
    raw = request("POST", path, None, "Transfer-Encoding: chunked", "Content-Type: application/json")
    player = Player()
    assert refused(player, raw + BROKEN_CHUNKS[name]) in (400, 431)
    assert player.closed
    if "proxy" not in path:
        assert not player.sent[S] and not player.of(AskRuling)
    else:
        assert b"0\r\n\r\n" not in player.sent[S] and b"smuggled" not in player.sent[S]


@pytest.mark.parametrize("name", BROKEN_CHUNKS)
def test_a_server_whose_chunks_could_be_read_in_two_ways_is_not_passed_on(name: str) -> None:
    player = Player().client(request())
    with contextlib.suppress(PeerViolation):
        player.server(response(b"", "200 OK", "Transfer-Encoding: chunked", length=False) + BROKEN_CHUNKS[name])
        assert player.closed
    if not player.closed:
        player.carry_out(player.machine.farewell("the target broke the protocol"))
    (answer,) = player.answers()
    assert not answer.whole or answer.status == 502


BROKEN_ANSWERS = {
    "CL and TE": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "another encoding": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n{}",
    "a folded header": b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\n\r\n",
    "a bare LF": b"HTTP/1.1 200 OK\r\nX: a\nSet-Cookie: b\r\n\r\n",
    "a bare CR": b"HTTP/1.1 200 OK\r\nX: a\rSet-Cookie: b\r\n\r\n",
    "NUL": b"HTTP/1.1 200 OK\r\nX: a\0b\r\n\r\n",
    "no status": b"HTTP/1.1 OK\r\n\r\n",
    "two digits": b"HTTP/1.1 20 OK\r\n\r\n",
    "a greeting": b"220 smtp ready\r\n\r\n",
    "a huge head": b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70_000,
    "many headers": b"HTTP/1.1 200 OK\r\n" + b"X: a\r\n" * 300 + b"\r\n",
    "a switch that nobody asked for": b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n",
    "a request": request("GET", "/smuggled"),
}


@pytest.mark.parametrize("name", BROKEN_ANSWERS)
def test_a_server_that_is_not_understood_is_a_bad_gateway(name: str) -> None:
    player = Player().client(request())
    with pytest.raises(PeerViolation) as violation:
        player.server(BROKEN_ANSWERS[name])
    assert violation.value.side is S
    player.carry_out(player.machine.farewell(f"the target broke the protocol: {violation.value}"))
    (answer,) = player.answers()
    assert answer.status == 502 and player.closed and player.done[0].error


def test_a_server_that_speaks_unasked_is_a_violation() -> None:
    with pytest.raises(PeerViolation):
        Player().server(response())
    player = Player().client(request()).server(response(b"[1]") + response(b"poison"))
    assert [answer.body for answer in player.answers()] == [b"[1]"] and player.closed


def test_an_answer_that_comes_before_its_request_was_allowed_is_a_violation() -> None:
    player = Player(lambda operation: None).client(request())
    with pytest.raises(PeerViolation):
        player.server(response())


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/api/v1/namespaces/shop/pods", ("Upgrade: h2c", "Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AA")),
        ("/api/v1/namespaces/shop/pods", ("Upgrade: h2c", "Connection: Upgrade")),
        ("/api/v1/namespaces/shop/pods?watch=1", ("Upgrade: websocket", "Connection: Upgrade")),
        ("/api/v1/namespaces/shop/pods/web/proxy/", ("Upgrade: websocket", "Connection: Upgrade")),
        ("/api/v1/namespaces/shop/pods/web/exec?command=id", ("Upgrade: h2c", "Connection: Upgrade")),
        ("/api/v1/namespaces/shop/pods/web/exec?command=id", ("Upgrade: websocket, h2c", "Connection: Upgrade")),
        ("/api/v1/namespaces/shop/pods/web/exec?command=id", ("Connection: Upgrade",)),
    ],
)
def test_no_other_protocol_is_switched_to(path: str, headers: tuple[str, ...]) -> None:
    seen: list[Operation] = []

    def judge(operation: Operation) -> Ruling:
        seen.append(operation)
        return DENY if operation.unclassified else ALLOW

    player = Player(judge)
    with contextlib.suppress(PeerViolation):
        player.client(request("GET", path, None, *headers))
    if not player.closed and not player.answers():
        player.carry_out(player.machine.farewell("the client broke the protocol"))
    (answer,) = player.answers()
    assert answer.status == 400 and not player.sent[S]
    assert all(operation.unclassified for operation in seen)


@pytest.mark.parametrize("framing", [b"Content-Length: 5", b"Transfer-Encoding: chunked"])
def test_a_switch_has_no_body_to_anybody(framing: bytes) -> None:
    reader = http.AnswerReader("GET", upgrade=True)
    head = b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n" + framing + b"\r\n\r\n"
    answer = reader.read(head)
    assert (answer.status, answer.framing, answer.headers) == (101, None, [])


def test_what_follows_a_refused_upgrade_is_no_stream() -> None:
    player = Player(lambda operation: DENY)
    player.client(request("GET", "/api/v1/pods", None, "Upgrade: h2c", "Connection: Upgrade") + request("GET", "/api"))
    assert [answer.status for answer in player.answers()] == [400, 403] and len(player.of(AskRuling)) == 2


def test_a_get_with_a_body_is_refused_and_the_body_is_no_request() -> None:
    player = Player(lambda operation: DENY if operation.unclassified else ALLOW)
    player.client(request("GET", "/api/v1/pods", SMUGGLED.encode()))
    (answer,) = player.answers()
    assert answer.status == 400 and not player.sent[S] and len(player.of(AskRuling)) == 1 and player.closed


def test_a_body_that_holds_a_request_is_a_body() -> None:
    for raw in (
        request("POST", "/api/v1/namespaces/shop/pods/web/proxy/x", SMUGGLED.encode()),
        request("POST", "/api/v1/namespaces/shop/pods/web/proxy/x", None, "Transfer-Encoding: chunked")
        + chunked(SMUGGLED.encode()),
    ):
        player = Player().client(raw)
        (sent,) = player.requests()
        assert sent.body == SMUGGLED.encode() and len(player.of(AskRuling)) == 1


@pytest.mark.parametrize(
    "path", ["/api%0d%0aX:%20y", "/api/%00", "/api?x=%0d%0aHost:%20b", "/api/v1/%2e%2e/x", "//other/api"]
)
def test_nothing_encoded_in_a_target_breaks_out_of_it(path: str) -> None:
    player = Player(lambda operation: DENY if operation.unclassified else ALLOW).client(request("GET", path))
    assert player.answers()[0].status == 403 and not player.sent[S]


def test_no_answer_of_ours_can_be_split_by_what_it_quotes() -> None:
    nasty = 'rule "x"\r\nSet-Cookie: a=b\r\n\r\n<html>'
    ruling = Ruling(DENY.decision, DENY.reasons, nasty, nasty, "v1")
    (answer,) = Player(lambda operation: ruling).client(request()).answers()
    assert answer.header("set-cookie") is None and nasty in answer.json["message"]


def test_the_token_is_in_nothing_but_the_request() -> None:
    player = Player()
    player.client(request("GET", "/api/v1/namespaces/shop/pods/web/proxy/echo", None, "Authorization: Bearer mine"))
    assert player.sent[S].count(TOKEN.encode()) == 1
    assert TOKEN not in repr(player.said) and TOKEN not in repr(player.of(AskCredential))
    with contextlib.suppress(PeerViolation):
        player.server(b"HTTP/1.1 200 OK\r\nX\x01: " + TOKEN.encode() + b"\r\n\r\n")
    player.carry_out(player.machine.farewell("it is over"))
    assert TOKEN.encode() not in player.sent[C]


# --- differential: our framing against a plain reader of chunks -------------------------------------------------------

pieces = st.lists(st.binary(min_size=1, max_size=300), max_size=8)


@settings(max_examples=300, deadline=None)
@given(pieces=pieces, cuts=st.lists(st.integers(0, 3000), max_size=20), behind=st.binary(max_size=20))
def test_chunks_are_read_whole_in_any_cut(pieces: list[bytes], cuts: list[int], behind: bytes) -> None:
    data = chunked(*pieces) + behind
    edges = sorted({0, len(data), *(cut % len(data) for cut in cuts)})
    reader, body, rest = Chunks(), b"", b""
    for start, stop in itertools.pairwise(edges):
        if reader.done:
            rest += data[start:stop]
            continue
        piece, more = reader.feed(data[start:stop])
        body += piece
        rest += more
    assert (body, rest, reader.done) == (b"".join(pieces), behind, True)


@settings(max_examples=500, deadline=None)
@given(data=st.lists(st.sampled_from([b"\r", b"\n", b"\r\n", b"a: b", b" ", b"\0", b"\t"]), max_size=12).map(b"".join))
def test_a_head_is_refused_or_read_alike_in_any_cut(data: bytes) -> None:
    def outcome(cuts: list[bytes]) -> object:
        reader = HeadReader()
        for index, cut in enumerate(cuts):
            try:
                found = reader.feed(cut)
            except Malformed:
                return "refused"
            if found is not None:
                return found[0], found[1] + b"".join(cuts[index + 1 :])
        return None

    whole = outcome([data]) if data else None
    assert outcome([data[index : index + 1] for index in range(len(data))]) == whole


@settings(max_examples=1000, deadline=None)
@given(
    pieces=st.lists(st.sampled_from([b"\r", b"\n", b"\r\n", b"a", b" ", b"\0", b"\t", b"\x7f", b"\xe4"]), max_size=12)
)
def test_the_quick_look_at_a_head_sees_what_the_slow_one_sees(pieces: list[bytes]) -> None:
    head = b"".join(pieces) + b"\r\n\r\n"
    assert http._plain(head) is (http._UNREADABLE.search(head) is None)


HEADS = st.lists(
    st.tuples(
        st.sampled_from(["Content-Length", "content-length", "Transfer-Encoding", "Connection", "Upgrade", "X-a"]),
        st.sampled_from([": ", ":", ":  ", " : ", ":\t"]) | st.just(": "),
        st.sampled_from(["5", "05", "5, 5", "+5", "", "chunked", "Chunked", "close", "x", "a b", "a  b", "a ", "\xe4"]),
    ),
    max_size=5,
)


@settings(max_examples=2000, deadline=None)
@given(
    line=st.sampled_from(["200 OK", "200 ", "200", "204 No Content", "304 x  y", "404 \xe4", "101 x", "100 x", "99 x"]),
    version=st.sampled_from(["1.1", "1.1", "1.0", "2.0"]),
    headers=HEADS,
    method=st.sampled_from(["GET", "HEAD"]),
)
def test_the_quick_reader_of_answers_sees_what_h11_sees(
    line: str, version: str, headers: list[tuple[str, str, str]], method: str
) -> None:
    raw = "\r\n".join([f"HTTP/{version} {line}", *map("".join, headers), "", ""]).encode("latin-1")
    quick = http._plain_answer(raw)
    if quick is not None:
        status, reason, last, pairs = http.AnswerReader(method)._by_h11(raw)
        assert (status, reason, last) == quick[:3]
        assert [(name.lower(), value.lower()) for name, value in pairs] == [
            (name.lower(), value.lower()) for name, value in quick[3]
        ]
        assert all(pair in pairs for pair in quick[3])
        http.AnswerReader(method).read(raw)


def test_what_an_api_server_writes_is_read_quickly() -> None:
    for framing in ("Content-Length: 2", "Transfer-Encoding: chunked"):
        assert http._plain_answer(response(b"{}", "200 OK", framing, "Audit-Id: a-b", length=False).removesuffix(b"{}"))


@pytest.mark.parametrize("value", [b"a\r\nb: c", b"a\nb", b"a\rb", b"a\0", b"a\r\n b", b"a\r\n\r\n"])
def test_no_head_is_written_that_would_be_read_as_more(value: bytes) -> None:
    for headers in ([(b"x", value)], [(value, b"x")]):
        with pytest.raises(ValueError):
            http.write_request("GET", "/", headers)
        with pytest.raises(ValueError):
            http.write_answer(200, b"OK", headers)
    with pytest.raises(ValueError):
        http.write_request("GET", "/" + value.decode(), [])
    with pytest.raises(ValueError):
        http.write_answer(200, value, [])
