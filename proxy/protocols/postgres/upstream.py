"""Getting a connection to the server to the point where it may be spoken to: plain, or TLS as the target's mode says.

States: created -> connecting -> (asked for TLS -> handshake) -> ready. `sslmode` has libpq's meaning; `allow`
starts in plain and is never turned down to TLS, because the first login attempt already showed the credential.
"""

from __future__ import annotations

import enum

from proxy.model import Target, TlsMode
from proxy.protocols.base import Command, Connect, PeerViolation, Send, Side, StartTls, UpstreamReady
from proxy.protocols.postgres.messages import SSL_REQUEST_PACKET


class UpstreamRefused(Exception):
    """The server cannot be spoken to as the target's mode demands. The message is for the client."""


class _State(enum.Enum):
    CREATED = "created"
    CONNECTING = "connecting"
    ASKED = "asked for TLS"
    HANDSHAKE = "handshake"
    READY = "ready"


class Upstream:
    """The way to the server's first message. `ready` says that it is open, `binding` what it is bound to (empty
    without TLS)."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._state = _State.CREATED
        self.binding = b""

    @property
    def ready(self) -> bool:
        return self._state is _State.READY

    def begin(self) -> list[Command]:
        self._state = _State.CONNECTING
        return [Connect()]

    def stands(self, event: UpstreamReady) -> list[Command]:
        """The connection or the handshake is done."""
        match self._state:
            case _State.CONNECTING if self._target.tls_mode not in (TlsMode.DISABLE, TlsMode.ALLOW):
                self._state = _State.ASKED
                return [Send(Side.SERVER, SSL_REQUEST_PACKET)]
            case _State.CONNECTING | _State.HANDSHAKE:
                self._state = _State.READY
                self.binding = event.end_point_binding
                return []
            case _:
                raise ValueError(f"no connection was asked for (state `{self._state.value}`)")

    def receive(self, data: bytes) -> list[Command]:
        """The server's answer to SSLRequest. Raises `UpstreamRefused`, and `PeerViolation` for bytes that nothing
        asked for: what stands in front of the handshake could have been put there by anybody."""
        if self._state is not _State.ASKED:
            raise PeerViolation("the server spoke before it was spoken to", Side.SERVER)
        if data == b"S":
            self._state = _State.HANDSHAKE
            return [StartTls(Side.SERVER)]
        if data == b"N":
            if self._target.tls_mode is not TlsMode.PREFER:
                raise UpstreamRefused(
                    f"target `{self._target.name}` has to be spoken to with TLS (`{self._target.tls_mode}`), "
                    "but the server does not offer it"
                )
            self._state = _State.READY
            return []
        if data[:1] in (b"S", b"N"):
            raise PeerViolation("the server sent bytes behind its answer to SSLRequest", Side.SERVER)
        # An unauthenticated server's error text is not shown to anybody (CVE-2024-10977).
        raise UpstreamRefused(f"the server of target `{self._target.name}` did not answer the request for TLS")
