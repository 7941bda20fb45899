"""Masks: functions from the text form of a value to what may be shown of it. Pure; they never raise and never fail
open.

- `redact`: `***`, whatever the value was.
- `partial`: enough to recognise a value that one knows, too little to learn one. An e-mail address keeps its first
  letter and its domain (`a***@example.com`); anything else keeps its last four characters (`***1234`), and only when at
  least twice as many are hidden. Characters are Unicode code points; what is not UTF-8 is redacted whole.
- `hash`: sixteen hex digits of HMAC-SHA-256 with the host's key. Equal values give equal tokens on one host, so rows
  can be told apart and joined by eye; without the key nobody can try values.

Blind spots: the length of a `partial` value is hidden, its last characters are not; `hash` of a column with few
distinct values shows how they are distributed.
"""

from __future__ import annotations

import hmac
from collections.abc import Callable

from proxy.model import Masker

REDACTED = b"***"

_KEPT = 4
_HIDDEN = 2 * _KEPT
_HASH_HEX = 16


def _redact(value: bytes) -> bytes:
    return REDACTED


def _partial(value: bytes) -> bytes:
    try:
        text = value.decode("utf-8")
    except UnicodeDecodeError:
        return REDACTED
    local, at, domain = text.rpartition("@")
    if at and len(local) > 1 and "." in domain and not any(map(str.isspace, text)):
        return f"{local[0]}***@{domain}".encode()
    if len(text) >= _KEPT + _HIDDEN:
        return f"***{text[-_KEPT:]}".encode()
    return REDACTED


def _hash(key: bytes) -> Masker:
    if len(key) < 16:
        raise ValueError(f"the mask key has `{len(key)}` bytes, wants 16 or more")

    def token(value: bytes) -> bytes:
        return hmac.digest(key, value, "sha256").hex()[:_HASH_HEX].encode()

    return token


_METHODS: dict[str, Callable[[bytes], Masker]] = {
    "redact": lambda key: _redact,
    "partial": lambda key: _partial,
    "hash": _hash,
}

METHODS = frozenset(_METHODS)


def masker(method: str, key: bytes) -> Masker:
    """The function for a method of the policy. `key` is the host's mask key (only `hash` uses it).

    Raises `ValueError` for an unknown method or a key that is too short."""
    try:
        return _METHODS[method](key)
    except KeyError:
        raise ValueError(f"unknown mask method `{method}`") from None
