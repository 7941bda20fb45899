"""Puts the kernel programs in, and takes everything off again: the only caller of the loader.

States of the pin directory:

    absent                  load
    complete, same build    keep: programs and maps outlive the daemon, and the lineage is exact
    complete, same layout   replace in place: new programs on the same maps, attached before the old ones go
    anything else           remove and load again; the lineage is then seeded from /proc

In between, the netfilter rules stay: connects are redirected and denied.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec

from hostagent.kernel import abi, bpf, redirect, turn
from hostagent.kernel.conntrack import Conntrack
from hostagent.kernel.loader import pin, require_own
from hostagent.kernel.pins import Pins, own_netns, remove
from hostagent.kernel.settings import KernelError, LoadRequest, Scope, Settings

_LOAD_TIMEOUT_S = 120
_SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def start(settings: Settings, scope: Scope) -> Pins:
    """Sees to it that this build's programs are attached to the cgroup, and that scope and rules are in; opens the
    pins. Nobody is exempt at first. Raises `KernelError`."""
    require_own(settings.run_dir)
    with turn.taken(settings.run_dir):
        state = _state(settings)
        if state != "keep":
            if state == "again":
                remove(settings.pin_dir)
            _load(settings, replace=state == "replace")
    pins = Pins.open(settings.pin_dir, Conntrack(settings.listen_port))
    try:
        for node in pins.exempted():
            pins.unexempt(node)
        apply_scope(settings, pins, scope)
    except BaseException:
        pins.close()
        raise
    return pins


def apply_scope(settings: Settings, pins: Pins, scope: Scope) -> None:
    """Sets what is recorded, redirected and looked at; what is in both scopes stays covered throughout. Raises
    `KernelError`."""
    with turn.taken(settings.run_dir):
        pins.set_scope(scope)
        _intercept(settings, pins, scope.agents)
        pins.rules_here = redirect.install(redirect.Rules.of(settings, scope))


def attached(settings: Settings) -> bool:
    """Whether everything that the loader attached and pinned is still there, and on the cgroup of the settings."""
    return _state(settings) == "keep"


def pinned_names(*, intercepting: bool = False) -> frozenset[str]:
    """The files of a complete pin directory."""
    links = {f"link_{name}" for name in (*abi.PROGRAMS, *(abi.PACKET_HOOKS if intercepting else ()))}
    programs = {f"program_{name}" for name in (*abi.PROGRAMS, *abi.PACKET_HOOKS, abi.MATCHED)}
    return frozenset({*abi.MAPS, abi.RING, "blank", "graveyard", "watches", *links, *programs})


def agents_found(settings: Settings) -> frozenset[tuple[int, int]] | None:
    """The files of the agents that were intercepted before this daemon came; None when nobody was."""
    try:
        with Pins.open(settings.pin_dir) as pins:
            return pins.agents()
    except (KernelError, OSError):
        return None


def cleanup(pin_dir: Path) -> list[str]:
    """Takes off rules, sets, pins and with them every attachment: nothing else, and nothing is left. Says what was
    taken off. Repeatable. Raises `KernelError`."""
    removed = redirect.remove()
    if pin_dir.exists():
        removed.append(f"programs, maps and their attachments pinned in {pin_dir}")
        remove(pin_dir)
    return removed


def _state(settings: Settings) -> str:
    directory = settings.pin_dir
    if not directory.exists():
        return "load"
    if not pinned_names() <= set(os.listdir(directory)):
        return "again"
    try:
        with Pins.open(directory) as pins:
            config = pins.config()
        attached_to = {_attached_to(directory / f"link_{name}") for name in abi.CGROUP_HOOKS}
    except (KernelError, OSError):
        return "again"
    if config.build == 0 or config.abi != abi.ABI or config.layout != abi.layout_of(settings.sizes):
        return "again"
    try:
        same_cgroup = attached_to == {settings.cgroup.stat().st_ino}
    except OSError as error:
        raise KernelError(f"cannot open cgroup `{settings.cgroup}`: {error.strerror}") from error
    return "keep" if same_cgroup and config.build == abi.build_of(settings, own_netns()) else "replace"


def _intercept(settings: Settings, pins: Pins, agents: frozenset[tuple[int, int]] | None) -> None:
    """Whoever was spared is asked about again: the policy may be another."""
    for node in pins.spared():
        pins.unspare(node)
    links = {name: settings.pin_dir / f"link_{name}" for name in abi.PACKET_HOOKS}
    if agents is None:
        pins.end_interception()
        for link in links.values():
            link.unlink(missing_ok=True)
        return
    pins.set_agents(agents)
    begins = not pins.config().intercept
    try:
        for name, link in links.items():
            if not link.exists() or _attached_to(link) != settings.cgroup.stat().st_ino:
                _attach_packet_hook(settings, name)
                begins = True
    except OSError as error:
        raise KernelError(f"cannot look at agents' connections: {error}; restart hopgate") from error
    if begins:
        pins.begin_interception()


def _attach_packet_hook(settings: Settings, name: str) -> None:
    """Attaches the pinned program in the place of what is at its link. Raises `OSError`."""
    program = bpf.object_get(settings.pin_dir / f"program_{name}")
    try:
        target = os.open(settings.cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            link = bpf.link_create(program, target, abi.PACKET_HOOKS[name])
        finally:
            os.close(target)
    finally:
        os.close(program)
    try:
        pin(link, settings.pin_dir / f"link_{name}")
    finally:
        os.close(link)


def _attached_to(path: Path) -> int:
    link = bpf.object_get(path)
    try:
        return bpf.attached_cgroup(link)
    finally:
        os.close(link)


def _load(settings: Settings, *, replace: bool) -> None:
    request = LoadRequest(
        pins=str(settings.pin_dir),
        cgroup=str(settings.cgroup),
        run_dir=str(settings.run_dir),
        mark=settings.mark,
        netns=own_netns(),
        build=abi.build_of(settings, own_netns()),
        layout=abi.layout_of(settings.sizes),
        sizes=settings.sizes,
        replace=replace,
    )
    try:
        done = subprocess.run(
            [sys.executable, "-m", "hostagent.kernel.loader"],
            input=msgspec.json.encode(request),
            capture_output=True,
            cwd=Path(__file__).resolve().parents[2],
            env={"PATH": _SEARCH_PATH},
            timeout=_LOAD_TIMEOUT_S,
            pass_fds=turn.descriptors(),
        )
    except subprocess.TimeoutExpired as error:
        raise KernelError(f"the kernel loader did not end within {_LOAD_TIMEOUT_S} s; try again") from error
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise KernelError(lines[-1] if lines else f"the kernel loader ended with status {done.returncode}")
