"""From an accepted connection to the chain that asks: the kernel's record, its lineage, the policy's agents."""

from __future__ import annotations

from hostagent.attribution.agents import AgentMatcher, Undecidable
from hostagent.attribution.chains import build_chain
from hostagent.attribution.digests import Digests
from hostagent.kernel.pins import Pins, Refused
from proxy.model import Chain, Endpoint

__all__ = ["AgentMatcher", "Attribution", "Refused", "Undecidable", "build_chain"]


class Attribution:
    """Asked once for each accepted connection. `agents` may be replaced when the policy changes."""

    def __init__(self, pins: Pins, agents: AgentMatcher) -> None:
        self._pins = pins
        self._digests = Digests()
        self.agents = agents

    @property
    def agents(self) -> AgentMatcher:
        return self._agents

    @agents.setter
    def agents(self, agents: AgentMatcher) -> None:
        self._agents = agents
        self._digests.prepare(agents.executables)

    def attribute(self, peer: Endpoint, dialled: Endpoint) -> Chain | Refused:
        """Who is behind the connection from `peer` to what it dialled. Takes the kernel's record, so a second question
        about the same connection is refused."""
        try:
            taken = self._pins.take(peer, dialled)
            if isinstance(taken, Refused):
                return taken
            return self._chain(taken.node, taken.tgid)
        except OSError as error:
            return Refused(f"the kernel's records cannot be read: {error.strerror or error}")

    def of_process(self, tgid: int) -> Chain | Refused:
        """The chain of a living process, by its id in the initial pid namespace. Raises `OSError`."""
        node = self._pins.node_of(tgid)
        return Refused(f"process `{tgid}` has no lineage") if node is None else self._chain(node, tgid)

    def of_image(self, node: int, tgid: int) -> Chain | Refused:
        """The chain of a process image, 0 when it is not known."""
        if not node:
            return Refused(f"process `{tgid}` has no lineage")
        try:
            return self._chain(node, tgid)
        except OSError as error:
            return Refused(f"the kernel's records cannot be read: {error.strerror or error}")

    def _chain(self, node: int, tgid: int) -> Chain | Refused:
        lineage = self._pins.lineage(node)
        if lineage is None:
            return Refused(f"the lineage of process `{tgid}` is incomplete: the process ended too long ago")
        try:
            return build_chain(self._digests.completed(lineage), self.agents.match)
        except Undecidable as error:
            return Refused(str(error))
