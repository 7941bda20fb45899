"""JSON values found in a stream of bytes without decoding them: where one ends, whatever is in it.

`Values` takes chunks and gives whole values, one after another; it looks at every byte once, keeps at most one value
and what came behind it, and never recurses. It finds ends and judges nothing: whether a value is JSON is for who
decodes it.
"""

from __future__ import annotations

import re

MAX_VALUE = 16 * 1024 * 1024
"""Bytes of one value: an API server's objects are below 2 MiB, so this is far beyond what one can be."""

_SPACE = re.compile(rb"[ \t\r\n]*")
_BRACKETS = re.compile(rb'[{}\[\]]|"[^"\\]*(?:\\.[^"\\]*)*(")?', re.DOTALL)
_STRING_END = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)
_SCALAR = re.compile(rb"[^\s,:{}\[\]\"]+")
_OPEN = frozenset(b"{[")
_QUOTE = ord('"')


class Oversized(Exception):
    """A value is longer than `MAX_VALUE`."""


class Values:
    """The unread bytes of a stream, and how far into its first value the search has come. `ended` is for whoever feeds
    it: no more will come. What was read is let go at once, since the next may be hours away."""

    __slots__ = ("_at", "_buffer", "_depth", "_in_string", "_start", "ended")

    def __init__(self) -> None:
        self.ended = False
        self._buffer = bytearray()
        self._start = 0
        self._at = 0  # everything from `_start` to here was searched
        self._depth = 0
        self._in_string = False

    def feed(self, data: bytes) -> None:
        if self._start:
            del self._buffer[: self._start]
            self._at -= self._start
            self._start = 0
        self._buffer += data

    def peek(self) -> int:
        """The first byte that is no white space, or -1 when there is none yet."""
        space = _SPACE.match(self._buffer, self._start)
        assert space is not None
        if space.end() > self._start:
            self._start = space.end()
            self._at = max(self._at, self._start)
        if self._start < len(self._buffer):
            return self._buffer[self._start]
        self._buffer.clear()
        self._start = self._at = 0
        return -1

    def take(self, count: int) -> None:
        """Drops bytes that `peek` showed."""
        self._start += count
        self._at = self._start

    def value(self) -> bytes | None:
        """The next value, or None while it is not all there. A number counts as ended where something else follows.
        Raises `Oversized`."""
        first = self.peek()
        if first < 0:
            return None
        if first in _OPEN or first == _QUOTE:
            end = self._end_of_nested()
        else:
            scalar = _SCALAR.match(self._buffer, self._start)
            stop = scalar.end() if scalar else self._start + 1
            end = stop if stop < len(self._buffer) else -1
        if (len(self._buffer) if end < 0 else end) - self._start > MAX_VALUE:
            raise Oversized
        if end < 0:
            return None
        value = bytes(memoryview(self._buffer)[self._start : end])
        self._start = self._at = end
        return value

    @property
    def unread(self) -> int:
        return len(self._buffer) - self._start

    def up_to_last(self, mark: bytes, limit: int) -> bytes | None:
        """The bytes before the last `mark` among so many, left unread; None where there is none, or where a value is
        half searched."""
        if self._at != self._start:
            return None
        end = self._buffer.rfind(mark, self._start, self._start + limit)
        return bytes(memoryview(self._buffer)[self._start : end]) if end > self._start else None

    def _end_of_nested(self) -> int:
        buffer, size, depth = self._buffer, len(self._buffer), self._depth
        while self._at < size:
            if self._in_string:
                inside = _STRING_END.match(buffer, self._at)
                assert inside is not None
                self._at = inside.end()
                if self._at == size or buffer[self._at] != _QUOTE:
                    # at the end of what is there, perhaps between a backslash and what it escapes
                    break
                self._at += 1
                self._in_string = False
                if depth == 0:
                    return self._at
            for token in _BRACKETS.finditer(buffer, self._at):
                end = token.end()
                first = buffer[token.start()]
                if first == _QUOTE:
                    if not token.lastindex:
                        self._in_string = True
                        self._at = end
                        break
                    if depth == 0:
                        self._at = end
                        return end
                elif first in _OPEN:
                    depth += 1
                else:
                    depth -= 1
                    if depth <= 0:
                        self._at, self._depth = end, 0
                        return end
            else:
                self._at = size
        self._depth = depth
        return -1
