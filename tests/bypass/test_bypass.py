"""One test for each class of attack: what came of it is what `cases.py` says has to come of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.bypass.bed import Bed, opened_bed
from tests.bypass.cases import CASES, Case

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    with opened_bed() as made:
        yield made


@pytest.mark.parametrize("case", CASES, ids=[case.id for case in CASES])
def test_no_way_past_the_gateway(bed: Bed, case: Case) -> None:
    seen = case.run(bed)
    assert seen.outcome == case.expected, seen
