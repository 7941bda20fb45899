"""Tries, for `hopgate doctor`, whether the targets can be reached. Only a worker may connect to them, so a worker does.

One round at a time; each target at the first `ENDPOINTS_MAX` of its endpoints. Networks are not tried: which of their
addresses answer is nobody's promise.

Blind spots: nothing logs in, so a wrong credential is not found; one worker tries for all of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from hostagent.control.messages import Visit
from hostagent.errors import OperatorError
from hostagent.workers import WorkerProcess
from proxy import ports
from proxy.model import Endpoint, Target

ENDPOINTS_MAX = 4
"""Tried of one target."""
VISITS_MAX = 64
"""Of one round."""
AT_A_TIME = 32
ANSWER_TIMEOUT_S = 7.0
"""How long a worker may take for one visit: longer than it gives the target."""
WORDS_MAX = 1000


@dataclass(frozen=True, slots=True)
class _Asked:
    worker: int
    answered: asyncio.Future[ports.TargetVisited]


class Visits:
    """`targets` are those in force; `worker` gives one that serves, or None."""

    def __init__(self, targets: Callable[[], Iterable[Target]], worker: Callable[[], WorkerProcess | None]) -> None:
        self._targets = targets
        self._worker = worker
        self._latest = 0
        self._asked: dict[int, _Asked] = {}
        self._under_way = False

    async def make(self) -> tuple[Visit, ...]:
        """Raises `OperatorError` when nobody can be sent, or somebody is on the way."""
        if self._under_way:
            raise OperatorError("the targets are being tried already: ask again in half a minute")
        if (worker := self._worker()) is None:
            raise OperatorError("no worker serves: `journalctl -u hopgate` says why")
        plan = list(_planned(self._targets()))
        turn = asyncio.Semaphore(AT_A_TIME)

        async def one(target: Target, endpoint: Endpoint | None) -> Visit:
            if endpoint is None:
                return Visit(target.name, "", None, "it has no single address: networks are not tried")
            async with turn:
                return await self._visit(worker, target, endpoint)

        self._under_way = True
        try:
            found = await asyncio.gather(*(one(*each) for each in plan[:VISITS_MAX]))
        finally:
            self._under_way = False
        left_out = [Visit("", "", None, f"`{len(plan) - VISITS_MAX}` more endpoints")] if len(plan) > VISITS_MAX else []
        return (*found, *left_out)

    def visited(self, worker: WorkerProcess, message: ports.TargetVisited) -> bool:
        """A worker is back; false when it was never sent. One that is late is heard no more."""
        asked = self._asked.get(message.visit)
        if asked is None:
            return 0 < message.visit <= self._latest
        if asked.worker != worker.pid:
            return False
        if not asked.answered.done():
            asked.answered.set_result(message)
        return True

    async def _visit(self, worker: WorkerProcess, target: Target, endpoint: Endpoint) -> Visit:
        self._latest = number = self._latest + 1
        asked = _Asked(worker.pid, asyncio.get_running_loop().create_future())
        self._asked[number] = asked
        try:
            worker.channel.send(ports.VisitTarget(visit=number, target=target.name, endpoint=endpoint))
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                answer = await asked.answered
            return Visit(target.name, str(endpoint), answer.reached, answer.what[:WORDS_MAX])
        except TimeoutError:
            return Visit(target.name, str(endpoint), None, f"the worker did not say within {ANSWER_TIMEOUT_S:g} s")
        finally:
            del self._asked[number]


def _planned(targets: Iterable[Target]) -> Iterable[tuple[Target, Endpoint | None]]:
    for target in targets:
        if target.endpoints:
            for endpoint in target.endpoints[:ENDPOINTS_MAX]:
                yield target, endpoint
        else:
            yield target, None
