"""Builds the chain of hops from a lineage. Pure, but for the matcher that it is given.

An image that matches no agent belongs to the hop of its nearest ancestor that does; images above the first agent belong
to none. An agent that starts itself again goes on being one hop: there is one hop for each unbroken run of an agent. An
image that is several agents begins, or goes on with, a hop of each.
"""

from __future__ import annotations

from collections.abc import Callable

from proxy.model import Chain, Hop, ProcessImage


def build_chain(lineage: tuple[ProcessImage, ...], match: Callable[[ProcessImage], tuple[str, ...]]) -> Chain:
    """`lineage` is root first; `match` names the agents that an image is. What `match` raises passes through."""
    hops: list[tuple[str, list[int]]] = []
    running: dict[str, list[int]] = {}
    for image in lineage:
        names = match(image)
        if names:
            goes_on = {name: running[name] for name in names if name in running}
            begins: dict[str, list[int]] = {name: [] for name in names if name not in running}
            hops.extend(begins.items())
            running = goes_on | begins
        for nodes in running.values():
            nodes.append(image.node)
    return Chain(hops=tuple(Hop(agent, tuple(nodes)) for agent, nodes in hops), lineage=lineage)
