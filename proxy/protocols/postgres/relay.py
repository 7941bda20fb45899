"""The session after its login: operations out of the client's bytes, and the server's replies held against the
pipeline.

Both streams are passed on as they come. Of the client's messages those are kept that ask for something (Query, Parse,
Execute, FunctionCall) until they are ruled on; of the server's only those that say where the session stands.

    the client's side is    until
    open                    a message asks for something, or more is owed than `MAX_PENDING`
    asking                  the ruling
    awaiting columns        the hidden Describe is answered, or fails
    awaiting replies        a name is certain: it hangs on messages from before the last Sync
    congested               the server has replied to half of it
    skipping                Sync: an earlier message of the pipeline failed, and the server skips as we do
    ended                   the server closes; it still replies to what came before Terminate

A denied message is replaced by one that must fail, and the error that comes back by ours: order, transaction state
and the skipping are then the server's own. In sessions with masks the machine adds messages of its own, whose
replies the client does not see: `Describe` of the portal before each Execute, so that rows are masked by the
description that belongs to them; and `Describe` of the statement, with a wait for its reply, before a Bind that
asks for binary results.

Blind spots: Bind's parameters and copied data are not looked into. COPY has no row description: in a session with
masks the policy has to deny copies of what is masked.
"""

from __future__ import annotations

import enum
import struct
from typing import Final

from proxy.model import Decision, OperationKind, Ruling
from proxy.protocols.base import AskRuling, Buffer, Close, Command, Completed, PeerViolation, Send, Side
from proxy.protocols.postgres import messages, operations
from proxy.protocols.postgres.columns import NOTHING, Catalog, CatalogChanged, Plan, mask_rows
from proxy.protocols.postgres.messages import MAX_FRAME, MAX_NAME, MAX_PENDING, MAX_STATEMENT, Malformed
from proxy.protocols.postgres.operations import Described
from proxy.protocols.postgres.pipeline import (
    BIND,
    CLOSE,
    DESCRIBE_PORTAL,
    DESCRIBE_STATEMENT,
    EXECUTE,
    PARSE,
    QUERY,
    SYNC,
    Expected,
    Pipeline,
    Portal,
    Statement,
)

ENDED = "the client ended the session"
NOT_RUN = "not run: an earlier message of the pipeline failed"
BINARY_HINT = "ask for the text format: masks work on text only"
RECONNECT_HINT = "connect again: the masks of a session are made from the catalog as it was at login"

MAX_NOTICES = 16
"""Notices of ours that wait for the end of the message that is being streamed."""

_Q: Final = ord("Q")
_P: Final = ord("P")
_B: Final = ord("B")
_E: Final = ord("E")
_D: Final = ord("D")
_C: Final = ord("C")
_S: Final = ord("S")
_H: Final = ord("H")
_X: Final = ord("X")
_F: Final = ord("F")
_d: Final = ord("d")
_c: Final = ord("c")
_f: Final = ord("f")
_N: Final = ord("N")
_T: Final = ord("T")
_Z: Final = ord("Z")

_CLIENT_LIMITS = {
    **dict.fromkeys((_Q, _P, _F), MAX_STATEMENT),
    **dict.fromkeys((_B, _d, _f), MAX_FRAME),
    **dict.fromkeys((_E, _D, _C, _S, _H, _X, _c), messages.MAX_CONTROL),
}
"""The client's message types, and the length of each."""

_length = struct.Struct(">I").unpack_from
# looked up once: members of an enum cost as much as a function call
_ALLOW: Final = Decision.ALLOW
_CLIENT: Final = Side.CLIENT
_SERVER: Final = Side.SERVER


class _Step(enum.Enum):
    """What becomes of one client message: it goes on, it is dropped, or the scan stops before it."""

    PASS = enum.auto()
    DROP = enum.auto()
    STOP = enum.auto()


_PASS, _DROP, _STOP = _Step


class _Fatal(Exception):
    """The session cannot go on, through nobody's breach of the protocol. The message is for the client."""

    def __init__(self, code: str, message: str, hint: str = "") -> None:
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
        self._pipeline = Pipeline()
        self._text = operations.TextReader(codec, conforming)
        # the client's side: bytes [approved, position) of the inbox may go on, the rest is not looked at yet
        self._inbox = b""
        self._position = 0
        self._approved = 0
        self._kept = bytearray()
        self._needed = 0
        self._through = 0
        self._through_drops = False
        self._streams_up = frozenset((_d, _f, _B) if catalog is None else (_d, _f))
        self._limits = _CLIENT_LIMITS if catalog is None else _CLIENT_LIMITS | {_B: MAX_STATEMENT}
        self._halts = frozenset(b"QEPF" if catalog is None else b"QEPFB")
        self._last_ask = 0
        self._asked: AskRuling | None = None
        self._asked_entry = Expected(QUERY)
        self._asked_stop = 0
        self._asked_changes_lexer = False
        self._awaits_columns = False
        self._awaits_replies = False
        self._congested = False
        self._sync_in_copy = False
        self._ended = False
        # the server's side
        self._streams_down = frozenset(b"dNA" if catalog is None else b"d")
        self._reply_kept = bytearray()
        self._reply_needed = 0
        self._reply_through = 0
        self._rows = 0
        self._notices: list[bytes] = []

    # --- the client's side --------------------------------------------------------------------------------------------

    @property
    def unanswered(self) -> bool:
        return self._asked is not None or self._awaits_columns or self._awaits_replies or self._congested

    def receive_client(self, data: Buffer) -> list[Command]:
        if type(data) is not bytes:
            data = bytes(data)
        if self.closed or self._ended:
            return []
        start = 0
        if self._through:
            if len(data) <= self._through:
                self._through -= len(data)
                return [] if self._through_drops else [Send(Side.SERVER, data)]
            if self._through_drops:
                data = data[self._through :]
            else:
                start = self._through
            self._through = 0
        elif self.unanswered:
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
        if self._pipeline.skipping:
            out.append(Completed(ask.id, error=NOT_RUN))
            self._approved = stop
        elif ruling.decision is _ALLOW and not ask.operation.unclassified:
            if entry.kind == EXECUTE and self._catalog is not None:
                out.append(Send(Side.SERVER, messages.describe(b"P", entry.name)))
                self._pipeline.expect(Expected(DESCRIBE_PORTAL, hidden=True, portal=entry.portal))
            if entry.kind != PARSE:
                if self._asked_changes_lexer:
                    self._text.unsettle()
                if entry.deallocates:
                    self._pipeline.taint(entry.deallocates)
            self._pipeline.expect(entry)
        else:
            out.append(Send(Side.SERVER, self._failing(entry)))
            message = ruling.message or f"denied: `{ask.operation.unclassified or 'by the gateway'}`"
            hint = BINARY_HINT if entry.kind == BIND else ruling.hint
            entry.denial = (_denial_code(ask, ruling), message, hint)
            # what fails has no effect on names
            entry.statement = entry.portal = None
            self._pipeline.expect(entry)
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

    def _scan(self, out: list[Command]) -> list[Command]:
        """Goes through the inbox from where it stopped, up to a question or the end of the bytes."""
        data = self._inbox
        position = self._position
        approved = self._approved
        queue = self._pipeline.queue
        limits = self._limits
        halts = self._halts
        while True:
            end = len(data)
            needed = 5
            if end - position >= 5:
                kind = data[position]
                size = _length(data, position + 1)[0]
                stop = position + 1 + size
                limit = limits.get(kind)
                if limit is None or size < 4:
                    raise PeerViolation(f"message type `0x{kind:02x}` with length `{size}`", Side.CLIENT)
                if size > limit:
                    self._flush(out, data, approved, position)
                    return self._fatal(out, "54000", f"message `{chr(kind)}` of `{size}` bytes exceeds the limit")
                if len(queue) >= MAX_PENDING:
                    self._flush(out, data, approved, position)
                    self._inbox, self._position, self._approved = data, position, position
                    self._congested = True
                    return out
                if stop > end and kind not in self._streams_up:
                    needed = size + 1
                elif kind == _B and stop > end and not self._names_are_there(data, position + 5):
                    needed = end - position + 1
                else:
                    if kind in halts:
                        # these may stop the scan, or send something in front of themselves
                        if position > approved:
                            self._flush(out, data, approved, position)
                            approved = position
                        self._inbox, self._position, self._approved = data, position, position
                    try:
                        step = self._take(out, kind, data, position, stop)
                    except _Fatal as fatal:
                        self._flush(out, data, approved, position)
                        return self._fatal(out, fatal.code, str(fatal), fatal.hint)
                    except Malformed as error:
                        raise PeerViolation(f"message `{chr(kind)}`: {error}", Side.CLIENT) from None
                    if step is _STOP:
                        if kind not in halts:
                            self._flush(out, data, approved, position)
                            self._inbox, self._position, self._approved = data, position, position
                        return out
                    if kind == _X:
                        self._flush(out, data, approved, stop)
                        return self._end(out)
                    if step is _DROP:
                        self._flush(out, data, approved, position)
                        approved = min(stop, end)
                    if stop > end:
                        self._flush(out, data, approved, end)
                        self._through = stop - end
                        self._through_drops = step is _DROP
                        self._inbox = b""
                        return out
                    position = stop
                    continue
            self._flush(out, data, approved, position)
            if self._kept:
                # what came while the scan stood still
                data = data[position:] + self._kept
                self._kept = bytearray()
                position = approved = 0
                if len(data) >= needed:
                    continue
            if position < len(data):
                self._kept = bytearray(data[position:])
                self._needed = needed
            self._inbox = b""
            return out

    def _flush(self, out: list[Command], data: bytes, start: int, stop: int) -> None:
        if stop > start:
            out.append(Send(_SERVER, data if stop - start == len(data) else data[start:stop]))

    def _take(self, out: list[Command], kind: int, data: bytes, position: int, stop: int) -> _Step:
        """Decides on one client message, which is whole unless it is streamed. Raises `_Fatal` and `Malformed`."""
        pipeline = self._pipeline
        if kind == _S:
            if pipeline.copying:
                # the server would read and ignore it
                self._sync_in_copy = True
                return _DROP
            pipeline.sync()
            return _PASS
        if kind == _X:
            return _PASS
        if pipeline.skipping:
            return _DROP
        if kind == _B:
            return self._bind(out, data, position, stop)
        if kind in b"dH":
            return _PASS
        if kind in b"DC":
            what = data[position + 5 : position + 6]
            name = self._name(data, position + 6, stop)[0]
            statement = pipeline.statements.get(name) if what == b"S" else None
            portal = pipeline.portals.get(name) if what == b"P" else None
            if what not in (b"S", b"P"):
                raise Malformed("it is about neither a statement nor a portal")
            described = DESCRIBE_STATEMENT if what == b"S" else DESCRIBE_PORTAL
            pipeline.expect(Expected(described if kind == _D else CLOSE, name=name, statement=statement, portal=portal))
            return _PASS
        if kind in b"cf":
            pipeline.end_copy()
            self._sync_in_copy = False
            return _PASS
        return self._ask(out, kind, data, position + 5, stop)

    def _name(self, data: bytes, start: int, stop: int) -> tuple[bytes, int]:
        """A statement's or portal's name, and where it ends. Raises `_Fatal` for one that can stand for another."""
        if start < stop and not data[start]:
            return b"", start + 1
        end = data.find(0, start, min(stop, start + MAX_NAME + 1, len(data)))
        if end < 0 and stop - start <= MAX_NAME:
            raise Malformed("a name does not end")
        name = data[start:end]
        if end < 0 or not name.isascii():
            raise _Fatal(
                "42622",
                f"a statement's or portal's name is longer than `{MAX_NAME}` bytes or not ASCII",
                "such names can stand for another at the server",
            )
        return name, end + 1

    def _names_are_there(self, data: bytes, start: int) -> bool:
        """Whether both names of a Bind that has not fully come can be judged."""
        first = data.find(0, start, start + MAX_NAME + 1)
        if first < 0:
            return len(data) - start > MAX_NAME
        return data.find(0, first + 1, first + MAX_NAME + 2) >= 0 or len(data) - first - 1 > MAX_NAME

    def _bind(self, out: list[Command], data: bytes, position: int, stop: int) -> _Step:
        pipeline = self._pipeline
        name, behind = self._name(data, position + 5, stop)
        prepared, behind = self._name(data, behind, stop)
        if pipeline.uncertain(prepared, portal=False):
            self._awaits_replies = True
            return _STOP
        statement = pipeline.statements.get(prepared)
        if self._catalog is not None and statement is not None:
            formats = messages.result_formats(data, behind, stop)
            if any(formats):
                if statement.plan is None:
                    out.append(Send(Side.SERVER, messages.describe(b"S", prepared) + messages.FLUSH))
                    pipeline.expect(Expected(DESCRIBE_STATEMENT, hidden=True, name=prepared, statement=statement))
                    self._awaits_columns = True
                    return _STOP
                column = _binary_mask(statement.plan, formats)
                if column:
                    reason = f"masked column `{column}` is asked for in binary format"
                    entry = Expected(BIND, name=name)
                    return self._pose(out, operations.refuse(statement.execution, reason), entry, stop)
        if len(pipeline.portals) >= messages.MAX_PREPARED:
            raise _Fatal("54000", "too many portals in one transaction", "close those that are no longer used")
        pipeline.expect(Expected(BIND, name=name, portal=Portal(statement)))
        return _PASS

    # --- asking -------------------------------------------------------------------------------------------------------

    def _ask(self, out: list[Command], kind: int, data: bytes, start: int, stop: int) -> _Step:
        """Asks about a Query, Parse, Execute or FunctionCall."""
        pipeline = self._pipeline
        if kind == _Q:
            if data.find(0, start, stop) != stop - 1:
                raise Malformed("its text does not end with it")
            described = self._text.describe(OperationKind.QUERY, operations.QUERIES, data[start : stop - 1])
            entry = Expected(QUERY)
        elif kind == _E:
            name = self._name(data, start, stop)[0]
            if pipeline.uncertain(name, portal=True):
                self._awaits_replies = True
                return _STOP
            portal = pipeline.portals.get(name)
            described = self._execution(name, portal)
            entry = Expected(EXECUTE, name=name, portal=portal)
        elif kind == _P:
            name, start = self._name(data, start, stop)
            text = messages.read_cstring(data, start, stop)[0]
            if (
                len(pipeline.statements) >= messages.MAX_PREPARED
                or pipeline.prepared_bytes + len(text) > messages.MAX_PREPARED_BYTES
            ):
                raise _Fatal("54000", "too many prepared statements", "close those that are no longer used")
            described = self._text.describe(OperationKind.PARSE, operations.PARSES, text)
            execution = self._text.describe(OperationKind.EXECUTE, operations.EXECUTIONS, text)
            entry = Expected(PARSE, name=name, statement=Statement(len(text), execution))
        else:
            oid = _length(data, start)[0] if stop - start >= 4 else 0
            reason = "a FunctionCall message names its function by OID only: call it in a SELECT"
            described = operations.unclassified(OperationKind.FUNCTION_CALL, f"function call by OID {oid}", reason)
            entry = Expected(QUERY)
        return self._pose(out, described, entry, stop)

    def _pose(self, out: list[Command], described: Described, entry: Expected, stop: int) -> _Step:
        if described.executes:
            name = self._pipeline.prepared_here(described.executes)
            if name:
                # its Execute message would be ruled on; this would pass that by
                shown = name.decode("utf-8", "replace")
                reason = f"`{shown}` was prepared by the protocol, so only the protocol may execute it"
                described = operations.refuse(described, reason)
        self._last_ask = entry.ask = self._last_ask + 1
        entry.deallocates = described.deallocates
        self._asked = AskRuling(entry.ask, described.operation)
        self._asked_changes_lexer = described.changes_lexer
        self._asked_stop = stop
        self._asked_entry = entry
        out.append(self._asked)
        return _STOP

    def _execution(self, name: bytes, portal: Portal | None) -> Described:
        if portal is not None and portal.statement is not None:
            return portal.statement.execution
        shown = name.decode("ascii")
        what = "was not bound by this session" if portal is None else "runs a statement that no Parse prepared"
        return operations.unclassified(
            OperationKind.EXECUTE, f"execute portal `{shown}`", f"the portal `{shown}` {what}"
        )

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
        out = []
        pieces: list[bytes] = []
        start = 0
        end = len(data)
        needed = 5
        streams = self._streams_down
        unmasked = self._catalog is None
        try:
            while end - position >= 5:
                kind = data[position]
                size = _length(data, position + 1)[0]
                stop = position + 1 + size
                replacement = None
                if kind == _D and (unmasked or not self._row_plan().masks):
                    # rows come by the thousand
                    while kind == _D:
                        if not 4 <= size <= MAX_FRAME:
                            raise Malformed(f"its length is `{size}`")
                        self._rows += 1
                        position += 1 + size
                        if end - position < 5:
                            break
                        kind = data[position]
                        size = _length(data, position + 1)[0]
                    if position > end:
                        self._reply_through = position - end
                        position = end
                    continue
                if kind == _D:
                    if not 6 <= size <= MAX_FRAME:
                        raise Malformed(f"its length is `{size}`")
                    if size > messages.MAX_MASKED_ROW:
                        raise _Fatal("54000", f"a row of `{size}` bytes is too large to be masked")
                    if stop > end:
                        needed = size + 1
                        break
                    pieces.append(data[start:position])
                    start, rows = mask_rows(data, position, end, self._row_plan(), pieces)
                    self._rows += rows
                    position = start
                    continue
                if kind in streams:
                    if not 4 <= size <= MAX_FRAME:
                        raise Malformed(f"its length is `{size}`")
                    self._rows += kind == _d
                    if stop > end:
                        self._reply_through = stop - end
                        position = end
                        break
                else:
                    if not 4 <= size <= messages.MAX_REPLY:
                        raise Malformed(f"its length is `{size}`")
                    if stop > end:
                        needed = size + 1
                        break
                    replacement = self._reply(out, kind, data, position + 5, stop)
                if replacement is not None:
                    pieces.append(data[start:position])
                    pieces.append(replacement)
                    start = stop
                position = stop
        except Malformed as error:
            raise PeerViolation(f"message `{chr(data[position])}`: {error}", Side.SERVER) from None
        except _Fatal as fatal:
            pieces.append(data[start:position])
            self._send_client(out, b"".join(pieces))
            return self._fatal(out, fatal.code, str(fatal), fatal.hint)
        if position < end:
            self._reply_kept = bytearray(data[position:])
            self._reply_needed = needed
        if pieces:
            pieces.append(data[start:position])
            self._send_client(out, b"".join(pieces))
        else:
            self._send_client(out, data if position == end else data[:position])
        if self._notices:
            self._flush_notices(out)
        if self._congested and len(self._pipeline.queue) <= MAX_PENDING // 2:
            self._congested = False
            return self._scan(out)
        if self._awaits_columns and not any(entry.hidden for entry in self._pipeline.queue):
            self._awaits_columns = False
            return self._scan(out)
        if self._awaits_replies:
            self._awaits_replies = False
            return self._scan(out)
        return out

    def _send_client(self, out: list[Command], data: bytes) -> None:
        """Puts the client's bytes before what is said about them."""
        if data:
            out.insert(0, Send(_CLIENT, data))

    def _reply(self, out: list[Command], kind: int, data: bytes, start: int, stop: int) -> bytes | None:
        """One whole message of the server, with its body; returns what the client gets instead, None for the
        message itself. Raises `_Fatal` and `Malformed`."""
        pipeline = self._pipeline
        if kind == 0x32:
            pipeline.confirm(pipeline.pop(BIND))
        elif kind == _C:
            self._complete(data[start : stop - 1].decode("ascii", "replace"), out)
        elif kind == _Z:
            if stop - start != 1 or data[start] not in b"ITE":
                raise Malformed("its status is unknown")
            head = pipeline.pop_ready(data[start] == 0x49)
            if head.kind == QUERY:
                self._finish(head, out)
            if not pipeline.queue:
                self._text.settle()
        elif kind == _T:
            return self._columns(data[start:stop] if self._catalog is not None else b"")
        elif kind == 0x31:
            entry = pipeline.pop(PARSE)
            pipeline.confirm(entry)
            out.append(Completed(entry.ask))
        elif kind == 0x33:
            pipeline.confirm(pipeline.pop(CLOSE))
        elif kind == ord("n"):
            return self._columns(None)
        elif kind == ord("t"):
            head = pipeline.head()
            if head.kind != DESCRIBE_STATEMENT:
                raise Malformed("nothing asked for it")
            return b"" if head.hidden else None
        elif kind == _E:
            return self._failed(data[start:stop], out)
        elif kind == _N:
            return messages.without_values(b"N", data[start:stop])
        elif kind == ord("s"):
            self._finish(pipeline.pop(EXECUTE), out)
        elif kind == ord("I"):
            if pipeline.head().kind == EXECUTE:
                self._finish(pipeline.pop(EXECUTE), out)
            else:
                self._running()
        elif kind in b"GW":
            self._running()
            pipeline.start_copy()
            self._sync_in_copy = False
        elif kind in b"Hc":
            self._running()
        elif kind == _S:
            name, start = messages.read_cstring(data, start, stop)
            trouble = self._text.report(name, messages.read_cstring(data, start, stop)[0])
            if trouble:
                raise _Fatal("0A000", trouble, "set client_encoding to UTF8, LATIN1 or SQL_ASCII")
        elif kind != ord("A"):
            raise Malformed("it has no place here")
        return None

    def _running(self) -> Expected:
        """The Query or Execute that the server's message is part of the reply to."""
        head = self._pipeline.head()
        self._pipeline.require_allowed(head)
        if head.kind != QUERY and head.kind != EXECUTE:
            raise Malformed("nothing asked for it")
        return head

    def _finish(self, entry: Expected, out: list[Command]) -> None:
        labels = entry.labels
        if entry.portal is not None and entry.portal.plan is not None:
            labels = entry.portal.plan.labels
        out.append(Completed(entry.ask, entry.tag, self._rows, entry.error, labels))
        self._rows = 0

    def _complete(self, tag: str, out: list[Command]) -> None:
        """CommandComplete: the end of an Execute, or of one statement of a Query."""
        head = self._running()
        head.tag = tag
        head.plan = None
        if head.kind == EXECUTE:
            self._finish(self._pipeline.queue.popleft(), out)
        self._pipeline.copying = False
        if tag[:2] == "DE" or tag[:2] == "DI":
            self._pipeline.deallocated(tag, head.deallocates)

    def _failed(self, body: bytes, out: list[Command]) -> bytes | None:
        """ErrorResponse: notes what failed with it; the client gets our words where the operation was denied."""
        pipeline = self._pipeline
        fields = messages.response_fields(body)
        replacement = messages.without_values(b"E", body) if self._catalog is not None else None
        head = pipeline.first()
        if head is None or fields.get("V", fields.get("S")) in (b"FATAL", b"PANIC"):
            return replacement
        if self._sync_in_copy and pipeline.copying:
            raise _Fatal("08P01", "a Sync came inside of a copy that failed: nobody can tell whether it counted")
        pipeline.copying = False
        text = f"{fields.get('C', b'').decode('ascii', 'replace')} {fields.get('M', b'').decode('utf-8', 'replace')}"
        if head.denial is not None:
            code, message, hint = head.denial
            head.denial = None
            text = f"{code} {message}"
            replacement = messages.error(code, message, hint)
        if head.kind <= SYNC:
            head.error = text
            return replacement
        for entry in pipeline.skip():
            if entry.ask:
                # what fails between operations (Bind, Describe) fails for the next one
                entry.error, text = text, NOT_RUN
                self._finish(entry, out)
        self._rows = 0
        return replacement

    def _row_plan(self) -> Plan:
        """What is known of the columns of the row that is coming, in a session with masks."""
        head = self._running()
        plan = head.plan if head.kind == QUERY else head.portal.plan if head.portal is not None else None
        if plan is None:
            raise _Fatal("55000", "the server sent a row whose columns are not known", RECONNECT_HINT)
        return plan

    def _columns(self, body: bytes | None) -> bytes | None:
        """RowDescription, or NoData (None): remembers the columns. Empty when the reply is not the client's."""
        head = self._pipeline.head()
        plan = NOTHING
        if self._catalog is not None and body is not None:
            try:
                plan = self._catalog.plan(body)
            except CatalogChanged as change:
                raise _Fatal("55000", f"the catalog changed: {change}", RECONNECT_HINT) from None
            if plan.binary:
                raise _Fatal("42501", f"masked column `{plan.binary[0]}` would be sent in binary format", BINARY_HINT)
        if head.kind == DESCRIBE_PORTAL:
            if head.portal is not None:
                head.portal.plan = plan
        elif head.kind == DESCRIBE_STATEMENT:
            if head.statement is not None:
                head.statement.plan = plan
        elif head.kind == QUERY and body is not None:
            self._pipeline.require_allowed(head)
            head.plan = plan
            if plan.labels:
                head.labels = tuple(dict.fromkeys(head.labels + plan.labels))
            return None
        else:
            raise Malformed("nothing asked for it")
        self._pipeline.queue.popleft()
        return b"" if head.hidden else None

    # --- saying something ourselves -----------------------------------------------------------------------------------

    def notice(self, message: str, hint: str) -> list[Command]:
        out: list[Command] = []
        if len(self._notices) < MAX_NOTICES:
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
        """The end without a word."""
        return [] if self.closed else self._close([], ENDED if self._ended else reason)

    def _end(self, out: list[Command]) -> list[Command]:
        """Terminate was passed on: what is owed still comes, and is recorded, before the server closes."""
        if self._pipeline.first() is None:
            return self._close(out, ENDED)
        self._ended = True
        self._inbox = b""
        self._kept = bytearray()
        return out

    def _fatal(self, out: list[Command], code: str, message: str, hint: str = "") -> list[Command]:
        if not self._reply_through:
            out.append(Send(Side.CLIENT, messages.error(code, message, hint, severity="FATAL")))
        return self._close(out, message)

    def _close(self, out: list[Command], reason: str) -> list[Command]:
        """Closes, and says of each operation on its way that its outcome is not known."""
        for entry in self._pipeline.queue:
            if entry.ask:
                entry.error = entry.error or f"no outcome: {reason}"
                self._finish(entry, out)
        self._pipeline.queue.clear()
        self.closed = True
        self._asked = None
        self._awaits_columns = self._awaits_replies = self._congested = False
        self._inbox = b""
        self._kept = bytearray()
        self._reply_kept = bytearray()
        out.append(Close(reason))
        return out


def _denial_code(ask: AskRuling, ruling: Ruling) -> str:
    """SQLSTATE: query_canceled, syntax_error or insufficient_privilege (PostgreSQL manual, appendix A)."""
    if ruling.cancelled:
        return "57014"
    return "42601" if ask.operation.ungrammatical else "42501"


def _binary_mask(plan: Plan, formats: tuple[int, ...]) -> str:
    """The first masked column that a Bind's result formats ask for in binary, or nothing."""
    for column, (index, _) in zip(plan.columns, plan.masks, strict=True):
        code = formats[0] if len(formats) == 1 else formats[index] if index < len(formats) else 0
        if code:
            return column
    return ""
