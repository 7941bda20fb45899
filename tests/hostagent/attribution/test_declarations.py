from __future__ import annotations

import pytest

from hostagent.attribution import AgentMatcher, Undecidable, build_chain
from proxy.model import ProcessImage
from proxy.policy.document import Agent

MATCHER = AgentMatcher(
    [
        Agent("planner", declared_by=("uid:1000",)),
        Agent("builder", declared_by=("planner", "uid:0")),
        Agent("fixed", exe="/no/such/file"),
    ]
)


def image(node: int, declared: str = "", uid: int = 1000) -> ProcessImage:
    return ProcessImage(node, node, 0, uid, 0, 0, "", "", (), False, "", declared)


def test_a_declared_image_begins_a_hop_that_its_children_are_in() -> None:
    chain = build_chain((image(1), image(2, "planner"), image(3), image(4, "builder"), image(5)), MATCHER.match)
    assert [(hop.agent, hop.nodes) for hop in chain.hops] == [("planner", (2, 3)), ("builder", (4, 5))]


@pytest.mark.parametrize("name", ["fixed", "gone"])
def test_a_label_that_the_policy_does_not_allow_is_not_quietly_no_agent(name: str) -> None:
    with pytest.raises(Undecidable, match=f"declared to be agent `{name}`"):
        MATCHER.match(image(1, name))


@pytest.mark.parametrize(
    ("agent", "lineage", "uid", "why_not"),
    [
        ("planner", (image(1),), 1000, ""),
        ("planner", (image(1, uid=0), image(2)), 1000, ""),
        ("planner", (image(1, uid=1001),), 1001, "uid 1001, outside of any agent may not declare agent `planner`"),
        ("planner", (image(1, uid=0),), 1000, "may not"),
        ("planner", (image(1),), 0, "may not"),
        ("builder", (image(1),), 1000, "may not"),
        ("builder", (image(1, "planner"), image(2)), 1000, ""),
        ("planner", (image(1, "planner"),), 1000, "planner may not declare agent `planner`"),
        ("builder", (image(1, "builder", 0),), 0, "builder may not declare agent `builder`"),
        ("planner", (image(1, "planner"), image(2, "builder"), image(3)), 1000, "planner > builder may not"),
        ("builder", (image(1, "planner"), image(2, "builder"), image(3)), 1000, "planner > builder may not"),
        ("fixed", (image(1),), 1000, "agent `fixed` has no `declared_by`"),
        ("gone", (image(1),), 1000, "the policy has no agent `gone`"),
    ],
)
def test_who_may_declare(agent: str, lineage: tuple[ProcessImage, ...], uid: int, why_not: str) -> None:
    refusal = MATCHER.why_not_declare(agent, build_chain(lineage, MATCHER.match), uid)
    assert (why_not in refusal) if why_not else refusal == ""
