"""What a connection becomes after the API server switched protocols for exec, attach or a port-forward.

    offered        what of the client's offers can be read here; the rest is taken out of the request
    open_tunnel    after the 101: the tunnel for what the server chose

    Upgrade      exec, attach                                         portforward
    SPDY/3.1     v4. v3. v2.channel.k8s.io, channel.k8s.io            portforward.k8s.io
    websocket    v5. v4.channel.k8s.io, channel.k8s.io,               SPDY/3.1+portforward.k8s.io,
                 v4.base64.channel.k8s.io, base64.channel.k8s.io      v4.channel.k8s.io, v4.base64.channel.k8s.io

A tunnel reads everything that it passes on; what it cannot read is a `PeerViolation`. WebSocket extensions
(permessage-deflate) are never offered on. Sources: k8s.io/apimachinery (packages httpstream and remotecommand),
k8s.io/streaming (package wsstream), k8s.io/cri-streaming.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final, Protocol

import msgspec

from proxy.model import RequestFacts
from proxy.protocols.base import AskRuling, Buffer, Command, Reply, Side
from proxy.protocols.kubernetes.forward import ChannelForward, SpdyForward
from proxy.protocols.kubernetes.requests import Head
from proxy.protocols.kubernetes.terminal import ChannelTerminal, Observation, SpdyTerminal

SPDY: Final = "spdy/3.1"
WEBSOCKET: Final = "websocket"
_TUNNELLED = "SPDY/3.1+portforward.k8s.io"
# the empty name is what a server speaks to a client that offers none
_TERMINALS = {
    SPDY: ("v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io", ""),
    WEBSOCKET: (
        "v5.channel.k8s.io",
        "v4.channel.k8s.io",
        "channel.k8s.io",
        "v4.base64.channel.k8s.io",
        "base64.channel.k8s.io",
        "",
    ),
}
_FORWARDS = {
    SPDY: ("portforward.k8s.io", ""),
    WEBSOCKET: (_TUNNELLED, "v4.channel.k8s.io", "v4.base64.channel.k8s.io", ""),
}
_READABLE = {
    each: [name for name in dict.fromkeys((*_TERMINALS[each], *_FORWARDS[each])) if name] for each in _FORWARDS
}

_UPGRADE = "upgrade"
_NEGOTIATION = {SPDY: "x-stream-protocol-version", WEBSOCKET: "sec-websocket-protocol"}
_BEARER = "base64url.bearer.authorization."
_WEBSOCKET_EXTENSIONS = "sec-websocket-extensions"

MAX_CHANNEL_PORTS = 39
"""Ports in one port-forward over channels: a channel is a byte, and in base64 a character."""


class Unspoken(Exception):
    """A protocol that cannot be read here, so it is not passed on. The message is for the client."""


class Tunnel(Protocol):
    """Both directions of a connection that no longer speaks HTTP. `receive` raises `PeerViolation`; `eof` tells how the
    operation, and what was asked inside it, ended."""

    def begin(self) -> list[Command]:
        """Right after the client was told of the switch, before any byte of either side."""

    def receive(self, side: Side, data: Buffer) -> list[Command]: ...

    def answer(self, ask: AskRuling, reply: Reply) -> list[Command]: ...

    def eof(self, side: Side) -> list[Command]:
        """That side will send no more, or the session ends: the tunnel is closed."""

    @property
    def unanswered(self) -> bool: ...

    @property
    def closed(self) -> bool: ...


def offered(request: Head) -> Head:
    """The request, which is one for exec, attach or a port-forward, with only those offers that can be read here.
    Raises `Unspoken` when none is left."""
    upgrade = _upgrade(request.values(_UPGRADE))
    if upgrade is None:
        asked = ", ".join(request.values(_UPGRADE))[:64]
        raise Unspoken(f"an upgrade to `{asked}` cannot be read by the gateway, which reads `SPDY/3.1` and `websocket`")
    name = _NEGOTIATION[upgrade]
    offers = _words(request.values(name))
    kept = [offer for offer in offers if offer in _READABLE[upgrade]]
    if offers and not kept:
        # a browser shows its token as one of the offers
        named = [offer for offer in offers if not offer.startswith(_BEARER)]
        asked, readable = ", ".join(named)[:128], ", ".join(_READABLE[upgrade])
        raise Unspoken(f"`{asked}` cannot be read by the gateway, which reads `{readable}`")
    headers = [pair for pair in request.headers if pair[0] not in (name, _WEBSOCKET_EXTENSIONS)]
    if upgrade == SPDY:
        headers += [(name, offer) for offer in kept]
    elif kept:
        headers.append((name, ", ".join(kept)))
    return msgspec.structs.replace(request, headers=tuple(headers))


def open_tunnel(
    id: int,
    facts: RequestFacts,
    request: Head,
    upgrade: bytes,
    headers: Iterable[tuple[bytes, bytes]],
    next_id: Callable[[], int],
    *,
    record_input: bool = False,
) -> Tunnel:
    """The tunnel for what the server chose of `request`, which went through `offered`; `upgrade` and `headers` are
    those of its 101. `id` is that of the request's `AskRuling`, and `next_id` numbers what is asked inside. Raises
    `Unspoken` for a choice that was not offered."""
    protocol = _upgrade(request.values(_UPGRADE))
    if protocol is None or _upgrade((upgrade.decode("latin-1"),)) != protocol:
        raise Unspoken("the server switches to another protocol than it was asked for")
    answer = [(name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in headers]
    if any(name == _WEBSOCKET_EXTENSIONS for name, _ in answer):
        raise Unspoken("the server switches WebSocket extensions on that it was not asked for")
    name = _NEGOTIATION[protocol]
    offers, choice = _words(request.values(name)), _words(value for each, value in answer if each == name)
    if len(choice) > 1 or bool(choice) is not bool(offers) or not set(choice) <= set(offers):
        raise Unspoken(f"the server chooses `{', '.join(choice)[:128]}` where `{', '.join(offers)}` was offered")
    chosen = choice[0] if choice else ""
    if chosen not in (_FORWARDS if facts.subresource == "portforward" else _TERMINALS)[protocol]:
        raise Unspoken(f"the server chooses `{chosen}` for `{facts.target}`")
    base64 = "base64" in chosen
    if facts.subresource == "portforward":
        if protocol == SPDY or chosen == _TUNNELLED:
            return SpdyForward(id, facts, next_id, in_websocket=protocol == WEBSOCKET)
        if len(facts.ports) > MAX_CHANNEL_PORTS:
            raise Unspoken(f"`{len(facts.ports)}` ports at once, where the gateway reads `{MAX_CHANNEL_PORTS}`")
        return ChannelForward(id, facts, next_id, base64=base64)
    observation = Observation(id, structured=chosen.startswith(("v4.", "v5.")), record_input=record_input)
    if protocol == SPDY:
        return SpdyTerminal(observation)
    return ChannelTerminal(observation, base64=base64, half_close=chosen.startswith("v5."))


def _upgrade(values: Sequence[str]) -> str | None:
    """The protocol that is switched to; None for none, several, or one that is not known."""
    value = values[0].strip().lower() if len(values) == 1 else ""
    return value if value in _NEGOTIATION else None


def _words(values: Iterable[str]) -> list[str]:
    return [word for word in (each.strip() for value in values for each in value.split(",")) if word]
