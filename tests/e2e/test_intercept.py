"""`intercept: all`: a real database at a port that the policy does not name is denied, recorded and alerted for chains
that have the agent; and for nobody else."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostagent import alerts
from tests.e2e.beds import DATABASE, Bed, bed, rules, target, wait_until
from tests.lab.cgroups import inside

HIDDEN = 6000
AGENTS = """\
agents:
  job: {exe: /bin/sh}
  reader: {exe: READER, intercept: all}
  picky: {exe: PICKY, argv: "*never*", intercept: all}
"""
SQL = ["psql", "-X", "-A", "-t", "-c", "SELECT 42"]


@pytest.fixture(scope="module")
def made() -> Iterator[Bed]:
    with bed("intercept") as one:
        forwarder = ["socat", f"TCP-LISTEN:{HIDDEN},fork,reuseaddr", f"TCP:{DATABASE}:5432"]
        process = subprocess.Popen(inside(forwarder, netns=one.database))
        for name in ("reader", "picky"):
            # a copy of its own, which only root can change
            path = _program(one, name)
            path.write_bytes(Path("/bin/dash").read_bytes())
            path.chmod(0o755)
        one.server.run_sql("CREATE ROLE intruder LOGIN PASSWORD 'open'")
        one.gateway.write_policy(_policy(one))
        try:
            one.gateway.start()
            yield one
        finally:
            process.kill()
            process.wait()


def _program(one: Bed, name: str) -> Path:
    # /run belongs to root all the way up
    return Path("/run") / f"{one.gateway.cgroup.name}-{name}"


@pytest.fixture(scope="module", autouse=True)
def programs(made: Bed) -> Iterator[None]:
    yield
    for name in ("reader", "picky"):
        _program(made, name).unlink()


def _policy(one: Bed, agents: str = AGENTS) -> str:
    for name in ("reader", "picky"):
        agents = agents.replace(name.upper(), str(_program(one, name)))
    return agents + f"targets:\n{target('shop', f'{DATABASE}:5432')}" + rules()


def _connect(
    one: Bed, *, port: int = HIDDEN, below: str = "", timeout_s: float = 30
) -> subprocess.CompletedProcess[str]:
    words = [*SQL, f"host={DATABASE} port={port} dbname=shop user=intruder sslmode=disable connect_timeout=10"]
    above = [str(_program(one, below)), "-c", '"$@"; exit $?', below] if below else []
    return one.gateway.run([*above, *words], env={"PGPASSWORD": "open"}, timeout_s=timeout_s)


def _alerts(one: Bed) -> list[alerts.Alert]:
    found = [alert for path in (one.gateway.state_dir / "alerts").glob("*.hga") for alert in alerts.read(path)]
    return [alert for alert in found if f"{DATABASE}:{HIDDEN}" in alert.what]


def test_a_hidden_database_is_denied_recorded_and_alerted(made: Bed) -> None:
    known = {row["id"] for row in made.sessions()}
    begun = time.monotonic()
    done = _connect(made, below="reader")
    assert done.returncode != 0 and "42" not in done.stdout
    assert time.monotonic() - begun < 8, "the client waited: its connection was not reset"

    (row,) = [row for row in made.sessions() if row["id"] not in known]
    assert "reader" in str(row["chain"])
    assert row["dialled"] == f"{DATABASE}:{HIDDEN}" and row["target"] == ""
    assert row["state"] == "closed" and "which is no target" in str(row["refusal"])
    opened, closed = made.replay(str(row["id"]))
    assert (opened["is"], closed["is"]) == ("opened", "closed")
    assert opened["protocol"] == "postgresql"
    lineage = opened["chain"]["lineage"]  # type: ignore[index]
    assert lineage[-1]["comm"] == "psql"
    made.gateway.cli("audit", "verify")

    alert = _alerts(made)[-1]
    assert alert.what.startswith(f"postgresql was spoken to {DATABASE}:{HIDDEN}, which is no target: ")
    assert "reader" in alert.what
    assert alert.done == "dropped and reset"
    assert "42" not in made.server.log().split("intruder")[-1]


def test_the_same_again_is_recorded_each_time(made: Bed) -> None:
    before = len(made.sessions())
    for _ in range(3):
        assert _connect(made, below="reader").returncode != 0
    assert len(made.sessions()) == before + 3


def test_who_is_below_no_intercepted_agent_is_left_alone(made: Bed) -> None:
    before = made.sessions()
    assert _connect(made).stdout == "42\n"
    assert made.sessions() == before


def test_who_only_has_the_file_of_an_agent_waits_once_and_is_served(made: Bed) -> None:
    """`argv` tells the agent and is not seen by the kernel: the host agent says that nobody is meant."""
    before = made.sessions()
    assert _connect(made, below="picky").stdout == "42\n"
    assert made.sessions() == before


def test_a_target_is_served_as_ever(made: Bed) -> None:
    done = _connect(made, port=5432, below="reader")
    assert "42" not in done.stdout and "reader" in done.stderr, (
        "the proxy, which answers in the protocol, was not asked"
    )


def test_a_reload_takes_it_off_and_puts_it_back(made: Bed) -> None:
    made.gateway.write_policy(_policy(made, AGENTS.replace("intercept: all", "intercept: targets")))
    made.gateway.cli("reload")
    try:
        assert not [name for name in os.listdir(made.gateway.pin_dir) if name in ("link_on_egress", "link_on_ingress")]
        assert _connect(made, below="reader").stdout == "42\n"
    finally:
        made.gateway.write_policy(_policy(made))
        made.gateway.cli("reload")
    assert _connect(made, below="reader").returncode != 0


def test_an_agents_new_file_is_followed(made: Bed) -> None:
    path = _program(made, "reader")
    fresh = path.with_name(path.name + "-new")
    fresh.write_bytes(path.read_bytes())
    fresh.chmod(0o755)
    fresh.rename(path)
    wait_until(lambda: _connect(made, below="reader").returncode != 0, "the new file is intercepted")


def test_a_daemon_that_is_down_or_has_no_policy_changes_nothing(made: Bed) -> None:
    sessions = len(made.sessions())
    made.gateway.kill()
    try:
        before = made.server.log()
        words = [*SQL, f"host={DATABASE} port={HIDDEN} dbname=shop user=intruder sslmode=disable connect_timeout=3"]
        above = [str(_program(made, "reader")), "-c", '"$@"; exit $?', "reader"]
        done = made.gateway.run([*above, *words], env={"PGPASSWORD": "open"})
        assert done.returncode != 0 and made.server.log() == before
        made.gateway.write_policy("agents: [")
    finally:
        made.gateway.start()
    try:
        # what was told meanwhile has waited in the ring
        wait_until(lambda: len(made.sessions()) == sessions + 1, "the session of before")
        assert _connect(made, below="reader").returncode != 0
        assert len(made.sessions()) == sessions + 2
    finally:
        made.gateway.write_policy(_policy(made))
        made.gateway.cli("reload")
    assert json.loads(made.gateway.cli("status", "--json").stdout)["policy_problem"] == ""
    assert _connect(made).stdout == "42\n"
