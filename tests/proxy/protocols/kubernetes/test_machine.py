"""The session: requests and answers, denials, credentials, keep-alive, bodies."""

from __future__ import annotations

import gzip
import json

import pytest

from proxy.model import FieldMask, Operation, Ruling, TlsMode
from proxy.protocols import registry
from proxy.protocols.base import (
    AskCredential,
    AskLogin,
    AskRuling,
    Authenticated,
    Close,
    Connect,
    Credential,
    PeerViolation,
    Refusal,
    StartTls,
    UpstreamFailed,
    UpstreamReady,
)
from proxy.protocols.kubernetes import machine as module
from proxy.protocols.kubernetes.http import CONTINUE
from proxy.protocols.kubernetes.machine import MAX_PIPELINED, KubernetesMachine
from proxy.protocols.kubernetes.requests import MAX_JUDGED_BODY
from tests.proxy.protocols.kubernetes.playing import (
    ALLOW,
    APPROVED,
    DENY,
    HIDE,
    REDACT,
    TOKEN,
    C,
    Player,
    S,
    chunked,
    login,
    request,
    response,
    target,
)

POD = json.dumps({"kind": "Pod", "apiVersion": "v1", "metadata": {"name": "web", "namespace": "shop"}}).encode()
PODS = "/api/v1/namespaces/shop/pods"


# --- up to the first request ------------------------------------------------------------------------------------------


def test_the_login_is_asked_for_as_soon_as_the_client_is_there() -> None:
    player = Player(login=login(mode=TlsMode.VERIFY_FULL), offer_tls=True)
    assert player.said == [
        StartTls(C, ("http/1.1",)),
        AskLogin("", "", cancellable=False),
        Connect(),
        StartTls(S, ("http/1.1",)),
        Authenticated(b""),
    ]
    assert not player.sent[C] and not player.sent[S]


def test_a_target_without_tls_is_spoken_to_in_plain() -> None:
    assert [type(command) for command in Player().said] == [AskLogin, Connect, Authenticated]


def test_bytes_in_front_of_the_handshake_are_a_violation() -> None:
    machine = KubernetesMachine(offer_tls=True)
    machine.begin()
    with pytest.raises(PeerViolation):
        machine.receive(C, b"GET")


@pytest.mark.parametrize("offer_tls", [True, False])
@pytest.mark.parametrize("when", ["accepted", "at the login"])
def test_a_refusal_is_the_answer_to_the_first_request(offer_tls: bool, when: str) -> None:
    refusal = Refusal("no agent is behind this connection", "ask the operators")
    if when == "accepted":
        player = Player(refusal=refusal, offer_tls=offer_tls)
    else:
        player = Player(login=refusal, offer_tls=offer_tls)
    assert player.closed is None
    player.client(request())
    (answer,) = player.answers()
    assert answer.status == 403 and answer.header("connection") == "close"
    assert answer.json["message"] == "no agent is behind this connection; ask the operators"
    assert player.closed and not player.sent[S] and not player.of(AskRuling)


def test_a_server_that_cannot_be_reached_is_told_of_in_answer_to_the_first_request() -> None:
    machine = KubernetesMachine(offer_tls=False)
    (ask,) = machine.begin()
    machine.answer(ask, login())
    assert machine.receive(C, request()) == [] and machine.unanswered
    send, close = machine.notify(UpstreamFailed("target `cluster` is not reachable"))
    assert b"503 Service Unavailable" in send.data and b"is not reachable" in send.data
    assert "is not reachable" in close.reason and not machine.unanswered


# --- a request and its answer -----------------------------------------------------------------------------------------


def test_a_request_goes_on_with_the_gateways_credential_and_without_the_clients() -> None:
    player = Player().client(
        request(
            "GET",
            PODS + "?limit=500",
            None,
            "Authorization: Bearer client-secret",
            "Cookie: session=client-secret",
            "X-Remote-User: admin",
            "X_Remote_Group: system:masters",
            "X-Forwarded-For: 10.0.0.1",
            "Proxy-Authorization: Basic client-secret",
            "Impersonate_User: admin",
            "Accept: application/json;as=Table",
            "Accept-Encoding: gzip",
            "User-Agent: kubectl/v1.33",
            "TE: trailers",
            "Connection: keep-alive, TE",
        )
    )
    (sent,) = player.requests()
    assert (sent.method, sent.target) == ("GET", PODS + "?limit=500")
    assert sorted(sent.headers) == [
        ("accept", "application/json;as=Table"),
        ("accept-encoding", "gzip"),
        ("authorization", f"Bearer {TOKEN}"),
        ("host", "kubernetes:6443"),
        ("user-agent", "kubectl/v1.33"),
    ]
    player.server(response(POD, "200 OK", "Audit-Id: 7"))
    (answer,) = player.answers()
    assert (answer.status, answer.body, answer.header("audit-id")) == (200, POD, "7")
    (done,) = player.done
    assert (done.id, done.tag, done.error) == (1, "200 OK", "")
    assert TOKEN.encode() not in player.sent[C] and TOKEN not in repr(player.said)
    assert player.closed is None and not player.machine.unanswered and not player.machine.incomplete


def test_without_a_token_there_is_no_authorization() -> None:
    (sent,) = Player(token="").client(request("GET", "/version", None, "Authorization: Bearer x")).requests()
    assert sent.header("authorization") is None


def test_impersonation_is_judged_and_passed_on() -> None:
    player = Player().client(request("GET", PODS, None, "Impersonate-User: ada", "Impersonate-Group: dev"))
    (ask,) = player.of(AskRuling)
    assert [facts.verb for facts in ask.operation.requests] == ["list", "impersonate", "impersonate"]
    (sent,) = player.requests()
    assert sent.header("impersonate-user") == "ada" and sent.header("impersonate-group") == "dev"


def test_a_credential_is_asked_for_with_every_request_and_only_after_its_ruling() -> None:
    player = Player()
    for number in (1, 2):
        player.client(request()).server(response())
        assert [ask.id for ask in player.of(AskCredential)] == list(range(1, number + 1))
    kinds = [type(command) for command in player.said if isinstance(command, AskRuling | AskCredential)]
    assert kinds == [AskRuling, AskCredential] * 2


@pytest.mark.parametrize("token", ["a\r\nX: y", "a b", "ä", "a\0"])
def test_a_token_that_no_header_can_hold_is_never_quoted(token: str) -> None:
    player = Player(token=token).client(request())
    (answer,) = player.answers()
    assert answer.status == 503 and token not in answer.json["message"]
    assert not player.sent[S] and player.closed is None


def test_a_credential_that_is_refused_is_told_and_recorded() -> None:
    player = Player(token=Refusal("the credential `cred` is not there", "tell the operators")).client(request())
    (answer,) = player.answers()
    assert answer.status == 503
    assert answer.json["message"] == "the credential `cred` is not there; tell the operators"
    assert "503 Service Unavailable" in player.done[0].error
    assert not player.sent[S] and player.closed is None


def test_a_judged_body_is_sent_as_it_was_judged() -> None:
    body = b'{"kind":"Pod",  "metadata":{"name":"web", "name":"other"}}'
    player = Player().client(request("POST", PODS, body, "Expect: 100-continue"))
    (ask,) = player.of(AskRuling)
    assert ask.operation.once and ask.operation.requests[0].body == {"kind": "Pod", "metadata": {"name": "other"}}
    (sent,) = player.requests()
    assert sent.json == ask.operation.requests[0].body and sent.header("expect") is None
    assert sent.header("content-length") == str(len(sent.body)) and sent.header("content-type") == "application/json"
    assert bytes(player.sent[C]) == CONTINUE


def test_a_judged_body_may_come_in_chunks_and_be_waited_for() -> None:
    player = Player().client(
        request(
            "POST", PODS, None, "Expect: 100-continue", "Transfer-Encoding: chunked", "Content-Type: application/json"
        )
    )
    assert bytes(player.sent[C]) == CONTINUE and player.machine.incomplete
    player.client(b"5;".replace(b";", b"\r\n") + POD[:5] + b"\r\n")
    assert player.machine.incomplete and not player.of(AskRuling)
    player.client(chunked(POD[5:]))
    assert not player.machine.incomplete
    (sent,) = player.requests()
    assert sent.json == json.loads(POD) and sent.header("transfer-encoding") is None


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH"])
def test_a_request_that_needs_a_body_and_has_none_is_asked_about_and_not_sent(method: str) -> None:
    seen: list[Operation] = []

    def judge(operation: Operation) -> Ruling:
        seen.append(operation)
        return DENY

    player = Player(judge).client(request(method, PODS + "/web"))
    assert seen[0].unclassified and player.answers()[0].status == 403 and not player.sent[S]


def test_a_delete_without_a_body_has_none_upstream() -> None:
    (sent,) = Player().client(request("DELETE", PODS + "/web")).requests()
    assert sent.header("content-length") is None and sent.header("transfer-encoding") is None and not sent.body


@pytest.mark.parametrize("framed", ["length", "chunks"])
@pytest.mark.parametrize("early", [True, False])
def test_a_body_that_is_streamed_is_judged_by_its_head_and_goes_on_piece_by_piece(framed: str, early: bool) -> None:
    path = "/api/v1/namespaces/shop/services/web/proxy/upload"
    payload = b"x" * 70_000
    if framed == "length":
        head, pieces = (
            request("POST", path, None, f"Content-Length: {len(payload)}"),
            [payload[:30_000], payload[30_000:]],
        )
    else:
        head = request("POST", path, None, "Transfer-Encoding: chunked")
        pieces = [b"7530\r\n" + payload[:30_000] + b"\r\n", chunked(payload[30_000:])]
    player = Player(lambda operation: None)
    player.client(head)
    if early:
        player.client(pieces[0])
    (ask,) = player.of(AskRuling)
    assert not player.sent[S] and player.machine.unanswered is early and not player.machine.incomplete
    player.reply(ask, ALLOW)
    assert not player.machine.unanswered
    if not early:
        player.client(pieces[0])
    assert len(player.sent[S]) > 30_000
    player.client(pieces[1])
    (sent,) = player.requests()
    assert sent.body == payload and sent.whole
    player.server(response(b"ok"))
    assert player.answers()[0].status == 200 and player.closed is None


def test_a_streamed_upload_that_asks_is_told_to_go_on_after_its_ruling() -> None:
    player = Player(lambda operation: None)
    player.client(request("PUT", PODS + "/web/proxy/x", None, "Content-Length: 3", "Expect: 100-continue"))
    assert not player.sent[C]
    player.reply(player.of(AskRuling)[0], ALLOW)
    assert bytes(player.sent[C]) == CONTINUE
    player.client(b"abc").server(response(b"ok"))
    assert [answer.status for answer in player.answers()] == [100, 200]


def test_an_answer_before_the_end_of_the_request_ends_the_connection() -> None:
    player = Player().client(request("POST", PODS + "/web/proxy/x", None, "Content-Length: 100") + b"abc")
    player.server(response(b"no", "413 Payload Too Large"))
    (answer,) = player.answers()
    assert answer.status == 413 and answer.header("connection") == "close" and answer.body == b"no"
    assert player.closed is None and player.machine.incomplete
    sent = len(player.sent[S])
    player.client(b"d" * 97)
    assert player.closed and len(player.sent[S]) == sent


# --- denials ----------------------------------------------------------------------------------------------------------


def test_a_denial_is_a_status_and_the_connection_goes_on() -> None:
    player = Player(lambda operation: DENY if "delete" in operation.text else ALLOW)
    player.client(request("DELETE", "/apis/apps/v1/namespaces/shop/deployments/web", b"{}"))
    (answer,) = player.answers()
    assert answer.status == 403 and answer.header("content-type") == "application/json"
    assert answer.header("connection") is None
    assert answer.json == {
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": "hop `a` may not do this (rule `no`); ask the owners of the policy",
        "reason": "Forbidden",
        "details": {"name": "web", "group": "apps", "kind": "deployments"},
        "code": 403,
    }
    assert not player.sent[S] and not player.done and player.closed is None
    player.client(request()).server(response())
    assert [answer.status for answer in player.answers()] == [403, 200]


def test_a_denied_upload_is_read_and_thrown_away_so_that_the_client_gets_to_read_why() -> None:
    player = Player(lambda operation: DENY)
    player.client(request("POST", PODS + "/web/proxy/x", None, "Transfer-Encoding: chunked") + b"3\r\nabc\r\n")
    (answer,) = player.answers("POST")
    assert answer.status == 403 and answer.header("connection") == "close"
    assert player.closed is None and player.machine.incomplete
    player.client(b"2\r\nde\r\n")
    assert player.closed is None
    player.client(b"0\r\n\r\n")
    assert player.closed and not player.sent[S]


def test_a_refused_body_is_not_read_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_DRAINED", 100_000)
    player = Player(lambda operation: DENY).client(
        request("POST", PODS + "/web/proxy/x", None, "Content-Length: 9999999")
    )
    player.client(b"x" * 90_000)
    assert player.closed is None
    player.client(b"x" * 90_000)
    assert "went on" in (player.closed or "")


@pytest.mark.parametrize("framed", ["length", "chunks"])
def test_a_body_that_is_too_large_to_be_judged_is_refused_and_recorded(framed: str) -> None:
    seen: list[Operation] = []

    def judge(operation: Operation) -> Ruling:
        seen.append(operation)
        return ALLOW

    player = Player(judge)
    if framed == "length":
        player.client(request("POST", PODS, None, f"Content-Length: {MAX_JUDGED_BODY + 1}", "Expect: 100-continue"))
    else:
        player.client(request("POST", PODS, None, "Transfer-Encoding: chunked"))
        for _ in range(9):
            if not player.sent[C]:
                player.client(b"100000\r\n" + b"x" * 0x100000 + b"\r\n")
    (answer,) = player.answers("POST")
    assert answer.status == 413 and answer.json["reason"] == "RequestEntityTooLarge"
    assert str(MAX_JUDGED_BODY) in seen[0].unclassified and not player.sent[S]


def test_what_cannot_be_classified_is_asked_about_with_the_reason() -> None:
    seen: list[Operation] = []

    def judge(operation: Operation) -> Ruling:
        seen.append(operation)
        return DENY

    player = Player(judge).client(request("GET", "/api/v1/namespaces/shop/../kube-system/secrets"))
    assert seen[0].unclassified and player.answers()[0].status == 403
    assert not player.sent[S] and player.closed is None


def test_what_cannot_be_classified_goes_nowhere_even_if_it_were_allowed() -> None:
    for raw in (
        request("GET", "/api/../x"),
        request("POST", PODS, b"no json"),
        request("GET", PODS, None, "Upgrade: x"),
    ):
        player = Player().client(raw)
        assert player.answers()[0].status in (400, 403) and not player.sent[S] and not player.of(AskCredential)


def test_a_head_request_is_denied_without_a_body() -> None:
    player = Player(lambda operation: DENY).client(request("HEAD", PODS)).client(request())
    assert [answer.status for answer in player.answers("HEAD")] == [403, 403]
    assert player.answers("HEAD")[0].body == b""


# --- answers ----------------------------------------------------------------------------------------------------------


def test_chunks_pass_as_they_come() -> None:
    player = Player().client(request("GET", PODS + "?watch=1"))
    player.server(response(b"", "200 OK", "Transfer-Encoding: chunked", length=False))
    assert b"200 OK" in player.sent[C]
    for number in range(3):
        before = len(player.sent[C])
        event = b'{"type":"ADDED","object":{"n":%d}}\n' % number
        player.server(b"%x\r\n%b\r\n" % (len(event), event))
        assert event in player.sent[C][before:]
    assert not player.done
    player.server(b"0\r\n\r\n")
    (answer,) = player.answers()
    assert answer.body.count(b"ADDED") == 3 and answer.whole
    assert player.done and player.closed is None


def test_compressed_answers_pass_untouched_where_nothing_is_masked() -> None:
    body = gzip.compress(POD * 100)
    player = Player(login=login((REDACT,))).client(request("GET", PODS, None, "Accept-Encoding: gzip"))
    assert player.requests()[0].header("accept-encoding") == "gzip"
    player.server(response(body, "200 OK", "Content-Encoding: gzip"))
    (answer,) = player.answers()
    assert answer.body == body and answer.header("content-encoding") == "gzip"


SECRET = json.dumps(
    {
        "kind": "Secret",
        "apiVersion": "v1",
        "metadata": {"name": "s", "namespace": "shop"},
        "data": {"p": "aHVudGVyMg=="},
    }
).encode()
SECRETS = "/api/v1/namespaces/shop/secrets"


def test_a_masked_answer_is_asked_for_in_plain_json_and_framed_anew() -> None:
    player = Player(login=login((REDACT,))).client(
        request("GET", SECRETS + "/s", None, "Accept: application/vnd.kubernetes.protobuf", "Accept-Encoding: gzip")
    )
    (sent,) = player.requests()
    assert sent.header("accept") == "application/json" and sent.header("accept-encoding") == "identity"
    player.server(
        response(SECRET[:50], length=False).replace(b"\r\n\r\n", b"\r\nContent-Length: %d\r\n\r\n" % len(SECRET))
    )
    assert not player.sent[C]
    player.server(SECRET[50:])
    (answer,) = player.answers()
    assert answer.json["data"] == {"p": "Kioq"} and answer.header("content-length") is None
    (done,) = player.done
    assert (done.rows, done.masked) == (1, ("secrets data.*",)) and b"aHVudGVyMg" not in player.sent[C]


@pytest.mark.parametrize(
    "answer",
    [
        response(SECRET, "200 OK", "Content-Encoding: gzip"),
        response(SECRET).replace(b"application/json", b"application/vnd.kubernetes.protobuf"),
        response(b'{"kind": "Secret", broken'),
    ],
)
def test_an_answer_that_cannot_be_masked_is_replaced(answer: bytes) -> None:
    player = Player(login=login((REDACT,))).client(request("GET", SECRETS + "/s")).server(answer)
    (told,) = player.answers()
    assert told.status == 502 and "cannot be shown masked" in told.json["message"]
    assert told.header("connection") == "close" and player.closed
    assert "cannot be shown masked" in player.done[0].error
    assert b"aHVudGVyMg" not in player.sent[C]


def test_a_long_list_goes_on_masked_while_it_comes_and_a_broken_one_stays_open() -> None:
    items = b",".join([b'{"metadata":{"name":"s"},"data":{"p":"aHVudGVyMg=="}}'] * 5000)
    body = b'{"kind":"SecretList","apiVersion":"v1","metadata":{},"items":[%b' % items
    for end, whole in ((b"]}", True), (b",broken]}", False), (b"", False)):
        player = Player(login=login((REDACT,))).client(request("GET", SECRETS)).server(response(body + end)[:-1])
        assert player.sent[C].startswith(b"HTTP/1.1 200 OK") and len(player.sent[C]) > len(body) // 2
        player.server(response(body + end)[-1:])
        assert b"aHVudGVyMg" not in player.sent[C]
        assert player.sent[C].endswith(b"\r\n0\r\n\r\n") is whole and player.closed is not whole
        (done,) = player.done
        assert (done.rows, done.error) == (5000, "") if whole else "cannot be shown masked" in done.error


def test_a_masked_watch_stands_before_its_first_event() -> None:
    player = Player(login=login((REDACT,))).client(request("GET", SECRETS + "?watch=true"))
    player.server(response(b"", "200 OK", "Transfer-Encoding: chunked", length=False))
    assert b"200 OK" in player.sent[C]
    event = b'{"type":"ADDED","object":' + SECRET + b"}\n"
    player.server(b"%x\r\n%b\r\n" % (len(event), event))
    assert b"Kioq" in player.sent[C] and b"aHVudGVyMg" not in player.sent[C]
    with pytest.raises(PeerViolation):
        player.server(b"zz\r\n")


def test_a_masked_watch_that_cannot_be_read_is_cut_off() -> None:
    player = Player(login=login((REDACT,))).client(request("GET", SECRETS + "?watch=true"))
    player.server(response(b"", "200 OK", "Transfer-Encoding: chunked", length=False))
    player.server(b"9\r\nnot json!\r\n")
    assert player.closed and not player.answers()[0].whole and "masked" in player.done[0].error


def test_warnings_of_the_server_pass_where_nothing_is_masked() -> None:
    warned = response(SECRET, "200 OK", 'Warning: 299 - "the value aHVudGVyMg== is deprecated"')
    player = Player(login=login((REDACT,))).client(request("GET", SECRETS + "/s")).server(warned)
    assert player.answers()[0].header("warning") is None and b"aHVudGVyMg" not in player.sent[C]
    player = Player().client(request()).server(warned)
    assert player.answers()[0].header("warning") is not None


def test_the_length_of_what_is_masked_is_not_told() -> None:
    player = Player(login=login((REDACT,))).client(request("HEAD", SECRETS + "/s"))
    player.server(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n")
    assert player.answers("HEAD")[0].header("content-length") is None and player.closed is None


def test_what_is_hidden_is_not_found_and_not_asked_for() -> None:
    player = Player(login=login((HIDE,))).client(request("GET", PODS + "/hidden-1"))
    (answer,) = player.answers()
    assert answer.status == 404 and answer.json["reason"] == "NotFound" and answer.json["details"]["name"] == "hidden-1"
    assert not player.sent[S] and player.closed is None and player.done[0].error.startswith("404")


def test_a_failure_is_recorded_with_the_servers_words() -> None:
    status = b'{"kind":"Status","status":"Failure","message":"pods \\"web\\" not found","code":404}'
    player = Player().client(request()).server(response(status, "404 Not Found"))
    assert player.done[0].error == '404 Not Found: pods "web" not found'
    assert player.done[0].tag == "404 Not Found" and player.answers()[0].body == status


@pytest.mark.parametrize(
    ("method", "answer"),
    [
        ("HEAD", b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n"),
        ("GET", b"HTTP/1.1 204 No Content\r\n\r\n"),
        ("GET", b"HTTP/1.1 304 Not Modified\r\nContent-Length: 500\r\n\r\n"),
        ("GET", b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
    ],
)
def test_answers_without_a_body_end_with_their_head(method: str, answer: bytes) -> None:
    player = Player().client(request(method, PODS)).server(answer)
    assert player.done and player.closed is None
    player.client(request()).server(response(b"[1]"))
    assert player.answers(method)[1].body == b"[1]"


def test_interim_answers_are_dropped() -> None:
    player = Player().client(request()).server(b"HTTP/1.1 103 Early Hints\r\nLink: <x>\r\n\r\n" * 5 + response())
    assert [answer.status for answer in player.answers()] == [200]


def test_trailers_are_dropped() -> None:
    player = Player().client(request())
    player.server(response(b"", "200 OK", "Transfer-Encoding: chunked", "Trailer: X-Sum", length=False))
    player.server(b"2\r\n{}\r\n0\r\nX-Sum: 1\r\n\r\n")
    assert player.sent[C].endswith(b"2\r\n{}\r\n0\r\n\r\n") and b"X-Sum" not in player.sent[C] and player.closed is None


def test_what_a_server_says_of_logins_and_other_ways_to_it_does_not_reach_the_client() -> None:
    headers = ("Set-Cookie: a=b", 'Alt-Svc: h3=":443"', "WWW-Authenticate: Basic", "Keep-Alive: timeout=5", "X-Own: 1")
    player = Player().client(request()).server(response(b"{}", "200 OK", *headers, "Connection: X-Own"))
    assert [name for name, _ in player.answers()[0].headers] == ["content-type", "content-length"]


# --- the connection ---------------------------------------------------------------------------------------------------


def test_pipelined_requests_wait_their_turn() -> None:
    player = Player().client(request("GET", PODS + "/a") + request("GET", PODS + "/b") + request("GET", PODS + "/c"))
    assert player.machine.unanswered and len(player.requests()) == 1
    for name in "abc":
        player.server(response(name.encode()))
    assert [answer.body for answer in player.answers()] == [b"a", b"b", b"c"]
    assert [sent.target[-1] for sent in player.requests()] == ["a", "b", "c"]
    assert not player.machine.unanswered


def test_requests_that_come_in_one_go_are_so_many_at_most() -> None:
    """What they lead to is done before anybody else's."""
    player = Player(lambda operation: DENY)
    player.client(request("GET", "/x") * (MAX_PIPELINED + 10))
    statuses = [answer.status for answer in player.answers()]
    assert statuses == [403] * MAX_PIPELINED + [400] and player.closed
    player = Player(lambda operation: DENY)
    for _ in range(MAX_PIPELINED + 10):
        player.client(request("GET", "/x"))
    assert not player.closed


def test_a_broken_request_behind_a_good_one_costs_the_good_one_nothing() -> None:
    player = Player().client(request() + b"BROKEN\r\n\r\n").server(response(b"[1]"))
    good, bad = player.answers()
    assert (good.status, good.body, bad.status) == (200, b"[1]", 400) and player.closed and player.done


def test_what_waits_is_bounded() -> None:
    player = Player().client(request())
    with pytest.raises(PeerViolation):
        for _ in range(40):
            player.client(b"x" * 100_000)


@pytest.mark.parametrize("who", ["client", "server", "old server"])
def test_a_connection_ends_when_either_side_wants_it(who: str) -> None:
    player = Player().client(request("GET", PODS, None, *(["Connection: close"] if who == "client" else [])))
    answer = response(b"[1]", "200 OK", *(["Connection: close"] if who == "server" else []))
    player.server(answer.replace(b"HTTP/1.1", b"HTTP/1.0") if who == "old server" else answer)
    assert player.answers()[0].header("connection") == "close" and player.closed
    assert all(sent.header("connection") is None for sent in player.requests())


def test_an_answer_that_ends_with_the_connection_is_framed_for_the_client() -> None:
    player = Player().client(request()).server(b"HTTP/1.1 200 OK\r\n\r\nabc").server(b"def")
    assert not player.done
    player.carry_out(player.machine.eof(S))
    (answer,) = player.answers()
    assert answer.body == b"abcdef" and answer.whole and answer.header("transfer-encoding") == "chunked"
    assert answer.header("connection") == "close" and player.closed and player.done[0].error == ""


@pytest.mark.parametrize(
    "got",
    [b"", b"HTTP/1.1 200", response(b"{}" * 9)[:-3], b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab"],
)
def test_an_answer_that_breaks_off_is_never_taken_for_whole(got: bytes) -> None:
    player = Player().client(request())
    if got:
        player.server(got)
    player.carry_out(player.machine.eof(S))
    (answer,) = player.answers()
    assert answer.status == 502 or not answer.whole
    assert player.closed and player.done[0].error == "the server closed the connection"


def test_a_server_that_leaves_between_requests_takes_the_client_along() -> None:
    player = Player().client(request()).server(response())
    sent = len(player.sent[C])
    player.carry_out(player.machine.eof(S))
    assert player.closed == "the server closed the connection" and len(player.sent[C]) == sent


def test_a_kept_connection_that_ends_as_it_is_used_is_one_that_clients_try_again() -> None:
    player = Player().client(request()).server(response()).client(request())
    sent = len(player.sent[C])
    player.carry_out(player.machine.eof(S))
    assert player.closed and len(player.sent[C]) == sent
    player = Player().client(request()).server(response()).client(request("POST", PODS, POD))
    player.carry_out(player.machine.eof(S))
    assert player.answers()[1].status == 502


def test_a_client_that_leaves_ends_the_watch() -> None:
    player = Player().client(request("GET", PODS + "?watch=1"))
    player.server(response(b"", "200 OK", "Transfer-Encoding: chunked", length=False))
    player.carry_out(player.machine.eof(C))
    assert player.closed and player.done[0].tag == "200 OK" and "client left" in player.done[0].error


def test_a_farewell_is_an_answer_where_one_is_owed() -> None:
    idle = Player().client(request()).server(response())
    sent = len(idle.sent[C])
    idle.carry_out(idle.machine.farewell("the policy changed", "connect again"))
    assert len(idle.sent[C]) == sent and idle.closed == "the policy changed"
    asked = Player(lambda operation: None).client(request())
    asked.carry_out(asked.machine.farewell("the policy changed", "connect again"))
    (answer,) = asked.answers()
    assert answer.status == 503 and answer.json["message"] == "the policy changed; connect again" and asked.closed
    halfway = Player().client(request()).server(response(b"{}" * 50)[:-10])
    sent = len(halfway.sent[C])
    halfway.carry_out(halfway.machine.farewell("the policy changed"))
    assert len(halfway.sent[C]) == sent and halfway.closed
    begun = Player().client(b"GET /api")
    begun.carry_out(begun.machine.farewell("a message was begun and not ended"))
    assert begun.answers()[0].status == 408 and begun.closed


def test_a_request_that_has_begun_is_incomplete() -> None:
    player = Player()
    assert not player.machine.incomplete
    raw = request("POST", PODS, POD)
    for index in range(len(raw) - 1):
        player.client(raw[index : index + 1])
        assert player.machine.incomplete
    player.client(raw[-1:])
    assert not player.machine.incomplete and len(player.requests()) == 1


def test_after_an_approval_the_client_is_told_by_whom() -> None:
    player = Player(lambda operation: APPROVED).client(request()).server(response())
    assert player.answers()[0].header("warning") == '299 hopgate "approved by ada: \\"fine\\""'


def test_while_a_human_decides_the_client_hears_nothing() -> None:
    player = Player(lambda operation: None).client(request())
    assert player.machine.notice("held for approval k7", "wait") == []
    assert not player.sent[C] and not player.sent[S]


def test_an_answer_to_what_was_not_asked_is_a_fault_of_the_sessions() -> None:
    player = Player(lambda operation: None, token=None).client(request())
    (ask,) = player.of(AskRuling)
    player.reply(ask, ALLOW)
    with pytest.raises(ValueError):
        player.reply(ask, ALLOW)
    with pytest.raises(ValueError):
        player.reply(AskCredential(9), Credential("x"))
    with pytest.raises(ValueError):
        player.reply(AskCredential(1), ALLOW)


def test_everything_passes_with_a_mask_that_concerns_other_resources(
    masks: tuple[FieldMask, ...] = (REDACT, HIDE),
) -> None:
    player = Player(login=login(masks)).client(request("GET", "/apis/apps/v1/deployments"))
    player.server(response(b'{"items": [1]}'))
    assert player.answers()[0].body == b'{"items": [1]}'


# --- an errand --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [TlsMode.DISABLE, TlsMode.VERIFY_FULL])
def test_a_visit_goes_as_far_as_tls_and_shows_no_credential(mode: TlsMode) -> None:
    visit = registry.visit("kubernetes")
    assert visit is not None
    errand = visit(target(mode))
    assert errand.begin() == [Connect()]
    if mode is not TlsMode.DISABLE:
        assert errand.notify(UpstreamReady()) == [StartTls(S, ("http/1.1",))]
    assert errand.notify(UpstreamReady()) == [Close("")]
    assert errand.notify(UpstreamFailed("its certificate was not accepted")) == [
        Close("its certificate was not accepted")
    ]
    assert errand.eof(S) == [Close("the server closed the connection")] and errand.receive(S, b"220 hello") != [
        Close("")
    ]
