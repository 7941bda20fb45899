"""Writes one session's records, each before what it records may happen.

States: alive, then closed or dead. A write that fails or falls short kills the writer: every later call raises
`AuditUnavailable` and writes nothing, because a line after a torn one would hide the tear.

`completed` records wait in memory and go out, in order, with the next record or with `flush()`; everything else is in
the kernel's hands when the call returns, and so survives the death of any process.

Blind spots: a crash of the whole machine can lose what the kernel had not yet put on the disk; a killed worker loses
the `completed` records since its last flush, never an operation or a ruling.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from hashlib import sha256

from proxy.model import Operation, Ruling
from proxy.recording.records import (
    LINE_OVERHEAD,
    MAX_LINE,
    Alert,
    AuditUnavailable,
    Closed,
    Completed,
    Decided,
    HopReason,
    Login,
    Observed,
    Ruled,
    encode,
    line,
)

_CACHE_BYTES = 16 * 1024 * 1024
_CACHE_ENTRY_BYTES = 64 * 1024
_WAITING_BYTES = 64 * 1024
_RUNNING = 4096
_PREFIX = b'{"is":"ruled","at_us":0,"op":0,'
_TEXT = b'"text":'


class RulingPieces:
    """The part of a record that is the same whenever the same operation gets the same ruling, encoded once; and what is
    the same around the texts of operations with one example, which are too many to be kept.

    Keyed by identity, which is sound because an entry keeps both objects alive. Bounded: at 16 MiB it starts over;
    pieces above 64 KiB are not kept.
    """

    def __init__(self) -> None:
        self._pieces: dict[tuple[int, int], tuple[bytes, Operation, Ruling]] = {}
        self._around: dict[tuple[int, int], tuple[bytes, bytes, Operation, Ruling]] = {}
        self._bytes = 0

    def piece(self, operation: Operation, ruling: Ruling) -> bytes:
        """JSON from after `op` to the end of the object."""
        example = operation.example
        if operation.once:
            return _piece(operation, operation.recorded_text, ruling)
        if example is None:
            kept = self._pieces.get((id(operation), id(ruling)))
            return self._add(operation, ruling) if kept is None else kept[0]
        around = self._around.get((id(example), id(ruling)))
        before, after, _, _ = self._add_around(example, ruling) if around is None else around
        return b"%b%b%b" % (before, encode(operation.recorded_text), after)

    def _add(self, operation: Operation, ruling: Ruling) -> bytes:
        piece = _piece(operation, operation.recorded_text, ruling)
        if self._has_room(piece):
            self._pieces[id(operation), id(ruling)] = (piece, operation, ruling)
        return piece

    def _add_around(self, example: Operation, ruling: Ruling) -> tuple[bytes, bytes, Operation, Ruling]:
        piece = _piece(example, "", ruling)
        text = piece.index(_TEXT) + len(_TEXT)
        around = (piece[:text], piece[text + len(b'""') :], example, ruling)
        if self._has_room(piece):
            self._around[id(example), id(ruling)] = around
        return around

    def _has_room(self, piece: bytes) -> bool:
        """Makes room for this piece, unless it is too large."""
        if len(piece) > _CACHE_ENTRY_BYTES:
            return False
        if self._bytes + len(piece) > _CACHE_BYTES:
            self._pieces.clear()
            self._around.clear()
            self._bytes = 0
        self._bytes += len(piece)
        return True


def _piece(operation: Operation, text: str, ruling: Ruling) -> bytes:
    whole = encode(
        Ruled(
            at_us=0,
            op=0,
            kind=operation.kind,
            phase=operation.phase,
            text=text,
            statements=operation.kinds,
            unclassified=operation.unclassified,
            decision=str(ruling.decision),
            reasons=_reasons(ruling),
            policy=ruling.policy_version,
        )
    )
    return whole[len(_PREFIX) :]


_PIECES = RulingPieces()


class Writer:
    """Owns `fd` (append only), which already holds `records` lines whose last link is `digest`.

    `clock` gives nanoseconds since the epoch. A method raises `AuditUnavailable` when its record could not be written
    whole, and so does every call after that; `completed` never raises, since what it tells has happened already.
    """

    __slots__ = (
        "_clock",
        "_ended",
        "_fd",
        "_pieces",
        "_released_us",
        "_waiting",
        "_waiting_bytes",
        "digest",
        "records",
        "session",
    )

    def __init__(
        self,
        fd: int,
        session: str,
        records: int,
        digest: bytes,
        clock: Callable[[], int],
        pieces: RulingPieces = _PIECES,
    ) -> None:
        self.session = session
        self.records = records
        self.digest = digest
        self._fd = fd
        self._clock = clock
        self._pieces = pieces
        self._released_us: dict[int, int] = {}
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._ended = ""

    @property
    def waiting(self) -> bool:
        """True while `completed` records wait for `flush()`."""
        return bool(self._waiting)

    def login(self, user: str, database: str, parameters: tuple[tuple[str, str], ...], ruling: Ruling) -> None:
        """Must return before a credential is asked for."""
        record = Login(
            at_us=self._now_us(),
            user=user,
            database=database,
            parameters=parameters,
            decision=str(ruling.decision),
            reasons=_reasons(ruling),
            policy=ruling.policy_version,
        )
        self._write(encode(record))

    def ruled(self, op: int, operation: Operation, ruling: Ruling) -> None:
        """Must return before the operation is released or denied."""
        now_us = self._clock() // 1000
        self._write(b'{"is":"ruled","at_us":%d,"op":%d,%b' % (now_us, op, self._pieces.piece(operation, ruling)))
        self._released_us[op] = now_us
        self._released_us.pop(op - _RUNNING, None)

    def held(self, op: int, operation: Operation, ruling: Ruling, approval: str) -> None:
        """Must return before a human is asked, or the target what would come of it."""
        piece = self._pieces.piece(operation, ruling)
        name = encode(approval)
        self._write(b'{"is":"held","at_us":%d,"op":%d,"approval":%b,%b' % (self._now_us(), op, name, piece))

    def decided(self, op: int, approval: str, outcome: str, by: str, reason: str) -> None:
        """Must return before the final ruling is."""
        record = Decided(at_us=self._now_us(), op=op, approval=approval, outcome=outcome, by=by, reason=reason)
        self._write(encode(record))

    def completed(self, op: int, tag: str, rows: int, error: str, masked: tuple[str, ...]) -> None:
        """Waits in memory for the next record or `flush()`."""
        if self._ended:
            return
        now_us = self._clock() // 1000
        duration_us = max(now_us - self._released_us.pop(op, now_us), 0)
        if error or masked or not _plain(tag):
            data = encode(
                Completed(at_us=now_us, op=op, duration_us=duration_us, tag=tag, rows=rows, error=error, masked=masked)
            )
        else:
            data = b'{"is":"completed","at_us":%d,"op":%d,"duration_us":%d,"tag":"%b","rows":%d}' % (
                now_us,
                op,
                duration_us,
                tag.encode(),
                rows,
            )
        self._waiting.append(data)
        self._waiting_bytes += len(data)
        if self._waiting_bytes > _WAITING_BYTES:
            try:
                self._write(None)
            except AuditUnavailable:
                return  # the writer is dead: whatever asks next is refused

    def observed(self, op: int, channel: str, data: bytes) -> None:
        """Must return before the bytes are sent on."""
        self._write(encode(Observed(at_us=self._now_us(), op=op, channel=channel, data=data)))

    def alert(self, text: str) -> None:
        self._write(encode(Alert(at_us=self._now_us(), text=text)))

    def flush(self) -> None:
        """Writes what waits. For a timer of some 10 ms."""
        if self._waiting:
            self._write(None)

    def closed(self, reason: str, operations: int, denied: int) -> None:
        """The last record; nothing can follow it."""
        self._write(encode(Closed(at_us=self._now_us(), reason=reason, operations=operations, denied=denied)))
        self._ended = "it is closed"

    def close(self) -> None:
        """Gives the descriptor back. A session that ended in good order called `closed` before."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1
        self._ended = self._ended or "it is closed"

    def _now_us(self) -> int:
        return self._clock() // 1000

    def _write(self, data: bytes | None) -> None:
        if self._ended:
            raise AuditUnavailable(f"recording of session `{self.session}` cannot go on: {self._ended}")
        digest = self.digest
        batch: Sequence[bytes]
        lines: bytes | bytearray
        if self._waiting:
            batch = self._waiting if data is None else [*self._waiting, data]
            lines = bytearray()
            for each in batch:
                digest = sha256(digest + each).digest()
                lines += line(digest, each)
        else:
            assert data is not None
            batch = (data,)
            digest = sha256(digest + data).digest()
            lines = line(digest, data)
        size = len(lines)
        if data is not None and len(data) + LINE_OVERHEAD > MAX_LINE:
            raise self._die(f"a record of `{len(data)}` bytes exceeds `{MAX_LINE}`")
        try:
            written = os.write(self._fd, lines)
        except OSError as error:
            raise self._die(error.strerror or str(error)) from error
        if written != size:
            self._advance(written, batch)
            raise self._die(f"only `{written}` of `{size}` bytes could be written: is the disk full?")
        self.digest = digest
        self.records += len(batch)
        if self._waiting:
            self._waiting.clear()
            self._waiting_bytes = 0

    def _advance(self, written: int, batch: Sequence[bytes]) -> None:
        """Counts the lines that a short write left whole."""
        for each in batch:
            written -= len(each) + LINE_OVERHEAD
            if written < 0:
                return
            self.digest = sha256(self.digest + each).digest()
            self.records += 1

    def _die(self, why: str) -> AuditUnavailable:
        self._ended = why
        self._waiting.clear()
        return AuditUnavailable(f"recording of session `{self.session}` cannot be written: {why}")


def _reasons(ruling: Ruling) -> tuple[HopReason, ...]:
    return tuple(HopReason(each.hop, each.rule, str(each.decision), each.text) for each in ruling.reasons)


def _plain(tag: str) -> bool:
    """True when `tag` needs no escape in JSON, as none of PostgreSQL's does: letters, digits and spaces."""
    return tag.isascii() and tag.replace(" ", "").isalnum()
