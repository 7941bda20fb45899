from __future__ import annotations

import pytest

from hostagent.names import DEFAULT_S, KEEP_S, MAX_ADDRESSES, MAX_S, MIN_S, Names
from hostagent.resolver import Answer

NAME = "db.internal"
OLD, NEW = "203.0.113.1", "203.0.113.2"
NONE: frozenset[str] = frozenset()


class World:
    """A clock, and a resolver that says what it is told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.says: Answer | OSError = Answer((OLD,))
        self.alerts: list[str] = []
        self.names = Names(self.ask, alert=lambda what, done: self.alerts.append(what), clock=lambda: self.now_s)
        self.names.addresses(NAME)

    def ask(self, name: str) -> Answer:
        if isinstance(self.says, OSError):
            raise self.says
        return self.says

    def refresh(self, *in_use: str) -> bool:
        return self.names.learn(NAME, self.names.ask(NAME), frozenset(in_use))

    @property
    def addresses(self) -> set[str]:
        return {*self.names.current(NAME), *self.names.former(NAME)}


@pytest.fixture
def world() -> World:
    return World()


@pytest.mark.parametrize(
    ("ttl_s", "wait_s"), [(None, DEFAULT_S), (60.0, 60.0), (0.0, MIN_S), (86400.0, MAX_S)], ids=str
)
def test_a_name_is_asked_for_again_when_its_answer_has_lived(world: World, ttl_s: float | None, wait_s: float) -> None:
    world.says = Answer((OLD,), ttl_s)
    assert world.refresh() is False
    world.now_s += wait_s - 0.1
    assert world.names.due() == ()
    world.now_s += 0.2
    assert world.names.due() == (NAME,)


def test_a_refused_client_makes_the_question_come_sooner_and_not_too_often(world: World) -> None:
    world.says = Answer((OLD,), MAX_S)
    world.refresh()
    world.names.hurry()
    assert world.names.due() == ()
    world.now_s += MIN_S
    assert world.names.due() == (NAME,), "as soon as the last answer is old enough"
    world.refresh()
    world.now_s += MIN_S
    assert world.names.due() == ()
    world.names.hurry()
    assert world.names.due() == (NAME,)


def test_a_former_address_is_kept_for_a_while(world: World) -> None:
    world.says = Answer((NEW,))
    assert world.refresh() is True
    assert (list(world.names.current(NAME)), list(world.names.former(NAME))) == ([NEW], [OLD])
    world.now_s += KEEP_S - 1
    assert world.refresh() is False
    world.now_s += 2
    assert world.refresh() is True
    assert world.addresses == {NEW}


def test_a_former_address_is_kept_as_long_as_a_session_is_at_it(world: World) -> None:
    world.says = Answer((NEW,))
    for _ in range(5):
        world.refresh(OLD)
        world.now_s += KEEP_S
        assert world.addresses == {OLD, NEW}
    world.refresh()
    world.refresh()
    assert world.addresses == {NEW}


def test_a_former_address_that_comes_back_is_current_again(world: World) -> None:
    world.says = Answer((NEW,))
    world.refresh()
    world.says = Answer((OLD, NEW))
    assert world.refresh() is True
    assert list(world.names.former(NAME)) == []


@pytest.mark.parametrize(
    "outcome",
    [
        OSError("no such name"),
        Answer(()),
        Answer(tuple(f"203.0.{number >> 8}.{number & 255}" for number in range(MAX_ADDRESSES + 1))),
    ],
    ids=["fails", "none", "too-many"],
)
def test_a_name_that_stops_resolving_keeps_its_addresses_and_alerts_once(
    world: World, outcome: Answer | OSError
) -> None:
    world.says = outcome
    for _ in range(3):
        assert world.refresh() is False
        assert world.addresses == {OLD}
        world.now_s += DEFAULT_S
        assert world.names.due() == (NAME,)
    assert len(world.alerts) == 1
    assert "`db.internal` does not resolve any more" in world.alerts[0]
    assert list(world.names.addresses(NAME)) == [OLD], "also when the policy is loaded again"


def test_a_name_that_never_resolved_is_an_error() -> None:
    def refuse(name: str) -> Answer:
        raise OSError(f"no {name}")

    with pytest.raises(OSError, match="no db"):
        Names(refuse).addresses(NAME)


def test_names_that_the_policy_has_no_more_are_forgotten(world: World) -> None:
    world.names.keep_only(())
    world.now_s += DEFAULT_S
    assert world.names.due() == ()
    assert list(world.names.former(NAME)) == []
