"""Which session a synthetic cancel key belongs to.

A client that wants to cancel opens a second connection, which any worker may get, and shows the key that it was given
at login. Keys are random, live as long as their session, and are never evicted: when the table is full, logins fail.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

MAX_KEYS = 65_536


class CancelTableFull(Exception):
    """Every key is in use by a live session."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Whose key it is: the worker (by process id), the session, and the target that the session is logged in to."""

    worker: int
    session: str
    target: str


class CancelTable:
    """The keys of all live sessions on this host."""

    def __init__(self) -> None:
        self._holders: dict[bytes, Holder] = {}
        self._keys: dict[str, bytes] = {}

    def register(self, holder: Holder) -> bytes:
        """A new key for the session: 8 bytes, the first four a positive process id as clients expect (PostgreSQL
        manual, "BackendKeyData"). Raises `CancelTableFull`."""
        if holder.session in self._keys:
            return self._keys[holder.session]
        if len(self._holders) >= MAX_KEYS:
            raise CancelTableFull(f"all `{MAX_KEYS}` cancel keys are in use")
        while True:
            key = (1 + secrets.randbelow(2**31 - 1)).to_bytes(4, "big") + secrets.token_bytes(4)
            if key not in self._holders:
                break
        self._holders[key] = holder
        self._keys[holder.session] = key
        return key

    def find(self, key: bytes) -> Holder | None:
        """The holder of exactly this key."""
        return self._holders.get(key)

    def release(self, session: str) -> None:
        """The session is over."""
        key = self._keys.pop(session, None)
        if key is not None:
            del self._holders[key]

    def __len__(self) -> int:
        return len(self._holders)
