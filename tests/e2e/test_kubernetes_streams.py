"""What lasts, and what is large: terminals, files, ports, logs, watches and lists through the gateway."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import json
import os
import pty
import secrets
import select
import signal
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from proxy.recording.records import Completed, Observed, Ruled
from tests.e2e.harbour import POD, WEB_PORT, Harbour, Lines, forwarded, spoken, until
from tests.lab.kubernetes import Kubectl, current_kubectl, kubectls, oldest_kubectl
from tests.lab.kubernetes.presence import built_or_skipped

CHUNK = 900_000
"""Bytes of a ConfigMap: etcd takes little more than a million."""
GIVEN_MEMORY_KIB = 40 * 1024
"""What a worker may grow by while tens of megabytes go through it."""


@pytest.fixture(params=["websocket", "spdy", "oldest"])
def kubectl(request: pytest.FixtureRequest) -> Kubectl:
    """The current one, the current one made to speak SPDY, and an old one."""
    built_or_skipped()
    match request.param:
        case "websocket":
            return current_kubectl()
        case "oldest":
            return oldest_kubectl()
        case _:
            return kubectls()[-1]


@contextlib.contextmanager
def terminal(
    harbour: Harbour, kubectl: Kubectl, *arguments: str, size: tuple[int, int]
) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """kubectl at a terminal of `size` (rows, columns), whose other end is ours."""
    leader, follower = pty.openpty()
    fcntl.ioctl(leader, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    process = subprocess.Popen(
        harbour.command("full", [kubectl.path, *arguments]),
        stdin=follower,
        stdout=follower,
        stderr=follower,
        start_new_session=True,
        env=harbour.environment(kubectl),
        cwd="/",
    )
    os.close(follower)
    try:
        yield leader, process
    finally:
        process.kill()
        process.wait()
        os.close(leader)


def read_terminal(leader: int, wanted: bytes, timeout_s: float = 20) -> bytes:
    seen = b""
    deadline = time.monotonic() + timeout_s
    while wanted not in seen:
        assert time.monotonic() < deadline, seen
        if select.select([leader], [], [], 0.5)[0]:
            try:
                seen += os.read(leader, 65536)
            except OSError:
                break
    assert wanted in seen, seen
    return seen


# --- exec, attach, cp -------------------------------------------------------------------------------------------------


def test_exec_carries_everything_both_ways(harbour: Harbour, kubectl: Kubectl) -> None:
    script = 'read x; echo "$x $COLOUR"; echo oops >&2; cat | wc -c; exit 7'
    done = harbour.kubectl(
        "full", "exec", "-i", POD, "--", "sh", "-c", script, kubectl=kubectl, stdin="apple\n" + "z" * 200_000
    )
    assert (done.stdout, done.returncode) == ("apple green\n200000\n", 7), done.stderr
    assert "oops" in done.stderr
    done = harbour.kubectl("full", "exec", POD, "--", "seq", "1", "200000", kubectl=kubectl)
    assert done.stdout == "".join(f"{number}\n" for number in range(1, 200_001))


def test_a_terminal_is_recorded_and_replayed(harbour: Harbour, kubectl: Kubectl) -> None:
    mark = harbour.mark()
    with terminal(harbour, kubectl, "exec", "-it", POD, "--", "sh", size=(41, 123)) as (leader, process):
        os.write(leader, b'until [ "$(stty size)" = "41 123" ]; do sleep 0.1; done; echo "<$((6*7))>"\n')
        read_terminal(leader, b"<42>")
        fcntl.ioctl(leader, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 90, 0, 0))
        process.send_signal(signal.SIGWINCH)  # it is not kubectl's controlling terminal
        os.write(leader, b'until [ "$(stty size)" = "30 90" ]; do sleep 0.1; done; echo "<$((6*8))>"; exit 3\n')
        read_terminal(leader, b"<48>")
        assert process.wait(20) == 3
    session, operation = _streamed(harbour, mark)
    told = harbour.gateway.cli("replay", session, "--operation", str(operation)).stdout
    assert "create pods/shell exec in default: sh" in told and "<42>" in told
    header, *events = harbour.gateway.cli(
        "replay", session, "--operation", str(operation), "--asciicast"
    ).stdout.splitlines()
    assert json.loads(header)["version"] == 2
    assert (json.loads(header)["width"], json.loads(header)["height"]) == (123, 41)
    shown = [json.loads(line) for line in events]
    assert any(kind == "r" and data == "90x30" for _, kind, data in shown)
    output = "".join(data for _, kind, data in shown if kind == "o")
    assert "<42>" in output and "<48>" in output


def _streamed(harbour: Harbour, mark: int) -> tuple[str, int]:
    """Session and operation of the only thing since `mark` that had a stream recorded."""
    found = {
        (row.id, record.op)
        for row in harbour.sessions_since(mark)
        for record in harbour.records(row)
        if isinstance(record, Observed)
    }
    (only,) = found
    return only


def test_attach_reaches_the_main_process(harbour: Harbour, kubectl: Kubectl) -> None:
    marker = f"marker-{secrets.token_hex(4)}"
    with harbour.start("full", "attach", "-i", POD, kubectl=kubectl) as attached:
        lines = Lines(attached)
        assert attached.stdin is not None
        attached.stdin.write(f"{marker}\n")
        attached.stdin.flush()
        lines.await_text(marker)
    assert marker in harbour.kubectl("full", "logs", POD, kubectl=kubectl).stdout


def test_files_are_copied_both_ways_and_seen_as_what_they_are(
    harbour: Harbour, kubectl: Kubectl, tmp_path: Path
) -> None:
    content = secrets.token_bytes(1_000_000)
    (tmp_path / "there").write_bytes(content)
    mark = harbour.mark()
    for pair in ([tmp_path / "there", f"{POD}:copied"], [f"{POD}:copied", tmp_path / "back"]):
        done = harbour.kubectl("full", "cp", *pair, kubectl=kubectl)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "back").read_bytes() == content
    told = [record.text for record in harbour.ruled_since(mark) if record.text.startswith("create pods/shell exec")]
    assert any(": tar xmf - " in text or ": tar -xmf - " in text for text in told), told
    assert any(": tar cf - copied" in text for text in told), told


def test_ports_are_forwarded(harbour: Harbour, kubectl: Kubectl) -> None:
    mark = harbour.mark()
    with forwarded(harbour, "debugger", [WEB_PORT], kubectl=kubectl) as (ports, _lines):
        said: dict[int, bytes] = {}

        def speak(number: int) -> None:
            said[number] = spoken(harbour, ports[WEB_PORT], f"{number}:".encode() + b"a" * 300_000)

        threads = [threading.Thread(target=speak, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert said == {number: f"{number}:".encode() + b"A" * 300_000 for number in range(6)}
    connections = [record for record in harbour.ruled_since(mark) if record.kind == "forward"]
    assert [record.text for record in connections] == [f"forward pods/{POD} in default to {WEB_PORT}"] * 6


def test_logs_are_followed(harbour: Harbour, kubectl: Kubectl) -> None:
    harbour.bed.node.run_pod("ticker", ["sh", "-c", "i=0; while true; do i=$((i+1)); echo tick $i; sleep 0.1; done"])
    try:
        with harbour.start("debugger", "logs", "--follow", "ticker", kubectl=kubectl) as following:
            lines = Lines(following)
            first = int(lines.await_text("tick").split()[-1])
            lines.await_text(f"tick {first + 10}")
    finally:
        harbour.server.kubectl("delete", "pod", "ticker", "--force")


# --- watches ----------------------------------------------------------------------------------------------------------


def test_a_watch_tells_at_once(harbour: Harbour, kubectl: Kubectl) -> None:
    with harbour.start("reader", "get", "configmaps", "--watch", "-o", "name", kubectl=kubectl) as watching:
        lines = Lines(watching)
        time.sleep(1)
        names = [f"event-{number}" for number in range(5)]
        try:
            for name in names:
                harbour.server.create(
                    "/api/v1/namespaces/default/configmaps", {"metadata": {"name": name}, "data": {"a": "b"}}
                )
                begun = time.monotonic()
                lines.await_text(f"configmap/{name}")
                assert time.monotonic() - begun < 2
        finally:
            harbour.server.kubectl("delete", "configmap", *names, "--ignore-not-found")


def test_a_worker_killed_under_a_watch_costs_that_watch_only(harbour: Harbour) -> None:
    with harbour.start("reader", "get", "configmaps", "--watch", "-o", "name") as watching:
        lines = Lines(watching)
        harbour.server.kubectl("create", "configmap", "seen")
        lines.await_text("configmap/seen")
        harbour.server.kubectl("delete", "configmap", "seen")
        before = harbour.workers()
        (serving,) = [pid for pid in before if _serves(harbour, pid)]
        os.kill(serving, 9)
        watching.wait(20)
        assert serving not in harbour.workers()
    until(lambda: len(harbour.workers()) == len(before), "another worker")
    assert harbour.kubectl("reader", "get", "configmaps").returncode == 0
    ended = until(lambda: [row for row in harbour.sessions() if str(row.state) == "interrupted"], "the session is told")
    assert [record.text for record in harbour.records(ended[0]) if isinstance(record, Ruled)]


def _serves(harbour: Harbour, pid: int) -> bool:
    """Whether the worker has a connection to the server."""
    listed = subprocess.run(
        [
            "nsenter",
            f"--net=/run/netns/{harbour.gateway.namespace}",
            "ss",
            "-Htnp",
            "state",
            "established",
            "dport",
            "=",
            ":6443",
        ],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return f"pid={pid}," in listed


# --- what is large ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(harbour: Harbour) -> Iterator[str]:
    """A namespace whose ConfigMaps come to 54 MB of JSON."""
    harbour.server.create("/api/v1/namespaces", {"metadata": {"name": "large"}})
    value = base64.b64encode(secrets.token_bytes(CHUNK // 4 * 3)).decode()
    for number in range(60):
        harbour.server.create(
            "/api/v1/namespaces/large/configmaps",
            {"metadata": {"name": f"large-{number:02}", "labels": {"five": str(number < 6)}}, "data": {"value": value}},
        )
    yield "large"
    harbour.server.request("DELETE", "/api/v1/namespaces/large/configmaps")


def raw_digest(harbour: Harbour, hops: str, path: str) -> tuple[int, str]:
    """Size and SHA-256 of what kubectl gets, which nobody here keeps."""
    script = '"$0" get --raw "$1" --disable-compression | tee >(wc -c >&2) | sha256sum'
    done = harbour.run(hops, ["bash", "-c", script, current_kubectl().path, path])
    return int(done.stderr), done.stdout.split()[0]


def memory_kib(pids: Sequence[int]) -> dict[int, int]:
    """What each has at most had resident."""
    return {
        pid: int(line.split()[1])
        for pid in pids
        for line in Path(f"/proc/{pid}/status").read_text().splitlines()
        if line.startswith("VmHWM")
    }


def reset_peaks(pids: Sequence[int]) -> None:
    for pid in pids:
        Path(f"/proc/{pid}/clear_refs").write_text("5")


def test_a_list_of_five_megabytes_is_the_servers(harbour: Harbour, large: str) -> None:
    path = f"/api/v1/namespaces/{large}/configmaps?labelSelector=five%3DTrue"
    direct = harbour.server.request("GET", path, token=harbour.server.token).body
    assert len(direct) > 5_000_000
    done = harbour.kubectl("full", "get", "--raw", path)
    assert done.stdout.encode() == direct
    assert (
        len(
            json.loads(
                harbour.kubectl("full", "get", "configmaps", "-n", large, "-l", "five=True", "-o", "json").stdout
            )["items"]
        )
        == 6
    )
    chunked = harbour.kubectl("full", "get", "configmaps", "-n", large, "--chunk-size=7", "-o", "name").stdout
    assert len(chunked.splitlines()) == 60


def test_compressed_answers_pass_as_they_are(harbour: Harbour, large: str) -> None:
    path = f"/api/v1/namespaces/{large}/configmaps?labelSelector=five%3DTrue"
    direct = harbour.server.request("GET", path, token=harbour.server.token).body
    head = "GET %s HTTP/1.1\r\nHost: cluster\r\nAccept-Encoding: gzip\r\nConnection: close\r\n\r\n"
    for hops, compressed in (("full", True), ("masked", False)):
        answered = harbour.converse_once(hops, head % path)
        assert (b"content-encoding: gzip" in answered.received.lower()) is compressed
        if compressed:
            assert answered.body == direct
        else:
            assert {each["data"]["value"] for each in json.loads(answered.body)["items"]} == {"***"}


@pytest.mark.parametrize("hops", ["full", "masked"])
def test_fifty_megabytes_go_through_in_bounded_memory(harbour: Harbour, large: str, hops: str) -> None:
    path = f"/api/v1/namespaces/{large}/configmaps"
    # both as of the same version, which stands in the list
    version = harbour.server.request("GET", f"{path}?limit=1").json()["metadata"]["resourceVersion"]
    path += f"?resourceVersion={version}&resourceVersionMatch=Exact"
    workers = harbour.workers()
    harbour.kubectl(hops, "get", "configmaps", "-n", large, "-l", "five=True", "-o", "name")
    reset_peaks(workers)
    before = memory_kib(workers)
    direct = harbour.server.request("GET", path, token=harbour.server.token).body
    size, digest = raw_digest(harbour, hops, path)
    grown = max(memory_kib(workers)[pid] - before[pid] for pid in workers)
    assert len(direct) > 50_000_000
    if hops == "full":
        assert (size, digest) == (len(direct), hashlib.sha256(direct).hexdigest())
    else:
        assert 10_000 < size < 1_000_000
    assert grown < GIVEN_MEMORY_KIB


def test_a_client_that_reads_slowly_holds_the_server_back(harbour: Harbour, large: str) -> None:
    workers = harbour.workers()
    reset_peaks(workers)
    before = memory_kib(workers)
    asked = f"GET /api/v1/namespaces/{large}/configmaps HTTP/1.1\r\nHost: cluster\r\nConnection: close\r\n\r\n"
    answered = harbour.converse_once("full", asked, 3)
    assert len(answered.received) > 50_000_000 and answered.end == "eof"
    assert max(memory_kib(workers)[pid] - before[pid] for pid in workers) < GIVEN_MEMORY_KIB


def test_a_body_that_is_too_large_to_be_judged_is_refused(harbour: Harbour) -> None:
    body = json.dumps(
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "huge"}, "data": {"a": "x" * 9_000_000}}
    )
    head = "POST /api/v1/namespaces/default/configmaps HTTP/1.1\r\nHost: cluster\r\nContent-Type: application/json\r\n"
    answered = harbour.converse_once("full", f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}")
    assert answered.statuses == [413]
    assert b"which is more than is judged" in answered.received
    assert harbour.server.request("GET", "/api/v1/namespaces/default/configmaps/huge").status == 404


def test_requests_on_a_kept_connection_are_recorded_each(harbour: Harbour) -> None:
    mark = harbour.mark()
    asked = "GET /api/v1/namespaces/default/pods/%s HTTP/1.1\r\nHost: cluster\r\n\r\n"
    answered = harbour.converse_once("full", "".join(asked % f"pod-{number}" for number in range(20)), patience_s=3)
    assert answered.statuses == [404] * 20
    (session,) = harbour.sessions_since(mark)
    records = harbour.records(session)
    assert [each.text for each in records if isinstance(each, Ruled)] == [
        f"get pods/pod-{n} in default" for n in range(20)
    ]
    assert len([each for each in records if isinstance(each, Completed)]) == 20
