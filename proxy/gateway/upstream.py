"""The connection to a target: dial, and TLS when the machine asks for it."""

from __future__ import annotations

import asyncio
import socket
from functools import lru_cache
from typing import cast

import structlog

from proxy.gateway import secured, tls
from proxy.model import Endpoint, Target
from proxy.protocols import base

log = structlog.get_logger()

CONNECT_TIMEOUT_S = 10.0
VISIT_TIMEOUT_S = 5.0
"""How long a target may take in all to show that it is there."""
CLOSE_TIMEOUT_S = 2.0
"""How long it may take to end after an errand."""
READ_AT_ONCE = 32 * 1024
"""Bytes: an errand hears little."""


class UpstreamError(Exception):
    """The target cannot be reached, or is not who it should be. The message names it and is fit for the client."""


_context = lru_cache(maxsize=256)(tls.client_context)


async def dial(target: Target, endpoint: Endpoint, protocol: asyncio.BufferedProtocol) -> None:
    """Connects to the endpoint that the client dialled. Raises `UpstreamError`."""
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            transport, _ = await asyncio.get_running_loop().create_connection(
                lambda: protocol, endpoint.address, endpoint.port, proto=socket.IPPROTO_TCP
            )
    except OSError as error:
        raise UpstreamError(f"target `{target.name}` at {endpoint} is not reachable: {tls.explain(error)}") from error
    transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


async def secure(
    target: Target,
    endpoint: Endpoint,
    raw: asyncio.Transport,
    protocol: asyncio.BufferedProtocol,
    alpn: tuple[str, ...] = (),
    certificate: bytes = b"",
) -> bytes:
    """Does the TLS handshake as a client, with `certificate` (PEM, key and chain) where there is one; the protocol gets
    the new transport. Returns the channel binding. Raises `UpstreamError`."""
    try:
        context = _context(target, alpn, certificate)
        transport = await secured.upgrade(raw, protocol, context, target.server_name or endpoint.address)
    except (OSError, ValueError) as error:
        if not isinstance(raw.get_protocol(), secured.Secured):
            raw.abort()
        raise UpstreamError(f"target `{target.name}` at {endpoint}: {tls.explain(error)}") from error
    shown = transport.peer_certificate
    return tls.end_point_binding(shown) if shown else b""


async def cancel(machine: base.Machine, target: Target, endpoint: Endpoint) -> None:
    """Lets a `canceller` do its one errand over a connection of its own, and waits until the server closes, which it
    does when it has done it; what goes wrong is logged, the client cannot be told."""
    inbox = _Inbox()
    try:
        async with asyncio.timeout(CONNECT_TIMEOUT_S + secured.HANDSHAKE_TIMEOUT_S):
            await _errand(machine, target, endpoint, inbox)
            while inbox.transport is not None and await inbox.queue.get():
                pass
    except (OSError, UpstreamError, base.PeerViolation) as error:
        log.warning("cancel request failed", target=target.name, why=str(error))
    finally:
        inbox.close()


async def visit(make: base.Visit | None, target: Target, endpoint: Endpoint) -> str:
    """Tries whether a login could begin, without one; says how far it went. Raises `UpstreamError`."""
    inbox = _Inbox()
    try:
        async with asyncio.timeout(VISIT_TIMEOUT_S):
            if make is None:
                await dial(target, endpoint, inbox)
                return "it takes connections; more cannot be told without a login"
            refusal = await _errand(make(target), target, endpoint, inbox)
    except TimeoutError as error:
        raise UpstreamError(f"target `{target.name}` at {endpoint} did not answer in {VISIT_TIMEOUT_S:g} s") from error
    except (OSError, base.PeerViolation) as error:
        raise UpstreamError(f"target `{target.name}` at {endpoint}: {error}") from error
    finally:
        inbox.close()
    if refusal:
        raise UpstreamError(f"target `{target.name}` at {endpoint}: {refusal}")
    if not isinstance(inbox.transport, secured.Secured):
        return "it takes connections, without TLS"
    return f"it takes connections; its TLS is as `{target.tls_mode}` wants it"


async def _errand(machine: base.Machine, target: Target, endpoint: Endpoint, inbox: _Inbox) -> str:
    """Does what a machine that speaks to the server alone wants done; the reason of its `Close`. Raises `OSError`,
    `UpstreamError` and `base.PeerViolation`."""
    pending = list(machine.begin())
    while True:
        while pending:
            command = pending.pop(0)
            match command:
                case base.Connect():
                    await dial(target, endpoint, inbox)
                    pending.extend(machine.notify(base.UpstreamReady()))
                case base.StartTls() if inbox.transport is not None:
                    binding = await secure(target, endpoint, inbox.transport, inbox)
                    pending.extend(machine.notify(base.UpstreamReady(binding)))
                case base.Send(data=data) if inbox.transport is not None:
                    inbox.transport.write(data)
                case base.Close(reason=reason):
                    return reason
                case _:
                    raise UpstreamError(f"target `{target.name}`: an errand cannot `{type(command).__name__}`")
        data = await inbox.queue.get()
        pending.extend(machine.receive(base.Side.SERVER, data) if data else machine.eof(base.Side.SERVER))


class _Inbox(asyncio.BufferedProtocol):
    """Bytes of the server, and empty bytes for its end."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.queue: asyncio.Queue[bytes] = asyncio.Queue()
        self._buffer = memoryview(bytearray(READ_AT_ONCE))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.queue.put_nowait(bytes(self._buffer[:nbytes]))

    def connection_lost(self, exc: Exception | None) -> None:
        self.queue.put_nowait(b"")

    def close(self) -> None:
        if self.transport is not None:
            self.transport.close()
            asyncio.get_running_loop().call_later(CLOSE_TIMEOUT_S, self.transport.abort)
