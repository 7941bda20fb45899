from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harbour import Harbour, opened_harbour
from tests.e2e.shop import Shop, opened_shop
from tests.lab.kubernetes.presence import built_or_skipped


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="package")
def shop() -> Iterator[Shop]:
    with opened_shop() as made:
        yield made


@pytest.fixture(scope="package")
def harbour() -> Iterator[Harbour]:
    built_or_skipped()
    with opened_harbour() as made:
        yield made
