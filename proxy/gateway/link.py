"""The worker's side of the conversation with the host agent: implements every port of `proxy/ports.py`.

When the channel closes, every waiting request fails and the worker ends: without the host agent there is no
attribution, no credential and no audit, so there is no access.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import socket
from collections.abc import Callable
from typing import TypeVar

from proxy import ports
from proxy.gateway.channel import Channel, decoder
from proxy.model import Endpoint

R = TypeVar("R", bound=ports.Reply)

ANSWER_TIMEOUT_S = 10.0
"""How long the host agent may take for anything but a human's decision."""
HOLD_GRACE_S = 5.0
"""How much longer than the hold's own timeout the worker waits for its outcome."""


class HostLink(ports.Attributor, ports.Broker, ports.Approver, ports.Cancels):
    """One per worker process."""

    def __init__(
        self, sock: socket.socket, on_push: Callable[[ports.Push, list[int]], None], on_closed: Callable[[str], None]
    ) -> None:
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[tuple[ports.Reply, list[int]]]] = {}
        self._on_push = on_push
        self._on_lost = on_closed
        self._channel: Channel[ports.ToWorker] = Channel(sock, decoder(ports.ToWorker), self._received, self._closed)

    async def muster(self, source: Endpoint) -> int:
        """Waits until the worker's own connections are exempt from the redirect; gives the shared listening socket."""
        return _with_descriptor(await self._ask(ports.Mustered(id=next(self._ids), source=source)), ports.Begin)[1]

    async def attribute(self, peer: Endpoint, dialled: Endpoint) -> tuple[ports.Attributed, int]:
        received = await self._ask(ports.Attribute(id=next(self._ids), peer=peer, dialled=dialled))
        reply, descriptors = received
        if isinstance(reply, ports.Attributed) and not descriptors:
            self._give_back(reply, "the worker had no descriptor left for its recording")
            raise ports.Unavailable("the gateway on this host has no room for more connections", "connect again later")
        return _with_descriptor(received, ports.Attributed)

    async def secret(self, session: str) -> tuple[ports.Secret, int]:
        received = await self._ask(ports.FetchSecret(id=next(self._ids), session=session))
        if isinstance(received[0], ports.Secret) and received[0].certificate:
            return _with_descriptor(received, ports.Secret)
        return _answer(received, ports.Secret), -1

    async def certificate(self, session: str, dialled: Endpoint) -> tuple[ports.Certificate, int]:
        return _with_descriptor(
            await self._ask(ports.FetchCertificate(id=next(self._ids), session=session, dialled=dialled)),
            ports.Certificate,
        )

    async def hold(
        self,
        *,
        session: str,
        approval: str,
        operation: int,
        hop: str,
        rule: str,
        preview: str,
        timeout_s: float,
        asked: Callable[[], None],
    ) -> ports.HoldDecided:
        request = ports.Hold(
            id=next(self._ids),
            session=session,
            approval=approval,
            operation=operation,
            hop=hop,
            rule=rule,
            preview=preview[:4096],
            timeout_s=timeout_s,
        )
        try:
            return _answer(await self._ask(request, timeout_s + HOLD_GRACE_S, asked), ports.HoldDecided)
        except asyncio.CancelledError:
            self._channel.send(ports.WithdrawHold(approval=approval, why="the client cancelled or left"))
            raise

    async def cancel_key(self, session: str) -> bytes:
        return _answer(
            await self._ask(ports.RegisterCancelKey(id=next(self._ids), session=session)), ports.CancelKey
        ).key

    async def pass_cancel(self, session: str, key: bytes) -> bool:
        return _answer(
            await self._ask(ports.PassCancel(id=next(self._ids), session=session, key=key)), ports.CancelPassed
        ).found

    def closed(self, message: ports.SessionClosed) -> None:
        """Tells that a session's recording is complete."""
        self._channel.send(message)

    def cancel_done(self, cancel: int) -> None:
        """Tells that a `CancelSession` was dealt with."""
        self._channel.send(ports.CancelDone(cancel=cancel))

    def visited(self, visit: int, reached: bool, what: str) -> None:
        """Tells what came of a `VisitTarget`."""
        self._channel.send(ports.TargetVisited(visit=visit, reached=reached, what=what[:1000]))

    def alert(self, session: str, text: str) -> None:
        """Tells the operators."""
        self._channel.send(ports.Alert(session=session, text=text[:1000]))

    async def _ask(
        self, request: ports.Request, timeout_s: float = ANSWER_TIMEOUT_S, asked: Callable[[], None] | None = None
    ) -> tuple[ports.Reply, list[int]]:
        future: asyncio.Future[tuple[ports.Reply, list[int]]] = asyncio.get_running_loop().create_future()
        self._waiting[request.id] = future
        try:
            self._channel.send(request)
            if asked is not None:
                asked()
            async with asyncio.timeout(timeout_s):
                return await future
        except TimeoutError:
            raise ports.Unavailable(f"the gateway's host agent did not answer within {timeout_s:g} s") from None
        finally:
            self._waiting.pop(request.id, None)

    def _received(self, message: ports.ToWorker, descriptors: list[int]) -> None:
        if not isinstance(message, ports.Reply):
            self._on_push(message, descriptors)
            return
        future = self._waiting.get(message.id)
        if future is None or future.done():
            for descriptor in descriptors:
                os.close(descriptor)
            if isinstance(message, ports.Attributed):
                self._give_back(message, "the answer of who it is came too late")
            return
        future.set_result((message, descriptors))

    def _give_back(self, opened: ports.Attributed, why: str) -> None:
        """A session that nobody here has is not left open."""
        self.closed(
            ports.SessionClosed(
                session=opened.session,
                records=opened.records,
                digest=opened.digest,
                operations=0,
                denied=0,
                reason=why,
            )
        )

    def _closed(self, why: str) -> None:
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(ports.Unavailable("the gateway's host agent is gone"))
        self._on_lost(why)


def _answer(received: tuple[ports.Reply, list[int]], expected: type[R]) -> R:
    reply, descriptors = received
    for descriptor in descriptors:
        os.close(descriptor)
    return _checked(reply, expected)


def _with_descriptor(received: tuple[ports.Reply, list[int]], expected: type[R]) -> tuple[R, int]:
    reply, descriptors = received
    checked = _checked(reply, expected)
    if len(descriptors) != 1:
        raise ports.Unavailable(f"the gateway's host agent sent `{len(descriptors)}` descriptors where one belongs")
    return checked, descriptors[0]


def _checked(reply: ports.Reply, expected: type[R]) -> R:
    match reply:
        case expected():
            return reply
        case ports.Refused(message=message, hint=hint):
            raise ports.Unavailable(message, hint)
        case _:
            raise ports.Unavailable(f"the gateway's host agent answered `{type(reply).__name__}` out of turn")
