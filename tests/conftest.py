"""What holds for all tests."""

from __future__ import annotations

from hypothesis import settings

# a machine that does something else meanwhile is no fault of the code
settings.register_profile("hopgate", deadline=None)
settings.load_profile("hopgate")
