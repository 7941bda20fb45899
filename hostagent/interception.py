"""Denies databases where no target is, for chains in which an agent is intercepted.

    told     the kernel saw a protocol begin where no target is (bpf/intercept.bpf.c), and lets no data through
    spared   no agent of the chain is intercepted after all: the kernel is told, and what it dropped passes when it
             comes again
    denied   the socket is reset, the session recorded with its refusal, and an alert raised

Who cannot be told is denied, and so is everybody while no policy was ever loaded: who was intercepted then still is.

Blind spots: a socket in another network namespace, or one that is bound to a device, is not reset; it stays without
data until its owner gives it up. Events that found no room in the ring are counted and not recorded.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog

from hostagent import kernel
from hostagent.alerts import Alerts, Source
from hostagent.attribution import Attribution, Refused
from hostagent.attribution.secrecy import recordable
from hostagent.control.sessions import Sessions
from hostagent.kernel import abi
from hostagent.policies import ActivePolicy
from proxy.model import Chain
from proxy.recording import AuditUnavailable

log = structlog.get_logger()


class Interception:
    """`spare` says that an image is no agent that is meant."""

    def __init__(
        self,
        *,
        policy: ActivePolicy,
        attribution: Attribution,
        sessions: Sessions,
        sockets: kernel.Sockets,
        spare: Callable[[int], None],
        alerts: Alerts,
    ) -> None:
        self._policy = policy
        self._attribution = attribution
        self._sessions = sessions
        self._sockets = sockets
        self._spare = spare
        self._alerts = alerts

    def told(self, event: kernel.Event) -> None:
        """Takes an event of type `EVENT_HIDDEN` or `EVENT_UNWATCHED`."""
        chain = self._attribution.of_image(event.node, event.tgid)
        if isinstance(chain, Refused) or self._means(chain):
            self._deny(event, chain)
        else:
            self._let_go(event.node)

    def _means(self, chain: Chain) -> bool:
        if not self._policy.loaded:
            return True
        return any(hop.agent in self._attribution.agents.intercepted for hop in chain.hops)

    def _let_go(self, node: int) -> None:
        try:
            self._spare(node)
        except kernel.KernelError as error:
            self._alerts.alert(str(error), done="its connection stays closed for data", source=Source.INTERCEPTION)

    def _deny(self, event: kernel.Event, chain: Chain | Refused) -> None:
        assert event.source is not None and event.dest is not None
        protocol = abi.PROTOCOLS.get(event.detail, "")
        what = (
            f"{protocol} was spoken to {event.dest}, which is no target"
            if protocol
            else f"a connection to {event.dest}, which is no target, could not be looked at"
        )
        if isinstance(chain, Refused):
            what += f", by nobody that is known: {chain.reason}"
        who = str(chain) if isinstance(chain, Chain) else "nobody known"
        done = "dropped" + self._reset(event)
        try:
            session = self._sessions.refuse(
                peer=event.source,
                dialled=event.dest,
                protocol=protocol,
                chain=recordable(chain) if isinstance(chain, Chain) else None,
                policy_version=self._policy.compiled.version,
                refusal=what,
            )
        except AuditUnavailable as error:
            log.error("denied, and cannot be recorded", dialled=str(event.dest), why=str(error))
            done += f", not recorded: {error}"
        else:
            log.warning("connection refused", session=session, dialled=str(event.dest), why=what)
        # the session is not named here: the same again is the same alert
        self._alerts.alert(f"{what}: {who}", by=f"process {event.tgid}", done=done, source=Source.INTERCEPTION)

    def _reset(self, event: kernel.Event) -> str:
        assert event.source is not None and event.dest is not None
        try:
            return " and reset" if self._sockets.reset_socket(event.source, event.dest, event.socket) else ""
        except (kernel.KernelError, OSError) as error:
            log.error("connection not reset", dialled=str(event.dest), why=str(error))
            return ""
