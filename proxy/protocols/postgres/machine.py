"""One PostgreSQL session, protocol 3.0, both sides: from the first byte to the first ReadyForQuery here, then in
`relay`.

    state        what is awaited                          goes on to
    STARTUP      a start-up packet of the client          SECURING   SSLRequest, when TLS is offered: S
                                                          STARTUP    SSLRequest otherwise, GSSENCRequest: N
                                                          CANCELLING CancelRequest: AskCancel
                                                          ASKING     StartupMessage: AskLogin
    SECURING     ClientSecured; any byte is a violation   STARTUP
    CANCELLING   Cancelled                                CLOSED
    ASKING       Login, or Refusal (-> CLOSED)            REACHING   Connect
    REACHING     the server, in plain or TLS (`upstream`) LOGGING_IN StartupMessage to the server
    LOGGING_IN   AuthenticationOk (`login`)               SETTLING
    SETTLING     the server's first ReadyForQuery         LEARNING   with masks: the catalog query
                                                          RELAYING   without
    LEARNING     the catalog query's ReadyForQuery        RELAYING
    RELAYING     `relay`
    CLOSED       nothing

The client is not asked for a password. It gets AuthenticationOk, the server's parameters, a key of the gateway's
and ReadyForQuery in one piece, once all of that is known. With `refusal` the machine goes no further than the
StartupMessage and asks nothing.

Blind spots: a client that starts with a TLS handshake (`sslnegotiation=direct`) is closed without a word, since
plain words are not what it reads. GSSAPI encryption is never offered. A server that speaks anything but 3.0 is a
violation.
"""

from __future__ import annotations

import enum
import hashlib
import struct
from typing import Final

from proxy.model import Ruling
from proxy.protocols.base import (
    Ask,
    AskCancel,
    AskLogin,
    AskRuling,
    Authenticated,
    Buffer,
    Cancelled,
    ClientSecured,
    Close,
    Command,
    Event,
    Learned,
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
from proxy.protocols.postgres import messages
from proxy.protocols.postgres.columns import Catalog, CatalogReader, CatalogUnreadable, catalog_query
from proxy.protocols.postgres.errand import cancelling
from proxy.protocols.postgres.login import LoginRefused, ServerLogin
from proxy.protocols.postgres.messages import Malformed
from proxy.protocols.postgres.relay import Relay
from proxy.protocols.postgres.startup import StartupRefused, StartupRequest, encoding_codec, read_request
from proxy.protocols.postgres.upstream import Upstream, UpstreamRefused

_SERVER: Final = Side.SERVER
CANCEL_KEY_BYTES = 8
"""Process id and secret of protocol 3.0, which is all that a client ever got from us."""
HINT_CREDENTIAL = "the credential is the gateway's own: tell the operators of this host"
HINT_TARGET = "tell the operators of this host: the target's address, its TLS and its CA are in their policy"


class State(enum.Enum):
    STARTUP = "startup"
    SECURING = "securing"
    CANCELLING = "cancelling"
    ASKING = "asking"
    REACHING = "reaching"
    LOGGING_IN = "logging in"
    SETTLING = "settling"
    LEARNING = "learning"
    RELAYING = "relaying"
    CLOSED = "closed"


class PostgresMachine:
    """See the module."""

    def __init__(self, *, offer_tls: bool, refusal: Refusal | None = None) -> None:
        self._offer_tls = offer_tls
        self._refusal = refusal
        self._state = State.STARTUP
        self._kept = bytearray()
        self._negotiations = 0
        self._request: StartupRequest | None = None
        self._asked: Ask | None = None
        self._login: Login | None = None
        self._upstream: Upstream | None = None
        self._server_login: ServerLogin | None = None
        self._reply = bytearray()
        self._reply_bytes = 0
        self._welcome = bytearray()
        self._parameters: dict[str, str] = {}
        self._cancel_key = b""
        self._reader: CatalogReader | None = None
        self._relay: Relay | None = None

    # --- the interface ------------------------------------------------------------------------------------------------

    def receive(self, side: Side, data: Buffer) -> list[Command]:
        relay = self._relay
        if relay is not None:
            return relay.receive_server(data) if side is _SERVER else relay.receive_client(data)
        if self._state is State.CLOSED:
            return []
        return self._receive_client(data) if side is Side.CLIENT else self._receive_server(data)

    def begin(self) -> list[Command]:
        return []

    def eof(self, side: Side) -> list[Command]:
        reason = f"the {side.value} closed the connection"
        if self._relay is not None:
            return self._relay.abandon(reason)
        if self._state is State.CLOSED:
            return []
        if side is Side.SERVER:
            return self._fail("08006", f"{self._target_words()} closed the connection during the login", HINT_TARGET)
        return self._close(reason)

    def answer(self, ask: Ask, reply: Reply) -> list[Command]:
        relay = self._relay
        if relay is not None and isinstance(ask, AskRuling) and isinstance(reply, Ruling):
            return relay.answer(ask, reply)
        match ask, reply:
            case AskRuling(), Ruling() if self._state is State.CLOSED:
                return []
            case (AskLogin(), Login() | Refusal()) | (AskCancel(), Cancelled()):
                if self._state is State.CLOSED:
                    return []
                if ask is not self._asked and ask != self._asked:
                    raise ValueError(f"`{ask}` was not asked, or was answered before")
                self._asked = None
            case _:
                raise ValueError(f"`{reply!r}` is no answer to `{type(ask).__name__}`")
        match reply:
            case Login():
                self._login = reply
                self._upstream = Upstream(reply.target)
                self._state = State.REACHING
                return self._upstream.begin()
            case Refusal(message, hint):
                return self._fail("28000", message, hint)
            case _:
                return self._close("the cancel request was dealt with")

    def notify(self, event: Event) -> list[Command]:
        if self._state is State.CLOSED:
            return []
        match event:
            case ClientSecured():
                if self._state is not State.SECURING:
                    raise ValueError(f"no handshake was asked for (state `{self._state.value}`)")
                self._state = State.STARTUP
                self._offer_tls = False
                return []
            case UpstreamReady():
                if self._upstream is None or self._state is not State.REACHING:
                    raise ValueError(f"no connection was asked for (state `{self._state.value}`)")
                return self._reach(self._upstream.stands(event))
            case UpstreamFailed(message):
                return self._fail("08006", message, HINT_TARGET)

    def notice(self, message: str, hint: str = "") -> list[Command]:
        if self._relay is not None:
            return [] if self._relay.closed else self._relay.notice(message, hint)
        if self._request is None or self._state is State.CLOSED:
            return []
        return [Send(Side.CLIENT, messages.notice(message, hint))]

    def preview(self, ask: AskRuling) -> list[Command]:
        return [Preview(ask.id, ask.operation.recorded_text)]

    def farewell(self, message: str, hint: str = "") -> list[Command]:
        if self._relay is not None:
            return self._relay.farewell("57P01", message, hint)
        if self._state is State.CLOSED:
            return []
        return self._fail("28000", message, hint)

    def canceller(self) -> Machine | None:
        if self._login is None or not self._cancel_key:
            return None
        return cancelling(self._login.target, self._cancel_key)

    @property
    def incomplete(self) -> bool:
        """Never: a client may sit inside a transaction as long as it likes, and holds up nobody else."""
        return False

    @property
    def unanswered(self) -> bool:
        if self._relay is not None:
            return self._relay.unanswered
        return self._state not in (State.STARTUP, State.SECURING, State.CLOSED)

    # --- the client's start-up ----------------------------------------------------------------------------------------

    def _receive_client(self, data: Buffer) -> list[Command]:
        if self._state is State.SECURING:
            raise PeerViolation("the client sent bytes in front of its TLS handshake", Side.CLIENT)
        self._kept += data
        if self._state is not State.STARTUP:
            if len(self._kept) > messages.MAX_KEPT:
                raise PeerViolation(f"more than `{messages.MAX_KEPT}` bytes before the login is done", Side.CLIENT)
            return []
        out: list[Command] = []
        while self._state is State.STARTUP and len(self._kept) >= 4:
            if self._kept[0] == 0x16 and self._kept[1] == 3:
                return out + self._close("the client starts with a TLS handshake; direct TLS is not spoken here")
            (size,) = struct.unpack_from(">I", self._kept)
            if not 8 <= size <= messages.MAX_STARTUP:
                raise PeerViolation(f"a start-up packet has length `{size}`", Side.CLIENT)
            if len(self._kept) < size:
                break
            packet = bytes(self._kept[4:size])
            del self._kept[:size]
            out += self._start(packet)
        return out

    def _start(self, packet: bytes) -> list[Command]:
        (code,) = struct.unpack_from(">I", packet)
        if code in (messages.SSL_REQUEST, messages.GSSENC_REQUEST):
            self._negotiations += 1
            if self._negotiations > messages.MAX_NEGOTIATIONS or len(packet) != 4:
                raise PeerViolation("too many, or malformed, requests for encryption", Side.CLIENT)
            if code == messages.GSSENC_REQUEST or not self._offer_tls:
                return [Send(Side.CLIENT, b"N")]
            if self._kept:
                raise PeerViolation("the client sent bytes in front of its TLS handshake", Side.CLIENT)
            self._state = State.SECURING
            return [Send(Side.CLIENT, b"S"), StartTls(Side.CLIENT)]
        if code == messages.CANCEL_REQUEST:
            if len(packet) != 4 + CANCEL_KEY_BYTES:
                raise PeerViolation(f"a cancel request has `{len(packet) - 4}` bytes of key", Side.CLIENT)
            if self._refusal is not None:
                return self._close(self._refusal.message)
            self._state = State.CANCELLING
            return self._ask(AskCancel(packet[4:]))
        if code >> 16 != 3:
            raise PeerViolation(f"unsupported frontend protocol `{code >> 16}.{code & 0xFFFF}`", Side.CLIENT)
        if self._refusal is not None:
            return self._fail("28000", self._refusal.message, self._refusal.hint)
        try:
            request = read_request(packet[4:])
        except Malformed as error:
            raise PeerViolation(f"the StartupMessage is malformed: {error}", Side.CLIENT) from None
        except StartupRefused as refusal:
            return self._fail(refusal.code, str(refusal), refusal.hint)
        self._request = request
        self._state = State.ASKING
        out: list[Command] = []
        if code != messages.PROTOCOL_3_0 or request.unknown_options:
            out.append(Send(Side.CLIENT, messages.negotiate_protocol_version(request.unknown_options)))
        return out + self._ask(AskLogin(request.user, request.database, request.parameters))

    def _ask(self, ask: Ask) -> list[Command]:
        self._asked = ask
        return [ask]

    # --- the login at the server --------------------------------------------------------------------------------------

    def _reach(self, out: list[Command]) -> list[Command]:
        assert self._upstream is not None
        if not self._upstream.ready:
            return out
        assert self._login is not None
        assert self._request is not None
        who = [("user", self._login.user), ("database", self._login.database)]
        try:
            packet = messages.startup([*who, *self._request.settings])
        except ValueError:
            return self._fail("28000", f"{self._target_words()} cannot be logged in to: a name has a NUL character")
        self._server_login = ServerLogin(self._login, self._upstream.binding)
        self._state = State.LOGGING_IN
        out.append(Send(Side.SERVER, packet))
        return out

    def _receive_server(self, data: Buffer) -> list[Command]:
        if self._state is State.REACHING:
            assert self._upstream is not None
            try:
                return self._reach(self._upstream.receive(bytes(data)))
            except UpstreamRefused as refusal:
                return self._fail("08006", str(refusal), HINT_TARGET)
        if self._state not in (State.LOGGING_IN, State.SETTLING, State.LEARNING):
            raise PeerViolation("the server spoke before it was spoken to", Side.SERVER)
        self._reply += data
        out: list[Command] = []
        while self._state in (State.LOGGING_IN, State.SETTLING, State.LEARNING) and len(self._reply) >= 5:
            (size,) = struct.unpack_from(">I", self._reply, 1)
            limit = messages.MAX_CATALOG if self._state is State.LEARNING else messages.MAX_LOGIN
            if not 4 <= size <= limit:
                raise PeerViolation(f"message `{chr(self._reply[0])}` has length `{size}`", Side.SERVER)
            if len(self._reply) < size + 1:
                break
            self._reply_bytes += size + 1
            if self._reply_bytes > limit:
                raise PeerViolation(f"more than `{limit}` bytes while {self._state.value}", Side.SERVER)
            message = bytes(self._reply[: size + 1])
            del self._reply[: size + 1]
            if self._state is State.LEARNING:
                out += self._learn(message)
            else:
                out += self._settle(message)
        if self._relay is not None and self._reply and not self._relay.closed:
            rest = bytes(self._reply)
            self._reply.clear()
            out += self._relay.receive_server(rest)
        return out

    def _settle(self, message: bytes) -> list[Command]:
        """One server message between the StartupMessage and the first ReadyForQuery."""
        assert self._server_login is not None
        body = message[5:]
        kind = message[:1]
        if kind == b"E":
            return self._refused_by_server(body)
        if self._state is State.LOGGING_IN:
            if kind == b"R":
                return self._authenticate(body)
            if kind == b"N":
                # nobody knows yet who says this
                return []
            raise PeerViolation(f"message `{kind.decode('latin-1')}` before the login is done", Side.SERVER)
        match kind:
            case b"N":
                self._welcome += message
            case b"S":
                return self._note_parameter(message)
            case b"K":
                self._cancel_key = body
            case b"Z":
                return self._settled(body)
            case _:
                raise PeerViolation(f"message `{kind.decode('latin-1')}` before ReadyForQuery", Side.SERVER)
        return []

    def _authenticate(self, body: bytes) -> list[Command]:
        assert self._server_login is not None
        try:
            reply = self._server_login.answer(body)
        except LoginRefused as refusal:
            message = f"gateway could not log in to {self._target_words()}: {refusal}"
            return self._fail("28000", message, HINT_CREDENTIAL)
        if self._server_login.accepted:
            self._state = State.SETTLING
        return [Send(Side.SERVER, reply)] if reply else []

    def _note_parameter(self, message: bytes) -> list[Command]:
        try:
            name, behind = messages.read_cstring(message, 5, len(message))
            value, _ = messages.read_cstring(message, behind, len(message))
        except Malformed as error:
            raise PeerViolation(f"a ParameterStatus is malformed: {error}", Side.SERVER) from None
        self._parameters[name.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        self._welcome += message
        return []

    def _refused_by_server(self, body: bytes) -> list[Command]:
        """The server's own error, with our words in front, and without the password whatever the server wrote."""
        assert self._login is not None
        try:
            fields = messages.response_fields(body)
        except Malformed as error:
            raise PeerViolation(str(error), Side.SERVER) from None
        code = fields.get("C", b"").decode("ascii", "replace")
        text = fields.get("M", b"").decode("utf-8", "replace")
        if self._login.password:
            text = text.replace(self._login.password, "<redacted>")
        hint = ""
        if code.startswith("28"):
            code, hint = "28000", HINT_CREDENTIAL
        return self._fail(code or "08006", f"gateway could not log in to {self._target_words()}: {text}", hint)

    def _settled(self, status: bytes) -> list[Command]:
        assert self._login is not None
        if status != b"I":
            raise PeerViolation("the first ReadyForQuery is not idle", Side.SERVER)
        if len(self._cancel_key) < 4:
            raise PeerViolation("the server gave no cancel key", Side.SERVER)
        out: list[Command] = [Authenticated(self._cancel_key, tuple(self._parameters.items()))]
        if not self._login.masks:
            return out + self._open(None)
        self._state = State.LEARNING
        self._reply_bytes = 0
        self._reader = CatalogReader(self._login.masks)
        out.append(Send(Side.SERVER, catalog_query(self._login.masks)))
        return out

    def _learn(self, message: bytes) -> list[Command]:
        """One server message in answer to the catalog query; none of them is the client's, except parameters."""
        assert self._reader is not None
        try:
            match message[:1]:
                case b"D":
                    self._reader.row(message[5:])
                case b"E":
                    fields = messages.response_fields(message[5:])
                    text = fields.get("M", b"").decode("utf-8", "replace")
                    return self._fail("58000", f"{self._target_words()}: the catalog cannot be read for masks: {text}")
                case b"S":
                    return self._note_parameter(message)
                case b"T" | b"C" | b"N":
                    pass
                case b"Z":
                    catalog = self._reader.catalog()
                    self._reader = None
                    return [Learned(tuple(sorted(set(catalog.derived.values())))), *self._open(catalog)]
                case kind:
                    raise PeerViolation(f"message `{kind.decode('latin-1')}` to the catalog query", Side.SERVER)
        except (CatalogUnreadable, Malformed) as error:
            raise PeerViolation(str(error), Side.SERVER) from None
        return []

    def _open(self, catalog: Catalog | None) -> list[Command]:
        """Welcomes the client, and takes up what it sent meanwhile."""
        assert self._login is not None
        encoding = self._parameters.get("client_encoding", "")
        codec = encoding_codec(encoding)
        if codec is None:
            return self._fail(
                "0A000",
                f"client encoding `{encoding[:64]}` of {self._target_words()} does not pass the gateway",
                "ask for client_encoding UTF8",
            )
        self._state = State.RELAYING
        self._relay = Relay(
            tag=hashlib.sha256(b"unknown portal" + self._login.nonce.encode()).hexdigest()[:16],
            catalog=catalog,
            codec=codec,
            conforming=self._parameters.get("standard_conforming_strings") == "on",
        )
        self._welcome[:0] = messages.AUTHENTICATION_OK
        self._welcome += messages.backend_key_data(self._login.cancel_key)
        self._welcome += b"Z\x00\x00\x00\x05I"
        out: list[Command] = [Send(Side.CLIENT, bytes(self._welcome))]
        self._welcome.clear()
        if self._kept:
            kept = bytes(self._kept)
            self._kept.clear()
            out += self._relay.receive_client(kept)
        return out

    # --- the end ------------------------------------------------------------------------------------------------------

    def _target_words(self) -> str:
        return f"target `{self._login.target.name}`" if self._login is not None else "the server"

    def _fail(self, code: str, message: str, hint: str = "") -> list[Command]:
        """FATAL, where the client can read it: not while its TLS handshake is under way."""
        out: list[Command] = []
        if self._state not in (State.SECURING, State.CANCELLING):
            out.append(Send(Side.CLIENT, messages.error(code, message, hint, severity="FATAL")))
        return out + self._close(message)

    def _close(self, reason: str) -> list[Command]:
        self._state = State.CLOSED
        self._asked = None
        self._kept.clear()
        self._reply.clear()
        self._welcome.clear()
        return [Close(reason)]
