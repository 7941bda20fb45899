"""Watches what is ours on the host while the daemon runs. What somebody else changes is put back, alerted and recorded.

    rules              at once when the kernel tells (nf_tables), every `LOOK_S` where it does not (legacy tables)
    address sets       the number of members every `SETS_S`, each of them every `LOOK_S`
    pins, attachment,
    the maps' contents every `LOOK_S`
    CA, mask key       every `LOOK_S`, put back as they were at start
    policy, settings   every `LOOK_S`; told in the status and never loaded by itself: that is the operator's to do

Who changed a rule is told by the kernel; who removed a pin or a file is not, and the alert then says nothing about it.

A connection that was opened while a rule was away went past the proxy: it is reset, and the alert says whose it was.
docs/operations.md says how long rules can be away.

Blind spots: what is changed and changed back between two looks; a connection past the proxy that has ended already.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from hostagent import kernel
from hostagent.alerts import Alerts
from proxy.model import ProcessImage

LOOK_S = 1.0
SETS_S = 0.05
RULES_S = 10.0
"""How often the rules are looked at although the kernel said nothing."""

_TOLD_MAX = 8

Stamp = tuple[tuple[str, ...], ...]
"""What tells whether files have changed, without reading them."""


class Watch:
    """`kept` are files that are put back; `policy_dir`, loaded when it was `policy_loaded`, and `config` are looked at.
    `name_chain` tells the chain of a lineage."""

    def __init__(
        self,
        *,
        guard: kernel.Guard,
        alerts: Alerts,
        kept: Iterable[Path],
        policy_dir: Path,
        policy_loaded: Stamp,
        config: Path | None,
        name_chain: Callable[[tuple[ProcessImage, ...]], str],
    ) -> None:
        """Raises `OSError` when a file that is to be kept cannot be read."""
        self._guard = guard
        self._alerts = alerts
        self._kept = [_KeptFile(path) for path in kept]
        self._policy_dir = policy_dir
        self._config = config
        self._name_chain = name_chain
        self._events = kernel.RulesetEvents()
        self._wake = asyncio.Event()
        self._rules_at_s = float("-inf")
        self._culprits: list[kernel.Culprit] = []
        self._settings_stamp = _stamp([config] if config is not None else [])
        self._settings_told = self._settings_stamp
        self._policy_stamp = self._policy_told = policy_loaded

    def policy_taken(self) -> None:
        """To be called before the policy is loaded again: what is on disk now counts as loaded."""
        self._policy_stamp = self._policy_told = policy_stamp(self._policy_dir)

    def report(self) -> dict[str, object]:
        """For `hopgate status`."""
        latest = self._alerts.latest
        return {
            "alerts": self._alerts.raised,
            "last_alert": latest.what if latest is not None else "",
            "policy_on_disk": (
                "as it was loaded"
                if self._policy_told == self._policy_stamp
                else "changed since it was loaded: `hopgate reload` takes it"
            ),
            "settings_on_disk": (
                "as they were at start"
                if self._settings_told == self._settings_stamp
                else "changed since the start: a restart takes them"
            ),
        }

    async def run(self) -> None:
        """Until it is cancelled."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self._events.fileno(), self._ruleset_changed)
        try:
            while True:
                due_s = time.monotonic() + LOOK_S
                while not self._wake.is_set() and time.monotonic() < due_s and self._guard.sets_are_whole():
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(SETS_S):
                            await self._wake.wait()
                self._wake.clear()
                await self._look()
        finally:
            loop.remove_reader(self._events.fileno())
            self._events.close()

    def _ruleset_changed(self) -> None:
        self._culprits += self._events.read()
        self._wake.set()

    async def _look(self) -> None:
        culprits, self._culprits = self._culprits, []
        now_s = time.monotonic()
        rules = bool(culprits) or not self._guard.notified or now_s - self._rules_at_s >= RULES_S
        if rules:
            self._rules_at_s = now_s
        try:
            changes = await asyncio.to_thread(self._guard.repair, rules=rules)
        except (kernel.KernelError, OSError) as error:
            self._alerts.alert(
                f"what was changed on the kernel side cannot be put back: {error}",
                by=await self._who(culprits),
                done=f"it is tried again in {LOOK_S:g} s",
            )
            self._rules_at_s = float("-inf")
        else:
            if changes:
                self._alerts.alert(_told(changes), by=await self._who(culprits), done="put back")
                await self._end_escapes()
        await self._look_at_files()

    async def _end_escapes(self) -> None:
        try:
            escapes = await asyncio.to_thread(self._guard.end_escapes)
        except (kernel.KernelError, OSError) as error:
            self._alerts.alert(f"connections may have gone past the proxy, and cannot be reset: {error}")
        else:
            if escapes:
                what = f"{len(escapes)} connections went past the proxy while rules were away: {_told(escapes)}"
                self._alerts.alert(what, done="reset")

    async def _look_at_files(self) -> None:
        for kept in self._kept:
            try:
                change = await asyncio.to_thread(kept.repair)
            except OSError as error:
                why = error.strerror or str(error)
                self._alerts.alert(f"`{kept.path}` was changed and cannot be put back: {why}", done="it is tried again")
                continue
            if change:
                self._alerts.alert(f"`{kept.path}` {change}", done="put back")
        policy = await asyncio.to_thread(policy_stamp, self._policy_dir)
        if policy != self._policy_told:
            self._policy_told = policy
            if policy != self._policy_stamp:
                self._alerts.alert(
                    f"the policy in `{self._policy_dir}` was changed and is not in force",
                    done="nothing: `hopgate reload` takes it",
                )
        if self._config is not None:
            settings = _stamp([self._config])
            if settings != self._settings_told:
                self._settings_told = settings
                if settings != self._settings_stamp:
                    self._alerts.alert(
                        f"the settings in `{self._config}` were changed and are not in force",
                        done="nothing: a restart takes them",
                    )

    async def _who(self, culprits: list[kernel.Culprit]) -> str:
        """Everybody who changed a rule since the last look, but for ourselves."""
        told: list[str] = []
        for culprit in {culprit.tgid: culprit for culprit in culprits if culprit.tgid}.values():
            try:
                lineage = await asyncio.to_thread(self._guard.lineage, culprit.tgid)
            except OSError:
                lineage = ()
            if any(image.tgid == os.getpid() for image in lineage):
                continue
            if lineage:
                names = " > ".join(image.comm for image in lineage[-_TOLD_MAX:])
                whose = f"uid {lineage[-1].uid}, {self._name_chain(lineage)}"
                told.append(f"{culprit.comm} (process {culprit.tgid}, {whose}): {names}")
            else:
                told.append(f"{culprit.comm} (process {culprit.tgid}, lineage not known)")
        return "; ".join(told)


class _KeptFile:
    """A file and what is in it. Raises `OSError` when it cannot be read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._content = path.read_bytes()
        self._mode = stat.S_IMODE(path.stat().st_mode)
        self._stamp = _stamp([path])

    def repair(self) -> str:
        """Puts the file back when it is not as it was, and says what was wrong with it. Raises `OSError`."""
        stamp = _stamp([self.path])
        if stamp == self._stamp:
            return ""
        change = self._change()
        if change:
            self.path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
            whole = self.path.with_name(f".{self.path.name}.new")
            whole.unlink(missing_ok=True)
            descriptor = os.open(whole, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(self._content)
                file.flush()
                os.fchmod(descriptor, self._mode)
                os.fsync(descriptor)
            os.rename(whole, self.path)
            stamp = _stamp([self.path])
        self._stamp = stamp
        return change

    def _change(self) -> str:
        try:
            status = self.path.lstat()
            if not stat.S_ISREG(status.st_mode):
                return "was replaced by something that is no file"
            if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) != self._mode:
                return "was given another owner or mode"
            return "" if self.path.read_bytes() == self._content else "was changed"
        except FileNotFoundError:
            return "was removed"


def policy_stamp(directory: Path) -> Stamp:
    """Changes whenever a policy file does."""
    return _stamp(sorted(directory.glob("*.yaml")))


def _stamp(files: Iterable[Path]) -> Stamp:
    return tuple((str(path), *_state(path)) for path in files)


def _state(path: Path) -> Iterator[str]:
    try:
        status = path.lstat()
    except OSError as error:
        yield error.strerror or str(error)
    else:
        for value in (
            status.st_dev,
            status.st_ino,
            status.st_mode,
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
        ):
            yield str(value)


def _told(changes: list[str]) -> str:
    """The first few; all of them are in the log of whoever reads the rules."""
    more = len(changes) - _TOLD_MAX
    return "; ".join(changes[:_TOLD_MAX]) + (f"; and {more} more" if more > 0 else "")
