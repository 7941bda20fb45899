"""What a mask is: a column, and the function that its values go through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Masker = Callable[[bytes], bytes]
"""Turns the text form of one value, never NULL, into its masked text form. Pure; never raises."""


@dataclass(frozen=True, slots=True)
class ColumnMask:
    """A mask on one column of one relation.

    `schema`, `relation` and `column` are exact names as the server's catalog spells them. `label` names the method
    for people and recordings (`redact`, `partial`, `hash`); values of types that have no text (numbers, dates, …)
    become NULL, whatever the method.
    """

    schema: str
    relation: str
    column: str
    label: str
    mask: Masker
