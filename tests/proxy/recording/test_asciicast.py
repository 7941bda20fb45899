"""A recorded terminal can be played: what `asciinema play` reads is what went through."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from proxy.model import Chain, Decision, Endpoint, Operation, OperationKind, Phase, Reason, RequestFacts, Ruling
from proxy.recording import Writer, read
from proxy.recording.asciicast import NothingRecorded, cast
from proxy.recording.records import FORMAT, Opened, encode, line, link, seed
from proxy.recording.replay import tell

SESSION = "20261124-104512-7f3a9c"
START_NS = 1_700_000_000_000_000_000
ALLOW = Ruling(Decision.ALLOW, (Reason("agent-a", "shell", Decision.ALLOW, ""),), "", "", "v1")
FACTS = RequestFacts(
    verb="create", path="/api/v1/namespaces/shop/pods/web/exec", resource="pods", subresource="exec", command=("sh",)
)


class Clock:
    def __init__(self) -> None:
        self.now_ns = START_NS

    def __call__(self) -> int:
        return self.now_ns

    def wait(self, seconds: float) -> None:
        self.now_ns += round(seconds * 1_000_000_000)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "recording"


def begin(path: Path, clock: Callable[[], int]) -> Writer:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
    header = encode(
        Opened(
            at_us=clock() // 1000,
            session=SESSION,
            format=FORMAT,
            host="runner-1",
            peer=Endpoint("127.0.0.1", 40000),
            dialled=Endpoint("192.0.2.7", 6443),
            target="cluster",
            protocol="kubernetes",
            policy="v1",
            chain=Chain((), ()),
        )
    )
    digest = link(seed(SESSION), header)
    os.write(fd, line(digest, header))
    writer = Writer(fd, SESSION, 1, digest, clock)
    text = "create pods/web exec in shop: sh"
    writer.ruled(
        1,
        Operation("kubernetes", OperationKind.REQUEST, Phase.EXECUTE, text, text, (), once=True, requests=(FACTS,)),
        ALLOW,
    )
    return writer


def lines(path: Path, operation: int = 1) -> list[object]:
    return [json.loads(text) for text in cast(read(path, SESSION), operation)]


def test_a_terminal_is_played_with_its_sizes_and_times(path: Path, clock: Clock) -> None:
    writer = begin(path, clock)
    writer.observed(1, "resize", b"120x40")
    clock.wait(0.25)
    writer.observed(1, "stdout", b"$ ")
    clock.wait(1)
    writer.observed(1, "stdin", b"ls\r")
    writer.observed(1, "stdout", b"ls\r\n\x1b[1mfile\x1b[0m\r\n")
    writer.observed(1, "resize", b"100x30")
    writer.observed(2, "stdout", b"another operation's")
    writer.completed(1, "exit 0", 0, "", ())
    writer.closed("the client left", 1, 0)
    writer.close()
    header, *events = lines(path)
    assert header == {
        "version": 2,
        "width": 120,
        "height": 40,
        "timestamp": START_NS // 1_000_000_000,
        "title": "create pods/web exec in shop: sh",
    }
    assert events == [
        [0.0, "r", "120x40"],
        [0.25, "o", "$ "],
        [1.25, "i", "ls\r"],
        [1.25, "o", "ls\r\n\x1b[1mfile\x1b[0m\r\n"],
        [1.25, "r", "100x30"],
    ]


def test_a_command_without_a_terminal_is_no_staircase(path: Path, clock: Clock) -> None:
    writer = begin(path, clock)
    writer.observed(1, "stdout", b"one\ntwo\n")
    writer.observed(1, "stderr", b"oops\n")
    writer.close()
    header, *events = lines(path)
    assert isinstance(header, dict)
    assert (header["width"], header["height"]) == (80, 24)
    assert events == [[0.0, "o", "one\r\ntwo\r\n"], [0.0, "o", "oops\r\n"]]


def test_a_letter_that_was_cut_in_two_is_whole_again(path: Path, clock: Clock) -> None:
    writer = begin(path, clock)
    for byte in "é\N{SNOWMAN}".encode():
        writer.observed(1, "stdout", bytes((byte,)))
    writer.observed(1, "stdout", b"\xff!")
    writer.close()
    assert "".join(str(event[2]) for event in lines(path)[1:] if isinstance(event, list)) == "é\N{SNOWMAN}\ufffd!"


def test_time_does_not_run_backwards(path: Path, clock: Clock) -> None:
    writer = begin(path, clock)
    clock.wait(2)
    writer.observed(1, "stdout", b"a")
    clock.wait(-5)
    writer.observed(1, "stdout", b"b")
    writer.close()
    assert lines(path)[1:] == [[2.0, "o", "a"], [2.0, "o", "b"]]


def test_what_cannot_be_played_is_said(path: Path, clock: Clock) -> None:
    begin(path, clock).close()
    with pytest.raises(NothingRecorded, match="operation `7` is not in the recording"):
        lines(path, 7)
    with pytest.raises(NothingRecorded, match="has nothing to play"):
        lines(path)


def test_replay_cuts_what_is_long_and_shows_escapes(path: Path, clock: Clock) -> None:
    writer = begin(path, clock)
    writer.observed(1, "stdout", b"\x1b]0;title\x07" + b"x" * 5000)
    writer.close()
    text = [text for _, text in tell(read(path, SESSION))][-1]
    assert "\\x1b]0;title\\x07xxx" in text
    assert text.endswith("… (5010 bytes)")
    assert len(text) < 400
