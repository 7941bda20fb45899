"""The conformance suite over the PostgreSQL machine."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy.protocols.base import Send, Side
from proxy.protocols.postgres import messages
from tests.proxy.protocols import conformance
from tests.proxy.protocols.conformance import Dialogue
from tests.proxy.protocols.postgres.dialogues import (
    DIALOGUES,
    MASKED_LOGIN,
    PLAIN_LOGIN,
    READY,
    SSN,
    SYNC,
    C,
    S,
    bind,
    pipeline,
    row,
    ruling,
)

PLAIN, MASKED, TLS, CANCEL = DIALOGUES
dialogues = pytest.mark.parametrize("dialogue", DIALOGUES, ids=lambda dialogue: dialogue.name)


@dialogues
@settings(max_examples=40, deadline=None)
@given(positions=st.lists(st.integers(0, 4000), max_size=60))
def test_any_chunking_gives_the_same_commands(dialogue: Dialogue, positions: list[int]) -> None:
    conformance.check_chunking(dialogue, ruling, positions)


@dialogues
def test_every_byte_alone_gives_the_same_commands(dialogue: Dialogue) -> None:
    conformance.check_every_byte_alone(dialogue, ruling)


KINDS = b"QPBEDCSHXFdcfpRKSZTtn123IsGHWNAEV"
frames = st.builds(
    lambda kind, body: bytes([kind]) + struct.pack(">I", len(body) + 4) + body,
    st.sampled_from(KINDS),
    st.one_of(
        st.binary(max_size=40), st.just(b"\0"), st.just(b"x\0\0\0"), st.just(b"S\0"), st.just(b"\0\1a\0" + b"\0" * 18)
    ),
)
noise = st.lists(st.tuples(st.sampled_from([C, S]), st.one_of(frames, st.binary(max_size=60))), max_size=12)


@dialogues
@settings(max_examples=150, deadline=None)
@given(steps=st.integers(0, 30), noise=noise)
def test_arbitrary_bytes_raise_only_peer_violations(
    dialogue: Dialogue, steps: int, noise: list[tuple[Side, bytes]]
) -> None:
    conformance.check_garbage(dialogue, ruling, steps, noise)


@dialogues
@settings(max_examples=150, deadline=None)
@given(step=st.integers(0, 30), position=st.integers(0, 2000), flip=st.integers(1, 255))
def test_one_wrong_byte_raises_only_peer_violations(dialogue: Dialogue, step: int, position: int, flip: int) -> None:
    step %= len(dialogue.steps)
    side, data = dialogue.steps[step]
    broken = bytearray(data)
    broken[position % len(data)] ^= flip
    conformance.check_garbage(dialogue, ruling, step, [(side, bytes(broken)), *dialogue.steps[step + 1 :]])


@dialogues
@pytest.mark.parametrize("side", [C, S])
def test_the_end_of_either_side_closes(dialogue: Dialogue, side: Side) -> None:
    for steps in range(len(dialogue.steps) + 1):
        conformance.check_end(dialogue, ruling, steps, side)


MIB = 1024 * 1024
BOUND = 19 * MIB
"""One statement of 16 MiB with its header, the bytes kept behind it, and the names."""
CHUNK = b"\xaa" * (512 * 1024)


def header(kind: bytes, size: int) -> bytes:
    return kind + struct.pack(">I", size)


def endless(side: Side, *first: bytes) -> Iterator[tuple[Side, bytes]]:
    yield from ((side, data) for data in first)
    yield from itertools.repeat((side, CHUNK), 80)


FLOODS = {
    "start-up": (PLAIN, 0, lambda: endless(C, struct.pack(">I", 9000))),
    "before the login is done": (PLAIN, 1, lambda: endless(C)),
    "server before its login": (PLAIN, 1, lambda: endless(S, header(b"R", 200_000))),
    "statement": (PLAIN, 2, lambda: endless(C, header(b"Q", 16 * MIB))),
    "statement too large": (PLAIN, 2, lambda: endless(C, header(b"Q", 17 * MIB))),
    "parse": (PLAIN, 2, lambda: endless(C, header(b"P", 16 * MIB))),
    "bind": (PLAIN, 2, lambda: endless(C, header(b"B", 800 * MIB) + b"\0\0")),
    "bind with masks": (MASKED, 3, lambda: endless(C, header(b"B", 16 * MIB) + b"\0\0")),
    "copied data": (PLAIN, 2, lambda: endless(C, header(b"d", 800 * MIB))),
    "row": (PLAIN, 2, lambda: endless(S, header(b"D", 800 * MIB))),
    "copied out": (MASKED, 3, lambda: endless(S, header(b"d", 800 * MIB))),
    "error": (PLAIN, 2, lambda: endless(S, header(b"E", MIB))),
    "catalog": (MASKED, 2, lambda: itertools.repeat((S, row(b"known", b"1:1," * 100_000, None, None)), 100)),
    "pipeline": (PLAIN, 2, lambda: itertools.repeat((C, SYNC * 2000), 100)),
    "copy ends": (PLAIN, 3, lambda: itertools.repeat((C, b"c\0\0\0\4" * 2000), 100)),
    "statements": (
        PLAIN,
        2,
        lambda: (
            side
            for number in range(10_000)
            for side in ((C, messages.parse(b"s%d" % number, "SELECT 1") + SYNC), (S, b"1\0\0\0\4" + READY))
        ),
    ),
    "skipped": (
        PLAIN,
        2,
        lambda: ((C, bind("", "missing")), (S, messages.error("26000", "m")), *endless(C, pipeline(""))),
    ),
}


@pytest.mark.parametrize("name", FLOODS)
def test_every_buffer_is_bounded(name: str) -> None:
    dialogue, steps, flood = FLOODS[name]
    stride = {"statements": 4001, "pipeline": 20, "copy ends": 20}.get(name, 1)
    conformance.check_bounded(dialogue, ruling, steps, flood(), bound=BOUND, stride=stride)


def test_a_masked_row_may_take_64_mib_and_no_more() -> None:
    for size, kept in ((64 * MIB, 66 * MIB), (65 * MIB, MIB)):
        flood = [(C, messages.query("SELECT id, ssn FROM customers")), (S, SSN + header(b"D", size))]
        conformance.check_bounded(MASKED, ruling, 3, flood + [(S, CHUNK)] * 4, bound=kept)


def test_a_question_that_is_not_answered_keeps_back_a_bounded_number_of_bytes() -> None:
    flood = [(C, messages.query("SELECT held")), *endless(C)]
    conformance.check_bounded(
        PLAIN, lambda operation: None if "held" in operation.text else ruling(operation), 2, flood, bound=3 * MIB
    )


@pytest.mark.parametrize("verdict", ["", "forbidden"])
@pytest.mark.parametrize("dialogue", [PLAIN, MASKED], ids=["plain", "masked"])
def test_no_byte_goes_to_the_server_before_its_ruling(dialogue: Dialogue, verdict: str) -> None:
    steps = len(PLAIN_LOGIN if dialogue is PLAIN else MASKED_LOGIN)
    text = f"SELECT 'marker 4711' {verdict}"
    for operation in (messages.query(text), messages.parse(b"s", text), pipeline(text)):
        conformance.check_nothing_before_its_ruling(dialogue, ruling, steps, operation, b"marker 4711")


def test_an_execute_waits_for_its_own_ruling() -> None:
    machine, _ = conformance.play(PLAIN, ruling, steps=2)
    (ask,) = machine.receive(C, messages.parse(b"s", "SELECT 1") + bind("p", "s") + messages.execute(b"p"))
    *released, again = machine.answer(ask, ruling(ask.operation))
    sent = b"".join(bytes(command.data) for command in released if isinstance(command, Send))
    assert sent == messages.parse(b"s", "SELECT 1") + bind("p", "s")
    assert again.operation.kind == "execute" and again.operation.text == "SELECT 1"
    (last,) = machine.answer(again, ruling(again.operation))
    assert last == Send(S, messages.execute(b"p"))


def test_masked_values_are_in_no_byte_for_the_client() -> None:
    for cuts in (lambda data: (data,), lambda data: [data[i : i + 1] for i in range(len(data))]):
        _, transcript = conformance.play(MASKED, ruling, cuts=cuts)
        assert b"secret" not in transcript.sent[C]
        assert b"***1" in transcript.sent[C]
        assert b"the catalog changed" in transcript.sent[C]
