"""How verbs print: tables and lines on standard output. What agents chose is made visible first, never interpreted."""

from __future__ import annotations

import datetime
import os
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from proxy.recording.replay import visible

WIDE = 400
"""Columns when nobody looks: a program that reads our lines gets them whole."""


def console() -> Console:
    """Colours and the terminal's width where there is a terminal."""
    terminal = sys.stdout.isatty()
    width = None if terminal or "COLUMNS" in os.environ else WIDE
    return Console(width=width, highlight=False, emoji=False, soft_wrap=False)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints a plain table. The first column, what other verbs are told, is whole however narrow the terminal is."""
    drawn = Table(*columns, box=None, pad_edge=False, header_style="bold")
    drawn.columns[0].min_width = max((len(visible(str(row[0]))) for row in rows), default=0)
    for row in rows:
        drawn.add_row(*(Text(visible(str(cell))) for cell in row))
    console().print(drawn)


def moment(at_us: int) -> str:
    """UTC to the second; empty for 0."""
    if not at_us:
        return ""
    return f"{datetime.datetime.fromtimestamp(at_us / 1_000_000, datetime.UTC):%Y-%m-%d %H:%M:%S}"
