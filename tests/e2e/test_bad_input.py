"""Bad policies, settings, credentials and servers: one clear message that says which file and line or which peer, and
nothing gets further than it may."""

from __future__ import annotations

import json
import re
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from hostagent.control.store import Store
from tests.e2e import beds
from tests.e2e.beds import DATABASE, JOB, PASSWORD, Bed, target
from tests.lab.cgroups import cgroup
from tests.lab.hopgate import Gateway, GatewayError, gateway
from tests.lab.namespaces import entered, namespace
from tests.lab.postgres import postgres

WRONG_PASSWORD = "not-the-password-55e1"
OTHER_SECRETS = ("topsecret-2b7e", "topsecret-9d01")
VERIFIED = "{mode: verify-full, ca: ../ca.pem}"
PLAIN = "{mode: disable}"
REQUIRED = "{mode: require}"
LOGIN_S = 60.0
DIAL_S = 10.0

GOOD_POLICY = JOB + "targets:\n" + target("shop", f"{DATABASE}:5432", tls=VERIFIED) + beds.rules()


@dataclass(frozen=True)
class Peer:
    """A target that is broken in one way. `said` is what the client is told beside the target's name, and what the
    recording holds; `logged` what the operators find in the log, the same unless given."""

    address: str
    said: str
    tls: str = VERIFIED
    credential: str = "shop"
    logged: str = ""
    server_name: str = beds.SERVER_NAME


PEERS = {
    "nothing-listens": Peer(f"{DATABASE}:5999", "not reachable: connection refused"),
    "wrong-ca": Peer(
        "192.0.2.11:5432",
        "its certificate was not accepted: unable to get local",
        "{mode: verify-full, ca: ../other-ca.pem}",
    ),
    "wrong-name": Peer(
        "192.0.2.12:5432", "its certificate was not accepted: hostname mismatch", server_name="other.shop.example"
    ),
    "expired": Peer(
        f"{DATABASE}:5434",
        "its certificate was not accepted: certificate has expired",
        "{mode: verify-full, ca: ../expired-ca.pem}",
    ),
    "offers-no-tls": Peer(
        f"{DATABASE}:5433", "has to be spoken to with TLS (`require`), but the server does not", REQUIRED
    ),
    "wrong-password": Peer("192.0.2.13:5432", "password authentication failed for user", credential="wrong-password"),
    "no-credential": Peer(
        "192.0.2.14:5432",
        "the gateway has no credential for",
        credential="missing",
        logged="/credentials/missing`: no such file or directory",
    ),
    "open-credential": Peer(
        "192.0.2.15:5432",
        "the gateway has no credential for",
        credential="open",
        logged="/credentials/open` has mode `0644`, others may use it: `chmod 600 ",
    ),
    "no-yaml": Peer(
        "192.0.2.16:5432",
        "the gateway has no credential for",
        credential="no-yaml",
        logged="/credentials/no-yaml:3: credential is not valid yaml",
    ),
    "closes": Peer(f"{DATABASE}:6001", "closed the connection during the login", PLAIN),
    "closes-during-tls": Peer(f"{DATABASE}:6002", "connection reset by peer", REQUIRED),
    "closes-during-scram": Peer(f"{DATABASE}:6003", "closed the connection during the login", PLAIN),
    "garbage": Peer(f"{DATABASE}:6004", "broke the protocol: message `h` has length", PLAIN),
    "garbage-for-tls": Peer(f"{DATABASE}:6005", "did not answer the request for tls", REQUIRED),
    "oversized": Peer(f"{DATABASE}:6006", "broke the protocol: message `r` has length `2147483647`", PLAIN),
    "echoes-password": Peer(f"{DATABASE}:6007", "no entry for `<redacted>`", PLAIN),
}
BEHAVIOURS = {
    6001: beds.close_after_startup,
    6002: beds.close_during_tls,
    6003: beds.close_during_scram,
    6004: beds.send_garbage,
    6005: beds.send_garbage,
    6006: beds.announce_too_much,
    6007: beds.echo_password,
    6008: beds.say_nothing,
    6009: beds.answer_garbage,
    6010: beds.announce_a_row_too_large,
    6011: beds.ask_for_the_password_late,
    6012: beds.reset_in_a_reply,
}
BLACKHOLE = "198.51.100.1"
SLOW = {
    "blackhole": Peer(f"{BLACKHOLE}:5432", "not reachable: it did not answer in time"),
    "silent": Peer(f"{DATABASE}:6008", "did not finish the login in time", PLAIN),
}


RESETS = f"{DATABASE}:6012"
AFTER_LOGIN = {
    "answers-garbage": Peer(f"{DATABASE}:6009", "broke the protocol", PLAIN),
    "row-too-large": Peer(f"{DATABASE}:6010", "broke the protocol", PLAIN),
    "late-password": Peer(f"{DATABASE}:6011", "broke the protocol", PLAIN),
}

WAITING_CLIENT = """
import json, socket, struct, sys, time
how, host = sys.argv[1:]
sock = socket.create_connection((host, 5432))
begun = time.monotonic()
if how == "drips":
    sock.settimeout(1)
    startup = struct.pack("!II", 4000, 196608) + b"user\\0"
elif how == "stalls in tls":
    sock.sendall(struct.pack("!II", 8, 80877103))
    assert sock.recv(1) == b"S"
got = b""
while True:
    try:
        data = sock.recv(65536)
    except TimeoutError:
        sock.send(startup[:1] or b"x")
        startup = startup[1:]
        continue
    except OSError:
        break
    if not data:
        break
    got += data
print(json.dumps({"seconds": time.monotonic() - begun, "got": got.decode("latin-1")}))
"""
WAITING = {"says nothing": LOGIN_S, "drips": LOGIN_S, "stalls in tls": 10.0}


@dataclass
class Answer:
    status: int
    stderr: str
    seconds: float


@pytest.fixture(scope="module")
def world() -> Iterator[Bed]:
    with ExitStack() as stack:
        made = stack.enter_context(beds.bed("badinput", settings={"workers": 1}))
        stack.enter_context(postgres(address=DATABASE, namespace=made.database, port=5433, tls=False))
        old = stack.enter_context(
            postgres(address=DATABASE, namespace=made.database, port=5434, expired=True, server_name=beds.SERVER_NAME)
        )
        shutil.copy(old.ca_path, made.gateway.directory / "expired-ca.pem")
        for port, behave in BEHAVIOURS.items():
            stack.enter_context(beds.hostile_server(made.database, DATABASE, port, behave))
        # the other end of the wire drops what it gets for this address: nobody answers, not even with a refusal
        _ip(made.runner, "route", "add", BLACKHOLE, "via", DATABASE)
        _ip(made.database, "route", "add", "blackhole", BLACKHOLE)
        made.gateway.write_policy(
            JOB
            + "targets:\n"
            + target("shop", f"{DATABASE}:5432", tls=VERIFIED)
            + "".join(
                target(name, peer.address, tls=peer.tls, credential=peer.credential).replace(
                    beds.SERVER_NAME, peer.server_name
                )
                for name, peer in {**PEERS, **SLOW, **AFTER_LOGIN}.items()
            )
            + target("resets", RESETS, tls=PLAIN)
            + beds.rules()
        )
        credentials = made.gateway.directory / "credentials"
        made.gateway.write_credential("wrong-password", "shop_app", WRONG_PASSWORD)
        made.gateway.write_credential("open", "shop_app", OTHER_SECRETS[0])
        (credentials / "open").chmod(0o644)
        made.gateway.write_credential("no-yaml", "shop_app", "x")
        (credentials / "no-yaml").write_text(f"user: shop_app\npassword: '{OTHER_SECRETS[1]}\n")
        made.gateway.start()
        yield made


def _ip(netns: str, *arguments: str) -> None:
    subprocess.run(["ip", "-n", netns, *arguments], check=True, capture_output=True)


def ask(bed: Bed, address: str) -> Answer:
    host, _, port = address.partition(":")
    begun = time.monotonic()
    done = bed.psql("SELECT 1", host=host, port=int(port), tls="require", timeout_s=90)
    return Answer(done.returncode, done.stderr, time.monotonic() - begun)


@pytest.fixture(scope="module", autouse=True)
def slow_answers(world: Bed) -> Iterator[dict[str, Answer]]:
    """What waits for a deadline waits while the other tests run."""
    found: dict[str, Answer] = {}

    def wait(name: str) -> None:
        found[name] = ask(world, SLOW[name].address)

    def hang(how: str) -> None:
        told = json.loads(world.python(WAITING_CLIENT, how, DATABASE, timeout_s=90))
        found[how] = Answer(0, told["got"], told["seconds"])

    threads = [threading.Thread(target=wait, args=(name,)) for name in SLOW]
    threads += [threading.Thread(target=hang, args=(how,)) for how in WAITING]
    for thread in threads:
        thread.start()
    yield found
    for thread in threads:
        thread.join(90)


# --- peers ------------------------------------------------------------------------------------------------------------


def test_the_bed_serves_who_is_not_broken(world: Bed) -> None:
    done = world.psql("SELECT current_user", tls="require")
    assert (done.returncode, done.stdout.strip()) == (0, "shop_app"), done.stderr


@pytest.mark.parametrize("name", PEERS)
def test_a_broken_target_is_named_to_client_log_and_recording(world: Bed, name: str) -> None:
    check(world, name, PEERS[name], ask(world, PEERS[name].address))


def check(bed: Bed, name: str, peer: Peer, answer: Answer) -> None:
    assert answer.status == 2
    assert answer.stderr.count("FATAL: ") == 1, answer.stderr
    assert f"target `{name}`" in answer.stderr
    assert peer.said.lower() in answer.stderr.lower()
    assert "HINT: " in answer.stderr and "operators" in answer.stderr
    sessions = [row for row in bed.sessions() if row["target"] == name]
    assert len(sessions) == 1
    session = str(sessions[0]["id"])
    lines = [str(line["why"]).lower() for line in bed.log_lines() if line.get("session") == session and "why" in line]
    logged = (peer.logged or peer.said).lower()
    assert any(logged in line for line in lines), lines
    beds.wait_until(
        lambda: any(row["id"] == session and row["state"] == "closed" for row in bed.sessions()), "session closed"
    )
    records = bed.replay(session)
    told = " ".join(str(record.get("text", "")) + str(record.get("reason", "")) for record in records)
    assert peer.said.lower() in told.lower()
    assert not [record for record in records if record["is"] == "ruled"]


@pytest.mark.parametrize("name", AFTER_LOGIN)
def test_a_server_that_turns_hostile_after_the_login_ends_its_session_with_a_word(world: Bed, name: str) -> None:
    peer = AFTER_LOGIN[name]
    answer = ask(world, peer.address)
    assert answer.seconds < 10
    assert answer.status == 2
    assert answer.stderr.count("FATAL: ") == 1, answer.stderr
    assert peer.said in answer.stderr
    assert peer.said in ending(world, name)


def ending(bed: Bed, name: str) -> str:
    """Why the one session with this target was closed, as its recording says."""

    def closed() -> list[str]:
        return [str(row["id"]) for row in bed.sessions() if row["target"] == name and row["state"] == "closed"]

    beds.wait_until(lambda: bool(closed()), f"the session with `{name}` is closed")
    (session,) = closed()
    last = bed.replay(session)[-1]
    assert last["is"] == "closed"
    return str(last["reason"])


def test_a_server_that_vanishes_in_a_reply_looks_to_the_client_as_it_would_without_us(world: Bed) -> None:
    answer = ask(world, RESETS)
    assert answer.status == 2
    assert "connection to server was lost" in answer.stderr
    assert ending(world, "resets") == "the server closed the connection"


def test_the_next_client_is_served_after_all_of_them(world: Bed) -> None:
    assert world.psql("SELECT 1", tls="require").stdout == "1\n"
    assert world.status()["worker_deaths"] == 0


# --- policy at reload -------------------------------------------------------------------------------------------------

BAD_POLICIES = {
    "unknown key": (
        GOOD_POLICY.replace("decision: allow", "decison: allow"),
        "decison",
    ),
    "bad YAML": (GOOD_POLICY + "  - {name: [\n", "YAML"),
    "unknown agent": (GOOD_POLICY.replace("agents: job,", "agents: jbo,"), "jbo"),
    "missing CA": (GOOD_POLICY.replace("../ca.pem", "../no-such-ca.pem"), "no-such-ca.pem"),
}


def bad_line(text: str, word: str) -> int:
    """The line that holds the mistake; of bad YAML the last."""
    lines = text.splitlines()
    return next((number for number, line in enumerate(lines, 1) if word in line), len(lines))


@pytest.mark.parametrize("kind", BAD_POLICIES)
def test_a_bad_policy_at_reload_leaves_the_old_one_in_force(world: Bed, kind: str) -> None:
    text, word = BAD_POLICIES[kind]
    path = world.gateway.policy_dir / "policy.yaml"
    good, before = path.read_text(), world.status()["policy"]
    path.write_text(text)
    try:
        done = world.gateway.cli("reload", check=False)
        status = world.status()
        served = world.psql("SELECT 1", tls="require")
    finally:
        path.write_text(good)
    assert done.returncode == 1
    found = re.search(r"policy\.yaml:(\d+)", done.stderr)
    assert found is not None, done.stderr
    expected = bad_line(text, word)
    # the end of the file is where an unclosed bracket is noticed
    assert int(found[1]) in ((expected, expected + 1) if kind == "bad YAML" else (expected,)), done.stderr
    assert word.lower() in done.stderr.lower()
    assert "Traceback" not in done.stderr
    assert status["policy"] == before
    assert found[0] in str(status["policy_problem"])
    assert served.stdout == "1\n", served.stderr
    assert world.gateway.cli("reload").returncode == 0
    assert world.status()["policy_problem"] == ""


# --- at start ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def unstarted(tmp_path: Path) -> Iterator[Gateway]:
    with (
        namespace() as name,
        cgroup("badstart") as hooked,
        gateway(tmp_path / "gateway", namespace=name, cgroup=hooked, settings={"workers": 1}) as made,
    ):
        yield made


def test_a_bad_policy_at_start_denies_everything(world: Bed, tmp_path: Path) -> None:
    with (
        cgroup("badstart") as hooked,
        gateway(tmp_path / "gateway", namespace=world.database, cgroup=hooked, settings={"workers": 1}) as made,
    ):
        shutil.copy(world.server.ca_path, made.directory / "ca.pem")
        for kind, (text, word) in BAD_POLICIES.items():
            made.write_policy(text)
            made.start()
            status = made.cli("status").stdout
            done = made.run(
                ["psql", "-X", "-c", "SELECT 1", f"host={DATABASE} dbname=shop user=shop_app sslmode=disable"]
            )
            made.stop()
            where = re.search(r"policy\.yaml:\d+", status)
            assert where is not None, (kind, status)
            assert word.lower() in status.lower(), kind
            log = made.log()
            assert where[0] in log, kind
            assert "everything is denied" in log
            assert done.returncode == 2, kind
            assert "is no target of the policy on this host" in done.stderr
            made.log_path.unlink()


def refused(made: Gateway) -> str:
    """What `hopgate run` said in one line before it ended, with nothing put on the host."""
    with pytest.raises(GatewayError):
        made.start()
    assert made.process is not None
    assert made.process.wait(10) == 1
    assert not made.pin_dir.exists()
    rules = subprocess.run(
        ["ip", "netns", "exec", made.namespace, "iptables-save"], check=True, capture_output=True, text=True
    ).stdout
    assert "HOPGATE" not in rules
    log = made.log()
    assert "Traceback" not in log
    return last_words(made)


def last_words(made: Gateway) -> str:
    """The line with which the daemon ended; its workers, which were on their way, may say theirs after it."""
    return [line for line in made.log().splitlines() if not line.startswith("{")][-1]


def test_a_start_that_fails_on_what_it_keeps_leaves_the_gate_closed(world: Bed, tmp_path: Path) -> None:
    with (
        cgroup("badstart") as hooked,
        gateway(tmp_path / "gateway", namespace=world.database, cgroup=hooked, settings={"workers": 1}) as made,
    ):
        (made.state_dir / "ca").mkdir(parents=True)
        (made.state_dir / "ca" / "ca.pem").write_text("no certificate")
        with pytest.raises(GatewayError):
            made.start()
        assert "certificate authority" in last_words(made)
        done = made.run(["psql", "-X", "-w", "-c", "SELECT 1", f"host={DATABASE} dbname=shop user=shop_app"])
        assert done.returncode == 2
        assert "Connection refused" in done.stderr


def test_an_index_that_cannot_be_brought_up_to_date_leaves_the_gate_closed(world: Bed, tmp_path: Path) -> None:
    with (
        cgroup("badstart") as hooked,
        gateway(tmp_path / "gateway", namespace=world.database, cgroup=hooked, settings={"workers": 1}) as made,
    ):
        made.state_dir.mkdir(parents=True)
        store = Store.create(made.state_dir / "control.sqlite")
        store.close()
        with sqlite3.connect(made.state_dir / "control.sqlite") as index:
            # sessions cannot be recovered from an index that refuses to be changed, as on a full disk
            index.execute("CREATE TRIGGER full BEFORE UPDATE ON approvals BEGIN SELECT RAISE(ABORT, 'full'); END")
            index.execute(
                "INSERT INTO approvals (id, session, operation, hop, rule, preview, asked_us, deadline_us, decided_us,"
                " outcome, \"by\", reason) VALUES ('H-222222', 's', 1, 'a', 'r', '', 1, 2, 0, 'pending', '', '')"
            )
        index.close()
        with pytest.raises(GatewayError):
            made.start()
        assert "control.sqlite" in last_words(made)
        done = made.run(["psql", "-X", "-w", "-c", "SELECT 1", f"host={DATABASE} dbname=shop user=shop_app"])
        assert done.returncode == 2
        assert "Connection refused" in done.stderr


def test_settings_with_an_unknown_key_are_refused_with_file_and_line(unstarted: Gateway) -> None:
    lines = unstarted.config.read_text().splitlines()
    lines.insert(3, "wrokers: 2")
    unstarted.config.write_text("\n".join(lines) + "\n")
    assert refused(unstarted).startswith(f"{unstarted.config}:4: unknown key `wrokers`: expected one of ")


def test_a_worker_user_that_does_not_exist_is_refused(unstarted: Gateway) -> None:
    text = unstarted.config.read_text()
    unstarted.config.write_text(text.replace("worker_user: nobody", "worker_user: nosuchuser"))
    unstarted.write_policy(JOB)
    assert refused(unstarted).startswith("worker_user `nosuchuser` does not exist: ")


def test_root_is_refused_as_worker_user(unstarted: Gateway) -> None:
    text = unstarted.config.read_text()
    unstarted.config.write_text(text.replace("worker_user: nobody", "worker_user: root"))
    assert refused(unstarted).startswith("worker_user `root` is root: ")


def test_a_port_in_use_is_refused(unstarted: Gateway) -> None:
    with entered(unstarted.namespace):
        taken = socket.create_server(("0.0.0.0", 301))
    with taken:
        assert refused(unstarted).startswith("cannot listen on port `301`: Address already in use: ")


def test_a_second_daemon_on_the_same_control_socket_is_refused(world: Bed, unstarted: Gateway) -> None:
    text = unstarted.config.read_text()
    theirs = world.gateway.directory / "run"
    unstarted.config.write_text(text.replace(str(unstarted.directory / "run"), str(theirs)))
    assert refused(unstarted).startswith(f"another hopgate answers on `{theirs}/control.sock`: ")
    assert world.psql("SELECT 1", tls="require").stdout == "1\n"


def test_somebody_else_than_root_is_refused() -> None:
    # imports first: the checkout need not be readable for everybody
    program = (
        "import os, sys; from hostagent import cli, daemon; os.setresuid(65534, 65534, 65534); "
        "sys.argv = ['hopgate', 'run', '--config', '/dev/null']; cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", program], capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == 1
    assert done.stderr == "hopgate has to be started by root: use the systemd unit\n"


# --- deadlines, and the secrets; last, since they look back on everything ---------------------------------------------


@pytest.mark.parametrize(("name", "limit_s"), [("blackhole", DIAL_S), ("silent", LOGIN_S)])
def test_a_target_that_does_not_answer_runs_into_a_deadline(
    world: Bed, slow_answers: dict[str, Answer], name: str, limit_s: float
) -> None:
    beds.wait_until(lambda: name in slow_answers, f"an answer for `{name}`", timeout_s=80)
    answer = slow_answers[name]
    assert limit_s - 1 < answer.seconds < limit_s + 5
    check(world, name, SLOW[name], answer)


@pytest.mark.parametrize("how", WAITING)
def test_a_client_that_does_not_go_on_runs_into_a_deadline(
    world: Bed, slow_answers: dict[str, Answer], how: str
) -> None:
    beds.wait_until(lambda: how in slow_answers, f"the end of the client that {how}", timeout_s=80)
    answer = slow_answers[how]
    assert WAITING[how] - 1 < answer.seconds < WAITING[how] + 5
    if how == "stalls in tls":
        assert answer.stderr == ""
    else:
        assert "the login took too long" in answer.stderr
    beds.wait_until(lambda: world.status()["open_sessions"] == 0, "every session closed")


def test_no_secret_is_written_down_anywhere(world: Bed) -> None:
    secrets = [secret.encode() for secret in (PASSWORD, WRONG_PASSWORD, *OTHER_SECRETS)]
    places = list(world.everything_written())
    assert len(places) > len(PEERS)
    assert [where for where, content in places for secret in secrets if secret in content] == []
    assert [line for line in world.server.log().splitlines() if PASSWORD in line and "CREATE ROLE" not in line] == []
