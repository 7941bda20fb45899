"""What a worker asks of the host agent, and the messages that carry it.

A worker has no capability, no credential and no key of its own. It asks over one inherited `SOCK_SEQPACKET` Unix
socket: one message a datagram, msgpack, at most `MAX_MESSAGE` bytes, file descriptors by SCM_RIGHTS. `Request`s carry
an `id` and get one `Reply` with the same `id`; `Notice`s of the worker get none; `Push`es come from the host agent.

The host agent treats a worker as hostile: it bounds and checks whatever a worker says, and a worker that breaks the
form is killed. The worker trusts the host agent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec

from proxy.model import Chain, Endpoint

MAX_MESSAGE = 128 * 1024
"""Bytes of one message. Larger things (policy, keys) come as a file descriptor."""


class Request(msgspec.Struct, frozen=True, tag=True, tag_field="is", kw_only=True):
    id: int


class Attribute(Request, frozen=True, kw_only=True):
    """Who connected? Asked once, at accept. Opens the session and its recording, also for whom it refuses.

    `family` is 4 or 6; `peer` is the client's socket as the listener sees it, `dialled` what SO_ORIGINAL_DST says."""

    peer: Endpoint
    dialled: Endpoint


class FetchSecret(Request, frozen=True, kw_only=True):
    """The credential for the session's target, as the session's policy names it. `session` must be open and
    attributed."""

    session: str


class FetchCertificate(Request, frozen=True, kw_only=True):
    """A serving certificate from the host's own CA for what the session dialled: the target's name and addresses, or
    the bare address where it is no target (so that a client that insists on TLS can be told why it is refused).

    `session` is empty for a connection that could not be recorded; then `dialled` says what it dialled, which has to
    be a target."""

    session: str
    dialled: Endpoint | None = None


class Hold(Request, frozen=True, kw_only=True):
    """A human is asked. The reply comes when it is decided; `approval` was chosen by the worker with `new_approval_id`.

    `preview` is the recorded text of the operation, cut to 4,096 characters."""

    session: str
    approval: str
    operation: int
    hop: str
    rule: str
    preview: str
    timeout_s: float


class RegisterCancelKey(Request, frozen=True, kw_only=True):
    """Asks for a synthetic cancel key for this session; keys are never evicted, so a full table refuses the login."""

    session: str


class PassCancel(Request, frozen=True, kw_only=True):
    """A client sent a cancel request with this key (on session `session`); the host agent tells the worker that has
    it."""

    session: str
    key: bytes


class Mustered(Request, frozen=True, kw_only=True):
    """The worker has connected to the muster address, from `source`, so that the kernel side learns which process image
    it is. Asked once, first; answered by `Begin`."""

    source: Endpoint


class WithdrawHold(msgspec.Struct, frozen=True, tag=True, tag_field="is", kw_only=True):
    """Nobody waits for this approval any more."""

    approval: str
    why: str


class SessionClosed(msgspec.Struct, frozen=True, tag=True, tag_field="is", kw_only=True):
    """The recording is complete: `records` lines, and `digest` is the last link of its hash chain (hex)."""

    session: str
    records: int
    digest: str
    operations: int
    denied: int
    reason: str


class CancelDone(msgspec.Struct, frozen=True, tag=True, tag_field="is", kw_only=True):
    """The server has taken a `CancelSession`, or it could not be reached: whoever asked need not wait any longer."""

    cancel: int


class TargetVisited(msgspec.Struct, frozen=True, tag=True, tag_field="is", kw_only=True):
    """What came of a `VisitTarget`, in words for the operator."""

    visit: int
    reached: bool
    what: str


class Alert(msgspec.Struct, frozen=True, tag=True, tag_field="is", kw_only=True):
    """Something the operators have to know."""

    session: str
    text: str


FromWorker = (
    Mustered
    | Attribute
    | FetchSecret
    | FetchCertificate
    | Hold
    | RegisterCancelKey
    | PassCancel
    | WithdrawHold
    | SessionClosed
    | CancelDone
    | TargetVisited
    | Alert
)


class Reply(msgspec.Struct, frozen=True, tag=True, tag_field="is", kw_only=True):
    id: int


class Attributed(Reply, frozen=True, kw_only=True):
    """`session` is the new session's id. `refusal` is empty, or says for the client why it may not go on, and `chain`
    is None where it is not known. `target` is the name of the dialled target, or empty. The recording's descriptor
    comes along (append only); its header is already written: `records` lines, chain `digest` (hex)."""

    session: str
    chain: Chain | None
    target: str
    protocol: str
    refusal: str
    hint: str
    records: int
    digest: str


class Secret(Reply, frozen=True, kw_only=True):
    """What the gateway logs in with; `password` may be a bearer token. Its `repr` shows no password.

    With `certificate` a descriptor (memfd) comes along that holds the key and the chain of a TLS client certificate
    (PEM)."""

    user: str
    password: str
    certificate: bool = False

    def __repr__(self) -> str:
        return f"Secret(user={self.user!r}, password=<redacted>)"


class Certificate(Reply, frozen=True, kw_only=True):
    """PEM; comes with a descriptor (memfd) that holds the key and the chain, since OpenSSL loads those from files
    only."""

    not_after_s: int


class HoldDecided(Reply, frozen=True, kw_only=True):
    """`outcome` is `approved`, `denied`, `expired` or `withdrawn`; `by` is who decided (login name and uid)."""

    outcome: str
    by: str
    reason: str


class CancelKey(Reply, frozen=True, kw_only=True):
    """8 bytes: PostgreSQL's process id and secret key."""

    key: bytes


class CancelPassed(Reply, frozen=True, kw_only=True):
    found: bool


class Refused(Reply, frozen=True, kw_only=True):
    """The request cannot be met; `message` says why, in words for the client, without secrets."""

    message: str
    hint: str = ""


class LoadPolicy(msgspec.Struct, frozen=True, tag=True, tag_field="is", kw_only=True):
    """A new policy version; the descriptor that comes along holds the resolved document (msgpack). Operations that are
    asked about from now on are ruled by it. `mask_key` keys the `hash` mask: 32 bytes, the same for the whole host."""

    version: str
    mask_key: bytes

    def __repr__(self) -> str:
        return f"LoadPolicy(version={self.version!r}, mask_key=<redacted>)"


class CancelSession(msgspec.Struct, frozen=True, tag=True, tag_field="is", kw_only=True):
    """Somebody with the right key cancels what this session runs. Answered by the notice `CancelDone` with the same
    `cancel`, once the server has taken it."""

    session: str
    cancel: int


class VisitTarget(msgspec.Struct, frozen=True, tag=True, tag_field="is", kw_only=True):
    """An operator asks whether this target can be reached at this endpoint. Answered by the notice `TargetVisited` with
    the same `visit`."""

    visit: int
    target: str
    endpoint: Endpoint


class Begin(Reply, frozen=True, kw_only=True):
    """The worker's own connections are exempt from the redirect from now on: accept. Comes with the descriptor of the
    listening socket that all workers share: a worker that has not got that far holds nobody's port when it is left
    behind."""


ToWorker = (
    Attributed
    | Secret
    | Certificate
    | HoldDecided
    | CancelKey
    | CancelPassed
    | Refused
    | LoadPolicy
    | CancelSession
    | VisitTarget
    | Begin
)


Push = LoadPolicy | CancelSession | VisitTarget
"""What comes to a worker without having been asked for."""


class Unavailable(Exception):
    """The host agent refused or is gone. The message is for the client."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


APPROVAL_LETTERS = "23456789ABCDEFGHJKMNPQRSTVWXYZ"
"""What approval ids are made of: no letter or digit that people confuse."""


def new_approval_id(below: Callable[[int], int]) -> str:
    """`H-` and six letters, e.g. `H-7KQ3F9`; `below(n)` gives a random integer in [0, n)."""
    return "H-" + "".join(APPROVAL_LETTERS[below(len(APPROVAL_LETTERS))] for _ in range(6))


class Attributor(Protocol):
    async def attribute(self, peer: Endpoint, dialled: Endpoint) -> tuple[Attributed, int]:
        """The answer and the recording's file descriptor, which the caller owns."""


class Broker(Protocol):
    async def secret(self, session: str) -> tuple[Secret, int]:
        """The answer, and a descriptor with key and chain which the caller owns, or -1. Raises `Unavailable`."""

    async def certificate(self, session: str, dialled: Endpoint) -> tuple[Certificate, int]:
        """The answer and a descriptor with key and chain, which the caller owns. Raises `Unavailable`."""


class Approver(Protocol):
    async def hold(
        self,
        *,
        session: str,
        approval: str,
        operation: int,
        hop: str,
        rule: str,
        preview: str,
        timeout_s: float,
        asked: Callable[[], None],
    ) -> HoldDecided:
        """Asks, calls `asked` once the question is on its way, and waits for the decision; cancelling the wait
        withdraws. Raises `Unavailable`."""


class Cancels(Protocol):
    async def cancel_key(self, session: str) -> bytes:
        """Raises `Unavailable` when the table is full."""

    async def pass_cancel(self, session: str, key: bytes) -> bool:
        """True when a session has this key; then its server has taken the request, so that it cannot meet a later
        statement."""
