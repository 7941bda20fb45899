"""Keeps what is on the host as it has to be: looks, says what somebody changed, and puts it back.

Everything that is pinned is held open too, so while the daemon runs, taking a pin away detaches nothing and loses no
event; the pin is made again. What can be lost is the attachment to the cgroup (`bpftool link detach`), which is made
again from the program: until then connects have no record and are denied; and rules and sets: how long that can last is
in docs/operations.md.

Safe for several threads: one works, the others wait.

Blind spots: whoever can write the maps can write labels, which nothing here notices; what is changed and changed back
between two looks.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from pathlib import Path

from hostagent.kernel import abi, bpf, redirect, turn
from hostagent.kernel.lifecycle import apply_scope, pinned_names
from hostagent.kernel.loader import pin, require_bpffs
from hostagent.kernel.pins import Pins
from hostagent.kernel.ruleset import SetSizes
from hostagent.kernel.settings import KernelError, Scope, Settings
from hostagent.kernel.sockets import Sockets
from proxy.model import ProcessImage

_RECENT_NS = 120 * 10**9
_WALK_MAX = 200_000
_TOLD_MAX = 8


class Guard:
    """`pins` are the daemon's own, by which `scope` was put in; the guard opens what it needs beside them. Raises
    `KernelError` when something is missing already."""

    def __init__(self, settings: Settings, pins: Pins, scope: Scope) -> None:
        self._settings = settings
        self._pins = pins
        self._own = Pins.open(settings.pin_dir)
        self._lock = threading.Lock()
        self._held: dict[str, int] = {}
        self.notified = redirect.notified()
        """Whether the kernel tells about changes of the rules."""
        self._config = bytes(self._own.config())
        self._sockets = Sockets(settings.listen_port, settings.mark)
        self._sets, self._sets_lock = SetSizes(), threading.Lock()
        self._scope, self._rules, self._installed = scope, redirect.Rules.of(settings, scope), pins.rules_here
        try:
            self._hold()
            self._members = self._sizes()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Waits for a look that is under way. Repeatable."""
        with self._lock:
            self._own.close()
            self._sets.close()
            self._sockets.close()
            while self._held:
                os.close(self._held.popitem()[1])

    def apply(self, scope: Scope) -> None:
        """Takes another scope. Raises `KernelError`; the next look then puts back what was in force before."""
        with self._lock:
            rules = redirect.Rules.of(self._settings, scope)
            former = self._pins.scope_here, self._pins.agents_here
            try:
                apply_scope(self._settings, self._pins, scope)
            except BaseException:
                self._pins.scope_here, self._pins.agents_here = former
                raise
            self._scope, self._rules, self._installed = scope, rules, self._pins.rules_here
            config = abi.Config.from_buffer_copy(self._config)
            config.intercept = self._pins.config().intercept
            self._config = bytes(config)
            self._hold()
            self._members = self._sizes()

    def _hold(self) -> None:
        """Holds what is pinned and nothing else: what is held stays attached."""
        wanted = pinned_names(intercepting=self._scope.agents is not None)
        for name in self._held.keys() - wanted:
            os.close(self._held.pop(name))
        directory = self._settings.pin_dir
        try:
            for name in wanted - self._held.keys():
                self._held[name] = bpf.object_get(directory / name)
        except OSError as error:
            raise KernelError(f"cannot hold the pins in `{directory}`: {error}; restart hopgate") from error

    def sets_are_whole(self) -> bool:
        """Whether the address sets have as many members as they should: cheap, for many times a second, where `repair`
        looks at each. Never waits for what others do."""
        try:
            return self._sizes() == self._members
        except OSError:
            return False

    def _sizes(self) -> tuple[int, ...]:
        with self._sets_lock:
            return tuple(map(self._sets.of, redirect.set_names()))

    def repair(self, *, rules: bool = True) -> list[str]:
        """Says what was changed, all of which is put back. Without `rules` they are taken as they should be. Raises
        `KernelError` or `OSError` when something cannot be put back: to be tried again."""
        with self._lock, turn.taken(self._settings.run_dir):
            if not self._held:
                return []
            # the rules name a pin
            found = self._repair_pins()
            changes = redirect.repair(self._rules, self._installed, look_at_rules=rules)
            if changes:
                self._members = self._sizes()
            found += changes
            found += self._repair_attachment()
            found += self._repair_maps()
            return found

    def end_escapes(self) -> list[str]:
        """Resets the connections that were made past the proxy since the programs are attached, because rules or sets
        were away; says whose they were. Those that are older stay. Raises `KernelError`, `OSError`."""
        with self._lock:
            found: list[str] = []
            for bypass in self._sockets.past(self._scope) if self._held else ():
                node = self._own.asker(bypass.source, bypass.dest)
                if bypass.dest == self._scope.muster or not node or not self._sockets.reset(bypass):
                    continue
                lineage = self._own.lineage(node) or ()
                found.append(f"{bypass} ({' > '.join(image.comm for image in lineage[-_TOLD_MAX:]) or 'not known'})")
            return found

    # --- what is attached ---------------------------------------------------------------------------------------------

    def _repair_pins(self) -> list[str]:
        found: list[str] = []
        directory = self._settings.pin_dir
        require_bpffs(directory)
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, held in self._held.items():
            what = _strange(directory / name, held)
            if what:
                pin(held, directory / name)
                found.append(f"pin {name} {what}")
        return found

    def _repair_attachment(self) -> list[str]:
        found: list[str] = []
        cgroup = self._settings.cgroup.stat().st_ino
        hooks = {**abi.CGROUP_HOOKS, **(abi.PACKET_HOOKS if self._scope.agents is not None else {})}
        for name, hook in hooks.items():
            link, program = self._held[f"link_{name}"], self._held[f"program_{name}"]
            if bpf.attached_cgroup(link) != cgroup or bpf.linked_program(link) != bpf.object_id(program)[1]:
                self._attach(name, hook)
                found.append(f"{name} was detached from the cgroup, or given another program")
        return found

    def _attach(self, program: str, hook: int) -> None:
        name = f"link_{program}"
        link = self._held[name]
        target = os.open(self._settings.cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fresh = bpf.link_create(self._held[f"program_{program}"], target, hook)
        finally:
            os.close(target)
        self._held[name] = fresh
        # the old link goes with its last descriptor, when the new one has its place
        pin(fresh, self._settings.pin_dir / name)
        os.close(link)

    # --- what the programs go by --------------------------------------------------------------------------------------

    def _repair_maps(self) -> list[str]:
        found: list[str] = []
        if bytes(self._own.config()) != self._config:
            self._own.set_config(self._config)
            found.append("the programs' configuration was changed")
        if self._own.scope() != self._pins.scope_here:
            self._own.set_scope(self._scope)
            found.append("what is recorded was changed")
        if self._own.agents() != self._pins.agents_here and self._pins.agents_here is not None:
            self._own.set_agents(self._pins.agents_here)
            found.append("the files of agents that are intercepted were changed")
        for node in self._own.spared() - self._pins.spared_here:
            self._own.unspare(node)
            found.append(f"process image {node} was spared by somebody else")
        for node in self._own.exempted() - self._pins.exempt_here:
            self._own.unexempt(node)
            found.append(f"process image {node} was exempted from the redirect by somebody else")
        return found

    # --- who ----------------------------------------------------------------------------------------------------------

    def lineage(self, tgid: int) -> tuple[ProcessImage, ...]:
        """The lineage of a process that runs or has just ended, by its id in the initial pid namespace; empty when it
        is not known. May take a second on a busy host."""
        with self._lock:
            if not self._held:
                return ()
            node = self._own.node_of(tgid) or self._ended(tgid)
            return (self._own.lineage(node) or ()) if node else ()

    def _ended(self, tgid: int) -> int:
        """The latest image of a process whose label is gone: it is kept for a while after the exit."""
        since = time.monotonic_ns() - _RECENT_NS
        found = 0
        for node in itertools.islice(self._own.nodes(), _WALK_MAX):
            if node >> 8 < since or node < found:
                continue
            image = self._own.image(node)
            if image is not None and image.tgid == tgid:
                found = node
        return found


def _strange(path: Path, held: int) -> str:
    """What is wrong with a pin; empty when it is the object that we hold."""
    try:
        fd = bpf.object_get(path)
    except OSError:
        return "cannot be opened" if path.exists() else "was removed"
    try:
        return "" if bpf.object_id(fd) == bpf.object_id(held) else "was replaced by another object"
    finally:
        os.close(fd)
