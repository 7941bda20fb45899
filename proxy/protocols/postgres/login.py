"""The gateway's own login at the server: one authentication exchange, as the client of it.

States: created -> (SASL: first sent -> final sent -> verified) -> accepted. Cleartext and md5 have one step. A
server that asks for nothing is let be, as libpq does; one that breaks a SCRAM exchange off with AuthenticationOk is
not, because then it has not shown that it knows the password.

Source: PostgreSQL manual, "SASL Authentication"; RFC 5802, RFC 7677, RFC 5929 section 4.

Blind spot: with `tls_mode` below `require` an attacker in the path can ask for the cleartext password, as with libpq.
"""

from __future__ import annotations

import hashlib
import re
import struct

from scramp import ScramClient, ScramException

from proxy.protocols.base import Login, PeerViolation, Side
from proxy.protocols.postgres.messages import cstring, frame

MAX_ITERATIONS = 1_000_000
"""SCRAM iterations that a server may ask for: about half a second of this worker's time. PostgreSQL's default is
4,096."""

_NAMES = {2: "Kerberos V5", 6: "SCM credentials", 7: "GSSAPI", 8: "GSSAPI", 9: "SSPI"}


class LoginRefused(Exception):
    """We will not log in this way. The message is for the client and never holds the password."""


class ServerLogin:
    """Answers the server's Authentication messages with the credential of `login`.

    `binding` is the tls-server-end-point data of the server's certificate, empty without TLS."""

    def __init__(self, login: Login, binding: bytes) -> None:
        self._login = login
        self._binding = binding
        self._scram: ScramClient | None = None
        self._awaits = "any"
        self.accepted = False

    def answer(self, body: bytes) -> bytes:
        """What to send for the body of one Authentication message; empty for nothing. Raises `LoginRefused`, and
        `PeerViolation` for what breaks the exchange."""
        if len(body) < 4:
            raise PeerViolation("an authentication request has no kind", Side.SERVER)
        (kind,) = struct.unpack_from(">I", body)
        rest = body[4:]
        match self._awaits, kind:
            case (("any" | "ok"), 0):
                self.accepted = True
                self._awaits = "nothing"
                return b""
            case "any", 3:
                self._awaits = "ok"
                return frame(b"p", self._password())
            case "any", 5:
                if len(rest) != 4:
                    raise PeerViolation(f"an md5 salt has `{len(rest)}` bytes", Side.SERVER)
                self._awaits = "ok"
                return frame(b"p", self._md5(rest))
            case "any", 10:
                self._awaits = "continue"
                return self._sasl_first(rest)
            case "continue", 11:
                self._awaits = "final"
                return self._sasl_final(rest)
            case "final", 12:
                self._verify(rest)
                self._awaits = "ok"
                return b""
            case "any", _ if kind not in (11, 12):
                name = _NAMES.get(kind, "unknown")
                raise LoginRefused(
                    f"the server asks for authentication method `{kind}` ({name}), which the gateway does not speak; "
                    "use scram-sha-256 in pg_hba.conf"
                )
            case _:
                raise PeerViolation(f"authentication request `{kind}` out of order", Side.SERVER)

    def _password(self) -> bytes:
        try:
            return cstring(self._login.password.encode())
        except ValueError:
            raise LoginRefused("the stored password cannot be sent: it has a NUL, or is not UTF-8") from None

    def _md5(self, salt: bytes) -> bytes:
        secret = self._password()[:-1]
        inner = hashlib.md5(secret + self._login.user.encode(), usedforsecurity=False).hexdigest()
        return b"md5" + hashlib.md5(inner.encode() + salt, usedforsecurity=False).hexdigest().encode() + b"\0"

    def _sasl_first(self, body: bytes) -> bytes:
        offered = [name.decode("ascii", "replace") for name in body.split(b"\0") if name]
        spoken = ["SCRAM-SHA-256-PLUS", "SCRAM-SHA-256"] if self._binding else ["SCRAM-SHA-256"]
        mechanisms = [name for name in spoken if name in offered]
        if not mechanisms:
            raise LoginRefused("the server offers no SASL mechanism that the gateway speaks (SCRAM-SHA-256, -PLUS)")
        binding = ("tls-server-end-point", self._binding) if self._binding else None
        try:
            # The server takes the user from the StartupMessage and ignores this one.
            self._scram = ScramClient(
                mechanisms, "*", self._login.password, channel_binding=binding, c_nonce=self._login.nonce
            )
            first = self._scram.get_client_first().encode()
        except ScramException:
            raise LoginRefused("the stored password cannot be used for SCRAM: it is empty or not prepared") from None
        mechanism = self._scram.mechanism_name.encode()
        return frame(b"p", cstring(mechanism), struct.pack(">I", len(first)), first)

    def _sasl_final(self, body: bytes) -> bytes:
        assert self._scram is not None
        iterations = re.search(rb",i=([0-9]{1,10})(?:,|$)", body)
        if iterations is None or int(iterations[1]) > MAX_ITERATIONS:
            raise PeerViolation(f"the server's SCRAM iterations are missing or exceed `{MAX_ITERATIONS}`", Side.SERVER)
        try:
            self._scram.set_server_first(body.decode("ascii"))
            return frame(b"p", self._scram.get_client_final().encode())
        except (ScramException, ValueError, LookupError):
            raise PeerViolation("the server's first SCRAM message is malformed", Side.SERVER) from None

    def _verify(self, body: bytes) -> None:
        assert self._scram is not None
        try:
            self._scram.set_server_final(body.decode("ascii"))
        except (ScramException, ValueError, LookupError):
            raise PeerViolation("the server did not show that it knows the password (SCRAM)", Side.SERVER) from None
