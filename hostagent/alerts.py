"""What operators have to know: logged as errors, and kept in files of `<state_dir>/alerts`, one a day (UTC), for root.

The lines are chained as those of a recording are (proxy/recording/records.py), with the file's name in the place of the
session: none can be changed, dropped or moved without breaking every link after it. Alerts never stop anything: when
the disk takes none, they are in the log all the same.

Whoever can raise alerts at will (a worker, an agent) must not fill the disk with them, nor hide others among them:
every source has an allowance of its own, `BURST` and then one every `REFILL_S`, each part of at most `WORDS_MAX`
characters: some 10 MiB a day and source, whatever happens. What goes beyond it is counted, and the count is told.

Blind spot: lines cut off at the end, or whole files taken away, are not noticed here; the log has the alerts too.
"""

from __future__ import annotations

import datetime
import enum
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import structlog

from proxy.recording.records import LINE_OVERHEAD, line, link, seed
from proxy.recording.replay import visible

log = structlog.get_logger()

SUFFIX = ".hga"
QUIET_S = 60.0
"""The same alert is raised again after this long at the earliest; in between it is only counted."""

BURST = 64
REFILL_S = 20.0
WORDS_MAX = 1000
_SAME_MAX = 4096
"""Alerts that are remembered for being the same."""

_LINE = re.compile(rb"([0-9a-f]{64}) (\{[^\n]*\})")


class Alert(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`at_us` is microseconds since the epoch; `by` says who, as far as that is known; `done` what was done about it;
    `times` counts, with this one, those that were not written because they were the same."""

    at_us: int
    what: str
    by: str = ""
    done: str = ""
    times: int = 1


class Source(enum.StrEnum):
    """Who can make alerts be raised."""

    HOST = "the host agent"
    WORKER = "workers"
    APPROVAL = "agents that approve"
    DECLARATION = "launchers"
    SOCKET = "raw sockets"
    INTERCEPTION = "agents that are intercepted"


@dataclass(slots=True)
class _Allowance:
    left: float
    at_s: float
    lost: int = 0


class Alerts:
    """`clock` gives nanoseconds since the epoch, `monotonic` seconds."""

    def __init__(
        self,
        directory: Path,
        clock: Callable[[], int] = time.time_ns,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.raised = 0
        self.latest: Alert | None = None
        self._directory = directory
        self._clock = clock
        self._monotonic = monotonic
        self._link: dict[str, bytes] = {}
        self._same: dict[str, tuple[float, int]] = {}
        self._allowances: dict[Source, _Allowance] = {}

    def alert(self, what: str, *, by: str = "", done: str = "", source: Source = Source.HOST) -> None:
        """Never raises."""
        now_s = self._monotonic()
        at_s, times = self._same.get(what, (float("-inf"), 0))
        if now_s - at_s < QUIET_S:
            self._same[what] = at_s, times + 1
            return
        if not self._may(source, now_s):
            return
        self._same = {known: kept for known, kept in self._same.items() if now_s - kept[0] < 10 * QUIET_S}
        while len(self._same) >= _SAME_MAX:
            del self._same[next(iter(self._same))]
        self._same[what] = now_s, 0
        self._raise(what, by, done, times + 1)

    def _may(self, source: Source, now_s: float) -> bool:
        """Takes one from the allowance; tells when it is used up, and how many were lost once it is not."""
        allowance = self._allowances.setdefault(source, _Allowance(BURST, now_s))
        allowance.left = min(allowance.left + (now_s - allowance.at_s) / REFILL_S, BURST)
        allowance.at_s = now_s
        if allowance.left < 1:
            if not allowance.lost:
                self._raise(f"too many alerts by {source.value}: more of them are only counted for now")
            allowance.lost += 1
            return False
        allowance.left -= 1
        lost, allowance.lost = allowance.lost, 0
        if lost:
            self._raise(f"{lost} alerts by {source.value} were only counted")
        return True

    def _raise(self, what: str, by: str = "", done: str = "", times: int = 1) -> None:
        what, by, done = (visible(text[:WORDS_MAX])[:WORDS_MAX] for text in (what, by, done))
        alert = Alert(at_us=self._clock() // 1000, what=what, by=by, done=done, times=times)
        self.raised += 1
        self.latest = alert
        log.error("alert", what=what, by=by, done=done, times=times)
        try:
            self._write(alert)
        except OSError as error:
            log.error("alert not written", directory=str(self._directory), why=error.strerror or str(error))

    def _write(self, alert: Alert) -> None:
        day = datetime.datetime.fromtimestamp(alert.at_us / 1e6, datetime.UTC)
        path = self._directory / f"{day:%Y-%m-%d}{SUFFIX}"
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        previous = self._link.get(path.name) or _last_link(path)
        data = msgspec.json.encode(alert)
        digest = link(previous, data)
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            text = line(digest, data)
            if os.write(descriptor, text) != len(text):
                raise OSError("only a part of it could be written: is the disk full?")
        finally:
            os.close(descriptor)
        self._link = {path.name: digest}


def _last_link(path: Path) -> bytes:
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        lines = []
    whole = [found[1] for found in map(_LINE.fullmatch, lines) if found is not None]
    return bytes.fromhex(whole[-1].decode()) if whole else seed(path.name)


def read(path: Path) -> list[Alert]:
    """The alerts of one file. Raises `OSError`, and `ValueError` that names the first line which does not hold."""
    alerts: list[Alert] = []
    digest = seed(path.name)
    for number, text in enumerate(path.read_bytes().splitlines(), 1):
        found = _LINE.fullmatch(text)
        if found is None:
            raise ValueError(f"{path}:{number}: is no alert, or was not written to its end")
        digest = link(digest, text[LINE_OVERHEAD - 1 :])
        if found[1] != digest.hex().encode():
            raise ValueError(f"{path}:{number}: does not follow from the lines before it")
        try:
            alerts.append(msgspec.json.decode(found[2], type=Alert))
        except msgspec.MsgspecError as error:
            raise ValueError(f"{path}:{number}: is no alert: {error}") from error
    return alerts
