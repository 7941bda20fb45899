"""Which result columns show masked values: what the server's catalog says, held against every RowDescription.

The catalog is read once, at login: masked columns as (table OID, attribute number); relations derived from masked
ones (views, materialised views, rules, partitions and inheritance in both directions), all of whose columns are
masked; and every relation that exists, with its number of attributes. A column of a relation or attribute that was
not there yet ends the session: what cannot be traced is not shown.

Blind spots: a column that the server computes has no table OID and passes here: the policy judges expressions from
the statement. A view that is replaced, or a table attached to a masked one, while the session runs keeps its OID
and is seen as it was at login. Functions are not looked into. Relations below `FIRST_NORMAL_OID` belong to the
server and are masked only by name.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from proxy.model import ColumnMask, Masker
from proxy.protocols.postgres.messages import MAX_MASKED_ROW, Malformed, query, read_cstring

_DATA_ROW: Final = ord("D")
_NULL = b"\xff\xff\xff\xff"
_unsigned = struct.Struct(">I").unpack_from
_signed = struct.Struct(">i").unpack_from
_short = struct.Struct(">H").unpack_from
_size = struct.Struct(">I").pack
_head = struct.Struct(">BI").pack

FIRST_NORMAL_OID = 16_384
"""OIDs below belong to what initdb made."""
MAX_PLANS = 256
"""Row descriptions of one session whose plan is remembered."""
REDACTED = b"***"
"""What a text becomes where the column's own mask is not known: a column of a derived relation, a whole row."""


class CatalogChanged(Exception):
    """A column comes from something that did not exist at login. The message says what."""


class CatalogUnreadable(Exception):
    """The answer to the catalog query is not what was asked for."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do with the rows of one RowDescription: which values, by index, go through which function (None: they
    become NULL). `columns` are their names as the result calls them, and `binary` those that come in binary
    format."""

    count: int
    masks: tuple[tuple[int, Masker | None], ...]
    columns: tuple[str, ...]
    labels: tuple[str, ...]
    binary: tuple[str, ...]


NOTHING = Plan(0, (), (), (), ())
"""The plan of a statement that returns no rows."""


def _redact(_: bytes) -> bytes:
    return REDACTED


def _hex(name: str) -> str:
    """A SQL expression for a name, whatever the server's quoting settings are."""
    return f"pg_catalog.convert_from(pg_catalog.decode('{name.encode().hex()}', 'hex'), 'UTF8')"


def catalog_query(masks: Sequence[ColumnMask]) -> bytes:
    """The Query whose rows `CatalogReader` takes. It runs in one snapshot, with nothing but the
    server's own catalog on its search path, and leaves no setting behind."""
    wanted = ", ".join(
        f"({index}, {_hex(mask.schema)}, {_hex(mask.relation)}, {_hex(mask.column)})"
        for index, mask in enumerate(masks)
    )
    return query(
        "SELECT pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);"
        f"""
WITH RECURSIVE wanted(idx, nsp, rel, col) AS (VALUES {wanted}),
masked AS MATERIALIZED (
  SELECT w.idx, c.oid AS relid, a.attnum, n.nspname, c.relname
  FROM wanted w
  JOIN pg_namespace n ON n.nspname::text = w.nsp
  JOIN pg_class c ON c.relnamespace = n.oid AND c.relname::text = w.rel
  JOIN pg_attribute a ON a.attrelid = c.oid AND a.attname::text = w.col AND a.attnum > 0 AND NOT a.attisdropped
),
edges(shown, shows) AS MATERIALIZED (
  SELECT d.refobjid, r.ev_class FROM pg_depend d JOIN pg_rewrite r ON r.oid = d.objid
  WHERE d.classid = 'pg_rewrite'::regclass AND d.refclassid = 'pg_class'::regclass AND r.ev_class <> d.refobjid
  UNION SELECT inhparent, inhrelid FROM pg_inherits
  UNION SELECT inhrelid, inhparent FROM pg_inherits
),
reached(origin, relid) AS (
  SELECT relid, relid FROM masked
  UNION SELECT r.origin, e.shows FROM reached r JOIN edges e ON e.shown = r.relid
)
SELECT 'masked', idx::text, relid::text, attnum::text FROM masked
UNION ALL
SELECT DISTINCT 'derived', c.oid::text, encode(convert_to(n.nspname::text, 'UTF8'), 'hex'),
  encode(convert_to(c.relname::text, 'UTF8'), 'hex')
FROM reached r JOIN pg_class c ON c.oid = r.relid JOIN pg_namespace n ON n.oid = c.relnamespace
WHERE r.origin <> r.relid
UNION ALL
SELECT 'known', string_agg(oid::text || ':' || relnatts::text, ','), NULL, NULL
FROM pg_class WHERE oid >= {FIRST_NORMAL_OID} AND relkind NOT IN ('i', 'I')
UNION ALL
SELECT 'text', string_agg(oid::text, ','), NULL, NULL FROM pg_type WHERE typcategory = 'S'"""
    )


class Catalog:
    """What a session with masks knows of the server's catalog."""

    def __init__(
        self,
        masked: Mapping[tuple[int, int], ColumnMask],
        derived: Mapping[int, tuple[str, str]],
        known: Mapping[int, int],
        text_types: frozenset[int],
    ) -> None:
        self.derived = derived
        self._masked = masked
        self._relations = {relation: mask for (relation, _), mask in masked.items()}
        self._known = known
        self._text_types = text_types
        self._plans: dict[bytes, Plan] = {}

    def plan(self, body: bytes) -> Plan:
        """The plan for the body of a RowDescription. Raises `CatalogChanged` and `Malformed`."""
        plan = self._plans.get(body)
        if plan is None:
            plan = self._make_plan(body)
            if len(self._plans) >= MAX_PLANS:
                self._plans.clear()
            self._plans[body] = plan
        return plan

    def _make_plan(self, body: bytes) -> Plan:
        masks: list[tuple[int, Masker | None]] = []
        columns: list[str] = []
        labels: list[str] = []
        binary: list[str] = []
        end = len(body)
        if end < 2:
            raise Malformed("a RowDescription has no count")
        (count,) = struct.unpack_from(">H", body)
        position = 2
        for index in range(count):
            name, position = read_cstring(body, position, end)
            if position + 18 > end:
                raise Malformed("a RowDescription ends early")
            relation, attribute, kind, _, _, code = struct.unpack_from(">IhIhih", body, position)
            position += 18
            found = self._judge(relation, attribute, name)
            if found is None:
                continue
            masker, label = found
            masks.append((index, masker if kind in self._text_types else None))
            labels.append(label)
            columns.append(name.decode("utf-8", "replace"))
            if code != 0:
                binary.append(columns[-1])
        if position != end:
            raise Malformed("bytes behind the last column of a RowDescription")
        return Plan(count, tuple(masks), tuple(columns), tuple(dict.fromkeys(labels)), tuple(binary))

    def _judge(self, relation: int, attribute: int, name: bytes) -> tuple[Masker, str] | None:
        if relation == 0 or attribute < 0:
            return None
        derived = self.derived.get(relation)
        if derived is not None:
            shown = name.decode("utf-8", "replace")
            return _redact, f"{derived[0]}.{derived[1]}.{shown}:redact"
        mask = self._masked.get((relation, attribute))
        if mask is not None:
            return mask.mask, f"{mask.schema}.{mask.relation}.{mask.column}:{mask.label}"
        if attribute == 0 and relation in self._relations:
            mask = self._relations[relation]
            return _redact, f"{mask.schema}.{mask.relation}.*:redact"
        if relation >= FIRST_NORMAL_OID and attribute > self._known.get(relation, -1):
            shown = name.decode("utf-8", "replace")
            raise CatalogChanged(f"column `{shown}` belongs to a relation or attribute that was made after login")
        return None


def mask_rows(data: bytes, position: int, end: int, plan: Plan, pieces: list[bytes]) -> tuple[int, int]:
    """Masks the DataRows from `position` on, up to the first message that is none or has not wholly come before `end`:
    adds them to `pieces`, and returns where that message is and how many rows there were. The first row is whole.
    Raises `Malformed`."""
    rows = 0
    copied = position
    steps = []
    column = 0
    for index, masker in plan.masks:
        steps.append((range(index - column), masker))
        column = index + 1
    try:
        while end - position >= 5 and data[position] == _DATA_ROW:
            (size,) = _unsigned(data, position + 1)
            stop = position + 1 + size
            if stop > end or not 6 <= size <= MAX_MASKED_ROW:
                break
            (count,) = _short(data, position + 5)
            if count != plan.count:
                raise Malformed(f"a row has `{count}` columns and its description `{plan.count}`")
            pieces += (data[copied:position], b"")
            head = len(pieces) - 1
            copied = position + 5
            at = position + 7
            for skipped, masker in steps:
                for _ in skipped:
                    (length,) = _signed(data, at)
                    at += 4 + length if length > 0 else 4
                (length,) = _signed(data, at)
                if length < 0:
                    at += 4
                    continue
                behind = at + 4 + length
                if behind > stop:
                    raise Malformed("a value exceeds its row")
                if masker is None:
                    pieces += (data[copied:at], _NULL)
                    size -= length
                else:
                    value = masker(data[at + 4 : behind])
                    pieces += (data[copied:at], _size(len(value)), value)
                    size += len(value) - length
                at = copied = behind
            if at > stop:
                raise Malformed("a value exceeds its row")
            pieces[head] = _head(_DATA_ROW, size)
            position = stop
            rows += 1
    except struct.error:
        raise Malformed("a row ends early") from None
    pieces.append(data[copied:position])
    return position, rows


class CatalogReader:
    """Collects the rows of the catalog query."""

    def __init__(self, masks: Sequence[ColumnMask]) -> None:
        self._masks = masks
        self._masked: dict[tuple[int, int], ColumnMask] = {}
        self._derived: dict[int, tuple[str, str]] = {}
        self._known: dict[int, int] | None = None
        self._text_types: frozenset[int] | None = None

    def row(self, body: bytes) -> None:
        """Takes the body of one DataRow; rows of another form are not ours. Raises `CatalogUnreadable`."""
        try:
            (count,) = struct.unpack_from(">H", body)
            if count != 4:
                return
            values: list[str] = []
            position = 2
            for _ in range(count):
                (size,) = struct.unpack_from(">i", body, position)
                position += 4
                values.append(body[position : position + max(size, 0)].decode("ascii"))
                position += max(size, 0)
            self._take(*values)
        except (struct.error, ValueError, IndexError):
            raise CatalogUnreadable("a row of the catalog query is malformed") from None

    def _take(self, kind: str, first: str, second: str, third: str) -> None:
        match kind:
            case "masked":
                self._masked[int(second), int(third)] = self._masks[int(first)]
            case "derived":
                self._derived[int(first)] = (bytes.fromhex(second).decode(), bytes.fromhex(third).decode())
            case "known":
                pairs = (entry.split(":") for entry in first.split(",") if entry)
                self._known = {int(relation): int(attributes) for relation, attributes in pairs}
            case "text":
                self._text_types = frozenset(int(entry) for entry in first.split(",") if entry)
            case _:
                raise ValueError(kind)

    def catalog(self) -> Catalog:
        """Raises `CatalogUnreadable` when the answer was not complete."""
        if self._known is None or self._text_types is None:
            raise CatalogUnreadable("the answer to the catalog query is not complete")
        return Catalog(self._masked, self._derived, self._known, self._text_types)
