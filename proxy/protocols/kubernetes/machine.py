"""One client connection to an API server, HTTP/1.1 on both sides, one connection upstream, one request in flight.

    state      what is awaited                            goes on to
    SECURING   ClientSecured                              ASKING     AskLogin
                                                          REFUSING   with a refusal
    ASKING     Login, or Refusal (-> REFUSING)            REACHING   Connect
    REACHING   the server, in plain or TLS                SERVING    Authenticated
                                                          REFUSING   it does not stand
    SERVING    requests, below                            DRAINING   answered before the request was over
    REFUSING   a request, to say why                      CLOSED     said
    DRAINING   what the client still sends, unread        CLOSED     its end
    CLOSED     nothing

A request goes through the stages of `exchange`; bytes behind it wait. exec, attach and port-forward then switch to
another protocol, in `streams`.

A denial is a `Status` and the connection goes on; it ends where the request's body was not read whole. `Expect:
100-continue` is answered here, once the body is wanted. Interim answers of the server and all trailers are dropped. An
answer that fails midway ends the connection, so that the client never takes a part for the whole.

Blind spots: a client that stops reading an answer, or a server that never ends one, has no deadline here. Which user
headers a front proxy may set is configurable in the server; only those named in `http` are kept from it.
"""

from __future__ import annotations

import dataclasses
import enum
import re
from functools import lru_cache
from typing import Final

from proxy.model import Decision, Ruling, Target, TlsMode
from proxy.protocols.base import (
    Ask,
    AskCredential,
    AskLogin,
    AskRuling,
    Authenticated,
    Buffer,
    ClientSecured,
    Close,
    Command,
    Completed,
    Connect,
    Credential,
    Disconnect,
    Event,
    Login,
    Machine,
    PeerViolation,
    Preview,
    Refusal,
    Reply,
    Send,
    Side,
    StartTls,
    UpstreamFailed,
    UpstreamReady,
)
from proxy.protocols.kubernetes import answers, http, streams
from proxy.protocols.kubernetes.exchange import Exchange, Stage
from proxy.protocols.kubernetes.http import Answer, AnswerReader, Framing, HeadReader, Length, Malformed
from proxy.protocols.kubernetes.masks import Redactor, Unmaskable
from proxy.protocols.kubernetes.preview import MAX_OBJECT, Inquiry, Question
from proxy.protocols.kubernetes.requests import (
    MAX_JUDGED_BODY,
    STREAMING,
    Body,
    Described,
    classify,
    describe,
)
from proxy.protocols.kubernetes.scrub import scrubbed_message

_CLIENT: Final = Side.CLIENT
_SERVER: Final = Side.SERVER
ALPN: Final = ("http/1.1",)
MAX_KEPT: Final = 2 * 1024 * 1024
"""Bytes of the client that wait behind a request; the session stops reading it before that."""
MAX_PIPELINED: Final = 128
"""Requests that come in one go: what they lead to is done in one go too, and everybody else waits meanwhile. Clients of
Kubernetes send one."""
MAX_DRAINED: Final = 64 * 1024 * 1024
"""Bytes of a refused body that are read, so that the client gets to read why."""
MAX_INTERIM: Final = 32
"""Interim answers to one request."""
MAX_UNHEARD: Final = 64 * 1024 * 1024
"""Bytes of an answer to a question of our own that are skipped because it is too large."""
MAX_ERROR: Final = 16 * 1024
"""Bytes of a failure's `Status` that are looked at for the recording."""
_RETRIED: Final = ("GET", "HEAD", "OPTIONS")
"""What a client asks again by itself when a kept connection ends without a word (RFC 9112, 9.3.1)."""
_BODIED: Final = ("POST", "PUT", "PATCH")
_ASKED_WITH: Final = ("user-agent",)
"""Headers of the client's that questions of our own carry, beside the identities that it asks to act as."""
_TOKEN: Final = re.compile(r"[\x21-\x7e]*")
_redactor = lru_cache(maxsize=64)(Redactor)
TOO_LARGE = f"its body has more than `{MAX_JUDGED_BODY}` bytes, which is more than is judged"
HINT_TARGET = "tell the operators of this host: the reason is in hopgate's log"
HINT_AGAIN = "ask again"


class State(enum.Enum):
    SECURING = "securing"
    ASKING = "asking"
    REACHING = "reaching"
    SERVING = "serving"
    REFUSING = "refusing"
    DRAINING = "draining"
    CLOSED = "closed"


class KubernetesMachine:
    """See the module."""

    __slots__ = (
        "_asked",
        "_behind",
        "_blame",
        "_drained",
        "_exchange",
        "_heads",
        "_ids",
        "_inbox",
        "_interim",
        "_login",
        "_offer_tls",
        "_question",
        "_reader",
        "_redactor",
        "_refusal",
        "_replies",
        "_rest",
        "_securing_server",
        "_served",
        "_server_left",
        "_skipped",
        "_state",
        "_tunnel",
    )

    def __init__(self, *, offer_tls: bool, refusal: Refusal | None = None) -> None:
        self._offer_tls = offer_tls
        self._refusal = (403, refusal.message, refusal.hint) if refusal is not None else None
        self._state = State.SECURING
        self._asked: Ask | None = None
        self._login: Login | None = None
        self._redactor: Redactor | None = None
        self._securing_server = False
        self._heads = HeadReader()
        self._inbox = bytearray()
        self._behind = 0
        """Requests that were read since nothing of the client waited."""
        self._exchange: Exchange | None = None
        self._ids = 0
        self._served = False
        self._replies = HeadReader()
        self._reader: AnswerReader | None = None
        """What the next answer of the server is read with; None when nothing was asked of it."""
        self._question: Question | None = None
        self._skipped = 0
        self._interim = 0
        self._server_left = False
        self._tunnel: streams.Tunnel | None = None
        self._rest: Framing | None = None
        self._drained = 0
        self._blame = 503
        """The status that a farewell gives."""

    # --- the interface ------------------------------------------------------------------------------------------------

    def begin(self) -> list[Command]:
        if self._offer_tls:
            return [StartTls(_CLIENT, ALPN)]
        return self._log_in()

    def receive(self, side: Side, data: Buffer) -> list[Command]:
        if self._state is State.CLOSED:
            return []
        if self._tunnel is not None:
            return self._pass(self._tunnel.receive(side, data))
        try:
            return self._receive_client(data) if side is _CLIENT else self._receive_server(bytes(data))
        except Malformed as malformed:
            self._blame = malformed.status if side is _CLIENT else 502
            raise PeerViolation(str(malformed), side) from None

    def eof(self, side: Side) -> list[Command]:
        if self._state is State.CLOSED:
            return []
        reason = f"the {side.value} closed the connection"
        if self._tunnel is not None:
            return [*self._tunnel.eof(side), *self._close(reason)]
        if side is _SERVER:
            return self._lose_server(reason)
        return [*self._break_off("the client left before the answer's end"), *self._close(reason)]

    def answer(self, ask: Ask, reply: Reply) -> list[Command]:
        if self._state is State.CLOSED:
            return []
        if self._tunnel is not None and isinstance(ask, AskRuling):
            return self._pass(self._tunnel.answer(ask, reply))
        exchange = self._exchange
        match ask, reply:
            case AskLogin(), Login() if ask == self._asked:
                self._asked = None
                self._login = reply
                if reply.field_masks:
                    self._redactor = _redactor(reply.field_masks)
                self._state = State.REACHING
                return [Connect()]
            case AskLogin(), Refusal(message, hint) if ask == self._asked:
                self._asked = None
                return self._refuse_all(403, message, hint)
            case AskRuling(id=id), Ruling() if exchange is not None and exchange.id == id:
                return self._ruled(exchange, reply)
            case AskCredential(id=id), Credential(token) if exchange is not None and exchange.id == id:
                return self._admitted(exchange, token)
            case AskCredential(id=id), Refusal(message, hint) if exchange is not None and exchange.id == id:
                return self._unadmitted(exchange, message, hint)
            case _:
                raise ValueError(f"`{type(reply).__name__}` is no answer to `{ask}` here")

    def notify(self, event: Event) -> list[Command]:
        if self._state is State.CLOSED:
            return []
        exchange = self._exchange
        again = exchange is not None and exchange.stage is Stage.REACHING
        match event:
            case UpstreamReady() if again and exchange is not None:
                return self._secure_server() or self._reached_again(exchange)
            case UpstreamFailed(message) if again and exchange is not None:
                return self._turn_away(exchange, 503, answers.sentence(message, HINT_TARGET))
            case ClientSecured() if self._state is State.SECURING:
                return self._log_in()
            case UpstreamReady() if self._state is State.REACHING and self._login is not None:
                if securing := self._secure_server():
                    return securing
                self._state = State.SERVING
                return [Authenticated(b""), *self._go_on()]
            case UpstreamFailed(message) if self._state is State.REACHING:
                return self._refuse_all(503, message, HINT_TARGET)
            case UpstreamReady() | UpstreamFailed() if self._state in (State.REFUSING, State.DRAINING):
                return []
            case _:
                raise ValueError(f"`{event}` was not asked for (state `{self._state.value}`)")

    def notice(self, message: str, hint: str = "") -> list[Command]:
        """Nothing: an answer cannot begin before it is known."""
        return []

    def preview(self, ask: AskRuling) -> list[Command]:
        exchange = self._exchange
        if exchange is None or exchange.id != ask.id or exchange.stage is not Stage.RULING or exchange.refused:
            return [Preview(ask.id, ask.operation.recorded_text)]
        assert exchange.request is not None
        assert exchange.described is not None
        exchange.inquiry = Inquiry(exchange.request, exchange.described)
        if exchange.plan is not None and exchange.plan.not_found is not None:
            exchange.inquiry.stop("it is hidden by the policy, and will not be found")
        return self._inquire(exchange)

    def farewell(self, message: str, hint: str = "") -> list[Command]:
        if self._state is State.CLOSED:
            return []
        if self._tunnel is not None:
            return [*self._tunnel.eof(_SERVER), *self._close(message)]
        if self._state is State.DRAINING:
            return self._close(message)
        exchange = self._exchange
        out: list[Command] = []
        if exchange is not None:
            if not exchange.begun:
                out.append(self._said(exchange.method, self._blame, message, hint, last=True))
            out += self._break_off(message)
        elif self._heads or self._blame not in (502, 503):
            blame = 408 if self._blame == 503 else self._blame
            out.append(self._said("", blame, message, hint, last=True))
        return out + self._close(message)

    def canceller(self) -> Machine | None:
        return None

    @property
    def incomplete(self) -> bool:
        exchange = self._exchange
        return (
            bool(self._heads)
            or (exchange is not None and exchange.stage is Stage.BODY)
            or self._state is State.DRAINING
        )

    @property
    def unanswered(self) -> bool:
        return self._tunnel.unanswered if self._tunnel is not None else bool(self._inbox)

    # --- before the first request -------------------------------------------------------------------------------------

    def _log_in(self) -> list[Command]:
        if self._refusal is not None:
            self._state = State.REFUSING
            return self._go_on()
        self._state = State.ASKING
        self._asked = AskLogin("", "", cancellable=False)
        return [self._asked]

    def _target(self) -> Target:
        assert self._login is not None
        return self._login.target

    def _secure_server(self) -> list[Command]:
        """The handshake with the server that stands, if there is to be one and it has not been."""
        if self._securing_server or self._target().tls_mode is TlsMode.DISABLE:
            return []
        self._securing_server = True
        return [StartTls(_SERVER, ALPN)]

    def _refuse_all(self, status: int, message: str, hint: str) -> list[Command]:
        """There is no session: the first request is told why."""
        self._refusal = (status, message, hint)
        self._state = State.REFUSING
        return self._go_on()

    # --- the client ---------------------------------------------------------------------------------------------------

    def _receive_client(self, data: Buffer) -> list[Command]:
        if self._state is State.SECURING:
            raise Malformed("the client sent bytes in front of its TLS handshake")
        if self._state is State.DRAINING:
            return self._drain(bytes(data))
        if self._inbox or not self._reads:
            self._keep(data)
            return []
        self._behind = 0
        return self._read(bytes(data))

    @property
    def _reads(self) -> bool:
        """Whether the client's next bytes are wanted now."""
        if self._state is State.REFUSING:
            return True
        if self._state is not State.SERVING:
            return False
        exchange = self._exchange
        if exchange is None or exchange.stage is Stage.BODY:
            return True
        return exchange.streamed and exchange.stage in (Stage.ANSWER, Stage.RELAY) and not exchange.framing.done

    def _keep(self, data: Buffer) -> None:
        if len(self._inbox) + len(data) > MAX_KEPT:
            raise Malformed(f"more than `{MAX_KEPT}` bytes wait behind a request")
        self._inbox += data

    def _go_on(self) -> list[Command]:
        """Reads what was kept."""
        if not self._inbox or not self._reads:
            return []
        data = bytes(self._inbox)
        self._inbox = bytearray()
        return self._read(data, broken=True)

    def _read(self, data: bytes, *, broken: bool = False) -> list[Command]:
        """Takes bytes as far as they are wanted. Raises `Malformed`, unless what was said before would be lost by it
        (`broken`: something was): then that is said, and the end."""
        out: list[Command] = []
        try:
            while data and self._reads:
                exchange = self._exchange
                if exchange is None:
                    found = self._heads.feed(data)
                    if found is None:
                        return out
                    raw, data = found
                    out += self._begin_request(raw)
                else:
                    piece, data = exchange.framing.feed(data)
                    out += self._take_body(exchange, piece)
            if data and self._state is State.DRAINING:
                out += self._drain(data)
            elif data and self._state is not State.CLOSED:
                self._keep(data)
        except Malformed as malformed:
            if not out and not broken:
                raise
            self._blame = malformed.status
            out += self.farewell(f"the client broke the protocol: {malformed}")
        return out

    def _begin_request(self, raw: bytes) -> list[Command]:
        self._behind += 1
        if self._behind > MAX_PIPELINED:
            raise Malformed(f"more than `{MAX_PIPELINED}` requests are sent without waiting for an answer")
        head, framing = http.read_request(raw)
        if self._refusal is not None:
            status, message, hint = self._refusal
            failure = answers.failure(status, answers.sentence(message, hint), classify(head).facts)
            said = self._wrote(head.method, failure, last=True)
            return [said, *self._end(framing, message)]
        self._ids += 1
        request = classify(head)
        exchange = Exchange(self._ids, head, request, framing)
        self._exchange = exchange
        if request.unclassified:
            return self._ask(exchange)
        if http.upgrades(head):
            if request.facts.subresource not in STREAMING:
                return self._ask(
                    exchange, 400, "no other protocol is spoken here than that of exec, attach, port-forward"
                )
            try:
                exchange.head = head = streams.offered(head)
            except streams.Unspoken as unspoken:
                return self._ask(exchange, 400, str(unspoken))
        if request.body is Body.NONE and not framing.done:
            return self._ask(exchange, 400, f"a `{head.method}` of this path has no body")
        if request.body is Body.JUDGED and not framing.done:
            if isinstance(framing, Length) and framing.left > MAX_JUDGED_BODY:
                return self._ask(exchange, 413, TOO_LARGE)
            return [Send(_CLIENT, http.CONTINUE)] if http.wants_continue(head) else []
        return self._ask(exchange)

    def _take_body(self, exchange: Exchange, piece: bytes) -> list[Command]:
        if exchange.body is None:
            return self._upload(exchange, piece)
        exchange.body += piece
        if len(exchange.body) > MAX_JUDGED_BODY:
            exchange.body = bytearray()
            return self._ask(exchange, 413, TOO_LARGE)
        return self._ask(exchange) if exchange.framing.done else []

    def _upload(self, exchange: Exchange, piece: bytes) -> list[Command]:
        """Passes a body on that nobody judges."""
        if not isinstance(exchange.framing, Length):
            piece = http.chunk(piece) + (http.LAST_CHUNK if exchange.framing.done else b"")
        return [Send(_SERVER, piece)] if piece else []

    def _ask(self, exchange: Exchange, refused: int = 0, why: str = "") -> list[Command]:
        """Asks for the ruling. `refused` is the status of a request that cannot go on, because of `why`: it is ruled
        on, and so recorded, all the same."""
        assert exchange.request is not None
        assert exchange.head is not None
        described = describe(exchange.request, exchange.head, bytes(exchange.body or b""))
        facts = described.operation.requests[0]
        if self._redactor is not None:
            exchange.plan = self._redactor.plan(facts)
        if refused:
            operation = dataclasses.replace(described.operation, unclassified=why, once=True)
            described = Described(operation, b"", "")
        # what could not be classified is denied by every judge; here it could not even be written
        exchange.refused = refused or (403 if described.operation.unclassified else 0)
        exchange.body = None
        exchange.described = described
        exchange.facts = facts
        exchange.stage = Stage.RULING
        return [AskRuling(exchange.id, described.operation)]

    # --- ruling and credential ----------------------------------------------------------------------------------------

    def _ruled(self, exchange: Exchange, ruling: Ruling) -> list[Command]:
        if exchange.stage is not Stage.RULING or exchange.ruling is not None:
            raise ValueError(f"the request `{exchange.id}` was ruled on before")
        exchange.ruling = ruling
        if exchange.inquiry is not None:
            # the server still answers a question of ours: its order is kept
            return []
        return self._act(exchange, ruling)

    def _act(self, exchange: Exchange, ruling: Ruling) -> list[Command]:
        if ruling.decision is not Decision.ALLOW or exchange.refused:
            message = answers.sentence(ruling.message or "refused: it cannot be judged", ruling.hint)
            return self._turn_away(exchange, exchange.refused or 403, message, reached=False)
        exchange.approved = answers.warning(ruling)
        exchange.record_input = ruling.record_input
        if exchange.plan is not None and (hidden := exchange.plan.not_found) is not None:
            return self._turn_away(exchange, 404, answers.told(hidden), body=hidden)
        exchange.stage = Stage.CREDENTIAL
        return [AskCredential(exchange.id)]

    def _admitted(self, exchange: Exchange, token: str) -> list[Command]:
        if not _TOKEN.fullmatch(token):
            return self._unadmitted(
                exchange, "the gateway's token for this target is none that can be sent", HINT_TARGET
            )
        if exchange.stage is Stage.RULING:
            return self._put_question(exchange, token)
        if exchange.stage is not Stage.CREDENTIAL:
            raise ValueError(f"no credential was asked for (stage `{exchange.stage.value}`)")
        if self._server_left:
            exchange.token = token
            exchange.stage = Stage.REACHING
            self._securing_server = False
            return [Disconnect(), Connect()]
        return self._send(exchange, token)

    def _reached_again(self, exchange: Exchange) -> list[Command]:
        self._server_left = False
        self._replies = HeadReader()
        token, exchange.token = exchange.token, ""
        return [Authenticated(b""), *self._send(exchange, token)]

    def _unadmitted(self, exchange: Exchange, message: str, hint: str) -> list[Command]:
        if exchange.stage is Stage.RULING and exchange.inquiry is not None:
            exchange.inquiry.stop(message)
            return self._inquire(exchange)
        return self._turn_away(exchange, 503, answers.sentence(message, hint))

    def _send(self, exchange: Exchange, token: str) -> list[Command]:
        """The request, written anew."""
        request, head, described = exchange.request, exchange.head, exchange.described
        assert request is not None
        assert head is not None
        assert described is not None
        headers = http.forwarded(head)
        dropped = {b"host"}
        added: http.Headers = [(b"host", _authority(self._target()))]
        upgrade = ", ".join(head.values("upgrade"))
        if exchange.plan is not None:
            accept = exchange.plan.accept(", ".join(head.values("accept")))
            dropped |= {b"accept", b"accept-encoding", b"range", b"if-range"}
            added += [(b"accept", accept.encode("latin-1")), (b"accept-encoding", b"identity")]
        if upgrade:
            added += [(b"connection", b"Upgrade"), (b"upgrade", upgrade.encode("latin-1"))]
        if exchange.streamed:
            if not isinstance(exchange.framing, Length):
                added.append((b"transfer-encoding", b"chunked"))
            elif exchange.framing.left or exchange.method in _BODIED:
                added.append((b"content-length", b"%d" % exchange.framing.left))
        else:
            dropped |= {b"content-type", b"content-encoding"}
            if described.body:
                added.append((b"content-type", described.content_type.encode("latin-1")))
            if described.body or exchange.method in _BODIED:
                added.append((b"content-length", b"%d" % len(described.body)))
        if token:
            added.append((b"authorization", b"Bearer " + token.encode()))
        headers = [header for header in headers if header[0] not in dropped]
        raw = self._put(exchange.method, request.target, headers + added)
        out: list[Command] = [Send(_SERVER, raw)]
        if described.body and not exchange.streamed:
            out.append(Send(_SERVER, described.body))
        exchange.stage = Stage.ANSWER
        exchange.request = exchange.described = exchange.ruling = None
        if exchange.streamed and not exchange.framing.done:
            if http.wants_continue(head):
                out.append(Send(_CLIENT, http.CONTINUE))
            out += self._go_on()
        return out

    def _put(self, method: str, target: str, headers: http.Headers) -> bytes:
        self._reader = AnswerReader(method, upgrade=any(name == b"upgrade" for name, _ in headers))
        self._interim = 0
        return http.write_request(method, target, headers)

    # --- what would come of it ----------------------------------------------------------------------------------------

    def _inquire(self, exchange: Exchange) -> list[Command]:
        """Asks the server the next question, or tells what the answers came to."""
        inquiry = exchange.inquiry
        assert inquiry is not None
        if self._server_left:
            inquiry.stop("the server closed the connection meanwhile")
        if inquiry.next() is not None and exchange.ruling is None:
            return [AskCredential(exchange.id)]
        exchange.inquiry = None
        if exchange.ruling is not None:
            return self._act(exchange, exchange.ruling)
        return [Preview(exchange.id, inquiry.text)]

    def _put_question(self, exchange: Exchange, token: str) -> list[Command]:
        assert exchange.inquiry is not None
        assert exchange.head is not None
        question = exchange.inquiry.next()
        if question is None or exchange.ruling is not None:
            return self._inquire(exchange)
        headers = [
            (name, value)
            for name, value in http.forwarded(exchange.head)
            if name.decode("latin-1") in _ASKED_WITH or name.startswith(b"impersonate-")
        ]
        headers.append((b"host", _authority(self._target())))
        headers += [(b"accept", b"application/json"), (b"accept-encoding", b"identity")]
        if question.body:
            headers.append((b"content-type", question.content_type.encode("latin-1")))
            headers.append((b"content-length", b"%d" % len(question.body)))
        if token:
            headers.append((b"authorization", b"Bearer " + token.encode()))
        self._question = question
        self._skipped = 0
        exchange.heard = bytearray()
        return [Send(_SERVER, self._put(question.method, question.target, headers) + question.body)]

    def _hear(self, exchange: Exchange, piece: bytes) -> None:
        assert exchange.heard is not None
        if len(exchange.heard) + len(piece) <= MAX_OBJECT:
            exchange.heard += piece
            return
        self._skipped += len(piece)
        if self._skipped > MAX_UNHEARD:
            raise Malformed("the answer to a dry run does not end")

    def _heard(self, exchange: Exchange, answer: Answer) -> list[Command]:
        question, self._question = self._question, None
        inquiry = exchange.inquiry
        assert question is not None
        assert inquiry is not None
        body = bytes(exchange.heard or b"")
        exchange.heard = None
        if self._skipped:
            inquiry.stop("the server's answer is too large to be shown")
            return self._inquire(exchange)
        masked = body
        plan = self._redactor.plan(question.facts) if self._redactor is not None else None
        if plan is not None:
            try:
                transformer = plan.transformer(answer.status, answer.value(b"content-type"))
                masked = transformer.feed(body) + transformer.finish()
            except Unmaskable as unmaskable:
                inquiry.stop(f"the server's answer cannot be shown: {unmaskable}")
                return self._inquire(exchange)
        inquiry.hear(answer.status, body, masked)
        return self._inquire(exchange)

    # --- the server ---------------------------------------------------------------------------------------------------

    def _receive_server(self, data: bytes) -> list[Command]:
        out: list[Command] = []
        try:
            while data and self._state is not State.DRAINING:
                exchange = self._exchange
                if exchange is None or (self._reader is None and exchange.answer is None):
                    raise Malformed("the server spoke without being asked")
                answer = exchange.answer
                if answer is None:
                    found = self._replies.feed(data)
                    if found is None:
                        break
                    raw, data = found
                    out += self._begin_answer(exchange, raw)
                elif answer.framing is not None:
                    piece, data = answer.framing.feed(data)
                    if piece:
                        out += self._pass_body(exchange, piece)
                out += self._end_answer(exchange)
                if self._state is State.CLOSED:
                    break
                if self._tunnel is not None:
                    return out + (self._pass(self._tunnel.receive(_SERVER, data)) if data else [])
        except Malformed as malformed:
            if not out:
                raise
            self._blame = 502
            out += self.farewell(f"the server broke the protocol: {malformed}")
        return out

    def _begin_answer(self, exchange: Exchange, raw: bytes) -> list[Command]:
        assert self._reader is not None
        answer = self._reader.read(raw)
        if answer.status == 101:
            return self._switch(exchange, answer)
        if answer.status < 200:
            self._interim += 1
            if self._interim > MAX_INTERIM:
                raise Malformed(f"the server sent more than `{MAX_INTERIM}` interim answers")
            return []
        exchange.answer = answer
        self._reader = None
        if answer.last:
            self._server_left = True
        if self._question is not None:
            return []
        exchange.stage = Stage.RELAY
        if exchange.plan is not None:
            # the length of what is masked tells of it, and a warning may quote it
            answer.headers = [pair for pair in answer.headers if pair[0].lower() not in (b"content-length", b"warning")]
            if answer.framing is not None:
                encoding = answer.value(b"content-encoding").strip().lower()
                try:
                    if encoding not in ("", "identity"):
                        raise Unmaskable(f"the server compressed its answer (`{encoding[:32]}`), unasked")
                    exchange.transformer = exchange.plan.transformer(answer.status, answer.value(b"content-type"))
                except Unmaskable as unmaskable:
                    return self._replace(exchange, unmaskable)
        exchange.chunked = answer.framing is not None and (
            exchange.transformer is not None or not isinstance(answer.framing, Length)
        )
        if answer.status >= 400 and not answer.value(b"content-encoding") and "json" in answer.value(b"content-type"):
            exchange.heard = bytearray()
        exchange.plan = None
        # a watch may have nothing to tell for hours, and its client wants to know that it stands
        exchange.unsent = exchange.transformer is not None and exchange.facts.verb != "watch"
        return [] if exchange.unsent else [self._head_of_answer(exchange, answer)]

    def _head_of_answer(self, exchange: Exchange, answer: Answer) -> Send:
        headers = answer.headers
        if exchange.approved:
            headers = [*headers, (b"Warning", exchange.approved)]
        exchange.closes = exchange.closes or self._server_left or not exchange.framing.done
        raw = http.write_answer(answer.status, answer.reason, headers, chunked=exchange.chunked, last=exchange.closes)
        answer.headers = []
        exchange.unsent = False
        exchange.begun = True
        exchange.head = None
        return Send(_CLIENT, raw)

    def _pass_body(self, exchange: Exchange, piece: bytes) -> list[Command]:
        if self._question is not None:
            self._hear(exchange, piece)
            return []
        if exchange.transformer is not None:
            try:
                piece = exchange.transformer.feed(piece)
            except Unmaskable as unmaskable:
                return self._replace(exchange, unmaskable)
        return self._put_through(exchange, piece)

    def _put_through(self, exchange: Exchange, piece: bytes) -> list[Command]:
        """Bytes of the answer that the client may see."""
        answer = exchange.answer
        assert answer is not None
        if not piece:
            return []
        if exchange.heard is not None:
            exchange.heard += piece[: MAX_ERROR - len(exchange.heard)]
        out: list[Command] = [self._head_of_answer(exchange, answer)] if exchange.unsent else []
        if exchange.chunked:
            piece = http.chunk(piece)
        out.append(Send(_CLIENT, piece))
        return out

    def _end_answer(self, exchange: Exchange) -> list[Command]:
        """Goes on when the answer is whole."""
        answer = exchange.answer
        if answer is None or exchange is not self._exchange:
            return []
        if answer.framing is not None and not answer.framing.done:
            return []
        if self._question is not None:
            exchange.answer = None
            return self._heard(exchange, answer)
        out: list[Command] = []
        rows = 0
        masked: tuple[str, ...] = ()
        transformer = exchange.transformer
        if transformer is not None:
            try:
                out += self._put_through(exchange, transformer.finish())
            except Unmaskable as unmaskable:
                return self._replace(exchange, unmaskable)
            if exchange.unsent:
                out.append(self._head_of_answer(exchange, answer))
            rows, masked = transformer.objects, transformer.masked
        if exchange.chunked:
            out.append(Send(_CLIENT, http.LAST_CHUNK))
        error = ""
        if answer.status >= 400:
            told = scrubbed_message(exchange.facts.resource, answers.told(bytes(exchange.heard or b"")))
            error = f"{answer.line}: {told}" if told else answer.line
        out.append(Completed(exchange.id, answer.line, rows, error, masked))
        self._served = True
        self._exchange = None
        if exchange.closes or self._server_left:
            return out + self._end(exchange.framing, "the connection was to end with this answer")
        return out + self._go_on()

    def _replace(self, exchange: Exchange, unmaskable: Unmaskable) -> list[Command]:
        """What cannot be masked is not shown: told in place of the answer, when that has not begun."""
        message = f"the answer cannot be shown masked: {unmaskable}"
        out: list[Command] = []
        if not exchange.begun:
            out.append(self._said(exchange.method, 502, message, "", last=True))
        out.append(Completed(exchange.id, "", 0, message))
        self._exchange = None
        return out + self._end(exchange.framing, message)

    def _lose_server(self, reason: str) -> list[Command]:
        exchange = self._exchange
        self._server_left = True
        if self._state in (State.ASKING, State.REACHING):
            return self._refuse_all(503, f"{reason} before the first request", HINT_TARGET)
        if self._state is State.REFUSING:
            return []
        if exchange is None:
            return self._close(reason)
        if exchange.stage in (Stage.BODY, Stage.RULING, Stage.CREDENTIAL):
            return [Disconnect(), *self._do_without_server(exchange)]
        answer = exchange.answer
        if self._question is None and answer is not None and answer.framing is not None and answer.framing.eof():
            return self._end_answer(exchange)
        out: list[Command] = []
        asked = exchange.stage in (Stage.ANSWER, Stage.RELAY)
        again = asked and answer is None and self._served and exchange.method in _RETRIED and not self._replies
        if not exchange.begun and not again:
            status = 502 if asked else 503
            out.append(self._said(exchange.method, status, reason, HINT_AGAIN, last=True))
        return [*out, *self._break_off(reason), *self._close(reason)]

    def _do_without_server(self, exchange: Exchange) -> list[Command]:
        """It was not asked yet, but for a dry run perhaps: it is connected to again when it is wanted."""
        if self._question is None:
            return []
        self._question = self._reader = None
        exchange.answer = exchange.heard = None
        return self._inquire(exchange)

    # --- another protocol ---------------------------------------------------------------------------------------------

    def _switch(self, exchange: Exchange, answer: Answer) -> list[Command]:
        assert exchange.head is not None
        try:
            tunnel = streams.open_tunnel(
                exchange.id,
                exchange.facts,
                exchange.head,
                answer.upgrade,
                answer.headers,
                self._next_id,
                record_input=exchange.record_input,
            )
        except streams.Unspoken as unspoken:
            raise Malformed(str(unspoken)) from None
        out: list[Command] = [Send(_CLIENT, http.write_switch(answer.headers, answer.upgrade)), *tunnel.begin()]
        self._tunnel = tunnel
        self._exchange = None
        self._reader = None
        early, self._inbox = bytes(self._inbox), bytearray()
        return out + (self._pass(tunnel.receive(_CLIENT, early)) if early else [])

    def _next_id(self) -> int:
        self._ids += 1
        return self._ids

    def _pass(self, out: list[Command], reason: str = "the stream ended") -> list[Command]:
        return out + self._close(reason) if self._tunnel is not None and self._tunnel.closed else out

    # --- the end ------------------------------------------------------------------------------------------------------

    def _turn_away(
        self, exchange: Exchange, status: int, message: str, *, reached: bool = True, body: bytes = b""
    ) -> list[Command]:
        """The gateway's own answer; the connection goes on when the request's body was read whole. `reached` says that
        the request had been allowed, and that what became of it is to be recorded. `body` is the `Status` itself."""
        assert not exchange.begun
        allowed = reached and exchange.ruling is not None
        last = exchange.closes or not exchange.framing.done or self._server_left
        failure = (status, answers.JSON, body) if body else answers.failure(status, message, exchange.facts)
        status = failure[0]
        out: list[Command] = [self._wrote(exchange.method, failure, last=last)]
        if allowed:
            out.append(Completed(exchange.id, "", 0, f"{status} {answers.phrase(status)}: {message}"))
        self._exchange = None
        if last:
            return out + self._end(exchange.framing, message)
        return out + self._go_on()

    def _said(self, method: str, status: int, message: str, hint: str, *, last: bool) -> Send:
        return self._wrote(method, answers.failure(status, answers.sentence(message, hint)), last=last)

    def _wrote(self, method: str, failure: tuple[int, bytes, bytes], *, last: bool) -> Send:
        """An answer of our own, head and body."""
        status, media, body = failure
        headers = [
            (b"Content-Type", media),
            (b"Cache-Control", b"no-cache, private"),
            (b"Content-Length", b"%d" % len(body)),
        ]
        head = http.write_answer(status, answers.phrase(status).encode(), headers, last=last)
        return Send(_CLIENT, head if method == "HEAD" else head + body)

    def _break_off(self, why: str) -> list[Command]:
        """The request in flight comes to no end."""
        exchange = self._exchange
        self._exchange = None
        if exchange is None or exchange.stage not in (Stage.ANSWER, Stage.RELAY):
            return []
        tag = exchange.answer.line if exchange.answer is not None else ""
        return [Completed(exchange.id, tag, 0, why)]

    def _end(self, framing: Framing, reason: str) -> list[Command]:
        """Closes; first reads what the client still sends of a body, so that it gets to read the answer."""
        if framing.done:
            return self._close(reason)
        self._state = State.DRAINING
        self._rest = framing
        kept, self._inbox = bytes(self._inbox), bytearray()
        return self._drain(kept) if kept else []

    def _drain(self, data: bytes) -> list[Command]:
        assert self._rest is not None
        self._drained += len(data)
        try:
            self._rest.feed(data)
        except Malformed as malformed:
            return self._close(f"the client broke the protocol: {malformed}")
        if self._rest.done:
            return self._close("what was refused has ended")
        if self._drained > MAX_DRAINED:
            return self._close("the client went on with a request that was refused")
        return []

    def _close(self, reason: str) -> list[Command]:
        self._state = State.CLOSED
        self._exchange = None
        self._tunnel = None
        self._reader = None
        self._inbox = bytearray()
        return [Close(reason)]


def _authority(target: Target) -> bytes:
    """The `Host` that the server is asked by: its own, since behind a front of several clusters the client's would
    choose to whom the gateway shows its token."""
    name = target.server_name or (target.endpoints[0].address if target.endpoints else "")
    name = f"[{name}]" if ":" in name else name
    return (f"{name}:{target.endpoints[0].port}" if target.endpoints else name).encode("latin-1")
