from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.bed import Bed, bed


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.kernel)


@pytest.fixture(scope="session", autouse=True)
def root() -> None:
    assert os.geteuid() == 0, "the kernel tests need root: deselect them with `-m 'not kernel'`"


@pytest.fixture(scope="module")
def shared() -> Iterator[Bed]:
    with bed("kernel") as made:
        yield made
