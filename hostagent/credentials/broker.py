"""What a credential is, and what a source of them answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from hostagent.errors import OperatorError


class CredentialUnavailable(OperatorError):
    """The message names the credential and where it was looked for, and never holds any of its content."""


@dataclass(frozen=True, slots=True)
class Credential:
    """How the gateway logs in to a target, or shows with each operation who asks. Its `repr` shows no secret.

    `password` is a password or a bearer token (then `user` is empty). `certificate` is PEM, the key and then the chain,
    for a TLS client certificate; empty where there is none.
    """

    user: str = ""
    password: str = field(repr=False, default="")
    certificate: bytes = field(repr=False, default=b"")


class Source(Protocol):
    """Where credentials come from."""

    async def credential(self, name: str) -> Credential:
        """The credential as it is now. Raises `CredentialUnavailable`."""
