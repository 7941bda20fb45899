"""Reads and verifies recordings. Bytes are hostile: whatever they are, only `BrokenRecording` is raised (or `OSError`).

A file is *intact* when every line is whole, chained and a record; *torn* when all of that holds up to a last line that
was begun and never ended (a full disk, a crash; the operation it was about was not released); *broken* otherwise.

Blind spot: a file that was cut at the end of a line, or written anew from its first line, is intact by itself. Only the
index, which knows the last link, tells.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec

from proxy.recording.records import FORMAT, LINE_OVERHEAD, MAX_LINE, Closed, Opened, Record, link, seed

_decode = msgspec.json.Decoder(Record).decode
_LINE = re.compile(rb"[0-9a-f]{64} \{.*\}\n", re.DOTALL)
_BEGUN = re.compile(rb"[0-9a-f]{0,64}|[0-9a-f]{64} (\{[^\n]*)?")


class BrokenRecording(Exception):
    """`line` (from 1) is the first bad one; `torn` says that it was begun and never ended, and that nothing else is
    wrong."""

    def __init__(self, line: int, reason: str, *, torn: bool = False) -> None:
        super().__init__(f"line {line}: {reason}")
        self.line = line
        self.reason = reason
        self.torn = torn


@dataclass(frozen=True, slots=True)
class Entry:
    """One verified line. `digest` is its link (hex)."""

    number: int
    digest: str
    record: Record


class State(enum.StrEnum):
    INTACT = "intact"
    TORN = "torn"
    BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class Verdict:
    """`records` and `digest` (hex) are those of the good lines; `line` and `reason` say what is wrong with the first
    bad one. `closed` says that the session's last record is there."""

    state: State
    session: str
    records: int
    digest: str
    closed: bool
    line: int = 0
    reason: str = ""


def read(path: Path, session: str | None = None) -> Iterator[Entry]:
    """Yields the verified lines in order; with `session`, only of that session's recording.

    Raises `BrokenRecording` at the first line that is not good, `OSError` when the file cannot be read.
    """
    with path.open("rb") as file:
        yield from _entries(file, session)


def _entries(file: BinaryIO, session: str | None) -> Iterator[Entry]:
    digest = b""
    number = 0
    closed = False
    while data := file.readline(MAX_LINE + 1):
        number += 1
        if closed:
            raise BrokenRecording(number, "something follows the record that closed the session")
        if len(data) > MAX_LINE:
            raise BrokenRecording(number, f"longer than `{MAX_LINE}` bytes")
        if not data.endswith(b"\n"):
            # A crash of the machine can leave blocks of zeros behind what was written.
            if _BEGUN.fullmatch(data.rstrip(b"\0")):
                raise BrokenRecording(number, "was begun and never ended", torn=True)
            raise BrokenRecording(number, "is no record, nor the beginning of one")
        if not _LINE.fullmatch(data):
            raise BrokenRecording(number, "is no record")
        text = data[LINE_OVERHEAD - 1 : -1]
        try:
            record = _decode(text)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise BrokenRecording(number, "is no record") from error
        if number == 1:
            digest = _seed_of(record, session)
        elif isinstance(record, Opened):
            raise BrokenRecording(number, "opens the session a second time")
        digest = link(digest, text)
        if data[:64] != digest.hex().encode():
            raise BrokenRecording(number, "does not follow from the lines before it")
        closed = isinstance(record, Closed)
        yield Entry(number, digest.hex(), record)


def _seed_of(record: Record, session: str | None) -> bytes:
    if not isinstance(record, Opened):
        raise BrokenRecording(1, f"is `{type(record).__name__.lower()}`; a recording begins with `opened`")
    if record.format != FORMAT:
        raise BrokenRecording(1, f"has format `{record.format}`; this version reads `{FORMAT}`")
    if session is not None and record.session != session:
        raise BrokenRecording(1, f"is of session `{record.session}` and not of `{session}`")
    return seed(record.session)


def verify(
    path: Path,
    *,
    session: str | None = None,
    expected_digest: str | None = None,
    expected_records: int | None = None,
    growing: bool = False,
) -> Verdict:
    """Verifies the whole file. `expected_*` are what the index knows: the file's end, or, of a file that is still
    `growing`, any point of it.

    Raises `OSError` when the file cannot be read.
    """
    last: Entry | None = None
    name = session or ""
    fault: BrokenRecording | None = None
    met = False
    try:
        for entry in read(path, session):
            if isinstance(entry.record, Opened):
                name = entry.record.session
            if entry.number == expected_records and expected_digest is not None:
                if entry.digest != expected_digest:
                    raise BrokenRecording(entry.number, "is not what the index knows")
                met = True
            elif growing and entry.digest == expected_digest:
                met = True
            elif expected_records is not None and entry.number > expected_records and not growing:
                raise BrokenRecording(
                    entry.number, f"follows the last of the `{expected_records}` that the index knows"
                )
            last = entry
        if last is None:
            raise BrokenRecording(1, "is missing: the file is empty")
    except BrokenRecording as error:
        fault = error
    records, digest = (last.number, last.digest) if last else (0, "")
    closed = last is not None and isinstance(last.record, Closed)
    if fault is None or fault.torn:
        short = expected_records is not None and records < expected_records
        if short:
            fault = BrokenRecording(records + 1, f"is missing: the index knows `{expected_records}`")
        elif expected_digest is not None and not met and (growing or digest != expected_digest):
            fault = BrokenRecording(max(records, 1), "is not what the index knows")
    if fault is None:
        return Verdict(State.INTACT, name, records, digest, closed)
    state = State.TORN if fault.torn else State.BROKEN
    return Verdict(state, name, records, digest, closed, fault.line, fault.reason)
