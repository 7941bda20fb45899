"""Opens, closes and recovers sessions: a recording file and a row of the index for each.

    (nothing) --open--> open --close--> closed        the recording ends with its last record, as the worker says
                         |   \\-close--> interrupted   it does not
                         +--interrupt----------------> interrupted (a worker or the daemon died)

The file is made first, with its header, and then the row: a daemon that is killed in between leaves a recording of one
line, which `recover` takes into the index.

Blind spot: a worker can write whatever it wants into the recordings of its own open sessions. What it says at the end
is checked against the end of the file only; `audit verify` checks all of it.
"""

from __future__ import annotations

import datetime
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import structlog

from hostagent.control.rows import SessionRow, SessionState
from hostagent.control.store import Store, StoreUnavailable
from hostagent.errors import OperatorError
from proxy.model import Chain, Endpoint
from proxy.recording import AuditUnavailable, BrokenRecording, State, read, verify
from proxy.recording.records import FORMAT, Closed, Login, Opened, Ruled, encode, line, link, seed

SUFFIX = ".hgr"
_ID = re.compile(r"(\d{4})(\d{2})(\d{2})-\d{6}-[0-9a-f]{6}")
_TAIL_BYTES = 64 * 1024

log = structlog.get_logger()


class RecordingUnavailable(OperatorError, AuditUnavailable):
    """No recording, no session, no access: the disk or the index does not take it."""


@dataclass(frozen=True, slots=True)
class OpenSession:
    """A session that a worker may be given. `fd` is the recording, append only; the caller owns it. The header is
    written: `records` lines, the last link is `digest` (hex)."""

    id: str
    fd: int
    path: Path
    records: int
    digest: str


class Sessions:
    """`recordings` is the directory of all recordings, `host` this machine's name; `clock` gives nanoseconds since the
    epoch."""

    def __init__(self, store: Store, recordings: Path, *, host: str, clock: Callable[[], int] = time.time_ns) -> None:
        self.recordings = recordings
        self._store = store
        self._host = host
        self._clock = clock

    def open(
        self,
        *,
        peer: Endpoint,
        dialled: Endpoint,
        target: str,
        protocol: str,
        chain: Chain | None,
        policy_version: str,
        refusal: str = "",
    ) -> OpenSession:
        """Raises `RecordingUnavailable`: then there is no session, and no access."""
        at_us = self._clock() // 1000
        path, fd = self._create(at_us)
        try:
            session = path.stem
            header = Opened(
                at_us=at_us,
                session=session,
                format=FORMAT,
                host=self._host,
                peer=peer,
                dialled=dialled,
                target=target,
                protocol=protocol,
                policy=policy_version,
                chain=chain,
                refusal=refusal,
            )
            text = encode(header)
            digest = link(seed(session), text)
            data = line(digest, text)
            written = os.write(fd, data)
            if written != len(data):
                raise RecordingUnavailable(
                    f"recording `{path}`: only `{written}` of `{len(data)}` bytes could be written: is the disk full?"
                )
            self._store.add_session(self._row(header, path, digest.hex()))
        except BaseException as error:
            os.close(fd)
            path.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise RecordingUnavailable(f"recording `{path}` cannot be written: {error.strerror}") from error
            if isinstance(error, StoreUnavailable):
                raise RecordingUnavailable(str(error)) from error
            raise
        return OpenSession(session, fd, path, 1, digest.hex())

    def close(self, session: str, *, records: int, digest: str, operations: int, denied: int, reason: str) -> None:
        """Takes the worker's word for the end of a recording, if the file ends that way; else the session counts as
        interrupted. When the store does not answer, the session stays open in it until the next start."""
        self._end(session, lambda row: self._close(row, records, digest, operations, denied, reason))

    def refuse(
        self,
        *,
        peer: Endpoint,
        dialled: Endpoint,
        protocol: str,
        chain: Chain | None,
        policy_version: str,
        refusal: str,
    ) -> str:
        """A session that ends where it begins, without a worker; its id. Raises `RecordingUnavailable`."""
        opened = self.open(
            peer=peer,
            dialled=dialled,
            target="",
            protocol=protocol,
            chain=chain,
            policy_version=policy_version,
            refusal=refusal,
        )
        text = encode(Closed(at_us=self._clock() // 1000, reason="refused", operations=0, denied=0))
        digest = link(bytes.fromhex(opened.digest), text)
        data = line(digest, text)
        try:
            whole = os.write(opened.fd, data) == len(data)
        except OSError as error:
            raise RecordingUnavailable(f"recording `{opened.path}` cannot be written: {error.strerror}") from error
        finally:
            os.close(opened.fd)
        if not whole:
            raise RecordingUnavailable(f"recording `{opened.path}` is not whole: is the disk full?")
        self.close(
            opened.id,
            records=opened.records + 1,
            digest=digest.hex(),
            operations=0,
            denied=0,
            reason="refused",
        )
        return opened.id

    def interrupt(self, session: str, reason: str) -> None:
        """The worker that had this session is gone: the index takes the recording as it stands, which is read for that.
        When the store does not answer, the session stays open in it until the next start."""
        self._end(session, lambda row: self._interrupt(row, reason))

    def _end(self, session: str, end: Callable[[SessionRow], None]) -> None:
        try:
            row = self._store.session(session)
            if row is not None and row.state is SessionState.OPEN:
                end(row)
        except StoreUnavailable as error:
            log.error("end of session not in the index", session=session, why=str(error))

    def _close(self, row: SessionRow, records: int, digest: str, operations: int, denied: int, reason: str) -> None:
        path = self.recordings / row.recording
        if not _ends_with(path, digest):
            log.error("recording does not end as its worker says", session=row.id)
            self._interrupt(row, reason)
            return
        self._store.end_session(
            row.id,
            state=SessionState.CLOSED,
            closed_us=self._clock() // 1000,
            records=records,
            digest=digest,
            operations=operations,
            denied=denied,
            database=_database(path),
            reason=reason,
        )

    def recover(self) -> list[str]:
        """At daemon start, before a session is opened: whatever is still open was interrupted. Gives the ids of those
        sessions, each of which `interrupt` is then to end; that reads all of a recording, and nobody has to wait for
        it. Raises `StoreUnavailable`."""
        for path in self._unindexed():
            self._adopt(path)
        return [row.id for row in self._store.sessions(state=SessionState.OPEN)]

    def _interrupt(self, row: SessionRow, reason: str) -> None:
        path = self.recordings / row.recording
        operations = denied = 0
        database = ""
        records, digest = row.records, row.digest
        try:
            for entry in read(path, row.id):
                records, digest = entry.number, entry.digest
                match entry.record:
                    case Ruled(decision=decision):
                        operations += 1
                        denied += decision == "deny"
                    case Login(database=asked):
                        database = asked
        except BrokenRecording as error:
            reason += f"; recording {'was torn' if error.torn else 'is broken'} at line {error.line}"
        except OSError as error:
            reason += f"; recording cannot be read: {error.strerror}"
        self._store.end_session(
            row.id,
            state=SessionState.INTERRUPTED,
            closed_us=self._clock() // 1000,
            records=max(records, row.records),
            digest=digest if records >= row.records else row.digest,
            operations=operations,
            denied=denied,
            database=database,
            reason=reason,
        )

    def _create(self, at_us: int) -> tuple[Path, int]:
        at = datetime.datetime.fromtimestamp(at_us / 1_000_000, datetime.UTC)
        directory = self.recordings / f"{at:%Y-%m-%d}"
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            while True:
                path = directory / f"{at:%Y%m%d-%H%M%S}-{secrets.token_hex(3)}{SUFFIX}"
                try:
                    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
                    return path, os.open(path, flags, 0o600)
                except FileExistsError:
                    continue
        except OSError as error:
            raise RecordingUnavailable(f"no recording can be made in `{directory}`: {error.strerror}") from error

    def _unindexed(self) -> Iterator[Path]:
        """Recordings without a row in the two newest days: older ones cannot stem from the daemon's last moment."""
        if not self.recordings.is_dir():
            return
        for directory in sorted((each for each in self.recordings.iterdir() if each.is_dir()), reverse=True)[:2]:
            paths = {path.stem: path for path in directory.glob(f"*{SUFFIX}")}
            if paths:
                # asked for all at once: there can be a hundred thousand, and clients wait
                known = self._store.session_ids(min(paths), max(paths))
                yield from (path for session, path in paths.items() if session not in known)

    def _adopt(self, path: Path) -> None:
        """Takes a recording into the index that holds its header and nothing else; others are the audit's business."""
        verdict = verify(path, session=path.stem)
        if (verdict.records == 0 and verdict.state is not State.BROKEN) or path.stat().st_size == 0:
            path.unlink()
        elif verdict.records == 1 and verdict.state is State.INTACT:
            header = next(read(path)).record
            assert isinstance(header, Opened)
            self._store.add_session(self._row(header, path, verdict.digest))

    def _row(self, header: Opened, path: Path, digest: str) -> SessionRow:
        chain = header.chain
        return SessionRow(
            id=header.session,
            opened_us=header.at_us,
            chain=str(chain) if chain else "",
            root_uid=chain.lineage[0].uid if chain and chain.lineage else -1,
            target=header.target,
            peer=str(header.peer),
            dialled=str(header.dialled),
            recording=str(path.relative_to(self.recordings)),
            records=1,
            digest=digest,
            refusal=header.refusal,
        )


def recording_path(recordings: Path, session: str) -> Path | None:
    """Where the recording of this session is; None when `session` is no session id."""
    found = _ID.fullmatch(session)
    return recordings / "-".join(found.groups()) / f"{session}{SUFFIX}" if found else None


def _ends_with(path: Path, digest: str) -> bool:
    """True when the file's last line has this link, is whole, and closed the session."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(file.tell() - _TAIL_BYTES, 0))
            last = file.read().rsplit(b"\n", 2)
    except OSError:
        return False
    return len(last) >= 2 and last[-1] == b"" and last[-2].startswith(f'{digest} {{"is":"closed",'.encode())


def _database(path: Path) -> str:
    """What the login asked for, which is among the first lines if anywhere."""
    try:
        for entry in read(path):
            if isinstance(entry.record, Login):
                return entry.record.database
            if entry.number > 4:
                break
    except (BrokenRecording, OSError):
        return ""
    return ""
