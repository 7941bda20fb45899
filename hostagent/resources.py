"""Where the files are that are no Python: C sources, the default policy, the units.

A wheel carries them in `hostagent/data`; in a checkout they are at the top.
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def path(name: str) -> Path:
    """The file or directory `name` (`bpf`, `policies/default.yaml`, `systemd`). Raises `FileNotFoundError`."""
    for root in (_PACKAGE / "data", _PACKAGE.parent):
        found = root / name
        if found.exists():
            return found
    raise FileNotFoundError(
        f"`{name}` is neither in `{_PACKAGE / 'data'}` nor in `{_PACKAGE.parent}`: reinstall hopgate"
    )
