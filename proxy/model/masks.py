"""What a mask is: a column or a field, and the function that its values go through."""

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


@dataclass(frozen=True, slots=True)
class FieldMask:
    """A mask on one field of the objects of one Kubernetes resource.

    `resource` is as kubectl spells it (`secrets`, `deployments.apps`), or `*`. `namespaces` and `names` are globs that
    the object has to meet; empty means any. `path` names the field (`data.*`, `spec.containers[*].env[*].value`,
    `metadata.annotations["example.com/x"]`). `label` names the method (`redact`, `partial`, `hash`), or is `hide`: then
    `path` is empty, and objects that meet the rest are left out of what is listed and watched.
    """

    resource: str
    namespaces: tuple[str, ...]
    names: tuple[str, ...]
    path: str
    label: str
    mask: Masker
