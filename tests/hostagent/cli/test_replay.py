"""`hopgate replay` of one operation, and of its terminal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hostagent.control.sessions import Sessions
from hostagent.control.store import Store
from hostagent.settings import load
from proxy.model import Chain, Decision, Endpoint, Operation, OperationKind, Phase, Reason, Ruling
from proxy.recording import Writer

ROOT = Path(__file__).parents[3]
ALLOW = Ruling(Decision.ALLOW, (Reason("agent-a", "shell", Decision.ALLOW, ""),), "", "", "v1")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    config = tmp_path / "hopgate.yaml"
    config.write_text(f"state_dir: {tmp_path}/state\nrun_dir: {tmp_path}\npolicy_dir: {tmp_path}/policy.d\n")
    return config


@pytest.fixture
def session(config: Path) -> str:
    settings = load(config)
    store = Store.create(settings.store_path)
    opened = Sessions(store, settings.recordings_dir, host="runner-1").open(
        peer=Endpoint("127.0.0.1", 40000),
        dialled=Endpoint("192.0.2.7", 6443),
        target="cluster",
        protocol="kubernetes",
        chain=Chain((), ()),
        policy_version="v1",
        refusal="",
    )
    writer = Writer(opened.fd, opened.id, opened.records, bytes.fromhex(opened.digest), lambda: 1_700_000_000 * 10**9)
    for number, text in enumerate(("get pods in shop", "create pods/web exec in shop: sh"), 1):
        operation = Operation("kubernetes", OperationKind.REQUEST, Phase.EXECUTE, text, text, (), once=True)
        writer.ruled(number, operation, ALLOW)
    writer.observed(2, "stdout", b"hello\n")
    writer.completed(2, "exit 0", 0, "", ())
    writer.closed("the client left", 2, 0)
    writer.close()
    store.close()
    return opened.id


def replay(config: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hostagent.cli", "replay", *arguments, "--config", str(config)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error", "COLUMNS": "300"}
    done = subprocess.run(command, capture_output=True, text=True, env=environ, timeout=60)
    assert "Traceback" not in done.stdout + done.stderr
    return done


def test_replay_of_one_operation_tells_what_it_showed(config: Path, session: str) -> None:
    done = replay(config, session, "--operation", "2")
    assert done.returncode == 0, done
    assert "get pods" not in done.stdout
    assert "stdout    #2 hello\\n" in done.stdout
    assert "completed #2 exit 0" in done.stdout


def test_replay_as_asciicast(config: Path, session: str) -> None:
    done = replay(config, session, "--operation", "2", "--asciicast")
    assert done.returncode == 0, done
    header, *events = (json.loads(line) for line in done.stdout.splitlines())
    assert header["version"] == 2
    assert header["title"] == "create pods/web exec in shop: sh"
    assert events == [[0.0, "o", "hello\r\n"]]


def test_what_cannot_be_played(config: Path, session: str) -> None:
    assert "has nothing to play" in replay(config, session, "--operation", "1", "--asciicast").stderr
    assert "`9` is not in the recording" in replay(config, session, "--operation", "9", "--asciicast").stderr
    done = replay(config, session, "--asciicast")
    assert done.returncode == 1
    assert "needs `--operation N`" in done.stderr
