"""Exec, attach and port-forward after the protocol was switched: everything is read, recorded or judged."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.model import OperationKind
from proxy.protocols.base import AskRuling, PeerViolation, Side
from proxy.protocols.kubernetes import forward, relay, terminal
from proxy.protocols.kubernetes.commands import told
from proxy.protocols.kubernetes.streams import Unspoken, offered, open_tunnel
from tests.proxy.protocols.conformance import cut_at
from tests.proxy.protocols.kubernetes.tunnels import (
    ALLOW,
    CLIENT,
    DENY,
    ID,
    SERVER,
    Listener,
    Session,
    Speaker,
    block,
    client_ws,
    control,
    data_frame,
    facts,
    head,
    joined,
    messages,
    reset,
    tunnel,
    ws,
)

SUCCESS = json.dumps({"metadata": {}, "status": "Success"}).encode()
FAILED = json.dumps(
    {
        "metadata": {},
        "status": "Failure",
        "message": "command terminated with non-zero exit code",
        "reason": "NonZeroExitCode",
        "details": {"causes": [{"reason": "ExitCode", "message": "42"}]},
    }
).encode()
BROKEN = json.dumps({"status": "Failure", "message": "container not found", "reason": "InternalError"}).encode()

# --- what is offered on -----------------------------------------------------------------------------------------------


def test_only_what_can_be_read_is_offered_on() -> None:
    request = head(
        "websocket",
        ("sec-websocket-protocol", "v9.channel.k8s.io, v5.channel.k8s.io"),
        ("sec-websocket-protocol", "v4.channel.k8s.io,chat"),
        ("sec-websocket-extensions", "permessage-deflate"),
        ("sec-websocket-key", "abc"),
    )
    assert offered(request).headers == (
        ("upgrade", "websocket"),
        ("sec-websocket-key", "abc"),
        ("sec-websocket-protocol", "v5.channel.k8s.io, v4.channel.k8s.io"),
    )
    request = head(
        "SPDY/3.1",
        ("x-stream-protocol-version", "v5.channel.k8s.io"),
        ("x-stream-protocol-version", "v4.channel.k8s.io"),
    )
    assert offered(request).values("x-stream-protocol-version") == ("v4.channel.k8s.io",)


@pytest.mark.parametrize(
    ("upgrade", "protocols"),
    [
        ("h2c", ""),
        ("", ""),
        ("websocket, h2c", ""),
        ("websocket", "base64.binary.k8s.io"),
        ("websocket", "v6.channel.k8s.io, graphql-ws"),
    ],
)
def test_what_cannot_be_read_is_not_offered(upgrade: str, protocols: str) -> None:
    with pytest.raises(Unspoken):
        offered(head(upgrade, ("sec-websocket-protocol", protocols)))


@pytest.mark.parametrize(
    ("subresource", "upgrade", "headers"),
    [
        ("exec", "SPDY/3.1", {"sec-websocket-protocol": "v4.channel.k8s.io"}),
        ("exec", "websocket", {}),
        ("exec", "websocket", {"sec-websocket-protocol": "v5.channel.k8s.io"}),
        ("exec", "websocket", {"sec-websocket-protocol": "v4.channel.k8s.io, v4.channel.k8s.io"}),
        ("portforward", "websocket", {"sec-websocket-protocol": "channel.k8s.io"}),
        (
            "exec",
            "websocket",
            {"sec-websocket-protocol": "v4.channel.k8s.io", "Sec-WebSocket-Extensions": "permessage-deflate"},
        ),
    ],
)
def test_a_server_may_only_choose_what_was_offered(subresource: str, upgrade: str, headers: dict[str, str]) -> None:
    request = offered(head("websocket", ("sec-websocket-protocol", "v4.channel.k8s.io, channel.k8s.io")))
    answer = [(name.encode(), value.encode()) for name, value in headers.items()]
    with pytest.raises(Unspoken):
        open_tunnel(ID, facts(subresource), request, upgrade.encode(), answer, lambda: 1)


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (("tar", "cf", "-", "/etc/passwd"), "copies out of the pod: /etc/passwd"),
        (("/bin/tar", "-cf", "-", "a", "b"), "copies out of the pod: a, b"),
        (("sh", "-c", "tar cf - '/srv/it'\\''s' | tail -c+4096"), "copies out of the pod: /srv/it's"),
        (("tar", "-xmf", "-", "-C", "/srv"), "copies into the pod: /srv"),
        (
            ("tar", "--no-same-permissions", "--no-same-owner", "-xmf", "-"),
            "copies into the pod: its working directory",
        ),
        (("tar", "tf", "/a.tar"), ""),
        (("tar", "cf", "/a.tar", "/etc"), ""),
        (("tar",), ""),
        (("sh", "-c", "tar cf - 'x | tail -c+1"), ""),
        (("sh",), ""),
        ((), ""),
    ],
)
def test_kubectl_cp_is_told_for_what_it_is(command: tuple[str, ...], expected: str) -> None:
    assert told(command) == expected


# --- exec and attach --------------------------------------------------------------------------------------------------


def exec_over_channels(protocol: str, status: bytes) -> tuple[Session, list[tuple[Side, bytes]]]:
    """A terminal session, in what the sides send."""
    in_base64 = "base64" in protocol

    def message(channel: int, text: bytes) -> bytes:
        return b"%d" % channel + base64.b64encode(text) if in_base64 else bytes((channel,)) + text

    opcode = 1 if in_base64 else 2
    steps = [
        (SERVER, ws(message(1, b""), opcode=opcode)),
        (CLIENT, client_ws(message(4, b'{"Width":120,"Height":40}\n'), opcode=opcode)),
        (SERVER, ws(message(1, b"$ "), opcode=opcode) + ws(b"", opcode=9)),
        (CLIENT, client_ws(b"", opcode=10) + client_ws(message(0, b"cat secret\n"), opcode=opcode)),
        (SERVER, ws(message(1, b"cat secret\r\n"), opcode=opcode) + ws(message(2, b"cat: no"), opcode=opcode)),
        (SERVER, ws(message(3, status), opcode=opcode) + ws(b"\x03\xe8", opcode=8)),
        (CLIENT, client_ws(b"\x03\xe8", opcode=8)),
    ]
    if protocol.startswith("v5"):
        steps.insert(4, (CLIENT, client_ws(b"\xff\0")))
    return Session(tunnel("exec", "websocket", protocol)), steps


CHANNEL_PROTOCOLS = ["v5.channel.k8s.io", "v4.channel.k8s.io", "v4.base64.channel.k8s.io"]


@pytest.mark.parametrize("protocol", CHANNEL_PROTOCOLS)
@pytest.mark.parametrize(
    ("status", "tag", "error"),
    [(SUCCESS, "exit 0", ""), (FAILED, "exit 42", ""), (BROKEN, "", "container not found"), (b"!", "", "!")],
)
def test_exec_over_channels_is_recorded(protocol: str, status: bytes, tag: str, error: str) -> None:
    session, steps = exec_over_channels(protocol, status)
    for side, data in steps:
        session.feed(side, data)
    session.end()
    for side, other in ((CLIENT, SERVER), (SERVER, CLIENT)):
        assert session.sent[other] == b"".join(data for each, data in steps if each is side)
    assert session.seen("stdout") == b"$ cat secret\r\n"
    assert session.seen("stderr") == b"cat: no"
    assert session.seen("resize") == b"120x40"
    assert not session.seen("stdin")
    (done,) = session.completed
    assert done.id == ID
    assert done.tag == "; ".join(filter(None, (tag, "stdin 11 bytes not recorded")))
    assert done.error == error


@pytest.mark.parametrize("protocol", CHANNEL_PROTOCOLS)
@given(cuts=st.lists(st.integers(0, 400), max_size=8))
def test_exec_over_channels_in_any_chunking(protocol: str, cuts: list[int]) -> None:
    session, steps = exec_over_channels(protocol, SUCCESS)
    for side, data in steps:
        session.feed(side, *cut_at(data, cuts))
    session.end()
    assert session.sent[CLIENT] == b"".join(data for side, data in steps if side is SERVER)
    assert session.seen("stdout") == b"$ cat secret\r\n"
    assert session.seen("resize") == b"120x40"
    assert session.completed[0].tag == "exit 0; stdin 11 bytes not recorded"


@pytest.mark.parametrize("cut", [True, False])
def test_the_end_is_told_when_the_server_has_said_its_last(cut: bool) -> None:
    """The client may then go away without a word."""
    session, steps = exec_over_channels("v4.channel.k8s.io", FAILED)
    for side, data in steps[:-1]:
        session.feed(side, *(cut_at(data, range(0, 400, 3)) if cut else [data]))
    assert [done.tag for done in session.completed] == ["exit 42; stdin 11 bytes not recorded"]
    session.end()
    assert len(session.completed) == 1
    session = Session(tunnel("exec", "SPDY/3.1", "v4.channel.k8s.io"))
    for side, data in exec_over_spdy(FAILED)[:-1]:
        assert not session.completed
        session.feed(side, data)
    assert [done.tag for done in session.completed] == ["exit 42; stdin 11 bytes not recorded"]
    session.end()
    assert len(session.completed) == 1


def test_what_is_shown_is_recorded_before_it_is_sent() -> None:
    machine = tunnel("exec", "websocket", "v4.channel.k8s.io")
    commands = machine.receive(SERVER, ws(b"\1abc") + ws(b"\1def") + ws(b"\2x"))
    assert [type(command).__name__ for command in commands] == ["Observed", "Observed", "Send"]
    assert [command.data for command in commands[:2]] == [b"abcdef", b"x"]


def test_input_is_recorded_when_that_is_wanted() -> None:
    session = Session(tunnel("attach", "websocket", "v4.channel.k8s.io", record_input=True))
    session.feed(CLIENT, client_ws(b"\0ls\n"))
    session.feed(SERVER, ws(b"\3" + SUCCESS))
    session.end(SERVER)
    assert session.seen("stdin") == b"ls\n"
    assert session.completed[0].tag == "exit 0"


def test_a_text_frame_of_bytes_is_what_the_python_client_sends() -> None:
    session = Session(tunnel("exec", "websocket", "v4.channel.k8s.io", record_input=True))
    session.feed(CLIENT, client_ws(b"\0ls\n", opcode=1))
    assert session.seen("stdin") == b"ls\n"


def test_an_end_without_a_status_is_no_success() -> None:
    session = Session(tunnel("exec", "websocket", "v4.channel.k8s.io"))
    session.feed(SERVER, ws(b"\1abc"))
    session.end(SERVER)
    assert session.completed[0].error == terminal.UNENDED


def test_the_first_protocol_has_no_status() -> None:
    session = Session(tunnel("exec", "websocket", ""))
    session.feed(SERVER, ws(b"\1abc"))
    session.end(SERVER)
    assert (session.completed[0].tag, session.completed[0].error) == ("", "")


def test_after_the_limit_only_sizes_and_a_digest_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "MAX_OBSERVED", 100_000)
    session = Session(tunnel("exec", "websocket", "v4.channel.k8s.io"))
    everything = b""
    for number in range(30):
        text = bytes((number,)) * 5000
        everything += text
        session.feed(SERVER, ws(b"\1" + text))
    session.feed(SERVER, ws(b"\3" + SUCCESS))
    session.end(SERVER)
    seen = session.seen("stdout")
    assert 90_000 < len(seen) < 100_000
    assert everything.startswith(seen)
    digest = hashlib.sha256(everything).hexdigest()
    summary = f"exit 0; stdout 150000 bytes, of which {len(seen)} are recorded, sha256 {digest}"
    assert session.completed[0].tag == summary
    assert len(session.sent[CLIENT]) > 150_000


def test_tiny_records_are_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "MAX_OBSERVED", 10_000)
    session = Session(tunnel("exec", "websocket", "v4.channel.k8s.io"))
    for number in range(2000):
        session.feed(SERVER, ws(b"\1x"))
        session.feed(CLIENT, client_ws(b'\4{"Width":%d,"Height":1}' % number))
    assert len(session.observed) < 110


HOSTILE_EXEC = {
    "output from the client": (CLIENT, client_ws(b"\1x")),
    "a status from the client": (CLIENT, client_ws(b"\3" + SUCCESS)),
    "input from the server": (SERVER, ws(b"\0x")),
    "a size from the server": (SERVER, ws(b'\4{"Width":1,"Height":1}')),
    "channel 5": (CLIENT, client_ws(b"\5x")),
    "channel 254": (SERVER, ws(b"\xfex")),
    "the end of channel 9": (CLIENT, client_ws(b"\xff\x09")),
    "the end of nothing": (CLIENT, client_ws(b"\xff")),
    "the end of too much": (CLIENT, client_ws(b"\xff\0\0")),
    "the end of input from the server": (SERVER, ws(b"\xff\0")),
    "a size that is none": (CLIENT, client_ws(b'\4{"Width":"x"}')),
    "a size below zero": (CLIENT, client_ws(b'\4{"Width":-1,"Height":1}')),
    "a size that never ends": (CLIENT, client_ws(b"\4" + b"{" * 2000)),
    "a status that is too long": (SERVER, ws(b"\3" + b"x" * (terminal.MAX_STATUS + 1))),
    "a fragment": (CLIENT, ws(b"\0x", key=b"abcd", first=0)),
}


@pytest.mark.parametrize("name", HOSTILE_EXEC)
def test_hostile_messages_are_refused(name: str) -> None:
    side, data = HOSTILE_EXEC[name]
    session = Session(tunnel("exec", "websocket", "v5.channel.k8s.io"))
    with pytest.raises(PeerViolation) as raised:
        session.feed(side, data)
    assert raised.value.side is side
    assert not session.sent[CLIENT] and not session.sent[SERVER]


def test_only_version_5_ends_channels() -> None:
    with pytest.raises(PeerViolation):
        Session(tunnel("exec", "websocket", "v4.channel.k8s.io")).feed(CLIENT, client_ws(b"\xff\0"))


def exec_over_spdy(status: bytes) -> list[tuple[Side, bytes]]:
    client, server = Speaker(), Speaker()
    opened = ["error", "stdin", "stdout", "stderr", "resize"]
    steps = [(CLIENT, client.syn_stream(1 + 2 * index, streamtype=kind)) for index, kind in enumerate(opened)]
    steps += [(SERVER, server.syn_reply(1 + 2 * index)) for index in range(len(opened))]
    steps += [
        (CLIENT, data_frame(9, b'{"Width":120,"Height":40}\n')),
        (SERVER, data_frame(5, b"$ ") + control(6, b"\0\0\0\2")),
        (CLIENT, control(6, b"\0\0\0\2") + data_frame(3, b"cat secret\n") + data_frame(3, b"", final=True)),
        (SERVER, data_frame(5, b"cat secret\r\n") + data_frame(7, b"cat: no")),
        (SERVER, data_frame(1, status) + data_frame(1, b"", final=True) + data_frame(5, b"", final=True)),
        (SERVER, data_frame(7, b"", final=True) + data_frame(3, b"", final=True)),
        (CLIENT, reset(1) + reset(9)),
    ]
    return steps


@given(cuts=st.lists(st.integers(0, 400), max_size=8), record_input=st.booleans())
def test_exec_over_spdy_is_recorded(cuts: list[int], record_input: bool) -> None:
    session = Session(tunnel("exec", "SPDY/3.1", "v4.channel.k8s.io", record_input=record_input))
    steps = exec_over_spdy(FAILED)
    for side, data in steps:
        session.feed(side, *cut_at(data, cuts))
    session.end()
    for side, other in ((CLIENT, SERVER), (SERVER, CLIENT)):
        sent = b"".join(data for each, data in steps if each is side)
        assert joined(Listener().hear(bytes(session.sent[other]))) == joined(Listener().hear(sent))
    assert session.seen("stdout") == b"$ cat secret\r\n"
    assert session.seen("stderr") == b"cat: no"
    assert session.seen("resize") == b"120x40"
    assert session.seen("stdin") == (b"cat secret\n" if record_input else b"")
    assert session.completed[0].tag == "exit 42" + ("" if record_input else "; stdin 11 bytes not recorded")


def opened_exec() -> tuple[Session, Speaker, Speaker]:
    client, server = Speaker(), Speaker()
    session = Session(tunnel("exec", "SPDY/3.1", "v4.channel.k8s.io"))
    session.feed(CLIENT, client.syn_stream(1, streamtype="error"), client.syn_stream(3, streamtype="stdout"))
    session.feed(SERVER, server.syn_reply(1), server.syn_reply(3))
    return session, client, server


HOSTILE_SPDY: dict[str, tuple[Side, Callable[[Speaker, Speaker], bytes]]] = {
    "a stream of the server": (SERVER, lambda client, server: server.syn_stream(2, streamtype="stdout")),
    "an even stream": (CLIENT, lambda client, server: client.syn_stream(6, streamtype="stdin")),
    "a stream again": (CLIENT, lambda client, server: client.syn_stream(3, streamtype="stdin")),
    "an earlier stream": (CLIENT, lambda client, server: client.syn_stream(1, streamtype="stdin")),
    "a second stdout": (CLIENT, lambda client, server: client.syn_stream(5, streamtype="stdout")),
    "an unknown kind": (CLIENT, lambda client, server: client.syn_stream(5, streamtype="data")),
    "two kinds in one": (CLIENT, lambda client, server: client.syn_stream(5, streamtype="stdin\0stdout")),
    "no kind": (CLIENT, lambda client, server: client.syn_stream(5)),
    "output from the client": (CLIENT, lambda client, server: data_frame(3, b"x")),
    "data on no stream": (SERVER, lambda client, server: data_frame(0, b"x")),
    "data on a stream to come": (SERVER, lambda client, server: data_frame(99, b"x")),
    "a reply of the client": (CLIENT, lambda client, server: client.syn_reply(3)),
    "a second reply": (SERVER, lambda client, server: server.syn_reply(3)),
    "a window of a stream to come": (CLIENT, lambda client, server: control(9, b"\0\0\0\x63\0\0\0\1")),
    "headers that rename a stream": (
        CLIENT,
        lambda client, server: control(8, b"\0\0\0\3" + client.compress(block([("streamtype", "stdin")]))),
    ),
    "data after the end": (
        SERVER,
        lambda client, server: data_frame(3, b"", final=True) + data_frame(3, b"x"),
    ),
}


@pytest.mark.parametrize("name", HOSTILE_SPDY)
def test_hostile_frames_are_refused(name: str) -> None:
    session, client, server = opened_exec()
    side, make = HOSTILE_SPDY[name]
    with pytest.raises(PeerViolation) as raised:
        session.feed(side, make(client, server))
    assert raised.value.side is side


def test_what_comes_for_a_stream_that_is_gone_is_dropped() -> None:
    session, _, _ = opened_exec()
    session.feed(CLIENT, reset(3))
    session.take(CLIENT)
    session.feed(SERVER, data_frame(3, b"late"), control(9, b"\0\0\0\3\0\0\0\1"), reset(3))
    assert not session.take(CLIENT)
    assert not session.seen("stdout")


def test_windows_and_pings_of_the_connection_pass() -> None:
    session, _, _ = opened_exec()
    session.take(SERVER)
    frames = control(9, b"\0\0\0\0\x7f\xff\xff\xff") + control(6, b"\0\0\0\1") + control(9, b"\0\0\0\3\0\0\x10\0")
    session.feed(CLIENT, frames)
    assert session.take(SERVER) == frames


# --- port-forwards ----------------------------------------------------------------------------------------------------


class Forward:
    """A port-forward over SPDY, plain or in WebSocket messages, and what the sides say and hear in it."""

    def __init__(self, in_websocket: bool, rule: Callable[[int], object] = lambda port: ALLOW) -> None:
        self.in_websocket = in_websocket
        self.client, self.server = Speaker(), Speaker()
        self.listeners = {side: Listener() for side in Side}
        protocol = "SPDY/3.1+portforward.k8s.io" if in_websocket else "portforward.k8s.io"
        upgrade = "websocket" if in_websocket else "SPDY/3.1"
        self.session = Session(tunnel("portforward", upgrade, protocol), rule)  # type: ignore[arg-type]

    def say(self, side: Side, data: bytes, cuts: list[int] | None = None) -> None:
        if self.in_websocket:
            data = client_ws(data) if side is CLIENT else ws(data)
        self.session.feed(side, *(cut_at(data, cuts) if cuts else [data]))

    def hear(self, side: Side) -> list[tuple[object, ...]]:
        """What that side got since the last time."""
        data = self.session.take(side)
        if self.in_websocket:
            data = b"".join(payload for opcode, payload in messages(data) if opcode == 2)
        return joined(self.listeners[side].hear(data))


@pytest.fixture(params=[False, True], ids=["plain", "websocket"])
def in_websocket(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def opening(stream: int, port: int, request: str) -> list[tuple[object, ...]]:
    named = {"port": str(port), "requestid": request}
    return [
        ("syn", stream, {"streamtype": "error", **named}),
        ("data", stream, b"", True),
        ("syn", stream + 2, {"streamtype": "data", **named}),
    ]


def test_a_connection_inside_a_forward_is_judged_and_counted(in_websocket: bool) -> None:
    forwarded = Forward(in_websocket)
    forwarded.say(CLIENT, forwarded.client.pair(1, 5432, "0"))
    (ask,) = forwarded.session.asked
    operation = ask.operation
    assert (operation.kind, operation.once, operation.protocol) == (OperationKind.FORWARD, True, "kubernetes")
    assert operation.text == "forward pods/web in shop to 5432"
    (request,) = operation.requests
    assert (request.verb, request.target, request.ports) == ("create", "pods/portforward", (5432,))
    assert (request.namespace, request.name) == ("shop", "web")
    assert ask.id != ID
    assert forwarded.hear(SERVER) == opening(1, 5432, "0")
    forwarded.say(SERVER, forwarded.server.syn_reply(1) + forwarded.server.syn_reply(3))
    forwarded.say(CLIENT, data_frame(3, b"hello"))
    forwarded.say(SERVER, data_frame(3, b"welcome to it"))
    assert forwarded.hear(CLIENT) == [("reply", 1), ("reply", 3), ("data", 3, b"welcome to it", False)]
    assert forwarded.hear(SERVER) == [("data", 3, b"hello", False)]
    assert not forwarded.session.completed
    forwarded.say(SERVER, data_frame(3, b"", final=True) + data_frame(1, b"", final=True))
    forwarded.say(CLIENT, reset(3))
    (done,) = forwarded.session.completed
    assert (done.id, done.tag, done.error) == (ask.id, "5 bytes sent, 13 received", "")
    assert not forwarded.session.observed
    forwarded.session.end()
    assert [(each.id, each.tag) for each in forwarded.session.completed[1:]] == [(ID, "1 connection")]


def test_nothing_of_a_connection_goes_on_before_its_ruling(in_websocket: bool) -> None:
    forwarded = Forward(in_websocket, lambda port: None)
    forwarded.say(CLIENT, forwarded.client.pair(1, 5432, "0") + data_frame(3, b"SELECT"))
    assert not forwarded.hear(SERVER)
    assert not forwarded.hear(CLIENT)
    forwarded.session.answer(ALLOW)
    assert forwarded.hear(SERVER) == [*opening(1, 5432, "0"), ("data", 3, b"SELECT", False)]


def test_a_denied_connection_is_told_so_and_the_others_go_on(in_websocket: bool) -> None:
    forwarded = Forward(in_websocket, lambda port: DENY if port == 5432 else ALLOW)
    forwarded.say(CLIENT, forwarded.client.pair(1, 80, "0"))
    forwarded.say(CLIENT, forwarded.client.pair(5, 5432, "1"))
    forwarded.say(CLIENT, forwarded.client.pair(9, 80, "2"))
    forwarded.say(CLIENT, data_frame(7, b"SELECT") + data_frame(11, b"GET /"))
    assert forwarded.hear(SERVER) == [*opening(1, 80, "0"), *opening(5, 80, "2"), ("data", 7, b"GET /", False)]
    assert forwarded.hear(CLIENT) == [
        ("reply", 5),
        ("data", 5, b"denied for agent (ask the owners)", True),
        ("reply", 7),
        ("data", 7, b"", True),
    ]
    replies = b"".join(forwarded.server.syn_reply(stream) for stream in (1, 3, 5, 7))
    forwarded.say(SERVER, replies)
    assert forwarded.hear(CLIENT) == [("reply", stream) for stream in (1, 3, 9, 11)]
    forwarded.say(CLIENT, reset(7) + reset(3))
    assert forwarded.hear(SERVER) == [("reset", 3)]
    # the server knows nothing of what was denied
    with pytest.raises(PeerViolation):
        forwarded.say(SERVER, data_frame(9, b"x"))


def test_questions_are_asked_one_at_a_time_and_the_rest_flows(in_websocket: bool) -> None:
    forwarded = Forward(in_websocket, lambda port: ALLOW if port == 80 else None)
    forwarded.say(CLIENT, forwarded.client.pair(1, 80, "0"))
    forwarded.hear(SERVER)
    for index, port in enumerate((5432, 3306, 6379)):
        forwarded.say(CLIENT, forwarded.client.pair(5 + 4 * index, port, str(index + 1)))
    assert [ask.operation.requests[0].ports for ask in forwarded.session.asked] == [(80,), (5432,)]
    forwarded.say(CLIENT, data_frame(3, b"on"))
    assert forwarded.hear(SERVER) == [("data", 3, b"on", False)]
    forwarded.session.answer(DENY)
    forwarded.session.answer(ALLOW)
    assert [ask.operation.requests[0].ports for ask in forwarded.session.asked][2:] == [(3306,), (6379,)]
    assert forwarded.hear(SERVER) == opening(5, 3306, "2")
    forwarded.session.end()
    assert [done.tag for done in forwarded.session.completed] == [
        "2 bytes sent, 0 received",
        "0 bytes sent, 0 received",
        "2 connections",
    ]


def test_the_server_is_told_of_streams_in_the_order_of_its_numbers(in_websocket: bool) -> None:
    """Two connections open at once: one is released whole before the other, and a server refuses a number that is lower
    than an earlier one."""
    forwarded = Forward(in_websocket)
    opened = [(1, "error", "0"), (3, "error", "1"), (5, "data", "1"), (7, "data", "0")]
    forwarded.say(
        CLIENT,
        b"".join(
            forwarded.client.syn_stream(stream, streamtype=kind, port=80, requestid=request)
            for stream, kind, request in opened
        ),
    )
    heard = forwarded.hear(SERVER)
    assert [frame[1] for frame in heard] == [1, 3, 5, 7]
    named = {(frame[2]["streamtype"], frame[2]["requestid"]): frame[1] for frame in heard}  # type: ignore[index]
    for stream, kind, request in opened:
        number = named[kind, request]
        assert isinstance(number, int)
        text = f"{kind} {request}".encode()
        forwarded.say(SERVER, forwarded.server.syn_reply(number) + data_frame(number, text))
        assert forwarded.hear(CLIENT) == [("reply", stream), ("data", stream, text, False)]
    forwarded.say(CLIENT, data_frame(7, b"up"))
    assert forwarded.hear(SERVER) == [("data", named["data", "0"], b"up", False)]


def test_a_client_that_gives_up_is_not_connected(in_websocket: bool) -> None:
    forwarded = Forward(in_websocket, lambda port: None)
    forwarded.say(CLIENT, forwarded.client.syn_stream(1, streamtype="error", port=5432, requestid="0") + reset(1))
    forwarded.session.answer(ALLOW)
    assert not forwarded.hear(SERVER)
    assert [done.error for done in forwarded.session.completed] == [forward.ABANDONED]
    forwarded.session.rule = lambda port: ALLOW
    forwarded.say(CLIENT, forwarded.client.pair(3, 80, "1"))
    assert forwarded.hear(SERVER) == opening(1, 80, "1")


def test_the_servers_error_is_recorded(in_websocket: bool) -> None:
    forwarded = Forward(in_websocket)
    forwarded.say(CLIENT, forwarded.client.pair(1, 5432, "0"))
    forwarded.say(SERVER, data_frame(1, b"connection refused") + reset(3) + reset(1))
    (done,) = forwarded.session.completed
    assert done.error == "connection refused"


def test_the_same_request_may_come_again_when_it_is_over(in_websocket: bool) -> None:
    forwarded = Forward(in_websocket)
    forwarded.say(CLIENT, forwarded.client.pair(1, 80, "0") + reset(1) + reset(3))
    forwarded.say(CLIENT, forwarded.client.pair(5, 5432, "0"))
    assert [ask.operation.requests[0].ports for ask in forwarded.session.asked] == [(80,), (5432,)]


@settings(max_examples=60)
@given(cuts=st.lists(st.integers(0, 900), max_size=10), in_websocket=st.booleans())
def test_a_forward_in_any_chunking(cuts: list[int], in_websocket: bool) -> None:
    forwarded = Forward(in_websocket, lambda port: DENY if port == 5432 else ALLOW)
    said = b"".join(
        (
            forwarded.client.pair(1, 80, "0"),
            forwarded.client.pair(5, 5432, "1"),
            data_frame(3, b"GET /" * 20),
            data_frame(7, b"SELECT" * 20),
            forwarded.client.pair(9, 8080, "2"),
        )
    )
    forwarded.say(CLIENT, said, cuts)
    assert forwarded.hear(SERVER) == [
        *opening(1, 80, "0"),
        ("data", 3, b"GET /" * 20, False),
        *opening(5, 8080, "2"),
    ]
    assert forwarded.hear(CLIENT) == [
        ("reply", 5),
        ("data", 5, b"denied for agent (ask the owners)", True),
        ("reply", 7),
        ("data", 7, b"", True),
    ]


HOSTILE_FORWARD: dict[str, Callable[[Speaker], bytes]] = {
    "another port for the data": lambda client: (
        client.syn_stream(1, streamtype="error", port=80, requestid="0")
        + client.syn_stream(3, streamtype="data", port=5432, requestid="0")
    ),
    "two data streams": lambda client: (
        client.pair(1, 80, "0") + client.syn_stream(5, streamtype="data", port=80, requestid="0")
    ),
    "no request": lambda client: client.syn_stream(1, streamtype="error", port=80),
    "two requests in one": lambda client: client.syn_stream(1, streamtype="error", port=80, requestid="0\x001"),
    "two ports in one": lambda client: client.syn_stream(1, streamtype="error", port="80\x005432", requestid="0"),
    "port 0": lambda client: client.syn_stream(1, streamtype="error", port=0, requestid="0"),
    "port 65616": lambda client: client.syn_stream(1, streamtype="error", port=65616, requestid="0"),
    "port 080": lambda client: client.syn_stream(1, streamtype="error", port="080", requestid="0"),
    "port in other digits": lambda client: client.syn_stream(1, streamtype="error", port="٨٠", requestid="0"),
    "no port": lambda client: client.syn_stream(1, streamtype="error", requestid="0"),
    "another kind": lambda client: client.syn_stream(1, streamtype="stdin", port=80, requestid="0"),
    "a long request": lambda client: client.syn_stream(1, streamtype="error", port=80, requestid="0" * 200),
    "data on the error stream": lambda client: (
        client.syn_stream(1, streamtype="error", port=80, requestid="0") + data_frame(1, b"x")
    ),
}


@pytest.mark.parametrize("name", HOSTILE_FORWARD)
def test_hostile_connections_are_refused(name: str, in_websocket: bool) -> None:
    forwarded = Forward(in_websocket)
    with pytest.raises(PeerViolation) as raised:
        forwarded.say(CLIENT, HOSTILE_FORWARD[name](forwarded.client))
    assert raised.value.side is CLIENT


def test_streams_are_bounded(in_websocket: bool) -> None:
    forwarded = Forward(in_websocket)
    with pytest.raises(PeerViolation, match=r"streams are open|connections"):
        for index in range(relay.MAX_STREAMS):
            forwarded.say(CLIENT, forwarded.client.pair(1 + 4 * index, 80, str(index)))


def test_what_waits_is_bounded_by_no_longer_reading(in_websocket: bool) -> None:
    forwarded = Forward(in_websocket, lambda port: None)
    forwarded.say(CLIENT, forwarded.client.pair(1, 80, "0"))
    assert not forwarded.session.tunnel.unanswered
    for _ in range(5):
        forwarded.say(CLIENT, data_frame(3, b"x" * 65536))
    assert forwarded.session.tunnel.unanswered
    forwarded.session.answer(ALLOW)
    assert not forwarded.session.tunnel.unanswered
    assert forwarded.hear(SERVER)[-1] == ("data", 3, b"x" * 5 * 65536, False)


def test_the_servers_frames_are_masked_with_the_clients_key() -> None:
    """RFC 6455 wants them masked; nothing random is made up here."""
    forwarded = Forward(True)
    forwarded.say(CLIENT, forwarded.client.pair(1, 80, "0"))
    data = bytes(forwarded.session.sent[SERVER])
    assert data[1] & 0x80
    at = 4 if data[1] & 0x7F == 126 else 2
    assert data[at : at + 4] == b"\x11\x22\x33\x44"


def test_text_is_no_spdy() -> None:
    forwarded = Forward(True)
    with pytest.raises(PeerViolation, match="text message"):
        forwarded.session.feed(CLIENT, client_ws(b"abc", opcode=1))


def test_pings_and_closing_pass_around_spdy() -> None:
    forwarded = Forward(True)
    ping = client_ws(b"hi", opcode=9)
    forwarded.session.feed(CLIENT, ping)
    assert forwarded.session.take(SERVER) == ping
    forwarded.session.feed(SERVER, ws(b"hi", opcode=10) + ws(b"\x03\xe8", opcode=8))
    assert messages(forwarded.session.take(CLIENT)) == [(10, b"hi"), (8, b"\x03\xe8")]


# --- port-forwards over channels --------------------------------------------------------------------------------------

PORTS = (80, 5432)
PREFIXES = b"".join(ws(bytes((channel,)) + PORTS[channel // 2].to_bytes(2, "little")) for channel in range(4))


def channels(rule: Callable[[int], object]) -> Session:
    return Session(tunnel("portforward", "websocket", "v4.channel.k8s.io", ports=PORTS), rule)  # type: ignore[arg-type]


def test_every_port_of_a_channel_forward_is_asked_about() -> None:
    session = channels(lambda port: ALLOW)
    assert [ask.operation.requests[0].ports for ask in session.asked] == [(80,), (5432,)]
    session.feed(SERVER, PREFIXES)
    session.feed(CLIENT, client_ws(b"\0GET /") + client_ws(b"\2SELECT"))
    session.feed(SERVER, ws(b"\x00200 OK") + ws(b"\3refused"))
    assert session.sent[CLIENT] == PREFIXES + ws(b"\x00200 OK") + ws(b"\3refused")
    assert session.sent[SERVER] == client_ws(b"\0GET /") + client_ws(b"\2SELECT")
    session.end()
    assert [(done.tag, done.error) for done in session.completed] == [
        ("5 bytes sent, 6 received", ""),
        ("6 bytes sent, 0 received", "refused"),
        ("2 connections", ""),
    ]


def test_a_denied_port_of_a_channel_forward_gets_nothing_through() -> None:
    session = channels(lambda port: DENY if port == 5432 else ALLOW)
    session.feed(SERVER, PREFIXES)
    session.feed(CLIENT, client_ws(b"\2SELECT") + client_ws(b"\0GET /"))
    session.feed(SERVER, ws(b"\2rows") + ws(b"\x00200 OK"))
    assert session.sent[SERVER] == client_ws(b"\0GET /")
    heard = messages(bytes(session.sent[CLIENT]))
    told_port = (5432).to_bytes(2, "little")
    assert (2, b"\3" + told_port) in heard
    assert (2, b"\3denied for agent (ask the owners)") in heard
    assert (2, b"\x00200 OK") in heard
    assert (2, b"\2rows") not in heard


def test_a_channel_forward_waits_for_its_rulings_between_messages() -> None:
    """The answer comes while a message of another connection is under way: it is not cut."""
    session = channels(lambda port: ALLOW if port == 80 else None)
    session.feed(SERVER, PREFIXES)
    session.feed(CLIENT, client_ws(b"\2SELECT"))
    assert not session.sent[SERVER]
    long = ws(b"\0" + b"x" * 300)
    session.feed(SERVER, ws(b"\2greeting") + long[:100])
    session.answer(DENY)
    session.feed(SERVER, long[100:])
    heard = messages(bytes(session.sent[CLIENT]))
    assert [payload for _, payload in heard[:3]] == [b"\0\x50\0", b"\1\x50\0", b"\0" + b"x" * 300]
    assert heard[-1] == (2, b"\3denied for agent (ask the owners)")
    assert b"greeting" not in session.sent[CLIENT]


def test_what_waited_in_a_channel_forward_goes_on() -> None:
    session = channels(lambda port: None)
    session.feed(SERVER, PREFIXES)
    request = client_ws(b"\0GET /")
    session.feed(CLIENT, request[:4])
    session.feed(CLIENT, request[4:9])
    assert not session.sent[SERVER] and not session.sent[CLIENT]
    session.answer(ALLOW)
    session.feed(CLIENT, request[9:])
    assert session.sent[SERVER] == request
    session.answer(ALLOW)
    assert sorted(messages(bytes(session.sent[CLIENT]))) == sorted(messages(PREFIXES))


def test_a_denied_port_is_told_in_base64_too() -> None:
    made = tunnel("portforward", "websocket", "v4.base64.channel.k8s.io", ports=(5432,))
    session = Session(made, lambda port: DENY)
    assert messages(bytes(session.sent[CLIENT]))[-1] == (
        1,
        b"1" + base64.b64encode(b"denied for agent (ask the owners)"),
    )


@pytest.mark.parametrize(
    ("side", "data"),
    [
        (SERVER, ws(b"\0\x51\0")),
        (SERVER, ws(b"\4\x50\0")),
        (CLIENT, client_ws(b"\1x")),
        (CLIENT, client_ws(b"\4x")),
    ],
)
def test_hostile_channels_of_a_forward_are_refused(side: Side, data: bytes) -> None:
    with pytest.raises(PeerViolation) as raised:
        channels(lambda port: ALLOW).feed(side, data)
    assert raised.value.side is side


def test_a_server_may_not_fill_what_waits() -> None:
    session = channels(lambda port: None)
    with pytest.raises(PeerViolation, match="not ruled on"):
        for _ in range(10):
            session.feed(SERVER, ws(b"\0\x50\0" + b"x" * 50_000) if not session.asked[1:] else b"")


# --- everything -------------------------------------------------------------------------------------------------------

KINDS = [
    ("exec", "SPDY/3.1", "v4.channel.k8s.io"),
    ("exec", "websocket", "v5.channel.k8s.io"),
    ("attach", "websocket", "base64.channel.k8s.io"),
    ("portforward", "SPDY/3.1", "portforward.k8s.io"),
    ("portforward", "websocket", "SPDY/3.1+portforward.k8s.io"),
    ("portforward", "websocket", "v4.channel.k8s.io"),
]


@given(
    st.sampled_from(KINDS),
    st.lists(st.tuples(st.sampled_from(Side), st.binary(min_size=1, max_size=80)), max_size=6),
)
def test_arbitrary_bytes_raise_only_violations(kind: tuple[str, str, str], noise: list[tuple[Side, bytes]]) -> None:
    session = Session(tunnel(*kind, ports=(80,)))
    try:
        for side, data in noise:
            session.feed(side, data)
    except PeerViolation as violation:
        assert str(violation)
    session.end()


def test_asks_are_answered_by_their_own_connection() -> None:
    forwarded = Forward(False, lambda port: None)
    forwarded.say(CLIENT, forwarded.client.pair(1, 80, "0"))
    (ask,) = forwarded.session.open
    with pytest.raises(AssertionError):
        forwarded.session.tunnel.answer(AskRuling(ask.id + 1, ask.operation), ALLOW)


def dialogues() -> list[tuple[Session, list[tuple[Side, bytes]]]]:
    """A session of each kind that has just begun, and what its sides say."""
    client, server = Speaker(), Speaker()
    said = [
        (CLIENT, client.pair(1, 80, "0") + client.pair(5, 5432, "1")),
        (SERVER, server.syn_reply(1) + server.syn_reply(3)),
        (CLIENT, data_frame(3, b"GET /") + control(9, b"\0\0\0\3\0\0\x10\0")),
        (SERVER, data_frame(3, b"200 OK") + data_frame(3, b"", final=True) + data_frame(1, b"", final=True)),
        (CLIENT, reset(3)),
    ]
    wrapped = [(side, client_ws(data) if side is CLIENT else ws(data)) for side, data in said]
    over_channels = [
        (SERVER, PREFIXES),
        (CLIENT, client_ws(b"\0GET /") + client_ws(b"\2SELECT")),
        (SERVER, ws(b"\0ok")),
    ]

    def rule(port: int) -> object:
        return DENY if port == 5432 else ALLOW

    return [
        exec_over_channels("v5.channel.k8s.io", FAILED),
        exec_over_channels("v4.base64.channel.k8s.io", FAILED),
        (Session(tunnel("exec", "SPDY/3.1", "v4.channel.k8s.io")), exec_over_spdy(FAILED)),
        (Forward(False, rule).session, said),
        (Forward(True, rule).session, wrapped),
        (channels(rule), over_channels),
    ]


@settings(max_examples=300)
@given(st.integers(0, 5), st.integers(0, 20), st.integers(0, 600), st.integers(1, 255))
def test_one_wrong_byte_raises_only_violations(kind: int, step: int, position: int, flip: int) -> None:
    session, steps = dialogues()[kind]
    try:
        for number, (side, data) in enumerate(steps):
            if number == step % len(steps):
                at = position % len(data)
                data = data[:at] + bytes((data[at] ^ flip,)) + data[at + 1 :]
            session.feed(side, data)
    except PeerViolation as violation:
        assert str(violation)
    session.end()
    assert len([done for done in session.completed if done.id == ID]) == 1
