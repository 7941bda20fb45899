"""Tells a recording to people: one line of plain text a record.

Agents choose most of what stands in a recording, so whatever could move a terminal's cursor, hide or reorder text is
written as its escape.
"""

from __future__ import annotations

import datetime
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import assert_never

from proxy.model import UNATTRIBUTED, Chain, ProcessImage
from proxy.recording.reader import Entry
from proxy.recording.records import (
    Alert,
    Closed,
    Completed,
    Decided,
    Held,
    HopReason,
    Login,
    Observed,
    Opened,
    Record,
    Ruled,
)


def tell(entries: Iterable[Entry]) -> Iterator[tuple[Record, str]]:
    """Each record with its lines (the text may hold several, without a final newline)."""
    for entry in entries:
        record = entry.record
        yield record, f"{clock_time(record.at_us)}  {_body(record)}"


def clock_time(at_us: int) -> str:
    """UTC, with milliseconds; a time that no calendar has is given as the number."""
    try:
        at = datetime.datetime.fromtimestamp(at_us / 1_000_000, datetime.UTC)
    except (OverflowError, ValueError, OSError):
        return f"@{at_us}us"
    return at.strftime("%H:%M:%S.") + f"{at.microsecond // 1000:03d}"


def visible(text: str) -> str:
    """`text` with everything escaped that a terminal would act on and not show."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_shown(letter) for letter in text)


def _shown(letter: str) -> str:
    if letter == "\n":
        return "\\n"
    if letter == "\t":
        return "\\t"
    if unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"):
        return ascii(letter)[1:-1]
    return letter


def _body(record: Record) -> str:
    match record:
        case Opened():
            return "\n".join(_opened(record))
        case Login():
            extra = "".join(f" {visible(name)}={visible(value)}" for name, value in record.parameters)
            what = f"login     user={visible(record.user)} database={visible(record.database)}{extra}"
            return f"{what}\n{_judged(record.decision, record.reasons, record.policy)}"
        case Ruled() | Held():
            word = f"#{record.op} {record.kind}"
            if record.phase != "execute":
                word += f" ({record.phase})"
            if isinstance(record, Held):
                word += f" waits for approval {visible(record.approval)}"
            lines = [f"{record.decision:<9} {word}: {visible(record.text)}"]
            if record.unclassified:
                lines.append(f"{_INDENT}could not be classified: {visible(record.unclassified)}")
            lines.append(_judged(record.decision, record.reasons, record.policy))
            return "\n".join(lines)
        case Decided():
            by = f" by {visible(record.by)}" if record.by else ""
            reason = f": {visible(record.reason)}" if record.reason else ""
            return f"{visible(record.outcome):<9} #{record.op} approval {visible(record.approval)}{by}{reason}"
        case Completed():
            outcome = f"error {visible(record.error)}" if record.error else visible(record.tag) or "done"
            masked = f", masked {', '.join(map(visible, record.masked))}" if record.masked else ""
            return f"completed #{record.op} {outcome}, {record.rows} rows in {record.duration_us / 1000:.3f} ms{masked}"
        case Observed():
            return f"{visible(record.channel):<9} #{record.op} {_excerpt(record.data)}"
        case Alert():
            return f"alert     {visible(record.text)}"
        case Closed():
            counts = f"{record.operations} operations, {record.denied} denied"
            return f"closed    {visible(record.reason)} ({counts})"
        case _:
            assert_never(record)


_INDENT = " " * 24
_EXCERPT = 240
"""Bytes that are shown of one record of a terminal: `asciicast` has them all."""


def _excerpt(data: bytes) -> str:
    text = visible(data[:_EXCERPT].decode("utf-8", "backslashreplace"))
    return f"{text} … ({len(data)} bytes)" if len(data) > _EXCERPT else text


def _opened(record: Opened) -> Iterator[str]:
    target = visible(record.target) or "no target"
    peer, dialled = visible(str(record.peer)), visible(str(record.dialled))
    yield f"opened    {visible(record.session)} on {visible(record.host)}"
    yield f"{_INDENT}{peer} -> {dialled} ({target}, {visible(record.protocol) or 'no protocol'})"
    yield f"{_INDENT}chain: {visible(str(record.chain)) if record.chain else 'not known'}"
    if record.chain:
        yield from _lineage(record.chain)
    if record.refusal:
        yield f"{_INDENT}refused: {visible(record.refusal)}"


def _lineage(chain: Chain) -> Iterator[str]:
    hops = {node: hop.agent for hop in chain.hops for node in hop.nodes}
    above = None
    for depth, image in enumerate(chain.lineage):
        argv = visible(" ".join(image.argv)) + (" …" if image.argv_truncated else "")
        hop = visible(hops.get(image.node, UNATTRIBUTED))
        indent = f"{_INDENT}{'  ' * min(depth, 16)}"
        yield f"{indent}{image.tgid} {visible(image.path)} [{hop}] uid {image.uid}: {argv}"
        if surroundings := _surroundings(image, above):
            yield f"{indent}  {surroundings}"
        above = image


_NAMESPACES = {"pid": "pid", "mnt": "mount", "net": "network", "user": "user"}


def _surroundings(image: ProcessImage, above: ProcessImage | None) -> str:
    """Container and namespaces where they are not those of the image above; all that are known at the root."""
    told = []
    if image.container != (above.container if above else ""):
        told.append(f"in container {visible(image.container)}" if image.container else "in no container")
    former = above.namespaces if above else None
    if image.namespaces is not None:
        differing = [
            f"{word} {number}"
            for kind, word in _NAMESPACES.items()
            if (number := getattr(image.namespaces, kind)) and (former is None or number != getattr(former, kind))
        ]
        if differing:
            told.append(f"in {'other ' if former else ''}namespaces: {', '.join(differing)}")
    return "; ".join(told)


def _judged(decision: str, reasons: Sequence[HopReason], policy: str) -> str:
    told = "; ".join(
        f"{visible(each.hop)}: {each.decision} by {visible(each.rule)}"
        + (f" ({visible(each.text)})" if each.text else "")
        for each in reasons
    )
    return f"{_INDENT}{told or decision} [policy {visible(policy)}]"
