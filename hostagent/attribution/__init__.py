"""From an accepted connection to the chain that asks: the kernel's record, its lineage, the policy's agents."""

from __future__ import annotations

from hostagent.attribution.agents import AgentMatcher, Undecidable
from hostagent.attribution.chains import build_chain
from hostagent.kernel.pins import Pins, Refused
from proxy.model import Chain, Endpoint

__all__ = ["AgentMatcher", "Attribution", "Refused", "Undecidable", "build_chain"]


class Attribution:
    """Asked once for each accepted connection. `agents` may be replaced when the policy changes."""

    def __init__(self, pins: Pins, agents: AgentMatcher) -> None:
        self.agents = agents
        self._pins = pins

    def attribute(self, peer: Endpoint, dialled: Endpoint) -> Chain | Refused:
        """Who is behind the connection from `peer` to what it dialled. Takes the kernel's record, so a second question
        about the same connection is refused."""
        try:
            taken = self._pins.take(peer, dialled)
            if isinstance(taken, Refused):
                return taken
            lineage = self._pins.lineage(taken.node)
        except OSError as error:
            return Refused(f"the kernel's records cannot be read: {error.strerror or error}")
        if lineage is None:
            return Refused(f"the lineage of process `{taken.tgid}` is incomplete: the process ended too long ago")
        try:
            return build_chain(lineage, self.agents.match)
        except Undecidable as error:
            return Refused(str(error))
