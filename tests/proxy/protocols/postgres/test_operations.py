"""Statements that differ in numbers only are classified once; whatever could mean something else is not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.model import OperationKind
from proxy.protocols.postgres import operations
from proxy.protocols.postgres.classify import Unclassified, classify
from proxy.protocols.postgres.operations import Memory

_PIECES = st.sampled_from(
    [
        *(
            "SELECT ",
            "a",
            "1",
            "2",
            "*",
            " FROM t",
            " WHERE ",
            "a = 1",
            "b > 2",
            " AND ",
            " ORDER BY ",
            " GROUP BY ",
            ", ",
        ),
        *(
            " LIMIT ",
            " offset ",
            "5",
            "DISTINCT ",
            "(",
            ")",
            "-",
            "UPDATE t SET a = 3",
            "DELETE FROM t",
            ";",
            "1.5",
            "=5",
        ),
        *(
            "'x = 1'",
            '"c = 1"',
            "$1",
            "-- = 1\n",
            "/* = 1 */",
            "= 1e3",
            "SET x = 7",
            "FETCH 3",
            "\\",
            "é",
            "<",
            "USING <",
        ),
    ]
)


def _facts(text: str) -> object:
    try:
        return classify(text)
    except Unclassified:
        return None


def test_a_number_is_part_of_no_shape() -> None:
    memory = Memory(OperationKind.QUERY)
    first = memory.describe(b"SELECT a FROM t WHERE id = 17 LIMIT 10").operation
    second = memory.describe(b"SELECT a FROM t WHERE id = 4711 LIMIT 5").operation
    assert second.example is first
    assert second.text == second.recorded_text == "SELECT a FROM t WHERE id = 4711 LIMIT 5"
    assert second.statements is first.statements


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("SELECT a, card FROM t ORDER BY 1", "SELECT a, card FROM t ORDER BY 2"),
        ("SELECT a, card FROM t GROUP BY -1", "SELECT a, card FROM t GROUP BY -2"),
        ("SET x = 1", "SET x = 2"),
        ("EXPLAIN (ANALYZE 0) SELECT a FROM t", "EXPLAIN (ANALYZE 1) SELECT a FROM t"),
        ("SELECT ' = 1'", "SELECT ' = 2'"),
        ("SELECT 1 /* = 1 */", "SELECT 1 /* = 2 */"),
        ("SELECT a FROM t WHERE a = 1", "SELECT a FROM t WHERE a = 1e1"),
        ("SELECT a FROM t WHERE a = 1", "SELECT a FROM t WHERE a = 1.5"),
        ("SELECT a FROM t WHERE a = 1", "SELECT a FROM t WHERE a = 99999999999"),
        ("SELECT a FROM t WHERE a = ?", "SELECT a FROM t WHERE a = 1"),
        ("SELECT a FROM t WHERE é = 1", "SELECT a FROM t WHERE é = 2"),
    ],
)
def test_what_could_mean_something_else_is_looked_at(one: str, other: str) -> None:
    memory = Memory(OperationKind.QUERY)
    memory.describe(one.encode())
    assert memory.describe(other.encode()).operation.example is None


def test_a_refusal_stands_for_nothing_else() -> None:
    memory = Memory(OperationKind.QUERY)
    memory.describe(b"SELECT a FROM t WHERE id = 17")
    refused = operations.refuse(memory.describe(b"SELECT a FROM t WHERE id = 18"), "it is not trusted")
    assert refused.operation.example is None


@given(st.lists(_PIECES, min_size=1, max_size=9).map("".join), st.integers(0, 999_999_999))
def test_facts_of_one_shape_are_the_same(text: str, number: int) -> None:
    memory = Memory(OperationKind.QUERY)
    memory.describe(text.encode())
    spelled = operations._VARIABLE.sub(rb"\g<1>\g<2>%d" % number, text.encode()).decode()
    described = memory.describe(spelled.encode()).operation
    assert described.text == spelled
    if not described.unclassified:
        assert described.statements == _facts(spelled)
