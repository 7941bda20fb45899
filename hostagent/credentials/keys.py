"""The key of the `hash` masks: made at first start, the same for the life of the host, so that equal values keep equal
hashes over sessions and restarts."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from hostagent.errors import OperatorError

KEY_BYTES = 32


class KeyUnavailable(OperatorError):
    """The message names the file."""


def mask_key(state_dir: Path) -> bytes:
    """32 bytes from `<state_dir>/mask.key` (mode 0600), which is made when it is absent. Raises `KeyUnavailable`."""
    path = state_dir / "mask.key"
    try:
        if not path.exists():
            _make(path)
        with path.open("rb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            key = file.read(KEY_BYTES + 1)
    except OSError as error:
        raise KeyUnavailable(f"cannot read or make mask key `{path}`: {error.strerror}") from error
    if mode & 0o077:
        raise KeyUnavailable(f"mask key `{path}` has mode `{mode:04o}`, others may read it: `chmod 600 {path}`")
    if len(key) != KEY_BYTES:
        raise KeyUnavailable(
            f"mask key `{path}` has not `{KEY_BYTES}` bytes: restore it, or remove it and accept that hashes change"
        )
    return key


def _make(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(whole, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        os.rename(whole, path)
    except OSError:
        whole.unlink(missing_ok=True)
        raise
