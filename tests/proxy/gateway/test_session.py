"""A session's order of things where a human is asked: what is recorded when, and by which policy the end is ruled."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from proxy import ports
from proxy.gateway.session import Session
from proxy.model import Decision, Operation, OperationKind, Phase, Reason, Ruling
from proxy.policy.testing import request
from proxy.protocols.base import AskRuling, Completed, Preview
from tests.proxy.policy.test_requests import policy, rule
from tests.proxy.recording.test_recording import begin

OPERATION = Operation("kubernetes", OperationKind.REQUEST, Phase.EXECUTE, "delete pods/web", "delete pods/web", ())


def ruling(decision: Decision) -> Ruling:
    return Ruling(decision, (Reason("a", "r", decision, "said"),), "said", "", "v", hold_timeout_s=1.0)


class Bed:
    """A session with a recording of its own; what is around it answers at once."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "recording"
        self.at_preview = ""
        self.replies: list[Ruling] = []
        self.decisions = [Decision.HOLD]
        link = SimpleNamespace(hold=self.hold, alert=lambda session, text: None)
        self.session = Session(cast(Any, SimpleNamespace(link=link, spawn=asyncio.create_task)))
        self.session.recording = begin(self.path)
        self.session.judge = cast(Any, SimpleNamespace(decide=lambda operation: ruling(self.decisions[-1])))
        self.session.machine = cast(
            Any,
            SimpleNamespace(preview=self.preview, answer=self.answer, unanswered=False, notice=lambda *words: []),
        )

    def preview(self, ask: AskRuling) -> list[Preview]:
        """A target would be asked now."""
        self.at_preview = self.path.read_text()
        return [Preview(ask.id, "what would come of it")]

    async def hold(self, **asked: object) -> ports.HoldDecided:
        assert asked["preview"] == "what would come of it"
        self.meanwhile()
        return ports.HoldDecided(id=1, outcome="approved", by="ada", reason="")

    def meanwhile(self) -> None:
        """What happens while the human thinks."""

    def answer(self, ask: AskRuling, reply: Ruling) -> list[object]:
        self.replies.append(reply)
        return []

    def run(self) -> Ruling:
        async def asked() -> None:
            self.session._carry_out([AskRuling(1, OPERATION)])
            assert self.session._task is not None
            await self.session._task

        asyncio.run(asked())
        (reply,) = self.replies
        return reply


def test_nothing_is_asked_of_the_target_before_the_hold_is_recorded(tmp_path: Path) -> None:
    bed = Bed(tmp_path)
    assert bed.run().decision is Decision.ALLOW
    assert '"is":"held"' in bed.at_preview


@pytest.mark.parametrize("later", list(Decision))
def test_an_approval_does_not_grant_what_the_policy_denies_by_now(tmp_path: Path, later: Decision) -> None:
    bed = Bed(tmp_path)
    bed.meanwhile = lambda: bed.decisions.append(later)  # type: ignore[method-assign]
    final = bed.run()
    assert final.decision is (Decision.DENY if later is Decision.DENY else Decision.ALLOW)
    assert "approved by ada" in str(final.reasons) or later is Decision.DENY
    last = bed.path.read_text().splitlines()[-1]
    assert '"is":"ruled"' in last and f'"decision":"{final.decision.name.lower()}"' in last


EXEC = request("create pods/web exec in shop: sh")
SHELL = rule("shell", "allow", "create", "pods/exec")
READ = rule("read", "allow", "read", "pods")


@pytest.mark.parametrize(
    ("later", "ends"),
    [
        ((SHELL,), False),
        ((SHELL, rule("no", "deny", "delete", "pods")), False),
        ((rule("ask", "hold", "create", "pods/exec"),), False),
        ((READ,), True),
        ((SHELL, rule("no", "deny", "create", "pods/exec")), True),
    ],
)
@pytest.mark.parametrize("done", [False, True])
def test_what_runs_ends_when_the_policy_denies_it(
    tmp_path: Path, later: tuple[Any, ...], ends: bool, done: bool
) -> None:
    bed = Bed(tmp_path)
    session = bed.session
    farewells: list[str] = []

    def farewell(message: str, hint: str) -> list[object]:
        farewells.append(message)
        return []

    session.machine = cast(Any, SimpleNamespace(answer=bed.answer, unanswered=False, farewell=farewell))

    def turn(*rules: Any) -> None:
        compiled = policy(tmp_path, *rules)
        cast(Any, session.worker).policy, cast(Any, session.worker).targets = compiled, compiled.targets
        session.target = session.target or compiled.targets["cluster"]

    async def played() -> None:
        turn(SHELL)
        assert session.target is not None
        session.principals = ("A",)
        session.judge = session.worker.policy.bind(("A",), session.target, "")
        session._carry_out([AskRuling(1, EXEC), *([Completed(1, "")] if done else [])])
        turn(*later)
        session.policy_changed()

    asyncio.run(played())
    assert bed.replies[0].decision is Decision.ALLOW
    assert len(farewells) == (ends and not done)
    assert all("may not create pods/web exec in shop" in each for each in farewells)
