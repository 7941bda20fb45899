"""What a credential is, and what a source of them answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from hostagent.errors import OperatorError


class CredentialUnavailable(OperatorError):
    """The message names the credential and where it was looked for, and never holds any of its content."""


@dataclass(frozen=True, slots=True)
class Credential:
    """How the gateway logs in to a target. Its `repr` shows no password."""

    user: str
    password: str = field(repr=False)


class Source(Protocol):
    """Where credentials come from."""

    def credential(self, name: str) -> Credential:
        """The credential as it is now. Raises `CredentialUnavailable`."""
