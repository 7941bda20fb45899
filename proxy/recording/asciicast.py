"""A recorded terminal as asciicast v2 (docs.asciinema.org/manual/asciicast/v2), for `asciinema play`.

One line of JSON for the header, then one for each thing that went through: `o` output, `i` input, `r` the terminal's
size. Times count from the ruling. A command without a terminal ends its lines with a bare newline, which a player would
show as a staircase; it gets the carriage return that its terminal would have put there.

Blind spots: output and errors are one stream, as on a screen; bytes that are no UTF-8 become replacement characters.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator

from proxy.recording.reader import Entry
from proxy.recording.records import Observed, Ruled

COLUMNS = 80
ROWS = 24
"""What a terminal has whose size was never told."""

_CODES = {"stdout": "o", "stderr": "o", "stdin": "i", "resize": "r"}


class NothingRecorded(Exception):
    """The operation is not in the recording, or nothing was observed of it. The message says which."""


def cast(entries: Iterable[Entry], operation: int) -> Iterator[str]:
    """The lines, without newlines. Raises `NothingRecorded`, and what reading raises."""
    ruled: Ruled | None = None
    observed: list[Observed] = []
    for entry in entries:
        record = entry.record
        if isinstance(record, Ruled) and record.op == operation:
            ruled = record
        elif isinstance(record, Observed) and record.op == operation:
            observed.append(record)
    if ruled is None:
        raise NothingRecorded(f"operation `{operation}` is not in the recording: `hopgate replay` tells what is")
    if not observed:
        raise NothingRecorded(f"operation `{operation}` (`{ruled.text}`) has nothing to play: it is told as text")
    sizes = [size for size in (_size(record) for record in observed if record.channel == "resize") if size]
    columns, rows = sizes[0] if sizes else (COLUMNS, ROWS)
    header = {
        "version": 2,
        "width": columns,
        "height": rows,
        "timestamp": ruled.at_us // 1_000_000,
        "title": ruled.text,
    }
    yield json.dumps(header, ensure_ascii=False)
    decoders = {channel: codecs.getincrementaldecoder("utf-8")("replace") for channel in _CODES}
    passed_us = 0
    for record in observed:
        code = _CODES.get(record.channel)
        if code is None:
            continue
        # the wall clock may have been set back
        passed_us = max(passed_us, record.at_us - ruled.at_us)
        text = decoders[record.channel].decode(record.data)
        if code == "o" and not sizes:
            text = text.replace("\n", "\r\n")
        if text:
            yield json.dumps([round(passed_us / 1_000_000, 6), code, text], ensure_ascii=False)


def _size(record: Observed) -> tuple[int, int] | None:
    columns, _, rows = record.data.partition(b"x")
    if columns.isdigit() and rows.isdigit() and 0 < int(columns) < 1 << 16 and 0 < int(rows) < 1 << 16:
        return int(columns), int(rows)
    return None
