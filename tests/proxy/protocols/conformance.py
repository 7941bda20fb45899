"""What every protocol machine has to keep, whatever it speaks. A protocol brings `Dialogue`s, and calls these checks.

A dialogue is a whole session in bytes: what each side sends, in order, with the answers and events that the session
would give. It is played in any chunking, cut short, or poisoned.

Blind spot: answers are given at once; waiting is seen only by `check_bounded`.
"""

from __future__ import annotations

import gc
import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from proxy.model import Decision, Operation, Ruling
from proxy.protocols.base import (
    AskCancel,
    AskCredential,
    AskLogin,
    AskRuling,
    Cancelled,
    ClientSecured,
    Close,
    Command,
    Commands,
    Connect,
    Credential,
    Disconnect,
    Login,
    Machine,
    MachineFactory,
    PeerViolation,
    Send,
    Side,
    StartTls,
    UpstreamReady,
)

Judge = Callable[[Operation], Ruling | None]
"""Rules, or (None) does not answer."""
TOKEN = "token-of-the-gateway"
"""What answers each AskCredential."""


@dataclass(frozen=True)
class Dialogue:
    """`steps` are what the sides send; `login` answers the AskLogin. `offer_tls` makes the machine offer TLS."""

    name: str
    factory: MachineFactory
    login: Login
    steps: tuple[tuple[Side, bytes], ...]
    offer_tls: bool = False

    def machine(self) -> Machine:
        return self.factory(offer_tls=self.offer_tls)


@dataclass
class Transcript:
    """What a machine said: bytes per side, and everything else in order."""

    sent: dict[Side, bytearray] = field(default_factory=lambda: {Side.CLIENT: bytearray(), Side.SERVER: bytearray()})
    said: list[Command] = field(default_factory=list)

    @property
    def closed(self) -> bool:
        return any(isinstance(command, Close) for command in self.said)

    def comparable(self) -> tuple[bytes, bytes, list[str]]:
        return bytes(self.sent[Side.CLIENT]), bytes(self.sent[Side.SERVER]), [repr(command) for command in self.said]


def follow(machine: Machine, login: Login, judge: Judge, commands: Commands, transcript: Transcript) -> None:
    """Carries commands out as a session would, without sockets."""
    pending = list(commands)
    while pending:
        command = pending.pop(0)
        answers: Commands = ()
        if isinstance(command, Send):
            transcript.sent[command.side] += command.data
            continue
        transcript.said.append(command)
        match command:
            case AskRuling(_, operation):
                ruling = judge(operation)
                answers = machine.answer(command, ruling) if ruling is not None else ()
            case AskLogin():
                answers = machine.answer(command, login)
            case AskCancel():
                answers = machine.answer(command, Cancelled())
            case AskCredential():
                answers = machine.answer(command, Credential(TOKEN))
            case Connect() | StartTls(Side.SERVER):
                answers = machine.notify(UpstreamReady())
            case StartTls(Side.CLIENT):
                answers = machine.notify(ClientSecured())
            case _:
                pass
        pending[:0] = answers


def play(
    dialogue: Dialogue,
    judge: Judge,
    *,
    cuts: Callable[[bytes], Iterable[bytes]] = lambda data: (data,),
    steps: int = -1,
) -> tuple[Machine, Transcript]:
    """Plays the dialogue's first `steps` (-1: all), each cut into chunks by `cuts`; a chunk comes in a buffer that is
    overwritten afterwards, as the interface allows."""
    machine = dialogue.machine()
    transcript = Transcript()
    follow(machine, dialogue.login, judge, machine.begin(), transcript)
    for side, data in dialogue.steps if steps < 0 else dialogue.steps[:steps]:
        for chunk in cuts(data):
            buffer = bytearray(chunk)
            follow(machine, dialogue.login, judge, machine.receive(side, memoryview(buffer)), transcript)
            buffer[:] = b"\xee" * len(buffer)
    return machine, transcript


def cut_at(data: bytes, positions: Sequence[int]) -> list[bytes]:
    """The data cut at these positions (taken modulo its length); no empty chunk."""
    edges = sorted({0, len(data), *(position % len(data) for position in positions)}) if data else [0]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


Comparable = Callable[[Transcript], object]
"""What of a transcript does not depend on how its bytes came: all of it, unless a protocol frames what it passes on
by pieces as they come."""


def check_chunking(
    dialogue: Dialogue, judge: Judge, positions: Sequence[int], comparable: Comparable = Transcript.comparable
) -> None:
    """Any chunking of the same bytes gives the same commands."""
    _, whole = play(dialogue, judge)
    _, cut = play(dialogue, judge, cuts=lambda data: cut_at(data, positions))
    assert comparable(cut) == comparable(whole)


def check_every_byte_alone(dialogue: Dialogue, judge: Judge, comparable: Comparable = Transcript.comparable) -> None:
    """The hardest chunking of all."""
    _, whole = play(dialogue, judge)
    _, cut = play(dialogue, judge, cuts=lambda data: [data[i : i + 1] for i in range(len(data))])
    assert comparable(cut) == comparable(whole)


def check_garbage(dialogue: Dialogue, judge: Judge, steps: int, noise: Sequence[tuple[Side, bytes]]) -> None:
    """Arbitrary bytes of either side, at any point of the dialogue, raise only `PeerViolation`; after it the
    machine can still say farewell, closes, and says nothing more."""
    machine, transcript = play(dialogue, judge, steps=steps)
    try:
        for side, data in noise:
            if data and not transcript.closed:
                follow(machine, dialogue.login, judge, machine.receive(side, data), transcript)
    except PeerViolation as violation:
        assert str(violation)
    if not transcript.closed:
        follow(machine, dialogue.login, judge, machine.farewell("it is over"), transcript)
    assert transcript.closed
    for side in Side:
        assert not machine.receive(side, b"more")
        assert not machine.eof(side)
    assert not machine.farewell("again")
    assert not machine.unanswered


def check_end(dialogue: Dialogue, judge: Judge, steps: int, side: Side) -> None:
    """The end of either side's bytes at any point closes both; a server that nothing was asked of may be let go, and
    then the end of the client closes."""
    machine, transcript = play(dialogue, judge, steps=steps)
    if not transcript.closed:
        commands = machine.eof(side)
        follow(machine, dialogue.login, judge, commands, transcript)
        if side is Side.SERVER and commands[:1] == [Disconnect()]:
            follow(machine, dialogue.login, judge, machine.eof(Side.CLIENT), transcript)
    assert transcript.closed


def retained(machine: Machine) -> int:
    """Bytes of everything that only this machine keeps: buffers, queues, names."""
    seen: set[int] = set()
    total = 0
    queue: list[object] = [machine]
    while queue:
        thing = queue.pop()
        if id(thing) in seen or isinstance(thing, type | Operation):
            continue
        if callable(thing) and thing is not machine:
            continue
        seen.add(id(thing))
        total += sys.getsizeof(thing)
        queue.extend(gc.get_referents(thing))
        queue.extend(getattr(thing, slot) for slot in getattr(type(thing), "__slots__", ()) if hasattr(thing, slot))
    return total


def check_bounded(
    dialogue: Dialogue, judge: Judge, steps: int, flood: Iterable[tuple[Side, bytes]], *, bound: int, stride: int = 1
) -> None:
    """Whatever comes after the dialogue's first steps, the machine keeps at most `bound` bytes: it breaks off,
    closes, or lets the bytes go. Looked at after every `stride` steps."""
    machine, transcript = play(dialogue, judge, steps=steps)
    try:
        for number, (side, data) in enumerate(flood):
            if transcript.closed:
                break
            follow(machine, dialogue.login, judge, machine.receive(side, data), transcript)
            transcript.sent = {Side.CLIENT: bytearray(), Side.SERVER: bytearray()}
            if number % stride == 0:
                assert retained(machine) <= bound
    except PeerViolation:
        pass
    assert retained(machine) <= bound


def check_nothing_before_its_ruling(
    dialogue: Dialogue, judge: Judge, steps: int, operation: bytes, marker: bytes
) -> None:
    """No byte of an operation goes to the server before its ruling, and none ever when that is a denial or does not
    come.

    `operation` is what the client sends after the first steps, and `marker` is in nothing else."""
    for verdict in (judge, lambda _: None):
        machine, transcript = play(dialogue, judge, steps=steps)
        upwards = transcript.sent[Side.SERVER]
        asked: list[AskRuling] = []
        for index in range(len(operation)):
            commands = machine.receive(Side.CLIENT, operation[index : index + 1])
            upwards += b"".join(bytes(c.data) for c in commands if isinstance(c, Send) and c.side is Side.SERVER)
            for ask in (command for command in commands if isinstance(command, AskRuling)):
                if not asked:
                    assert marker not in upwards
                asked.append(ask)
                ruling = verdict(ask.operation)
                if ruling is not None:
                    follow(machine, dialogue.login, verdict, machine.answer(ask, ruling), transcript)
        assert asked and marker.decode() in asked[0].operation.text
        ruling = verdict(asked[0].operation)
        assert (marker in upwards) is (ruling is not None and ruling.decision is Decision.ALLOW)
