"""Whatever the order in which clients, servers, rulings, credentials, previews and ends come: nothing but
`PeerViolation`, one answer to each request, and nothing before its ruling that could change something."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.model import FieldMask, Ruling
from proxy.protocols.base import AskCredential, AskRuling, Credential, PeerViolation, Refusal, Reply
from tests.proxy.protocols.kubernetes.playing import (
    ALLOW,
    APPROVED,
    DENY,
    REDACT,
    TOKEN,
    C,
    Player,
    S,
    chunked,
    login,
    request,
    response,
)

PODS = "/api/v1/namespaces/shop/pods"
JSON = json.dumps({"kind": "Pod", "apiVersion": "v1", "metadata": {"name": "web"}, "data": {"a": "b"}}).encode()
MERGE = "application/merge-patch+json"
REQUESTS = [
    request("GET", PODS),
    request("HEAD", PODS),
    request("GET", PODS + "?watch=1"),
    request("GET", "/api/v1/namespaces/shop/secrets/s"),
    request("PATCH", PODS + "/web", b"{}", content_type=MERGE),
    request("PATCH", "/api/v1/namespaces/shop/secrets/s", b"{}", content_type=MERGE),
    request("DELETE", PODS + "/web", b'{"propagationPolicy":"Background"}'),
    request("POST", PODS, JSON, "Expect: 100-continue"),
    request("POST", PODS, None, "Transfer-Encoding: chunked", "Content-Type: application/json") + chunked(JSON),
    request("PUT", PODS + "/web/proxy/x", None, "Transfer-Encoding: chunked", "Expect: 100-continue") + chunked(b"abc"),
    request("GET", PODS, None, "Connection: close"),
    request("GET", PODS + "/web/exec?command=id", None, "Connection: Upgrade", "Upgrade: SPDY/3.1"),
    request("GET", "/api/../x"),
]
ANSWERS = [
    response(JSON),
    response(b"", "200 OK", "Transfer-Encoding: chunked", length=False) + chunked(JSON, JSON),
    response(JSON, "404 Not Found"),
    response(JSON, "200 OK", "Connection: close"),
    response(b"no json"),
    b"HTTP/1.1 204 No Content\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\n",
    b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n\r\nuntil the end",
]


class Play:
    """A player whose answers wait, and who does one thing after the other."""

    def __init__(self, masks: tuple[FieldMask, ...]) -> None:
        self.player = Player(lambda operation: None, login=login(masks), token=None)
        self.answered: set[int] = set()
        self.allowed: set[int] = set()
        self.previewed: set[int] = set()

    def open(self) -> list[AskRuling | AskCredential]:
        """The questions that nobody answered yet."""
        asks = [command for command in self.player.said if isinstance(command, AskRuling | AskCredential)]
        return [ask for ask in asks if id(ask) not in self.answered]

    def reply(self, kind: type, reply: Reply) -> None:
        for ask in self.open():
            if isinstance(ask, kind):
                self.answered.add(id(ask))
                if isinstance(ask, AskRuling) and isinstance(reply, Ruling) and reply is not DENY:
                    self.allowed.add(ask.id)
                self.player.reply(ask, reply)
                return

    def preview(self) -> None:
        """Once for a question, as the session does it."""
        for ask in self.open():
            if isinstance(ask, AskRuling) and ask.id not in self.previewed:
                self.previewed.add(ask.id)
                self.player.carry_out(self.player.machine.preview(ask))


Act = Callable[[Play], object]


def natural(choice: int) -> Act:
    """What would come next if nobody did anything odd."""

    def act(play: Play) -> None:
        asks = play.open()
        if asks and isinstance(asks[-1], AskCredential):
            play.reply(AskCredential, Credential(TOKEN))
        elif play.player.machine._question is not None and choice % 4:
            play.player.server(ANSWERS[choice % len(ANSWERS)])
        elif asks and choice % 3 and asks[-1].id not in play.previewed:
            play.preview()
        elif asks:
            play.reply(AskRuling, [ALLOW, APPROVED, ALLOW, DENY][choice % 4])
        elif play.player.machine._exchange is not None:
            play.player.server(ANSWERS[choice % len(ANSWERS)])
        else:
            play.player.client(REQUESTS[choice % len(REQUESTS)])

    return act


odd = st.one_of(
    st.sampled_from(REQUESTS).map(lambda data: lambda play: play.player.client(data)),
    st.sampled_from(ANSWERS).map(lambda data: lambda play: play.player.server(data)),
    st.tuples(st.sampled_from(REQUESTS), st.integers(1, 200)).map(
        lambda pair: lambda play: play.player.client(pair[0][: pair[1]])
    ),
    st.tuples(st.sampled_from(ANSWERS), st.integers(1, 200)).map(
        lambda pair: lambda play: play.player.server(pair[0][: pair[1]])
    ),
    st.sampled_from([ALLOW, DENY, APPROVED]).map(lambda ruling: lambda play: play.reply(AskRuling, ruling)),
    st.sampled_from([Credential(TOKEN), Credential(TOKEN), Refusal("no credential")]).map(
        lambda reply: lambda play: play.reply(AskCredential, reply)
    ),
    st.just(lambda play: play.preview()),
)
usual = st.lists(st.integers(0, 10_000).map(natural), min_size=8, max_size=40)
oddities = st.lists(st.tuples(st.integers(0, 40), odd), max_size=3)
ends: st.SearchStrategy[Act] = st.sampled_from(
    [
        lambda play: play.player.carry_out(play.player.machine.eof(C)),
        lambda play: play.player.carry_out(play.player.machine.eof(S)),
        lambda play: play.player.carry_out(play.player.machine.farewell("it is over")),
    ]
)


@pytest.mark.parametrize("masks", [(), (REDACT,)], ids=["plain", "masked"])
@settings(max_examples=1500, deadline=None)
@given(acts=usual, oddities=oddities, end=ends)
def test_any_order_of_events_is_survived(
    masks: tuple[FieldMask, ...], acts: list[Act], oddities: list[tuple[int, Act]], end: Act
) -> None:
    play = Play(masks)
    for position, oddity in oddities:
        acts.insert(position, oddity)
    player = play.player
    try:
        for act in [*acts, end]:
            if player.closed is None:
                act(play)
    except PeerViolation as violation:
        player.carry_out(player.machine.farewell(str(violation)))
    if player.closed is None:
        player.carry_out(player.machine.farewell("it is over"))
    assert player.closed is not None and not player.machine.unanswered
    finished = [done.id for done in player.done]
    assert len(finished) == len(set(finished)) and play.allowed.issuperset(finished)
    if b"101 Switching" in player.sent[C] or b"101 Switching" in player.sent[S]:
        return
    earnest = 0
    for sent in player.requests():
        if sent.method == "GET" or "dryRun=All" in sent.target:
            assert sent.method != "DELETE" or not sent.whole or sent.json["dryRun"] == ["All"]
        else:
            earnest += 1
    assert earnest <= len(play.allowed)
    assert TOKEN.encode() not in player.sent[C]
