"""Whether the laboratory's programs can be had on this machine, for pytest."""

from __future__ import annotations

import os

import pytest

from tests.lab.kubernetes.binaries import Binaries, GoMissing, binaries


def built_or_skipped() -> Binaries:
    """The programs. Skips the calling test where there is no Go to build them with, except in CI: there it fails."""
    try:
        return binaries()
    except GoMissing as missing:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(missing))
