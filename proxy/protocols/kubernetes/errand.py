"""A machine that only sees whether an API server can be spoken to: it goes as far as a login could begin, which is TLS
as the target's mode says, shows no credential, and leaves (`base.Visit`)."""

from __future__ import annotations

from proxy.model import Target, TlsMode
from proxy.protocols.base import (
    Buffer,
    Close,
    Command,
    Connect,
    Errand,
    Event,
    Side,
    StartTls,
    UpstreamFailed,
    UpstreamReady,
)
from proxy.protocols.kubernetes.machine import ALPN


class Visit(Errand):
    """See the module."""

    def __init__(self, target: Target) -> None:
        self._secured = target.tls_mode is TlsMode.DISABLE

    def begin(self) -> list[Command]:
        return [Connect()]

    def notify(self, event: Event) -> list[Command]:
        match event:
            case UpstreamReady() if self._secured:
                return [Close("")]
            case UpstreamReady():
                self._secured = True
                return [StartTls(Side.SERVER, ALPN)]
            case UpstreamFailed(message):
                return [Close(message)]
            case _:
                raise ValueError(f"an errand has no client: `{event}`")

    def receive(self, side: Side, data: Buffer) -> list[Command]:
        return [Close("it speaks before it is spoken to, as no API server does")]
