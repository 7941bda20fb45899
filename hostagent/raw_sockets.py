"""Tells of those who write below TCP, where the rules do not reach or cannot say whose it was: raw IP, AF_PACKET and
AF_XDP sockets.

    told  by the kernel (bpf/raw.bpf.c): a packet socket sent a frame, a raw IP socket was made
    seen  in a look every `LOOK_S` (hostagent/kernel/raw_sockets.py): a packet or AF_XDP socket is open

A frame to what is protected is an alert whoever sent it. For the rest: agents have no business with such sockets, and
what is known to be below one is an alert; so is an open socket of anybody, unless it was there at the first look, as
DHCP clients are. Each image and kind is told once.

Nothing is stopped: who has CAP_NET_RAW may write what it likes.

Blind spot: the raw IP sockets of who is below no agent, and of `iptables`, which makes one each time that it meets an
address set; the rules catch what they send.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable
from functools import cache

import structlog

from hostagent import kernel
from hostagent.alerts import Alerts, Source
from hostagent.kernel import abi, raw_sockets
from proxy.model import UNATTRIBUTED, ProcessImage

LOOK_S = 5.0
_REMEMBERED_MAX = 4096
_TOLD_MAX = 8
_IPTABLES = ("iptables-nft", "iptables-legacy", "iptables")

log = structlog.get_logger()


class RawSockets:
    """`lineage` gives that of a node, `guard` that of a process; `name_chain` tells the chain of a lineage."""

    def __init__(
        self,
        *,
        lineage: Callable[[int], tuple[ProcessImage, ...] | None],
        guard: kernel.Guard,
        name_chain: Callable[[tuple[ProcessImage, ...]], str],
        alerts: Alerts,
    ) -> None:
        self._lineage = lineage
        self._guard = guard
        self._name_chain = name_chain
        self._alerts = alerts
        self._stamp: raw_sockets.Stamp = frozenset()
        self._remembered: OrderedDict[tuple[str, int], None] = OrderedDict()
        self._first = True

    def told(self, event: kernel.Event) -> None:
        """Takes an event of type `EVENT_SENT_RAW`."""
        lineage = (self._lineage(event.node) if event.node else None) or ()
        to = f" to {event.dest}" if event.dest is not None else ""
        match event.detail:
            case abi.SENT_FRAME_IN_SCOPE:
                self._tell(f"a packet socket sent a frame{to}, past the rules", event.tgid, lineage)
            case abi.SENT_FRAME if self._suspect(lineage):
                self._tell(f"a packet socket sent a frame{to}", event.tgid, lineage)
            case abi.SENT_RAW_IP if self._suspect(lineage) and not _is_iptables(lineage):
                self._tell("a raw IP socket was made", event.tgid, lineage)

    async def run(self) -> None:
        """Looks, until it is cancelled."""
        while True:
            for found, lineage in await asyncio.to_thread(self._look):
                what = f"an {found.kind} socket is open"
                if self._first and not self._suspect(lineage):
                    log.info(what, process=found.tgid, image=lineage[-1].comm)
                else:
                    self._tell(what, found.tgid, lineage)
            self._first = False
            await asyncio.sleep(LOOK_S)

    def _look(self) -> list[tuple[raw_sockets.RawSocket, tuple[ProcessImage, ...]]]:
        """What was not there before, of each image one."""
        stamp = raw_sockets.stamp()
        if stamp == self._stamp:
            return []
        self._stamp = stamp
        found: list[tuple[raw_sockets.RawSocket, tuple[ProcessImage, ...]]] = []
        for one in raw_sockets.owners():
            lineage = self._guard.lineage(one.tgid)
            if self._is_new(one.kind, lineage[-1].node if lineage else -one.inode):
                found.append((one, lineage))
        return found

    def _is_new(self, kind: str, who: int) -> bool:
        if (kind, who) in self._remembered:
            return False
        self._remembered[kind, who] = None
        if len(self._remembered) > _REMEMBERED_MAX:
            self._remembered.popitem(last=False)
        return True

    def _suspect(self, lineage: tuple[ProcessImage, ...]) -> bool:
        """Whether it is below an agent, as far as that is known; what we start ourselves is not."""
        if any(image.tgid == os.getpid() for image in lineage):
            return False
        return not lineage or self._name_chain(lineage) != UNATTRIBUTED

    def _tell(self, what: str, tgid: int, lineage: tuple[ProcessImage, ...]) -> None:
        by = f"process {tgid}, lineage not known"
        if lineage:
            names = " > ".join(image.comm for image in lineage[-_TOLD_MAX:])
            by = f"process {tgid}, uid {lineage[-1].uid}, {self._name_chain(lineage)}: {names}"
        self._alerts.alert(f"{what}: process {tgid}", by=by, source=Source.SOCKET)


def _is_iptables(lineage: tuple[ProcessImage, ...]) -> bool:
    return bool(lineage) and (lineage[-1].device, lineage[-1].inode) in _iptables_files()


@cache
def _iptables_files() -> frozenset[tuple[int, int]]:
    found = [os.stat(path) for name in _IPTABLES if (path := shutil.which(name)) is not None]
    return frozenset((status.st_dev, status.st_ino) for status in found)
