"""The control store: an index of sessions and approvals, in SQLite.

WAL with `synchronous=NORMAL`: a killed daemon loses nothing; a crash of the machine can lose the last transactions,
never the store. One writer (the daemon), any number of readers (the command line).

Blind spot: recordings are found through this index; who can write it can hide one, and `audit verify` then reports the
file as unknown.
"""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import sqlalchemy as sa

from hostagent.control.rows import ApprovalRow, Outcome, SessionRow, SessionState
from hostagent.errors import OperatorError

SCHEMA_VERSION = 1
_BUSY_TIMEOUT_S = 5.0


class StoreUnavailable(OperatorError):
    """The store cannot be opened, read or written; the message names the file."""


_METADATA = sa.MetaData()
_SCHEMA = sa.Table("schema_version", _METADATA, sa.Column("version", sa.Integer, primary_key=True))
_SESSIONS = sa.Table(
    "sessions",
    _METADATA,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("state", sa.String, nullable=False, index=True),
    sa.Column("opened_us", sa.BigInteger, nullable=False),
    sa.Column("closed_us", sa.BigInteger, nullable=False),
    sa.Column("chain", sa.String, nullable=False),
    sa.Column("root_uid", sa.BigInteger, nullable=False),
    sa.Column("target", sa.String, nullable=False),
    sa.Column("peer", sa.String, nullable=False),
    sa.Column("dialled", sa.String, nullable=False),
    sa.Column("database", sa.String, nullable=False),
    sa.Column("recording", sa.String, nullable=False, unique=True),
    sa.Column("records", sa.BigInteger, nullable=False),
    sa.Column("digest", sa.String, nullable=False),
    sa.Column("operations", sa.BigInteger, nullable=False),
    sa.Column("denied", sa.BigInteger, nullable=False),
    sa.Column("refusal", sa.String, nullable=False),
    sa.Column("reason", sa.String, nullable=False),
)
_APPROVALS = sa.Table(
    "approvals",
    _METADATA,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("session", sa.String, nullable=False, index=True),
    sa.Column("operation", sa.BigInteger, nullable=False),
    sa.Column("hop", sa.String, nullable=False),
    sa.Column("rule", sa.String, nullable=False),
    sa.Column("preview", sa.String, nullable=False),
    sa.Column("asked_us", sa.BigInteger, nullable=False),
    sa.Column("deadline_us", sa.BigInteger, nullable=False),
    sa.Column("decided_us", sa.BigInteger, nullable=False),
    sa.Column("outcome", sa.String, nullable=False, index=True),
    sa.Column("by", sa.String, nullable=False),
    sa.Column("reason", sa.String, nullable=False),
)


class Store:
    """An open store. Made by `create` (the daemon) or `open_existing` (the command line). Every method raises
    `StoreUnavailable` when the store does not answer."""

    def __init__(self, path: Path, engine: sa.Engine) -> None:
        self.path = path
        self._engine = engine

    @classmethod
    def create(cls, path: Path) -> Store:
        """Opens the store, and makes it (mode 0600) when there is none."""
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        except OSError as error:
            raise StoreUnavailable(f"cannot open control store `{path}`: {error.strerror}") from error
        store = cls._open(path)
        try:
            with store._transaction() as connection:
                if not sa.inspect(connection).has_table(_SCHEMA.name):
                    _METADATA.create_all(connection)
                    connection.execute(_SCHEMA.insert(), {"version": SCHEMA_VERSION})
            store._check_schema()
        except StoreUnavailable:
            store.close()
            raise
        return store

    @classmethod
    def open_existing(cls, path: Path) -> Store:
        """Opens the store that a daemon has made."""
        store = cls._open(path)
        try:
            store._check_schema()
        except StoreUnavailable:
            store.close()
            raise
        return store

    @classmethod
    def _open(cls, path: Path) -> Store:
        try:
            mode = stat.S_IMODE(path.stat().st_mode)
        except FileNotFoundError as error:
            raise StoreUnavailable(f"no control store at `{path}`: hopgate has not run with this state_dir") from error
        except OSError as error:
            raise StoreUnavailable(f"cannot open control store `{path}`: {error.strerror}") from error
        if mode & 0o077:
            raise StoreUnavailable(
                f"control store `{path}` has mode `{mode:04o}`, others may use it: `chmod 600 {path}`"
            )
        engine = sa.create_engine(
            sa.URL.create("sqlite", database=str(path)), connect_args={"timeout": _BUSY_TIMEOUT_S}
        )

        @sa.event.listens_for(engine, "connect")
        def _configure(connection: Any, _: Any) -> None:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")

        return cls(path, engine)

    def close(self) -> None:
        """Gives the files back."""
        self._engine.dispose()

    def add_session(self, row: SessionRow) -> None:
        with self._transaction() as connection:
            connection.execute(_SESSIONS.insert(), msgspec.to_builtins(row))

    def end_session(
        self,
        session: str,
        *,
        state: SessionState,
        closed_us: int,
        records: int,
        digest: str,
        operations: int,
        denied: int,
        database: str,
        reason: str,
    ) -> bool:
        """Closes or interrupts an open session; False when there is no open session of this id."""
        change = _SESSIONS.update().where(_SESSIONS.c.id == session, _SESSIONS.c.state == SessionState.OPEN.value)
        values = {
            "state": state.value,
            "closed_us": closed_us,
            "records": records,
            "digest": digest,
            "operations": operations,
            "denied": denied,
            "database": database,
            "reason": reason,
        }
        with self._transaction() as connection:
            return connection.execute(change.values(values)).rowcount == 1

    def session(self, session: str) -> SessionRow | None:
        with self._transaction() as connection:
            row = connection.execute(_SESSIONS.select().where(_SESSIONS.c.id == session)).mappings().first()
        return None if row is None else self._session(row)

    def sessions(self, *, state: SessionState | None = None, limit: int | None = None) -> list[SessionRow]:
        """Newest first."""
        query = _SESSIONS.select().order_by(_SESSIONS.c.opened_us.desc(), _SESSIONS.c.id.desc()).limit(limit)
        if state is not None:
            query = query.where(_SESSIONS.c.state == state.value)
        with self._transaction() as connection:
            rows = connection.execute(query).mappings().all()
        return [self._session(row) for row in rows]

    def session_ids(self, first: str, last: str) -> set[str]:
        """The ids from `first` to `last`, in their order, which is that of time."""
        query = sa.select(_SESSIONS.c.id).where(_SESSIONS.c.id.between(first, last))
        with self._transaction() as connection:
            return set(connection.execute(query).scalars())

    def add_approval(self, row: ApprovalRow) -> bool:
        """False when an approval of this id is already known."""
        with self._transaction() as connection:
            known = connection.execute(sa.select(_APPROVALS.c.id).where(_APPROVALS.c.id == row.id)).first()
            if known is not None:
                return False
            connection.execute(_APPROVALS.insert(), msgspec.to_builtins(row))
        return True

    def decide_approval(self, approval: str, *, outcome: Outcome, decided_us: int, by: str, reason: str) -> bool:
        """False when there is no pending approval of this id."""
        change = _APPROVALS.update().where(_APPROVALS.c.id == approval, _APPROVALS.c.outcome == Outcome.PENDING.value)
        values = {"outcome": outcome.value, "decided_us": decided_us, "by": by, "reason": reason}
        with self._transaction() as connection:
            return connection.execute(change.values(values)).rowcount == 1

    def withdraw_pending(self, *, decided_us: int, reason: str) -> int:
        """Withdraws every approval that is pending; gives their number."""
        change = _APPROVALS.update().where(_APPROVALS.c.outcome == Outcome.PENDING.value)
        values = {"outcome": Outcome.WITHDRAWN.value, "decided_us": decided_us, "by": "hopgate", "reason": reason}
        with self._transaction() as connection:
            return connection.execute(change.values(values)).rowcount

    def approval(self, approval: str) -> ApprovalRow | None:
        with self._transaction() as connection:
            row = connection.execute(_APPROVALS.select().where(_APPROVALS.c.id == approval)).mappings().first()
        return None if row is None else self._approval(row)

    def approvals(self, *, limit: int | None = None) -> list[ApprovalRow]:
        """Newest first."""
        query = _APPROVALS.select().order_by(_APPROVALS.c.asked_us.desc(), _APPROVALS.c.id).limit(limit)
        with self._transaction() as connection:
            rows = connection.execute(query).mappings().all()
        return [self._approval(row) for row in rows]

    def _session(self, row: Mapping[Any, Any]) -> SessionRow:
        try:
            return msgspec.convert({str(name): value for name, value in row.items()}, SessionRow)
        except msgspec.ValidationError as error:
            raise StoreUnavailable(f"control store `{self.path}` holds a session that is none: {error}") from error

    def _approval(self, row: Mapping[Any, Any]) -> ApprovalRow:
        try:
            return msgspec.convert({str(name): value for name, value in row.items()}, ApprovalRow)
        except msgspec.ValidationError as error:
            raise StoreUnavailable(f"control store `{self.path}` holds an approval that is none: {error}") from error

    def _check_schema(self) -> None:
        with self._transaction() as connection:
            known = sa.inspect(connection).has_table(_SCHEMA.name)
            version = connection.execute(sa.select(_SCHEMA.c.version)).scalar() if known else None
        if version != SCHEMA_VERSION:
            raise StoreUnavailable(
                f"control store `{self.path}` has schema `{version}`, this version needs `{SCHEMA_VERSION}`; "
                "move the file away, or run the version that made it"
            )

    @contextmanager
    def _transaction(self) -> Iterator[sa.Connection]:
        try:
            with self._engine.begin() as connection:
                yield connection
        except (sa.exc.SQLAlchemyError, sqlite3.Error) as error:
            cause = getattr(error, "orig", None) or error
            raise StoreUnavailable(f"control store `{self.path}` does not answer: {cause}") from error


@contextmanager
def opened(path: Path) -> Iterator[Store]:
    """The store that a daemon has made, closed at the end. Raises `StoreUnavailable`."""
    store = Store.open_existing(path)
    try:
        yield store
    finally:
        store.close()
