"""What the server still owes: the queue of expected replies, and what names stand for before and after they come.

Every message that was passed on has its entry, so every reply belongs to the head:

    client message      reply, in this order                     effect, once the reply is there
    Query               (T? D* C | I | G/H … C)*  [E]  Z         portals end with the transaction
    Parse               1                                        the name stands for the text
    Bind                2                                        the portal stands for the statement
    Describe S / P      t, (T | n)   /   T | n                   columns of the statement / of the portal
    Execute             D* (C | I | s)  or  G/H … C              -
    Close               3                                        the name stands for nothing
    Sync                [E]  Z                                   portals end with the transaction
    CopyDone, CopyFail  none: a mark, up to which a copy swallows Sync
    Flush, CopyData     none: no entry

An error in reply to Query or Sync leaves the head in place, since Z follows. An error in reply to any other message
takes all entries up to the next Sync with it: the server skips those messages, and until a Sync comes we skip them
as well (`skipping`). A copy from the client swallows the Syncs that follow its Execute.

What a name stands for is known twice: confirmed, by replies, and expected, by what was sent. An Execute is judged
by what is expected since the last Sync: an error in between means that the server skips it, and what was expected is
made anew. What is expected from before that Sync could still be skipped while the Execute is not, so such a name is
`uncertain` until the replies are there. A name that SQL may have taken away stands for nothing that can be judged.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Final

import msgspec

from proxy.protocols.base import PeerViolation, Side
from proxy.protocols.postgres.columns import Plan
from proxy.protocols.postgres.operations import Described, refuse

QUERY: Final = 0
SYNC: Final = 1
PARSE: Final = 2
BIND: Final = 3
DESCRIBE_STATEMENT: Final = 4
DESCRIBE_PORTAL: Final = 5
EXECUTE: Final = 6
CLOSE: Final = 7
COPY_END: Final = 8

_NAMING = frozenset({PARSE, BIND, CLOSE})
"""What changes the meaning of names."""
TAINTED = "SQL may have deallocated its name, so it may stand for another statement"
_WORDS = ("Query", "Sync", "Parse", "Bind", "Describe", "Describe", "Execute", "Close", "CopyDone")


class Statement(msgspec.Struct):
    """A prepared statement: what its Execute will be asked as, and its columns once they are known. `size` is its
    text's."""

    size: int
    execution: Described
    plan: Plan | None = None


class Portal(msgspec.Struct):
    """A bound portal; `statement` is None when no Parse of this session prepared it."""

    statement: Statement | None
    plan: Plan | None = None


class Expected(msgspec.Struct):
    """The reply that one message will have. `ask` is the operation's id, or 0; `denial` is our code, message and hint
    while the server's error for them has not come; `hidden` replies are not the client's."""

    kind: int
    ask: int = 0
    denial: tuple[str, str, str] | None = None
    hidden: bool = False
    name: bytes = b""
    statement: Statement | None = None
    portal: Portal | None = None
    deallocates: frozenset[bytes] = frozenset()
    tag: str = ""
    error: str = ""
    plan: Plan | None = None
    labels: tuple[str, ...] = ()


class Pipeline:
    """The queue and the names of one session."""

    def __init__(self) -> None:
        self.queue: deque[Expected] = deque()
        self.skipping = False
        self.copying = False
        self._syncs = 0
        self.statements: dict[bytes, Statement] = {}
        self.portals: dict[bytes, Portal] = {}
        self.prepared_bytes = 0
        self._confirmed_statements: dict[bytes, Statement] = {}
        self._confirmed_portals: dict[bytes, Portal] = {}

    # --- what was sent ------------------------------------------------------------------------------------------------

    def expect(self, entry: Expected) -> None:
        """A message was passed on; `statements` and `portals` are what they will be if nothing fails before it."""
        self.queue.append(entry)
        if entry.kind in _NAMING:
            self._apply(entry)

    def _apply(self, entry: Expected) -> None:
        if entry.kind == BIND:
            if entry.portal is not None:
                self.portals[entry.name] = entry.portal
        elif entry.kind == PARSE:
            if entry.statement is not None:
                replaced = self.statements.get(entry.name)
                self.statements[entry.name] = entry.statement
                self.prepared_bytes += entry.statement.size - (replaced.size if replaced is not None else 0)
        elif entry.kind == CLOSE:
            if entry.statement is not None:
                gone = self.statements.pop(entry.name, None)
                self.prepared_bytes -= gone.size if gone is not None else 0
            elif entry.portal is not None:
                self.portals.pop(entry.name, None)

    def _expect_anew(self) -> None:
        """After entries were dropped or names ended: what is confirmed, and what is still on its way."""
        self.statements = dict(self._confirmed_statements)
        self.prepared_bytes = sum(statement.size for statement in self.statements.values())
        self._expect_portals_anew()
        for entry in self.queue:
            if entry.portal is None:
                self._apply(entry)

    def _expect_portals_anew(self) -> None:
        self.portals = dict(self._confirmed_portals)
        for entry in self.queue:
            if entry.portal is not None:
                self._apply(entry)

    def sync(self) -> None:
        """A Sync was passed on."""
        self.skipping = False
        self._syncs += 1
        self.queue.append(Expected(SYNC))

    def uncertain(self, name: bytes, *, portal: bool) -> bool:
        """Whether what the name stands for hangs on a reply to a message from before the last Sync."""
        if not self._syncs:
            return False
        since = True
        for entry in reversed(self.queue):
            if entry.kind == SYNC:
                since = False
            elif since and entry.denial is not None and entry.kind != QUERY:
                # it fails, so nothing that hangs on the name runs before the next Sync
                return False
            elif entry.name == name and entry.kind in _NAMING:
                about = entry.portal if portal else entry.statement
                if about is not None:
                    return not since
        return False

    def taint(self, names: frozenset[bytes]) -> None:
        """SQL that may take these names away (the empty one: all) was passed on: they can come to stand for others."""
        for statements in (self._confirmed_statements, self.statements):
            for name in statements if b"" in names else names & statements.keys():
                statements[name].execution = refuse(statements[name].execution, TAINTED)

    def end_copy(self) -> None:
        """The client ended the copy that it is in, or will be in."""
        self.copying = False
        if self.queue:
            self.queue.append(Expected(COPY_END))

    def prepared_here(self, names: Iterable[bytes]) -> bytes:
        """One of the names that a Parse of this session prepared, or may have; empty when there is none."""
        for name in names:
            if name in self._confirmed_statements:
                return name
            if any(entry.kind == PARSE and entry.name == name for entry in self.queue):
                return name
        return b""

    # --- what came back -----------------------------------------------------------------------------------------------

    def first(self) -> Expected | None:
        """The head, or None when nothing is owed."""
        queue = self.queue
        while queue and queue[0].kind == COPY_END:
            queue.popleft()
        return queue[0] if queue else None

    def head(self) -> Expected:
        """What the next reply belongs to. Raises `PeerViolation` when nothing was asked for."""
        queue = self.queue
        if queue and queue[0].kind != COPY_END:
            return queue[0]
        head = self.first()
        if head is None:
            raise PeerViolation("the server replied to nothing", Side.SERVER)
        return head

    def pop(self, kind: int) -> Expected:
        """Takes the head, whose reply is there. Raises `PeerViolation` when it is another, or was to fail."""
        head = self.head()
        if head.kind != kind:
            raise PeerViolation(f"the server replied to {_WORDS[kind]} where {_WORDS[head.kind]} is next", Side.SERVER)
        if head.denial is not None:
            self.require_allowed(head)
        return self.queue.popleft()

    def require_allowed(self, head: Expected) -> None:
        if head.denial is not None:
            raise PeerViolation("the server accepted what was put in the place of a denied operation", Side.SERVER)

    def confirm(self, entry: Expected) -> None:
        """The reply to a Parse, Bind or Close: its effect holds."""
        if entry.kind == BIND:
            if entry.portal is not None:
                self._confirmed_portals[entry.name] = entry.portal
        elif entry.kind == PARSE:
            if entry.statement is not None:
                self._confirmed_statements[entry.name] = entry.statement
        elif entry.statement is not None:
            self._confirmed_statements.pop(entry.name, None)
        elif entry.portal is not None:
            self._confirmed_portals.pop(entry.name, None)

    def pop_ready(self, idle: bool) -> Expected:
        """Takes the Query or Sync whose ReadyForQuery is there; `idle` says that no transaction is open."""
        head = self.head()
        if head.kind > SYNC:
            raise PeerViolation(f"the server is ready where the reply to {_WORDS[head.kind]} is next", Side.SERVER)
        self.require_allowed(head)
        queue = self.queue
        queue.popleft()
        self._syncs -= head.kind == SYNC
        if queue:
            self.first()
        self.copying = False
        if idle and self._confirmed_portals:
            self._confirmed_portals = {}
            self._expect_portals_anew()
        return head

    def skip(self) -> list[Expected]:
        """The message at the head failed: takes it and all that the server skips, up to the next Sync."""
        queue = self.queue
        dropped = []
        while queue and queue[0].kind != SYNC:
            dropped.append(queue.popleft())
        self.skipping = not queue
        self._expect_anew()
        return dropped

    def start_copy(self) -> None:
        """The server reads copied data for the statement at the head: Syncs behind it are swallowed, up to the
        copy's end."""
        queue = self.queue
        head = queue.popleft()
        while queue and queue[0].kind == SYNC:
            queue.popleft()
            self._syncs -= 1
        self.copying = not (queue and queue[0].kind == COPY_END)
        queue.appendleft(head)

    def deallocated(self, tag: str, names: frozenset[bytes]) -> None:
        """SQL took names away. Where it is not certain which, they stay known, and tainted."""
        if tag in ("DEALLOCATE ALL", "DISCARD ALL"):
            self._confirmed_statements = {}
        elif tag == "DEALLOCATE" and len(names) == 1:
            for name in names:
                self._confirmed_statements.pop(name, None)
        else:
            return
        self._expect_anew()
