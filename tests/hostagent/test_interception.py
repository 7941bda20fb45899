"""What is done about a database where no target is, for every answer to the question whose it was."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from hostagent import alerts, kernel
from hostagent.alerts import Alerts
from hostagent.attribution import AgentMatcher, Refused
from hostagent.control.sessions import Sessions
from hostagent.control.store import Store
from hostagent.interception import Interception
from hostagent.kernel import abi
from hostagent.policies import ActivePolicy, PolicyUnusable
from proxy.model import Chain, Endpoint, Hop, ProcessImage
from proxy.policy import Agent

SOURCE, DEST = Endpoint("192.0.2.1", 40000), Endpoint("192.0.2.7", 6000)
IMAGE = ProcessImage(7, 100, 5, 1000, 2049, 77, "/usr/bin/python3", "python3", ("x", "--password=hunter2"), False, "/j")
HIDDEN = kernel.Event(abi.EVENTS["EVENT_HIDDEN"], 2, 7, 100, 1, 99, 5, SOURCE, DEST)
UNWATCHED = kernel.Event(abi.EVENTS["EVENT_UNWATCHED"], 0, 7, 100, 1, 99, 5, SOURCE, DEST)


@dataclass
class Known:
    """Says whose an image is."""

    chain: Chain | Refused
    agents: AgentMatcher

    def of_image(self, node: int, tgid: int) -> Chain | Refused:
        assert (node, tgid) == (7, 100)
        return self.chain


@dataclass
class Resets:
    gone: bool = False
    seen: list[tuple[Endpoint, Endpoint, int]] = field(default_factory=list)

    def reset_socket(self, source: Endpoint, dest: Endpoint, cookie: int) -> bool:
        self.seen.append((source, dest, cookie))
        return not self.gone


class Bench:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        (directory / "policy.d").mkdir()
        self.policy = ActivePolicy(directory / "policy.d", bytes(32))
        self.policy.reload()
        self.store = Store.create(directory / "control.sqlite")
        self.known = Known(Refused("x"), AgentMatcher([Agent("a", "/bin/sh", intercept="all"), Agent("b", "/bin/cat")]))
        self.resets = Resets()
        self.spared: list[int] = []
        self.interception = Interception(
            policy=self.policy,
            attribution=self.known,  # type: ignore[arg-type]
            sessions=Sessions(self.store, directory / "recordings", host="runner-1"),
            sockets=self.resets,  # type: ignore[arg-type]
            spare=self.spared.append,
            alerts=Alerts(directory / "alerts"),
        )

    def by(self, *hops: str) -> None:
        self.known.chain = Chain(hops=tuple(Hop(hop, (7,)) for hop in hops), lineage=(IMAGE,))

    def raised(self) -> list[alerts.Alert]:
        return [alert for path in (self.directory / "alerts").glob("*.hga") for alert in alerts.read(path)]


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.store.close()


@pytest.mark.parametrize("hops", [("a",), ("b", "a"), ("a", "b")])
def test_an_intercepted_agent_anywhere_in_the_chain_is_denied(bench: Bench, hops: tuple[str, ...]) -> None:
    bench.by(*hops)
    bench.interception.told(HIDDEN)
    assert bench.resets.seen == [(SOURCE, DEST, 99)] and not bench.spared
    (row,) = bench.store.sessions()
    assert row.dialled == "192.0.2.7:6000" and row.peer == "192.0.2.1:40000"
    assert row.refusal == "mysql was spoken to 192.0.2.7:6000, which is no target"
    (alert,) = bench.raised()
    assert alert.what == f"{row.refusal}: {row.chain}" and alert.done == "dropped and reset"
    written = (bench.directory / "recordings" / row.recording).read_text()
    assert "hunter2" not in written and '"protocol":"mysql"' in written


@pytest.mark.parametrize("event", [HIDDEN, UNWATCHED])
@pytest.mark.parametrize("hops", [(), ("b",)])
def test_a_chain_without_one_is_spared(bench: Bench, hops: tuple[str, ...], event: kernel.Event) -> None:
    bench.by(*hops)
    bench.interception.told(event)
    assert bench.spared == [7]
    assert not bench.resets.seen and not bench.store.sessions() and not bench.raised()


def test_who_is_not_known_is_denied(bench: Bench) -> None:
    bench.known.chain = Refused("it has no lineage")
    bench.interception.told(HIDDEN)
    (row,) = bench.store.sessions()
    assert row.chain == "" and row.refusal.endswith("by nobody that is known: it has no lineage")
    assert bench.resets.seen and not bench.spared


def test_what_cannot_be_looked_at_is_denied(bench: Bench) -> None:
    bench.by("a")
    bench.interception.told(UNWATCHED)
    (row,) = bench.store.sessions()
    assert row.refusal == "a connection to 192.0.2.7:6000, which is no target, could not be looked at"


def test_without_any_policy_nobody_is_spared(bench: Bench) -> None:
    (bench.directory / "policy.d" / "bad.yaml").write_text("agents: [")
    never = ActivePolicy(bench.directory / "policy.d", bytes(32))
    with pytest.raises(PolicyUnusable):
        never.reload()
    bench.interception._policy = never
    bench.by("b")
    bench.interception.told(HIDDEN)
    assert bench.store.sessions() and not bench.spared


def test_the_same_again_is_recorded_and_is_one_alert(bench: Bench) -> None:
    bench.by("a")
    bench.resets.gone = True
    for _ in range(3):
        bench.interception.told(HIDDEN)
    assert len(bench.store.sessions()) == 3
    assert [alert.done for alert in bench.raised()] == ["dropped"]


def test_what_cannot_be_recorded_is_told(bench: Bench) -> None:
    bench.by("a")
    (bench.directory / "recordings").write_text("not a directory")
    bench.interception.told(HIDDEN)
    assert bench.resets.seen
    assert "not recorded" in bench.raised()[0].done
