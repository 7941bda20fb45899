"""What a protocol machine is: bytes in, commands out; no socket, clock or randomness.

A machine stands between two peers, the CLIENT (an agent's process) and the SERVER (the target). It never sees a
socket: the session feeds it bytes with `receive`, carries out the commands in order, and answers its questions with
`answer`. A machine that has asked keeps back the client's further bytes until it is answered; server bytes go on.

    session                          machine
       | -- receive(CLIENT, bytes) -->  |
       | <-- [AskRuling(op), ...] ----- |      the operation's bytes stay in the machine
       | -- answer(ask, ruling) ------> |
       | <-- [Send(SERVER, bytes)] ---- |      released, or replaced by what the server will refuse

Every `ask` is answered exactly once, unless the machine is dropped or has closed. `PeerViolation` is the only exception
that bytes from a peer may cause; after it the machine is closed, and the session records, tells the client
with `farewell`, and drops both sides.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Protocol

import msgspec

from proxy.model import ColumnMask, FieldMask, Operation, Ruling, Target

Buffer = bytes | bytearray | memoryview


class Side(enum.Enum):
    CLIENT = "client"
    SERVER = "server"


class PeerViolation(Exception):
    """A peer broke the protocol or a bound. `side` says which one; the message says what and how much."""

    def __init__(self, message: str, side: Side) -> None:
        super().__init__(message)
        self.side = side


# --- questions, and what answers each ---------------------------------------------------------------------------------


class AskLogin(msgspec.Struct, frozen=True):
    """The client said which database and role it wants. Answered by `Login` or `Refusal`.

    `parameters` are the other start-up parameters, for the recording. `cancellable` says that the client is to get a
    cancel key. A protocol without a login of its own asks with empty names.
    """

    user: str
    database: str
    parameters: tuple[tuple[str, str], ...] = ()
    cancellable: bool = True


class AskRuling(msgspec.Struct, frozen=True, gc=False):
    """May this operation go on? Answered by `Ruling`; after a hold the session answers with the final decision."""

    id: int
    operation: Operation


class AskCredential(msgspec.Struct, frozen=True):
    """What shows the server who asks, for a protocol that sends it with every operation: asked anew each time, since it
    may be rotated at any time. Answered by `Credential` or `Refusal`. `id` is that of the operation's `AskRuling`."""

    id: int


class AskCancel(msgspec.Struct, frozen=True):
    """A cancel request with the key that the client was given. Answered by `Cancelled` once it was passed on (or
    not)."""

    key: bytes


Ask = AskLogin | AskRuling | AskCredential | AskCancel


class Login(msgspec.Struct, frozen=True):
    """Go ahead: log in to `target` as `user` with `password`.

    `nonce` is fresh randomness for SCRAM; `cancel_key` is the synthetic key the client gets, empty where none was
    wanted; `masks` and `field_masks` are all masks that hold for this session.
    """

    target: Target
    user: str
    password: str
    database: str
    nonce: str
    cancel_key: bytes
    masks: tuple[ColumnMask, ...] = ()
    field_masks: tuple[FieldMask, ...] = ()

    def __repr__(self) -> str:
        return f"Login(target={self.target.name!r}, user={self.user!r}, password=<redacted>)"


class Credential(msgspec.Struct, frozen=True):
    """A bearer token; empty where the gateway's TLS certificate towards the server says who it is."""

    token: str

    def __repr__(self) -> str:
        return "Credential(token=<redacted>)"


class Refusal(msgspec.Struct, frozen=True):
    """No login, or no credential. The text is for the client."""

    message: str
    hint: str = ""


class Cancelled(msgspec.Struct, frozen=True):
    """The cancel request was dealt with; the protocol tells the client nothing about how."""


class UpstreamReady(msgspec.Struct, frozen=True):
    """The connection that `Connect` or `StartTls(SERVER)` asked for stands. `end_point_binding` is the
    tls-server-end-point channel binding (RFC 5929, section 4) of the server's certificate, empty without TLS."""

    end_point_binding: bytes = b""


class UpstreamFailed(msgspec.Struct, frozen=True):
    """It does not stand; `message` says which peer and why, in words for the client."""

    message: str


class ClientSecured(msgspec.Struct, frozen=True):
    """The TLS handshake that `StartTls(CLIENT)` asked for is done."""


Reply = Login | Credential | Refusal | Ruling | Cancelled
Event = UpstreamReady | UpstreamFailed | ClientSecured

# --- commands ---------------------------------------------------------------------------------------------------------


class Send(msgspec.Struct, frozen=True, gc=False):
    """Write these bytes to that side. The buffer belongs to the session from now on."""

    side: Side
    data: Buffer


class Connect(msgspec.Struct, frozen=True):
    """Open the connection to the target of the `Login`. Answered by the event `UpstreamReady` or `UpstreamFailed`."""


class Disconnect(msgspec.Struct, frozen=True):
    """Drop the connection to the server, of which nothing more is wanted, and keep the client; `Connect` may follow
    later. What the server still sends is not seen any more."""


class StartTls(msgspec.Struct, frozen=True):
    """Do the TLS handshake on that side, as server towards the CLIENT and as client towards the SERVER.

    Answered by the event `ClientSecured` (CLIENT), `UpstreamReady` or `UpstreamFailed` (SERVER). A machine emits it
    only when it holds no unread bytes of that side (else: `PeerViolation`). `alpn` are the protocols that are offered
    or accepted (RFC 7301)."""

    side: Side
    alpn: tuple[str, ...] = ()


class Completed(msgspec.Struct, frozen=True, gc=False):
    """An operation ended: for the recording. `id` is that of its `AskRuling`; `tag` is the server's word for what was
    done (`SELECT 5`); `rows` counts rows sent to the client; `error` is empty, or SQLSTATE and primary message."""

    id: int
    tag: str = ""
    rows: int = 0
    error: str = ""
    masked: tuple[str, ...] = ()


class Preview(msgspec.Struct, frozen=True):
    """What the human who is asked about the operation `id` gets to see: the answer to `Machine.preview`."""

    id: int
    text: str


class Observed(msgspec.Struct, frozen=True, gc=False):
    """Bytes that went through a running operation (a terminal, a command's output): recorded before they are sent on.
    `id` is that of its `AskRuling`; `channel` is `stdin`, `stdout`, `stderr` or `resize` (then `data` is
    `COLUMNSxROWS`)."""

    id: int
    channel: str
    data: bytes


class Authenticated(msgspec.Struct, frozen=True):
    """The server let us in. `cancel_key` is the server's own, to be mapped from the synthetic one."""

    cancel_key: bytes
    parameters: tuple[tuple[str, str], ...] = ()


class Learned(msgspec.Struct, frozen=True):
    """The server's catalog was read: these relations show values of masked columns without being the masked relation
    (views, materialised views, partitions, inheritance children), as (schema, name). The policy has to treat all their
    columns as masked."""

    derived: tuple[tuple[str, str], ...]


class Close(msgspec.Struct, frozen=True):
    """Close both sides once what was sent is flushed. `reason` is for the recording."""

    reason: str


Command = (
    Send
    | Connect
    | Disconnect
    | StartTls
    | AskLogin
    | AskRuling
    | AskCredential
    | AskCancel
    | Preview
    | Observed
    | Completed
    | Authenticated
    | Learned
    | Close
)
Commands = Sequence[Command]


class Machine(Protocol):
    """One session's protocol state, both sides."""

    def receive(self, side: Side, data: Buffer) -> Commands:
        """Takes any chunk of that side's bytes, of at least one byte; `data` may be reused by the caller afterwards."""

    def eof(self, side: Side) -> Commands:
        """That side will send no more."""

    def answer(self, ask: Ask, reply: Reply) -> Commands:
        """Goes on after a question."""

    def notify(self, event: Event) -> Commands:
        """Goes on after a connection or handshake that a command asked for."""

    def notice(self, message: str, hint: str = "") -> Commands:
        """Tells the client something in the protocol's own words, between messages (hold: what it waits for)."""

    def preview(self, ask: AskRuling) -> Commands:
        """The operation is about to be held: finds out what the human should see of it, and says so with one `Preview`,
        at once or after it has asked the server what would come of it."""

    def farewell(self, message: str, hint: str = "") -> Commands:
        """Tells the client in the protocol's own words why the session ends, as far as its state allows, and closes."""

    def canceller(self) -> Machine | None:
        """A machine of its own that asks the server, over a connection of its own, to cancel what this session runs: it
        speaks to the SERVER alone, starts with `begin`, and ends with `Close`. None before the login is done."""

    def begin(self) -> Commands:
        """The first commands, before any byte of a peer: none for a protocol that waits for its client."""

    @property
    def incomplete(self) -> bool:
        """True while the client has begun a message and not ended it: there is a limit to how long that may take."""

    @property
    def unanswered(self) -> bool:
        """True while client bytes are kept back for an answer: the session stops reading the client when this lasts."""


class Errand:
    """What is the same in every machine that speaks to the SERVER alone and asks nothing (`canceller`, `Visit`)."""

    def eof(self, side: Side) -> Commands:
        return [Close(f"the {side.value} closed the connection")]

    def answer(self, ask: Ask, reply: Reply) -> Commands:
        raise ValueError("an errand asks nothing")

    def notice(self, message: str, hint: str = "") -> Commands:
        return []

    def preview(self, ask: AskRuling) -> Commands:
        raise ValueError("an errand asks nothing")

    def farewell(self, message: str, hint: str = "") -> Commands:
        return [Close(message)]

    def canceller(self) -> Machine | None:
        return None

    @property
    def incomplete(self) -> bool:
        return False

    @property
    def unanswered(self) -> bool:
        return False


class MachineFactory(Protocol):
    """What a protocol folder registers."""

    def __call__(self, *, offer_tls: bool, refusal: Refusal | None = None) -> Machine:
        """Makes a machine for one accepted connection. With `refusal`, the machine takes the client to the first point
        at which its protocol can say why, says it, and closes; it then asks nothing."""


class Visit(Protocol):
    """What a protocol folder may register as `visit`: makes a machine that tells whether a target can be spoken to."""

    def __call__(self, target: Target) -> Machine:
        """The machine speaks to the SERVER alone, starts with `begin`, shows no credential, and ends with `Close`: with
        an empty reason when a login could begin now, else with what is in its way."""
