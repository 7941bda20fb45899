"""Recordings: what is written can be read, and nothing in it can be changed unseen."""

from __future__ import annotations

import itertools
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from proxy.model import (
    Chain,
    Decision,
    Endpoint,
    Hop,
    Namespaces,
    Operation,
    OperationKind,
    Phase,
    ProcessImage,
    Reason,
    Ruling,
    StatementFacts,
)
from proxy.recording import AuditUnavailable, BrokenRecording, RulingPieces, State, Writer, read, verify
from proxy.recording.records import (
    FORMAT,
    Alert,
    Closed,
    Completed,
    Decided,
    Held,
    Login,
    Opened,
    Ruled,
    encode,
    line,
    link,
    seed,
)
from proxy.recording.replay import tell, visible

SESSION = "20261124-104512-7f3a9c"
CHAIN = Chain(
    hops=(Hop("agent-a", (1,)), Hop("agent-b", (2,))),
    lineage=(
        ProcessImage(1, 100, 5, 1000, 2049, 77, "/usr/bin/python3", "python3", ("python3", "a.py"), False, "/jobs"),
        ProcessImage(2, 101, 6, 1000, 2049, 78, "/usr/bin/psql", "psql", ("psql",), True, "/jobs"),
    ),
)
ALLOW = Ruling(Decision.ALLOW, (Reason("agent-a", "read", Decision.ALLOW, "reads"),), "", "", "v1")
DENY = Ruling(
    Decision.DENY,
    (Reason("agent-a", "read", Decision.ALLOW, ""), Reason("agent-b", "[default]", Decision.DENY, "no rule")),
    "denied",
    "ask",
    "v1",
)


def operation(text: str = "SELECT 1") -> Operation:
    return Operation("postgres", OperationKind.QUERY, Phase.EXECUTE, "secret", text, (StatementFacts("select"),))


OPENED = Opened(
    at_us=1_700_000_000_000_000,
    session=SESSION,
    format=FORMAT,
    host="runner-1",
    peer=Endpoint("127.0.0.1", 40000),
    dialled=Endpoint("192.0.2.7", 5432),
    target="orders",
    protocol="postgres",
    policy="v1",
    chain=CHAIN,
)


def begin(path: Path, pieces: RulingPieces | None = None, clock: Callable[[], int] | None = None) -> Writer:
    """A recording with its header, and a writer that goes on with it."""
    ticks = itertools.count(1_700_000_000_000_000_000, 1_000_000)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
    header = encode(OPENED)
    digest = link(seed(SESSION), header)
    os.write(fd, line(digest, header))
    return Writer(fd, SESSION, 1, digest, clock or (lambda: next(ticks)), pieces or RulingPieces())


def whole(path: Path) -> Writer:
    """A recording with every kind of record."""
    writer = begin(path)
    writer.login("app", "orders", (("application_name", "job"),), ALLOW)
    writer.ruled(1, operation(), ALLOW)
    writer.completed(1, "SELECT 1", 1, "", ())
    writer.held(2, operation("UPDATE t SET a = 1"), ALLOW, "H-7KQ3F9")
    writer.decided(2, "H-7KQ3F9", "approved", "root (uid 0)", "it is fine")
    writer.ruled(2, operation("UPDATE t SET a = 1"), ALLOW)
    writer.completed(2, "", 0, "23505: duplicate", ("public.t.a",))
    writer.ruled(3, operation("DROP TABLE t"), DENY)
    writer.alert("something")
    writer.closed("the client disconnected", 3, 1)
    writer.close()
    return writer


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("recording") / "whole.hgr"
    whole(path)
    return path.read_bytes()


def test_everything_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "r"
    writer = whole(path)
    records = [entry.record for entry in read(path, SESSION)]
    assert [type(record) for record in records] == [
        Opened, Login, Ruled, Completed, Held, Decided, Ruled, Completed, Ruled, Alert, Closed
    ]  # fmt: skip
    opened, login, first = records[0], records[1], records[2]
    assert isinstance(opened, Opened)
    assert opened.chain == CHAIN
    assert isinstance(login, Login)
    assert (login.database, login.parameters) == ("orders", (("application_name", "job"),))
    assert isinstance(first, Ruled)
    assert (first.op, first.kind, first.text, first.statements) == (1, "query", "SELECT 1", ("select",))
    assert first.reasons[0].rule == "read"
    done = records[3]
    assert isinstance(done, Completed)
    assert (done.tag, done.rows, done.duration_us) == ("SELECT 1", 1, 1000)
    verdict = verify(path, session=SESSION, expected_digest=writer.digest.hex(), expected_records=11)
    assert (verdict.state, verdict.records, verdict.closed) == (State.INTACT, 11, True)
    assert writer.records == 11


def test_what_the_client_wrote_before_redaction_is_not_in_the_file(recorded: bytes) -> None:
    assert b"secret" not in recorded


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.integers(min_value=0), flip=st.integers(1, 255))
def test_any_changed_byte_is_seen_and_its_line_named(tmp_path: Path, recorded: bytes, where: int, flip: int) -> None:
    where %= len(recorded)
    path = tmp_path / "r"
    changed = bytearray(recorded)
    changed[where] ^= flip
    path.write_bytes(changed)
    verdict = verify(path)
    assert verdict.state is not State.INTACT
    assert verdict.line == recorded.count(b"\n", 0, where) + 1
    assert verdict.records == verdict.line - 1


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(length=st.integers(min_value=0))
def test_any_truncation_is_seen_by_whoever_knows_the_end(tmp_path: Path, recorded: bytes, length: int) -> None:
    length %= len(recorded)
    path = tmp_path / "r"
    path.write_bytes(recorded[:length])
    lines = recorded.count(b"\n")
    digest = recorded.splitlines()[-1][:64].decode()
    verdict = verify(path, expected_digest=digest, expected_records=lines)
    assert verdict.state is State.BROKEN
    assert verdict.line == recorded.count(b"\n", 0, length) + 1
    alone = verify(path)
    if length == 0 or recorded[length - 1 : length] == b"\n":
        assert alone.state is (State.INTACT if length else State.BROKEN)
    else:
        assert alone.state is State.TORN
    assert not alone.closed


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=400), behind=st.booleans())
def test_arbitrary_bytes_raise_nothing_but_broken_recording(
    tmp_path: Path, recorded: bytes, data: bytes, behind: bool
) -> None:
    path = tmp_path / "r"
    path.write_bytes(recorded + data if behind else data)
    verdict = verify(path)
    if behind:
        assert verdict.state is (State.BROKEN if data else State.INTACT)
    else:
        assert verdict.records == 0
        assert verdict.state is not State.INTACT
    try:
        list(read(path))
    except BrokenRecording as error:
        assert error.line >= 1


@pytest.mark.parametrize(
    "text",
    [
        b"{}",
        b'{"is":"ruled"}',
        b'{"is":"nothing","at_us":1}',
        b'{"is":"alert","at_us":1,"text":"x","more":1}',
        b'{"is":"alert","at_us":1,"text":"\xff"}',
        b'{"is":"alert","at_us":1,"text":' + b"[" * 100_000 + b"}",
        b'{"is":"opened","at_us":1}',
    ],
)
def test_a_well_chained_line_that_is_no_record_is_broken(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "r"
    writer = begin(path)
    writer.close()
    with path.open("ab") as file:
        file.write(line(link(writer.digest, text), text))
    verdict = verify(path)
    assert (verdict.state, verdict.line, verdict.records) == (State.BROKEN, 2, 1)


def test_nothing_follows_the_end(tmp_path: Path) -> None:
    path = tmp_path / "r"
    writer = whole(path)
    text = encode(Alert(at_us=1, text="late"))
    with path.open("ab") as file:
        file.write(line(link(writer.digest, text), text))
    assert verify(path).line == 12


def test_a_recording_of_another_session_or_format_is_not_taken_for_this_one(tmp_path: Path) -> None:
    path = tmp_path / "r"
    whole(path)
    other = verify(path, session="20261124-104512-000000")
    assert (other.state, other.line) == (State.BROKEN, 1)
    path.write_bytes(path.read_bytes().replace(b'"format":1', b'"format":2'))
    assert "format `2`" in verify(path).reason


def test_lines_swapped_or_dropped_are_seen(tmp_path: Path, recorded: bytes) -> None:
    lines = recorded.splitlines(keepends=True)
    path = tmp_path / "r"
    path.write_bytes(b"".join([*lines[:2], lines[3], lines[2], *lines[4:]]))
    assert verify(path).line == 3
    path.write_bytes(b"".join([*lines[:4], *lines[5:]]))
    assert verify(path).line == 5


def test_a_rebuilt_chain_is_seen_by_whoever_knows_the_end(tmp_path: Path, recorded: bytes) -> None:
    path = tmp_path / "r"
    digest = seed(SESSION)
    forged = b""
    for each in recorded.splitlines():
        text = each[65:].replace(b"DROP TABLE t", b"SELECT 2 + 2")
        digest = link(digest, text)
        forged += line(digest, text)
    path.write_bytes(forged)
    assert verify(path).state is State.INTACT
    verdict = verify(path, expected_digest=recorded.splitlines()[-1][:64].decode(), expected_records=11)
    assert (verdict.state, verdict.reason) == (State.BROKEN, "is not what the index knows")


def test_a_growing_file_is_verified_as_far_as_it_goes(tmp_path: Path) -> None:
    path = tmp_path / "r"
    writer = begin(path)
    header = writer.digest.hex()
    writer.ruled(1, operation(), ALLOW)
    known = {"session": SESSION, "expected_digest": header, "expected_records": 1, "growing": True}
    assert verify(path, **known).records == 2
    with path.open("ab") as file:
        file.write(b"0123")
    assert verify(path, **known).state is State.TORN
    assert verify(path, **{**known, "expected_digest": "0" * 64}).state is State.BROKEN
    writer.close()


def test_zeros_that_a_crash_left_behind_are_a_torn_tail(tmp_path: Path) -> None:
    path = tmp_path / "r"
    begin(path).close()
    with path.open("ab") as file:
        file.write(b"00ff" + b"\0" * 500)
    assert verify(path).state is State.TORN


def test_a_ruling_is_in_the_file_when_ruled_returns(tmp_path: Path) -> None:
    path = tmp_path / "r"
    writer = begin(path)
    for number in range(1, 4):
        writer.ruled(number, operation(), ALLOW)
        assert verify(path).records == writer.records == 1 + number
    writer.close()


def test_completed_waits_and_goes_out_in_order(tmp_path: Path) -> None:
    path = tmp_path / "r"
    writer = begin(path)
    writer.ruled(1, operation(), ALLOW)
    writer.completed(1, "SELECT 1", 1, "", ())
    writer.completed(1, 'odd "tag"', 1, "", ())
    assert writer.waiting
    assert verify(path).records == 2
    writer.flush()
    assert not writer.waiting
    assert verify(path).records == writer.records == 4
    tags = [entry.record.tag for entry in read(path) if isinstance(entry.record, Completed)]
    assert tags == ["SELECT 1", 'odd "tag"']
    writer.flush()
    assert verify(path).records == 4
    writer.close()


def test_completed_records_do_not_pile_up(tmp_path: Path) -> None:
    path = tmp_path / "r"
    writer = begin(path)
    for number in range(10_000):
        writer.completed(number, "INSERT 0 1", 1, "x" * 100, ())
        assert writer._waiting_bytes < 70_000
    writer.close()
    assert verify(path).records > 9000


def test_operations_that_never_complete_do_not_pile_up(tmp_path: Path) -> None:
    writer = begin(tmp_path / "r")
    statement = operation()
    for number in range(10_000):
        writer.ruled(number, statement, ALLOW)
    assert len(writer._released_us) == 4096
    writer.close()


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(texts=st.lists(st.text(st.characters(codec=None)), min_size=1, max_size=5), seen=st.integers(1, 3))
def test_any_text_is_recorded_on_one_line(tmp_path: Path, texts: list[str], seen: int) -> None:
    path = tmp_path / "r"
    path.unlink(missing_ok=True)
    writer = begin(path)
    for text in texts:
        once = operation(text)
        for _ in range(seen):
            writer.ruled(1, once, DENY)
    writer.decided(1, "H", texts[0], texts[-1], "")
    writer.completed(1, texts[0], 0, "", ())
    writer.closed(texts[0], 1, 1)
    writer.close()
    verdict = verify(path)
    assert verdict.state is State.INTACT
    assert verdict.records == len(texts) * seen + 4
    for entry in read(path):
        if isinstance(entry.record, Ruled):
            expected = texts[(entry.number - 2) // seen]
            assert entry.record.text == expected.encode("utf-8", "backslashreplace").decode()


def test_the_cache_of_pieces_is_bounded_and_never_confuses_rulings(tmp_path: Path) -> None:
    pieces = RulingPieces()
    path = tmp_path / "r"
    writer = begin(path, pieces)
    same = operation()
    for number in range(400):
        writer.ruled(number, operation("x" * 60_000), ALLOW)
        assert pieces._bytes <= 16 * 1024 * 1024
    writer.ruled(1, same, ALLOW)
    writer.ruled(2, same, DENY)
    writer.ruled(3, same, ALLOW)
    writer.ruled(4, operation("y" * 100_000), ALLOW)
    writer.close()
    last = [entry.record for entry in read(path)][-4:]
    assert [record.decision for record in last if isinstance(record, Ruled)] == ["allow", "deny", "allow", "allow"]
    assert max(len(piece) for piece, *_ in pieces._pieces.values()) < 70_000


def test_operations_with_one_example_keep_their_own_texts(tmp_path: Path) -> None:
    writer = begin(tmp_path / "a", RulingPieces())
    example = operation("SELECT 1")
    texts = ["SELECT 2", "SELECT 1", 'SELECT "text":""', "SELECT 3"]
    for op, text in enumerate(texts):
        own = example if text == example.recorded_text else replace(example, recorded_text=text, example=example)
        writer.ruled(op, own, DENY)
    writer.closed("done", len(texts), 0)
    ruled = [entry.record for entry in read(tmp_path / "a") if isinstance(entry.record, Ruled)]
    assert [record.text for record in ruled] == texts
    assert {record.policy for record in ruled} == {DENY.policy_version}


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB of the test's own."""
    mount = tmp_path / "disk"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(mount)], check=True)
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.parametrize("size", [100, 1000, 5000])
def test_a_full_disk_ends_the_writer_and_what_it_wrote_still_holds(tiny_disk: Path, size: int) -> None:
    path = tiny_disk / "r"
    writer = begin(path)
    statement = operation("x" * size)
    number = 0
    with pytest.raises(AuditUnavailable, match="cannot be written"):
        for number in range(1000):
            writer.completed(number, "SELECT 1", 1, "", ())
            writer.ruled(number, statement, ALLOW)
    assert number > 3
    records, digest = writer.records, writer.digest.hex()
    (tiny_disk / "ballast").unlink(missing_ok=True)
    with pytest.raises(AuditUnavailable, match="cannot go on"):
        writer.ruled(number, statement, ALLOW)
    with pytest.raises(AuditUnavailable):
        writer.closed("x", 1, 1)
    writer.completed(1, "SELECT 1", 1, "", ())
    writer.close()
    assert (writer.records, writer.digest.hex()) == (records, digest)
    verdict = verify(path, expected_records=records, expected_digest=digest)
    assert verdict.state in (State.TORN, State.INTACT)
    assert (verdict.records, verdict.closed) == (records, False)


def test_a_short_write_leaves_a_torn_tail_and_the_whole_lines_count(tmp_path: Path) -> None:
    """RLIMIT_FSIZE makes the kernel write less than it was asked to, at a byte of our choice."""
    script = f"""
import os, resource, signal, sys
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_recording as t
from dataclasses import replace
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path = Path({str(tmp_path / "r")!r})
writer = t.begin(path)
size = path.stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 500, size + 500))
for number in range(5):
    writer.completed(number, "SELECT 1", 1, "", ())
try:
    writer.ruled(9, t.operation(), t.ALLOW)
except t.AuditUnavailable as error:
    print(writer.records, writer.digest.hex(), "|", error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    told, _, error = done.stdout.partition("|")
    records, digest = told.split()
    assert "only `500` of" in error
    assert 1 < int(records) < 6
    verdict = verify(tmp_path / "r", expected_records=int(records), expected_digest=digest)
    assert (verdict.state, verdict.line) == (State.TORN, int(records) + 1)


def test_a_killed_writer_loses_no_ruling_that_it_had_told_of(tmp_path: Path) -> None:
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_recording as t
from dataclasses import replace
from pathlib import Path
writer = t.begin(Path({str(tmp_path / "r")!r}))
statement = t.operation()
number = 0
while True:
    number += 1
    writer.ruled(number, statement, t.ALLOW)
    sys.stdout.write(f"{{number}}\\n")
    sys.stdout.flush()
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        for _ in range(500):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        told = [500, *map(int, process.stdout.read().split())][-1]
    verdict = verify(tmp_path / "r")
    assert verdict.state in (State.INTACT, State.TORN)
    assert verdict.records >= 1 + told
    assert not verdict.closed


def test_a_record_beyond_the_bound_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.recording.writer.MAX_LINE", 10_000)
    monkeypatch.setattr("proxy.recording.reader.MAX_LINE", 10_000)
    path = tmp_path / "r"
    writer = begin(path)
    with pytest.raises(AuditUnavailable, match="exceeds `10000`"):
        writer.ruled(1, operation("x" * 10_000), ALLOW)
    writer.close()
    assert verify(path).state is State.INTACT
    with path.open("ab") as file:
        file.write(b"0" * 20_000)
    assert verify(path).reason == "longer than `10000` bytes"


def test_reading_needs_memory_for_one_line_only(tmp_path: Path) -> None:
    path = tmp_path / "r"
    writer = begin(path)
    statement = operation("x" * 10_000)
    for number in range(3000):
        writer.ruled(number, statement, ALLOW)
    writer.close()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert verify(path).records == 3001
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 * 1024


def headed(path: Path, header: bytes) -> Path:
    """A recording that has its header alone."""
    path.write_bytes(line(link(seed(SESSION), header), header))
    return path


def test_a_recording_of_an_older_version_is_read(tmp_path: Path) -> None:
    """What an image has got since is missing in it."""
    opened = json.loads(encode(OPENED))
    for image in opened["chain"]["lineage"]:
        for name in ("declared", "namespaces", "container", "sha256"):
            del image[name]
    path = headed(tmp_path / "r", json.dumps(opened).encode())
    ((record, told),) = tell(read(path, SESSION))
    assert record == OPENED
    assert "namespaces" not in told


def test_replay_tells_containers_and_namespaces_where_they_change(tmp_path: Path) -> None:
    root, client = CHAIN.lineage
    host = Namespaces(11, 12, 13, 14)
    boxed = msgspec.structs.replace(client, namespaces=Namespaces(21, 22, 13, 14), container="3f\x1b[2J")
    lineage = (
        msgspec.structs.replace(root, namespaces=host),
        msgspec.structs.replace(client, tgid=102, namespaces=host),
        msgspec.structs.replace(boxed, tgid=103),
        msgspec.structs.replace(boxed, tgid=104),
        # one that could not be read says nothing
        msgspec.structs.replace(client, tgid=105, namespaces=Namespaces(0, 12, 99, 14)),
    )
    header = encode(msgspec.structs.replace(OPENED, chain=msgspec.structs.replace(CHAIN, lineage=lineage)))
    ((_record, told),) = tell(read(headed(tmp_path / "r", header)))
    lines = [line.strip() for line in told.splitlines()]
    following = zip(lines, [*lines[1:], ""], strict=True)
    after = {int(line.split()[0]): next_line for line, next_line in following if " uid " in line}
    assert after[100] == "in namespaces: pid 11, mount 12, network 13, user 14"
    assert after[102].startswith("103 ")
    assert after[103] == "in container 3f\\x1b[2J; in other namespaces: pid 21, mount 22"
    assert after[104].startswith("105 ")
    assert after[105] == "in no container; in other namespaces: mount 12, network 99"


def test_replay_tells_every_record_and_lets_no_text_act_on_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "r"
    whole(path)
    told = "\n".join(text for _, text in tell(read(path)))
    for expected in (
        "agent-a > agent-b", "/usr/bin/psql", "user=app database=orders application_name=job", "SELECT 1",
        "waits for approval H-7KQ3F9", "approved", "root (uid 0): it is fine", "error 23505: duplicate",
        "masked public.t.a", "agent-b: deny by [default] (no rule)", "alert     something", "3 operations, 1 denied",
    ):  # fmt: skip
        assert expected in told
    evil = "a\x1b[2Jb\r\nc\u202ed\ud800\x9b31m\u200b"
    writer = begin(tmp_path / "evil")
    writer.login(evil, evil, ((evil, evil),), DENY)
    writer.ruled(1, operation(evil), Ruling(Decision.DENY, (Reason(evil, evil, Decision.DENY, evil),), "", "", evil))
    writer.decided(1, evil, evil, evil, evil)
    writer.completed(1, evil, 1, evil, (evil,))
    writer.alert(evil)
    writer.closed(evil, 1, 1)
    writer.close()
    for record, text in tell(read(tmp_path / "evil")):
        assert all(letter.isprintable() or letter == "\n" for letter in text), record
    assert visible("grün 表 \n") == "grün 表 \\n"
