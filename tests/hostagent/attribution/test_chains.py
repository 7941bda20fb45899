from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostagent.attribution import Undecidable, build_chain
from proxy.model import Chain, ProcessImage


def image(node: int, argv: tuple[str, ...] = ()) -> ProcessImage:
    return ProcessImage(node, node, 0, 0, 0, 0, "", "", argv, False, "")


def chain_of(*agents: str) -> Chain:
    """One image for each word; a word names the agents that the image is (`a+b`), `-` none."""
    lineage = tuple(
        image(index + 1, () if word == "-" else tuple(word.split("+"))) for index, word in enumerate(agents)
    )
    return build_chain(lineage, lambda one: one.argv)


def hops(chain: Chain) -> list[tuple[str, tuple[int, ...]]]:
    return [(hop.agent, hop.nodes) for hop in chain.hops]


@pytest.mark.parametrize(
    ("images", "expected"),
    [
        ("-", []),
        ("- -", []),
        ("a", [("a", (1,))]),
        ("- a -", [("a", (2, 3))]),
        ("a a", [("a", (1, 2))]),
        ("a - a", [("a", (1, 2, 3))]),
        ("a b", [("a", (1,)), ("b", (2,))]),
        ("a - b - a", [("a", (1, 2)), ("b", (3, 4)), ("a", (5,))]),
        ("a+b -", [("a", (1, 2)), ("b", (1, 2))]),
        ("a a+b", [("a", (1, 2)), ("b", (2,))]),
        ("a+b b", [("a", (1,)), ("b", (1, 2))]),
    ],
)
def test_hops(images: str, expected: list[tuple[str, tuple[int, ...]]]) -> None:
    assert hops(chain_of(*images.split())) == expected


def test_without_any_agent_the_chain_is_unattributed() -> None:
    assert chain_of("-", "-").principals == ("unattributed",)


def test_what_cannot_be_told_passes_through() -> None:
    def match(_image: ProcessImage) -> tuple[str, ...]:
        raise Undecidable("why")

    with pytest.raises(Undecidable, match="why"):
        build_chain((image(1),), match)


@given(st.lists(st.sampled_from(["-", "a", "b", "c", "a+b", "b+c"]), min_size=1, max_size=12))
def test_a_child_has_all_hops_of_its_parent_and_no_agent_is_lost(words: list[str]) -> None:
    chain, parent = chain_of(*words), chain_of(*words[:-1])
    assert {hop.agent for hop in chain.hops} == {name for word in words if word != "-" for name in word.split("+")}
    agents = [hop.agent for hop in chain.hops]
    assert agents[: len(parent.hops)] == [hop.agent for hop in parent.hops]
