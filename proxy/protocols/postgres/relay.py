"""The session after its login: operations out of the client's bytes, and the server's replies held against what is expected.

Both streams are passed on as they come. Of the client's messages only those are kept that ask for something (Query, Parse,
Execute, FunctionCall) until they are ruled on; of the server's only those that say where the session stands.

    client message      reply expected, in this order            effect, once the reply is there
    Query               (T? D* C | I | G/H … C)*  [E]  Z         portals end with a transaction
    Parse               1                                        the name stands for the text
    Bind                2                                        the portal stands for the statement
    Describe S / P      t, (T | n)   /   T | n                   columns of the statement / of the portal
    Execute             D* (C | I | s)  or  G/H … C              -
    Close               3                                        the name stands for nothing
    Sync                [E]  Z                                   portals end with a transaction
    CopyDone, CopyFail  none: a mark, up to which a copy swallows Sync
    Flush, CopyData     none

Each message that was passed on has its entry in the queue of expected replies, so that every reply belongs to the head. An
error in reply to Query or Sync leaves the head in place, since Z follows. An error in reply to any other message takes
all entries up to the next Sync with it: the server skips those messages, and until a Sync comes we skip them as well. A
copy from the client swallows the Syncs that follow its Execute.

What a name stands for is known twice: confirmed, by replies, and expected, by what was sent. An Execute is judged by
what is expected; an error in between means that the server skips it, and what was expected is made anew.

A denied message is replaced by one that must fail, and the error that comes back by ours: order, transaction state and the
skipping are then the server's own. In sessions with masks the machine adds messages of its own (hidden: their replies are
swallowed): `Describe` of the portal before each Execute, so that rows are masked by the description that belongs to
them, and `Describe` of the statement, with a wait for its reply, before a Bind that asks for binary results.

Blind spots: Bind's parameters and copied data are not looked into. The lexer's settings are followed by what statements
say and the server reports; a function that changes them is seen only when the server reports it.
"""

from __future__ import annotations

import struct
from collections import deque
from typing import Final

import msgspec

from proxy.model import Decision, OperationKind, Ruling
from proxy.protocols.base import AskRuling, Buffer, Close, Command, Completed, PeerViolation, Send, Side
from proxy.protocols.postgres import messages, operations
from proxy.protocols.postgres.columns import NOTHING, Catalog, CatalogChanged, Plan, mask_row
from proxy.protocols.postgres.messages import MAX_CONTROL, MAX_FRAME, MAX_NAME, MAX_PENDING, MAX_STATEMENT, Malformed
from proxy.protocols.postgres.operations import Described
from proxy.protocols.postgres.startup import encoding_codec

QUERY: Final = 0
SYNC: Final = 1
PARSE: Final = 2
BIND: Final = 3
DESCRIBE_STATEMENT: Final = 4
DESCRIBE_PORTAL: Final = 5
EXECUTE: Final = 6
CLOSE: Final = 7
COPY_END: Final = 8

NOT_RUN = "not run: an earlier message of the pipeline failed"
BINARY_HINT = "ask for the text format: masks work on text only"
RECONNECT_HINT = "connect again: the masks of a session are made from the catalog as it was at login"

_length = struct.Struct(">I").unpack_from


class Statement(msgspec.Struct):
    """A prepared statement: what its Execute will be asked as, and its columns once they are known."""

    size: int
    execution: Described
    plan: Plan | None = None


class Portal(msgspec.Struct):
    """A bound portal; `statement` is None when it was not prepared by a Parse of this session."""

    statement: Statement | None
    plan: Plan | None = None


class Expected(msgspec.Struct):
    """The reply that one message will have. `ask` is the operation's id or 0; `denial` is our message and hint while the
    server's error for them has not come; `hidden` replies are not the client's."""

    kind: int
    ask: int = 0
    denial: tuple[str, str] | None = None
    hidden: bool = False
    name: bytes = b""
    statement: Statement | None = None
    portal: Portal | None = None
    deallocates: bytes = b""
    tag: str = ""
    error: str = ""
    plan: Plan | None = None
    labels: tuple[str, ...] = ()


class _Unshowable(Exception):
    """The session cannot go on with what the server is about to send."""

    def __init__(self, code: str, message: str, hint: str) -> None:
        super().__init__(message)
        self.code = code
        self.hint = hint


class Relay:
    """Both directions of one session, from the first ReadyForQuery on."""

    def __init__(self, *, tag: str, catalog: Catalog | None, codec: str, conforming: bool) -> None:
        """`tag` is a word that no client can guess; `codec` and `conforming` are what the server reported of
        `client_encoding` and `standard_conforming_strings`."""
        self.closed = False
        self._tag = tag
        self._catalog = catalog
        self._streamed = frozenset(b"DdNA") if catalog is None else frozenset(b"d")
        self._queue: deque[Expected] = deque()
        # the client's side
        self._inbox = b""
        self._position = 0
        self._approved = 0
        self._kept = bytearray()
        self._needed = 0
        self._through = 0
        self._discarding = False
        self._last_ask = 0
        self._asked: AskRuling | None = None
        self._asked_changes_lexer = False
        self._asked_stop = 0
        self._asked_entry = Expected(QUERY)
        self._awaits_columns = False
        self._congested = False
        self._skipping = False
        self._copying = False
        self._sync_in_copy = False
        # what names stand for
        self._statements: dict[bytes, Statement] = {}
        self._expected_statements: dict[bytes, Statement] = {}
        self._prepared_bytes = 0
        self._portals: dict[bytes, Portal] = {}
        self._expected_portals: dict[bytes, Portal] = {}
        # how the server reads text
        self._codec = codec
        self._conforming = conforming
        self._unsettled = False
        self._plain = codec == "utf-8" and conforming
        # the server's side
        self._reply_kept = bytearray()
        self._reply_needed = 0
        self._reply_through = 0
        self._rows = 0
        self._notices: list[bytes] = []

    # --- the client's side --------------------------------------------------------------------------------------------

    @property
    def unanswered(self) -> bool:
        return self._asked is not None or self._awaits_columns or self._congested

    def receive_client(self, data: Buffer) -> list[Command]:
        if type(data) is not bytes:
            data = bytes(data)
        if self.closed:
            return []
        start = 0
        if self._through:
            if len(data) <= self._through:
                self._through -= len(data)
                return [] if self._discarding else [Send(Side.SERVER, data)]
            if self._discarding:
                data = data[self._through :]
            else:
                start = self._through
            self._through = 0
        elif self._asked is not None or self._awaits_columns or self._congested:
            self._kept += data
            if len(self._kept) > messages.MAX_KEPT:
                raise PeerViolation(f"more than `{messages.MAX_KEPT}` bytes behind an open question", Side.CLIENT)
            return []
        elif self._kept:
            self._kept += data
            if len(self._kept) < self._needed:
                return []
            data = bytes(self._kept)
            self._kept = bytearray()
        self._inbox = data
        self._position = start
        self._approved = 0
        return self._scan([])

    def answer(self, ask: AskRuling, ruling: Ruling) -> list[Command]:
        """Releases the operation that `ask` is about, or puts what must fail in its place."""
        if self.closed:
            return []
        if ask is not self._asked and ask != self._asked:
            raise ValueError(f"operation `{ask.id}` was not asked about, or was answered before")
        self._asked = None
        entry = self._asked_entry
        stop = self._asked_stop
        out: list[Command] = []
        if self._skipping:
            out.append(Completed(ask.id, error=NOT_RUN))
            self._approved = stop
        elif ruling.decision is Decision.ALLOW and not ask.operation.unclassified:
            if entry.kind == EXECUTE and self._catalog is not None:
                out.append(Send(Side.SERVER, messages.describe(b"P", entry.name)))
                self._queue.append(Expected(DESCRIBE_PORTAL, hidden=True, portal=entry.portal))
            if self._asked_changes_lexer and entry.kind != PARSE:
                self._unsettled = True
                self._plain = False
            self._expect(entry)
        else:
            out.append(Send(Side.SERVER, self._failing(entry)))
            if entry.denial is None:
                entry.denial = (ruling.message or "denied by the gateway", ruling.hint)
                if ruling.decision is Decision.ALLOW:
                    entry.denial = (f"the operation could not be classified: {ask.operation.unclassified}", "")
            # what fails has no effect on names
            entry.statement = entry.portal = None
            self._queue.append(entry)
            self._approved = stop
        self._position = stop
        return self._scan(out)

    def _failing(self, entry: Expected) -> bytes:
        """A message that must fail in the place of the denied one; its text lets the server's operators correlate."""
        text = f"hopgate denied operation {entry.ask}"
        if entry.kind == PARSE:
            return messages.parse(entry.name, text)
        unknown = f"{text} {self._tag}".encode()
        if entry.kind == EXECUTE:
            return messages.execute(unknown)
        if entry.kind == BIND:
            return messages.bind(entry.name, unknown)
        return messages.query(text)

    def _expect(self, entry: Expected) -> None:
        self._queue.append(entry)
        self._apply(entry)

    def _apply(self, entry: Expected) -> None:
        """The effect that this message will have, if nothing fails before it."""
        if entry.kind == PARSE and entry.statement is not None:
            replaced = self._expected_statements.get(entry.name)
            self._expected_statements[entry.name] = entry.statement
            self._prepared_bytes += entry.statement.size - (replaced.size if replaced is not None else 0)
        elif entry.kind == BIND and entry.portal is not None:
            self._expected_portals[entry.name] = entry.portal
        elif entry.kind == CLOSE:
            if entry.statement is not None:
                gone = self._expected_statements.pop(entry.name, None)
                self._prepared_bytes -= gone.size if gone is not None else 0
            elif entry.portal is not None:
                self._expected_portals.pop(entry.name, None)

    def _expect_anew(self) -> None:
        """After entries were dropped or names ended: what is confirmed, and what is still on its way."""
        self._expected_statements = dict(self._statements)
        self._prepared_bytes = sum(statement.size for statement in self._statements.values())
        self._expected_portals = dict(self._portals)
        for entry in self._queue:
            self._apply(entry)

    def _scan(self, out: list[Command]) -> list[Command]:
        """Goes through the inbox from where it stopped; stops at a question, and where the bytes end."""
        data = self._inbox
        position = self._position
        approved = self._approved
        queue = self._queue
        while True:
            end = len(data)
            needed = 5
            if end - position >= 5:
                if len(queue) >= MAX_PENDING:
                    self._flush(out, data, approved, position)
                    self._inbox, self._position, self._approved = data, position, position
                    self._congested = True
                    return out
                kind = data[position]
                size = _length(data, position + 1)[0]
                stop = position + 1 + size
                if size < 4:
                    raise PeerViolation(f"message `{chr(kind)}` has length `{size}`", Side.CLIENT)
                if kind in b"QPF":
                    if size > MAX_STATEMENT:
                        self._flush(out, data, approved, position)
                        return self._fatal(
                            out, "54000", f"a statement of `{size}` bytes exceeds the gateway's limit of `{MAX_STATEMENT}`"
                        )
                    if stop <= end:
                        self._flush(out, data, approved, position)
                        if self._skipping:
                            position = approved = stop
                            continue
                        self._inbox, self._position, self._approved = data, position, position
                        return self._ask(out, kind, stop)
                    needed = size + 1
                elif kind in b"dfB":
                    if size > MAX_FRAME:
                        raise PeerViolation(f"message `{chr(kind)}` of `{size}` bytes exceeds `{MAX_FRAME}`", Side.CLIENT)
                    needed = 0
                    if kind == 0x42 and not self._skipping:
                        if self._catalog is not None and stop > end:
                            if size > MAX_STATEMENT:
                                self._flush(out, data, approved, position)
                                return self._fatal(
                                    out,
                                    "54000",
                                    f"a Bind of `{size}` bytes exceeds the limit of `{MAX_STATEMENT}` for sessions with masks",
                                )
                            needed = size + 1
                        else:
                            names = self._bind_names(data, position + 5, min(stop, end), stop <= end)
                            if names is None:
                                needed = end - position + 1
                            else:
                                portal, statement, behind = names
                                if len(portal) > MAX_NAME or not (portal + statement).isascii():
                                    self._flush(out, data, approved, position)
                                    return self._bad_name(out)
                                if self._catalog is not None and not self._may_bind(
                                    out, data, approved, position, behind, stop, portal, statement
                                ):
                                    return out
                                if len(self._expected_portals) >= messages.MAX_PREPARED:
                                    self._flush(out, data, approved, position)
                                    return self._fatal(out, "54000", "too many portals in one transaction")
                                bound = Portal(self._expected_statements.get(statement))
                                self._expect(Expected(BIND, name=portal, portal=bound))
                    elif kind == 0x66 and not self._skipping:
                        self._end_copy()
                    if not needed:
                        if self._skipping:
                            self._flush(out, data, approved, position)
                            approved = min(stop, end)
                            self._discarding = True
                        else:
                            self._discarding = False
                        if stop > end:
                            self._flush(out, data, approved, end)
                            self._through = stop - end
                            self._inbox = b""
                            return out
                        position = stop
                        continue
                elif kind in b"SHEDCcX":
                    if size > MAX_CONTROL:
                        self._flush(out, data, approved, position)
                        return self._bad_name(out)
                    if stop <= end:
                        if kind == 0x53:
                            if self._copying:
                                # the server would read and ignore it
                                self._sync_in_copy = True
                                self._flush(out, data, approved, position)
                                approved = stop
                            else:
                                self._skipping = False
                                queue.append(Expected(SYNC))
                        elif kind == 0x58:
                            self._flush(out, data, approved, stop)
                            return self._close(out, "the client ended the session")
                        elif self._skipping:
                            self._flush(out, data, approved, position)
                            approved = stop
                        elif kind == 0x45:
                            self._flush(out, data, approved, position)
                            self._inbox, self._position, self._approved = data, position, position
                            return self._ask(out, kind, stop)
                        elif kind == 0x63:
                            self._end_copy()
                        elif kind != 0x48 and not self._describe_or_close(kind, data, position, stop):
                            self._flush(out, data, approved, position)
                            return self._bad_name(out)
                        position = stop
                        continue
                    needed = size + 1
                else:
                    raise PeerViolation(f"unknown message type `0x{kind:02x}`", Side.CLIENT)
            self._flush(out, data, approved, position)
            if self._kept:
                # what came while a question was open
                data = data[position:] + self._kept
                self._kept = bytearray()
                position = approved = 0
                if len(data) >= needed:
                    continue
            if position < end:
                self._kept = bytearray(data[position:])
                self._needed = needed
            self._inbox = b""
            return out

    def _flush(self, out: list[Command], data: bytes, start: int, stop: int) -> None:
        if stop > start:
            out.append(Send(Side.SERVER, data if stop - start == len(data) else data[start:stop]))

    def _bind_names(self, data: bytes, start: int, end: int, whole: bool) -> tuple[bytes, bytes, int] | None:
        """The portal's and the statement's name of a Bind, and where they end; None when more bytes are needed. A name that
        is too long comes back as it is, cut."""
        names = []
        for _ in range(2):
            stop = data.find(0, start, min(end, start + MAX_NAME + 1))
            if stop < 0:
                if end - start > MAX_NAME:
                    return data[start : start + MAX_NAME + 1], b"", end
                if whole:
                    raise PeerViolation("a Bind ends inside its names", Side.CLIENT)
                return None
            names.append(data[start:stop])
            start = stop + 1
        return names[0], names[1], start

    def _name(self, data: bytes, start: int, stop: int) -> bytes:
        try:
            return messages.read_cstring(data, start, stop)[0]
        except Malformed as error:
            raise PeerViolation(str(error), Side.CLIENT) from None

    def _describe_or_close(self, kind: int, data: bytes, position: int, stop: int) -> bool:
        """Notes the reply to a Describe or Close; False for a name that cannot be one."""
        what = data[position + 5] if stop > position + 5 else 0
        if what not in b"SP":
            raise PeerViolation(f"message `{chr(kind)}` is about `0x{what:02x}`, neither statement nor portal", Side.CLIENT)
        name = self._name(data, position + 6, stop)
        if len(name) > MAX_NAME or not name.isascii():
            return False
        if what == 0x53:
            statement = self._expected_statements.get(name)
            if kind == 0x44:
                self._queue.append(Expected(DESCRIBE_STATEMENT, name=name, statement=statement))
            else:
                self._expect(Expected(CLOSE, name=name, statement=statement))
        else:
            portal = self._expected_portals.get(name)
            if kind == 0x44:
                self._queue.append(Expected(DESCRIBE_PORTAL, name=name, portal=portal))
            else:
                self._expect(Expected(CLOSE, name=name, portal=portal))
        return True

    def _end_copy(self) -> None:
        self._copying = False
        self._sync_in_copy = False
        if self._queue:
            self._queue.append(Expected(COPY_END))

    def _bad_name(self, out: list[Command]) -> list[Command]:
        return self._fatal(
            out,
            "42622",
            f"a statement's or portal's name is longer than `{MAX_NAME}` bytes or not ASCII",
            "such names can stand for another at the server",
        )

    # --- asking -------------------------------------------------------------------------------------------------------

    def _ask(self, out: list[Command], kind: int, stop: int) -> list[Command]:
        """Asks about the message at the inbox's position."""
        data = self._inbox
        start = self._position + 5
        if kind == 0x51:
            if data.find(0, start, stop) != stop - 1:
                raise PeerViolation("a Query's text does not end with the message", Side.CLIENT)
            described = self._described(OperationKind.QUERY, operations.QUERIES, data[start : stop - 1])
            entry = Expected(QUERY, deallocates=described.deallocates)
        elif kind == 0x45:
            name = self._name(data, start, stop)
            if len(name) > MAX_NAME or not name.isascii():
                return self._bad_name(out)
            portal = self._expected_portals.get(name)
            described = self._execution(name, portal)
            entry = Expected(EXECUTE, name=name, portal=portal, deallocates=described.deallocates)
        elif kind == 0x50:
            name = self._name(data, start, stop)
            if len(name) > MAX_NAME or not name.isascii():
                return self._bad_name(out)
            start += len(name) + 1
            text = self._name(data, start, stop)
            if (
                len(self._expected_statements) >= messages.MAX_PREPARED
                or self._prepared_bytes + len(text) > messages.MAX_PREPARED_BYTES
            ):
                return self._fatal(out, "54000", "too many prepared statements", "close those that are no longer used")
            described = self._described(OperationKind.PARSE, operations.PARSES, text)
            execution = self._described(OperationKind.EXECUTE, operations.EXECUTIONS, text)
            entry = Expected(PARSE, name=name, statement=Statement(len(text), execution))
        else:
            function = _length(data, start)[0] if stop - start >= 4 else 0
            described = operations.unclassified(
                OperationKind.FUNCTION_CALL,
                f"function call by OID {function}",
                "a FunctionCall message names its function by OID only: call it in a SELECT",
            )
            entry = Expected(QUERY)
        return self._pose(out, described, entry, stop)

    def _pose(self, out: list[Command], described: Described, entry: Expected, stop: int) -> list[Command]:
        if described.executes:
            described = self._check_prepared(described)
        self._last_ask += 1
        entry.ask = self._last_ask
        ask = AskRuling(self._last_ask, described.operation)
        self._asked = ask
        self._asked_changes_lexer = described.changes_lexer
        self._asked_stop = stop
        self._asked_entry = entry
        out.append(ask)
        return out

    def _described(self, kind: OperationKind, memory: operations.Memory, text: bytes) -> Described:
        if self._plain:
            return memory.describe(text)
        ascii_only = text.isascii()
        escapes = b"\\" in text
        if self._unsettled and (escapes or not ascii_only):
            return operations.unclassified(
                kind, text.decode("ascii", "backslashreplace"), "an earlier statement is just changing how text is read"
            )
        if escapes and not self._conforming:
            return operations.unclassified(
                kind,
                text.decode("ascii", "backslashreplace"),
                "with standard_conforming_strings off a backslash can hide the end of a string",
            )
        if ascii_only or self._codec == "utf-8":
            return memory.describe(text)
        return operations.describe(kind, text, self._codec)

    def _execution(self, name: bytes, portal: Portal | None) -> Described:
        if portal is not None and portal.statement is not None:
            return portal.statement.execution
        shown = name.decode("ascii", "replace")
        what = "was not bound by this session" if portal is None else "runs a statement that no Parse prepared"
        return operations.unclassified(OperationKind.EXECUTE, f"execute portal {shown!r}", f"the portal `{shown}` {what}")

    def _check_prepared(self, described: Described) -> Described:
        """A SQL-level EXECUTE of what a Parse prepared would pass by the ruling that its Execute message gets."""
        for name in described.executes:
            if name in self._statements or any(entry.kind == PARSE and entry.name == name for entry in self._queue):
                shown = name.decode("utf-8", "replace")
                return operations.refuse(
                    described, f"`{shown}` was prepared by the protocol, so only the protocol may execute it"
                )
        return described

    def _may_bind(
        self,
        out: list[Command],
        data: bytes,
        approved: int,
        position: int,
        behind: int,
        stop: int,
        portal: bytes,
        name: bytes,
    ) -> bool:
        """In a session with masks: whether this Bind can go on now. If not, its columns are being asked for, or it is asked
        about because it wants a masked column in binary."""
        try:
            formats = messages.result_formats(data, behind, stop)
        except Malformed as error:
            raise PeerViolation(str(error), Side.CLIENT) from None
        statement = self._expected_statements.get(name)
        if not any(formats) or statement is None:
            return True
        if statement.plan is None:
            self._flush(out, data, approved, position)
            out.append(Send(Side.SERVER, messages.describe(b"S", name) + messages.FLUSH))
            self._queue.append(Expected(DESCRIBE_STATEMENT, hidden=True, name=name, statement=statement))
            self._inbox, self._position, self._approved = data, position, position
            self._awaits_columns = True
            return False
        masked = [
            label
            for label, (index, _) in zip(statement.plan.columns, statement.plan.masks, strict=True)
            if (formats[0] if len(formats) == 1 else formats[index] if index < len(formats) else 0)
        ]
        if not masked:
            return True
        self._flush(out, data, approved, position)
        self._inbox, self._position, self._approved = data, position, position
        reason = f"masked column `{masked[0]}` is asked for in binary format"
        entry = Expected(BIND, name=portal, denial=(reason, BINARY_HINT))
        self._pose(out, operations.refuse(statement.execution, reason), entry, stop)
        return False

    # --- the server's side --------------------------------------------------------------------------------------------

    def receive_server(self, data: Buffer) -> list[Command]:
        if type(data) is not bytes:
            data = bytes(data)
        if self.closed:
            return []
        position = 0
        if self._reply_through:
            if len(data) <= self._reply_through:
                self._reply_through -= len(data)
                out: list[Command] = [Send(Side.CLIENT, data)]
                self._flush_notices(out)
                return out
            position = self._reply_through
            self._reply_through = 0
        elif self._reply_kept:
            self._reply_kept += data
            if len(self._reply_kept) < self._reply_needed:
                return []
            data = bytes(self._reply_kept)
            self._reply_kept = bytearray()
        queue = self._queue
        streamed = self._streamed
        end = len(data)
        start = 0
        pieces: list[bytes] = []
        out = []
        needed = 5
        while end - position >= 5:
            kind = data[position]
            size = _length(data, position + 1)[0]
            stop = position + 1 + size
            if kind in streamed:
                if not 4 <= size <= MAX_FRAME:
                    raise PeerViolation(f"message `{chr(kind)}` has length `{size}`", Side.SERVER)
                if kind == 0x44 or kind == 0x64:
                    self._rows += 1
                if stop > end:
                    self._reply_through = stop - end
                    position = end
                    break
                position = stop
                continue
            if kind == 0x44:
                plan = self._row_plan()
                if plan is None:
                    return self._fatal_reply(
                        pieces, data[start:position], out, "55000", "the server sent a row whose columns are not known"
                    )
                if not 4 <= size <= (messages.MAX_MASKED_ROW if plan.masks else MAX_FRAME):
                    return self._fatal_reply(
                        pieces, data[start:position], out, "54000", f"a row of `{size}` bytes is too large to be masked"
                    )
                if stop > end:
                    if plan.masks:
                        needed = size + 1
                        break
                    self._rows += 1
                    self._reply_through = stop - end
                    position = end
                    break
                self._rows += 1
                if plan.masks:
                    pieces.append(data[start:position])
                    try:
                        pieces.append(mask_row(data, position + 5, stop, plan))
                    except Malformed as error:
                        raise PeerViolation(str(error), Side.SERVER) from None
                    start = stop
                position = stop
                continue
            if not 4 <= size <= messages.MAX_REPLY:
                raise PeerViolation(f"message `{chr(kind)}` has length `{size}`", Side.SERVER)
            if stop > end:
                needed = size + 1
                break
            if kind == 0x5A:
                self._ready(data[position + 5] if size == 5 else 0, out)
            elif kind == 0x43:
                self._complete(data[position + 5 : stop - 1].decode("ascii", "replace"), out)
            elif kind == 0x45 or kind == 0x4E:
                body = data[position + 5 : stop]
                replacement = self._failed(body, out) if kind == 0x45 else None
                if replacement is None and self._catalog is not None:
                    replacement = messages.without_values(data[position : position + 1], body)
                if replacement is not None:
                    pieces.append(data[start:position])
                    pieces.append(replacement)
                    start = stop
                if self._copying and kind == 0x45:
                    self._copying = False
                    if self._sync_in_copy:
                        return self._fatal_reply(
                            pieces, data[start:stop], out, "08P01", "a Sync came inside of a copy that failed"
                        )
            elif kind == 0x54 or kind == 0x6E:
                head = self._head()
                try:
                    hidden = self._columns(head, data[position + 5 : stop] if kind == 0x54 else None)
                except _Unshowable as why:
                    return self._fatal_reply(pieces, data[start:position], out, why.code, str(why), why.hint)
                except Malformed as error:
                    raise PeerViolation(str(error), Side.SERVER) from None
                if hidden:
                    pieces.append(data[start:position])
                    start = stop
            elif kind == 0x74:
                head = self._head()
                if head.kind != DESCRIBE_STATEMENT:
                    raise PeerViolation("a ParameterDescription that nothing asked for", Side.SERVER)
                if head.hidden:
                    pieces.append(data[start:position])
                    start = stop
            elif kind == 0x31:
                entry = self._pop(PARSE)
                if entry.statement is not None:
                    self._statements[entry.name] = entry.statement
                out.append(Completed(entry.ask))
            elif kind == 0x32:
                entry = self._pop(BIND)
                if entry.portal is not None:
                    self._portals[entry.name] = entry.portal
            elif kind == 0x33:
                entry = self._pop(CLOSE)
                if entry.statement is not None:
                    self._statements.pop(entry.name, None)
                elif entry.portal is not None:
                    self._portals.pop(entry.name, None)
            elif kind == 0x73 or kind == 0x49:
                head = self._head()
                if head.kind == EXECUTE:
                    self._finish(self._pop(EXECUTE), out)
                elif kind == 0x73 or head.kind != QUERY:
                    raise PeerViolation(f"message `{chr(kind)}` in reply to something else", Side.SERVER)
            elif kind == 0x47 or kind == 0x57:
                self._start_copy()
            elif kind == 0x48 or kind == 0x63:
                self._reply_to_statement(kind)
            elif kind == 0x53:
                try:
                    trouble = self._parameter(data, position + 5, stop)
                except Malformed as error:
                    raise PeerViolation(str(error), Side.SERVER) from None
                if trouble:
                    return self._fatal_reply(pieces, data[start:position], out, "0A000", trouble)
            elif kind != 0x41:
                raise PeerViolation(f"unexpected message type `0x{kind:02x}`", Side.SERVER)
            position = stop
        if position < end:
            self._reply_kept = bytearray(data[position:])
            self._reply_needed = needed
        if pieces:
            pieces.append(data[start:position])
            joined = b"".join(pieces)
            if joined:
                out.insert(0, Send(Side.CLIENT, joined))
        elif position > start:
            out.insert(0, Send(Side.CLIENT, data if position == end and start == 0 else data[start:position]))
        if self._notices:
            self._flush_notices(out)
        if self._congested and len(queue) <= MAX_PENDING // 2:
            self._congested = False
            if self._asked is None:
                return self._scan(out)
        elif self._awaits_columns and not self._columns_outstanding():
            self._awaits_columns = False
            return self._scan(out)
        return out

    def _head(self) -> Expected:
        """What the next reply belongs to."""
        queue = self._queue
        while queue and queue[0].kind == COPY_END:
            queue.popleft()
        if not queue:
            raise PeerViolation("a reply that nothing asked for", Side.SERVER)
        return queue[0]

    def _pop(self, kind: int) -> Expected:
        head = self._head()
        if head.kind != kind:
            raise PeerViolation(f"a reply to `{kind}` where `{head.kind}` is expected", Side.SERVER)
        if head.denial is not None:
            raise PeerViolation("the server accepted what was put in the place of a denied operation", Side.SERVER)
        return self._queue.popleft()

    def _finish(self, entry: Expected, out: list[Command]) -> None:
        labels = entry.labels
        if entry.portal is not None and entry.portal.plan is not None:
            labels = entry.portal.plan.labels
        out.append(Completed(entry.ask, entry.tag, self._rows, entry.error, labels))
        self._rows = 0

    def _ready(self, status: int, out: list[Command]) -> None:
        """ReadyForQuery: the Query or Sync at the head is over."""
        if status not in b"ITE":
            raise PeerViolation("a malformed ReadyForQuery", Side.SERVER)
        head = self._head()
        if head.kind > SYNC:
            raise PeerViolation("a ReadyForQuery before the replies that are expected", Side.SERVER)
        if head.denial is not None:
            raise PeerViolation("the server accepted what was put in the place of a denied operation", Side.SERVER)
        queue = self._queue
        queue.popleft()
        while queue and queue[0].kind == COPY_END:
            queue.popleft()
        self._copying = False
        if head.kind == QUERY:
            self._finish(head, out)
        if status == 0x49 and self._portals:
            self._portals = {}
            self._expect_anew()
        if self._unsettled and not self._queue:
            self._unsettled = False
            self._plain = self._codec == "utf-8" and self._conforming

    def _complete(self, tag: str, out: list[Command]) -> None:
        head = self._head()
        if head.kind == QUERY:
            if head.denial is not None:
                raise PeerViolation("the server ran what was put in the place of a denied operation", Side.SERVER)
            head.tag = tag
            head.plan = None
        else:
            self._pop(EXECUTE).tag = tag
            self._finish(head, out)
        self._copying = False
        if tag in ("DEALLOCATE ALL", "DISCARD ALL"):
            self._statements = {}
            self._expect_anew()
        elif head.deallocates and tag == "DEALLOCATE":
            self._statements.pop(head.deallocates, None)
            self._expect_anew()

    def _failed(self, body: bytes, out: list[Command]) -> bytes | None:
        """ErrorResponse: what to send in its place, if it has to be another."""
        try:
            fields = messages.response_fields(body)
        except Malformed as error:
            raise PeerViolation(str(error), Side.SERVER) from None
        queue = self._queue
        while queue and queue[0].kind == COPY_END:
            queue.popleft()
        severity = fields.get("V", fields.get("S", b""))
        if not queue or severity in (b"FATAL", b"PANIC"):
            return None
        text = f"{fields.get('C', b'').decode('ascii', 'replace')} {fields.get('M', b'').decode('utf-8', 'replace')}"
        replacement = None
        head = queue[0]
        failed = head
        if head.hidden:
            # what it stood in front of fails with it
            failed = next((entry for entry in queue if not entry.hidden), head)
        if head.denial is not None:
            message, hint = head.denial
            head.denial = None
            text = f"42501 {message}"
            replacement = messages.error("42501", message, hint)
        failed.error = failed.error or text
        if head.kind <= SYNC:
            return replacement
        while queue and queue[0].kind != SYNC:
            entry = queue.popleft()
            if entry.ask:
                entry.error = entry.error or NOT_RUN
                self._finish(entry, out)
        self._skipping = not queue
        self._rows = 0
        self._expect_anew()
        return replacement

    def _row_plan(self) -> Plan | None:
        """What is known of the columns of the row that is coming."""
        head = self._head()
        if head.kind == QUERY:
            return head.plan
        if head.kind == EXECUTE and head.portal is not None:
            return head.portal.plan
        raise PeerViolation("a row that nothing asked for", Side.SERVER)

    def _columns(self, head: Expected, body: bytes | None) -> bool:
        """RowDescription, or NoData (None): remembers the columns; True when the reply is not the client's."""
        catalog = self._catalog
        plan = NOTHING
        if catalog is not None and body is not None:
            try:
                plan = catalog.plan(body)
            except CatalogChanged as change:
                raise _Unshowable("55000", f"the catalog changed: {change}", RECONNECT_HINT) from None
            if plan.binary:
                raise _Unshowable("42501", f"masked column `{plan.binary[0]}` would be sent in binary format", BINARY_HINT)
        if head.kind == QUERY and body is not None:
            if head.denial is not None:
                raise PeerViolation("the server ran what was put in the place of a denied operation", Side.SERVER)
            head.plan = plan
            if plan.labels:
                head.labels = tuple(dict.fromkeys(head.labels + plan.labels))
            return False
        if head.kind == DESCRIBE_STATEMENT:
            if head.statement is not None:
                head.statement.plan = plan
        elif head.kind == DESCRIBE_PORTAL:
            if head.portal is not None:
                head.portal.plan = plan
        else:
            raise PeerViolation("a row description that nothing asked for", Side.SERVER)
        self._queue.popleft()
        return head.hidden

    def _columns_outstanding(self) -> bool:
        return any(entry.kind == DESCRIBE_STATEMENT and entry.hidden for entry in self._queue)

    def _reply_to_statement(self, kind: int) -> Expected:
        head = self._head()
        if head.denial is not None or (head.kind != QUERY and head.kind != EXECUTE):
            raise PeerViolation(f"message `{chr(kind)}` that nothing asked for", Side.SERVER)
        return head

    def _start_copy(self) -> None:
        """The server reads copied data: a Sync or Flush behind the statement is swallowed, up to the end of the copy."""
        head = self._reply_to_statement(0x47)
        queue = self._queue
        queue.popleft()
        while queue and queue[0].kind == SYNC:
            queue.popleft()
        self._copying = not (queue and queue[0].kind == COPY_END)
        self._sync_in_copy = False
        queue.appendleft(head)

    def _parameter(self, data: bytes, start: int, stop: int) -> str:
        """ParameterStatus: follows how the server reads text. Returns why the session cannot go on, or nothing."""
        name, start = messages.read_cstring(data, start, stop)
        value, _ = messages.read_cstring(data, start, stop)
        if name == b"client_encoding":
            shown = value.decode("ascii", "replace")
            codec = encoding_codec(shown)
            if codec is None:
                return f"client encoding `{shown[:64]}` does not pass the gateway"
            self._codec = codec
        elif name == b"standard_conforming_strings":
            self._conforming = value == b"on"
        else:
            return ""
        self._plain = self._codec == "utf-8" and self._conforming and not self._unsettled
        return ""

    # --- saying something ourselves -----------------------------------------------------------------------------------

    @property
    def between_messages(self) -> bool:
        """Whether a message of ours can be put into what the client reads now."""
        return not self._reply_through

    def notice(self, message: str, hint: str) -> list[Command]:
        out: list[Command] = []
        if len(self._notices) < 16:
            self._notices.append(messages.notice(message, hint))
        self._flush_notices(out)
        return out

    def _flush_notices(self, out: list[Command]) -> None:
        if self._notices and not self._reply_through and not self.closed:
            out.append(Send(Side.CLIENT, b"".join(self._notices)))
            self._notices.clear()

    def farewell(self, code: str, message: str, hint: str) -> list[Command]:
        return [] if self.closed else self._fatal([], code, message, hint)

    def abandon(self, reason: str) -> list[Command]:
        """The end without a word: closes, and says of each operation on its way that it has no outcome."""
        return [] if self.closed else self._close([], reason)

    def _fatal(self, out: list[Command], code: str, message: str, hint: str = "") -> list[Command]:
        if self.between_messages:
            out.append(Send(Side.CLIENT, messages.error(code, message, hint, severity="FATAL")))
        return self._close(out, message)

    def _fatal_reply(
        self, pieces: list[bytes], rest: bytes, out: list[Command], code: str, message: str, hint: str = ""
    ) -> list[Command]:
        """Ends the session in the middle of the server's bytes: what came before goes out, and nothing after."""
        before = b"".join(pieces) + rest
        if before:
            out.insert(0, Send(Side.CLIENT, before))
        return self._fatal(out, code, message, hint)

    def _close(self, out: list[Command], reason: str) -> list[Command]:
        for entry in self._queue:
            if entry.ask:
                entry.error = entry.error or f"no outcome: {reason}"
                self._finish(entry, out)
        self._queue.clear()
        self.closed = True
        self._asked = None
        self._awaits_columns = self._congested = False
        self._inbox = b""
        self._kept = bytearray()
        self._reply_kept = bytearray()
        out.append(Close(reason))
        return out
