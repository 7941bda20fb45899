"""One machine played by hand: what a session would do, with the answers in the test's hand; and HTTP read back with
h11, so that a test sees messages and not bytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import h11

from proxy.model import Decision, Endpoint, FieldMask, Operation, Reason, Ruling, Target, TlsMode
from proxy.protocols.base import (
    Ask,
    AskCredential,
    AskLogin,
    AskRuling,
    ClientSecured,
    Close,
    Command,
    Completed,
    Connect,
    Credential,
    Login,
    Preview,
    Refusal,
    Reply,
    Send,
    Side,
    StartTls,
    UpstreamFailed,
    UpstreamReady,
)
from proxy.protocols.kubernetes.machine import KubernetesMachine

C, S = Side.CLIENT, Side.SERVER
TOKEN = "token-of-the-gateway"
ALLOW = Ruling(Decision.ALLOW, (Reason("a", "all", Decision.ALLOW, "allowed"),), "", "", "v1")
DENY = Ruling(
    Decision.DENY,
    (Reason("a", "no", Decision.DENY, "denied"),),
    "hop `a` may not do this (rule `no`)",
    "ask the owners of the policy",
    "v1",
)
APPROVED = Ruling(
    Decision.ALLOW,
    (
        Reason("a", "ask", Decision.HOLD, "held"),
        Reason("hopgate", "[approval k7]", Decision.ALLOW, 'approved by ada: "fine"'),
    ),
    "",
    "",
    "v1",
)
REDACT = FieldMask("secrets", (), (), "data.*", "redact", lambda value: b"***")
HIDE = FieldMask("pods", (), ("hidden-*",), "", "hide", lambda value: value)
"""The first may be shown masked, the second not at all."""


def target(mode: TlsMode = TlsMode.DISABLE) -> Target:
    return Target("cluster", "kubernetes", (Endpoint("192.0.2.1", 6443),), mode, "kubernetes", "", "cred")


def login(masks: tuple[FieldMask, ...] = (), mode: TlsMode = TlsMode.DISABLE) -> Login:
    return Login(target(mode), "", "", "", "", b"", field_masks=masks)


def request(
    method: str = "GET",
    path: str = "/api/v1/namespaces/shop/pods/web",
    body: bytes | None = None,
    *headers: str,
    content_type: str = "application/json",
) -> bytes:
    """A whole request; headers are lines."""
    lines = [f"{method} {path} HTTP/1.1", "Host: cluster:6443", *headers]
    if body is not None:
        lines += [f"Content-Type: {content_type}", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + (body or b"")


def response(body: bytes = b"{}", status: str = "200 OK", *headers: str, length: bool = True) -> bytes:
    """A whole answer."""
    lines = [f"HTTP/1.1 {status}", "Content-Type: application/json", *headers]
    if length:
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def chunked(*pieces: bytes) -> bytes:
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


Kind = TypeVar("Kind")
Judge = Callable[[Operation], Ruling | None]


@dataclass
class Player:
    """Plays the session; `judge` may return None, then the test answers by itself with `reply`. `token` may be a
    refusal, or None, then credentials too wait for the test."""

    judge: Judge = lambda operation: ALLOW
    login: Login | Refusal = field(default_factory=login)
    offer_tls: bool = False
    refusal: Refusal | None = None
    token: str | Refusal | None = TOKEN
    unreachable: str = ""
    sent: dict[Side, bytearray] = field(default_factory=lambda: {C: bytearray(), S: bytearray()})
    said: list[Command] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.machine = KubernetesMachine(offer_tls=self.offer_tls, refusal=self.refusal)
        self.carry_out(self.machine.begin())

    def client(self, data: bytes) -> Player:
        self.carry_out(self.machine.receive(C, data))
        return self

    def server(self, data: bytes) -> Player:
        self.carry_out(self.machine.receive(S, data))
        return self

    def reply(self, ask: Ask, reply: Reply) -> Player:
        self.carry_out(self.machine.answer(ask, reply))
        return self

    def carry_out(self, commands: Sequence[Command]) -> None:
        pending = list(commands)
        while pending:
            command = pending.pop(0)
            if isinstance(command, Send):
                self.sent[command.side] += command.data
                continue
            self.said.append(command)
            answers: Sequence[Command] = ()
            match command:
                case AskLogin():
                    answers = self.machine.answer(command, self.login)
                case AskRuling(operation=operation) if (ruling := self.judge(operation)) is not None:
                    answers = self.machine.answer(command, ruling)
                case AskCredential() if isinstance(self.token, Refusal):
                    answers = self.machine.answer(command, self.token)
                case AskCredential() if self.token is not None:
                    answers = self.machine.answer(command, Credential(self.token))
                case Connect() if self.unreachable:
                    answers = self.machine.notify(UpstreamFailed(self.unreachable))
                case Connect() | StartTls(Side.SERVER):
                    answers = self.machine.notify(UpstreamReady())
                case StartTls(Side.CLIENT):
                    answers = self.machine.notify(ClientSecured())
            # as in the session, what an answer leads to comes behind what was said before
            pending += answers

    def of(self, kind: type[Kind]) -> list[Kind]:
        return [command for command in self.said if isinstance(command, kind)]

    @property
    def closed(self) -> str | None:
        """The reason of the end, or None."""
        ends = self.of(Close)
        assert len(ends) < 2
        return ends[0].reason if ends else None

    @property
    def done(self) -> list[Completed]:
        return self.of(Completed)

    @property
    def previews(self) -> list[str]:
        return [preview.text for preview in self.of(Preview)]

    def answers(self, *methods: str) -> list[Answered]:
        """What the client got, as a client reads it; the methods of its requests are GET unless they are named."""
        return read_answers(bytes(self.sent[C]), methods)

    def requests(self) -> list[Requested]:
        """What the server got, as a server reads it."""
        return read_requests(bytes(self.sent[S]))


@dataclass(frozen=True)
class Answered:
    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes
    whole: bool = True

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name), None)

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Requested:
    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    body: bytes
    whole: bool = True

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name), None)

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def read_answers(data: bytes, methods: Sequence[str] = ()) -> list[Answered]:
    found = []
    while data:
        reader = h11.Connection(h11.CLIENT)
        method = methods[len(found)] if len(found) < len(methods) else "GET"
        reader.send(h11.Request(method=method, target="/", headers=[("Host", "x")]))
        reader.send(h11.EndOfMessage())
        reader.receive_data(data)
        while isinstance(event := reader.next_event(), h11.InformationalResponse):
            found.append(Answered(event.status_code, _text(event.headers), b""))
        assert isinstance(event, h11.Response), event
        body, whole = _body(reader)
        found.append(Answered(event.status_code, _text(event.headers), body, whole))
        data = reader.trailing_data[0] if whole else b""
    return found


def read_requests(data: bytes) -> list[Requested]:
    found = []
    while data:
        reader = h11.Connection(h11.SERVER)
        reader.receive_data(data)
        event = reader.next_event()
        assert isinstance(event, h11.Request), event
        body, whole = _body(reader)
        found.append(Requested(event.method.decode(), event.target.decode(), _text(event.headers), body, whole))
        data = reader.trailing_data[0] if whole else b""
    return found


def _text(headers: Any) -> tuple[tuple[str, str], ...]:
    return tuple((name.decode(), value.decode("latin-1")) for name, value in headers)


def _body(reader: h11.Connection) -> tuple[bytes, bool]:
    body = b""
    while True:
        event = reader.next_event()
        if isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            return body, True
        else:
            return body, False
