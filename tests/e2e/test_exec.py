"""`hopgate exec`: agents that a launcher declares, for real: who may, what the chain is then, and that it is not to be
borrowed."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.e2e import beds
from tests.e2e.beds import DATABASE, Bed, wait_until

NOBODY = 65534
POLICY = textwrap.dedent(f"""\
    agents:
      planner: {{declared_by: "uid:0"}}
      builder: {{declared_by: planner}}
      guest: {{declared_by: "uid:{NOBODY}"}}
    targets:
    {beds.target("shop", f"{DATABASE}:5432")}
    rules:
      - {{name: all-read, agents: "*", targets: shop, statements: read, decision: allow}}
      - {{name: planner-makes, agents: planner, targets: shop, statements: [ddl, write], decision: allow}}
    """)
PSQL = ["psql", "-X", "-A", "-t", "-q", f"host={DATABASE} dbname=shop user=agent sslmode=prefer", "-c"]
READ = [*PSQL, "SELECT 'read'"]
MAKE = [*PSQL, "CREATE TABLE IF NOT EXISTS made (); SELECT 'made'"]
DECLARE = """
def declare(agent):
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(sys.argv[1])
    return sock

def answer(sock, agent):
    sock.sendall(json.dumps({"agent": agent}).encode() + b"\\n")
    data = sock.recv(4096)
    return json.loads(data)["refusal"] if data else "no answer"
"""
PRELUDE = "import json, os, socket, sys\n" + DECLARE.replace("\\\\n", "\\n")


@pytest.fixture(scope="module")
def bed() -> Iterator[Bed]:
    with beds.bed("exec") as made:
        made.gateway.write_policy(POLICY)
        made.gateway.start()
        yield made


def as_agent(bed: Bed, agent: str, command: Sequence[str]) -> list[str]:
    here = [sys.executable, "-I", "-m", "hostagent.cli", "exec"]
    return [*here, "--agent", agent, "--config", str(bed.gateway.config), "--", *command]


def said(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stdout + done.stderr).strip()


def socket_path(bed: Bed) -> str:
    return str(bed.gateway.directory / "run" / "declare.sock")


def python(bed: Bed, source: str, *, uid: int = 0) -> subprocess.CompletedProcess[str]:
    """A client that speaks to the socket itself. Its interpreter is no agent and was started as `uid`."""
    user = ["setpriv", f"--reuid={uid}", "--clear-groups"] if uid else []
    program = PRELUDE + textwrap.dedent(source)
    return bed.gateway.run([*user, "/usr/bin/python3", "-I", "-c", program, socket_path(bed), *READ])


def chain(bed: Bed) -> object:
    return bed.sessions()[0]["chain"]


def test_a_declared_command_is_the_agent_and_others_are_nobody(bed: Bed) -> None:
    assert said(bed.gateway.run(as_agent(bed, "planner", MAKE))) == "made"
    assert chain(bed) == "planner"
    assert "agent `unattributed` may not log in" in said(bed.gateway.run(READ))
    assert chain(bed) == "unattributed"


def test_a_declared_hop_stands_below_the_one_that_declared_it(bed: Bed) -> None:
    nested = as_agent(bed, "planner", as_agent(bed, "builder", READ))
    assert said(bed.gateway.run(nested)) == "read"
    assert chain(bed) == "planner > builder"
    done = bed.gateway.run(as_agent(bed, "planner", as_agent(bed, "builder", MAKE)))
    assert "agent `builder` may not create-table" in said(done)


@pytest.mark.parametrize("how", ["exec {}", "setsid --fork --wait {}", "(setsid {} &) ; sleep 2", "env -i {}"])
def test_what_the_command_starts_keeps_the_hop(bed: Bed, how: str) -> None:
    quoted = " ".join(f"'{word}'" if " " in word else word for word in PSQL) + ' "SELECT 1 + 1"'
    path = subprocess.run(["which", "psql"], check=True, capture_output=True, text=True).stdout.strip()
    done = bed.gateway.run(as_agent(bed, "planner", ["sh", "-c", how.format(quoted.replace("psql", path, 1))]))
    assert said(done) == "2"
    assert chain(bed) == "planner"


@pytest.mark.parametrize(
    ("agent", "why"),
    [
        ("builder", "uid 0, outside of any agent may not declare agent `builder`: `declared_by` names planner"),
        ("guest", "may not declare agent `guest`"),
        ("nobody", "the policy has no agent `nobody`"),
        ("x" * 200, "the policy has no agent"),
    ],
)
def test_who_may_not_declare_runs_nothing(bed: Bed, agent: str, why: str) -> None:
    marker = bed.directory / "marker"
    done = bed.gateway.run(as_agent(bed, agent, ["touch", str(marker)]))
    assert done.returncode == 1
    assert why in done.stderr
    assert "Traceback" not in done.stderr
    assert not marker.exists()
    alerts = [line for line in bed.log_lines() if "declaration refused" in str(line.get("what")) and agent in str(line)]
    assert bool(alerts) == (agent in ("builder", "guest"))


def test_the_user_counts_that_the_process_was_started_as(bed: Bed) -> None:
    source = f"""
        if os.getuid() != {NOBODY}:
            os.setresuid({NOBODY}, {NOBODY}, {NOBODY})
        print(answer(declare("guest"), "guest") or "yes", flush=True)
        os.execvp(sys.argv[2], sys.argv[2:])
    """
    done = python(bed, source, uid=NOBODY)
    assert done.stdout.split() == ["yes", "read"], said(done)
    assert chain(bed) == "guest"
    done = python(bed, source)
    assert "may not declare agent `guest`" in done.stdout
    assert chain(bed) == "unattributed"


def test_a_process_that_has_forked_cannot_label_what_it_shares_with_others(bed: Bed) -> None:
    done = python(
        bed,
        """
        child = os.fork()
        if not child:
            print(answer(declare("planner"), "planner"), flush=True)
            os._exit(0)
        os.waitpid(child, 0)
        os.execvp(sys.argv[2], sys.argv[2:])
        """,
    )
    assert "declare from a fresh one" in done.stdout
    assert "`unattributed` may not log in" in done.stderr


def test_a_connection_that_was_handed_over_gives_nothing(bed: Bed) -> None:
    """The one that connected is dead; its child asks over the same socket."""
    done = python(
        bed,
        """
        sock = declare("planner")
        reading, writing = os.pipe()
        if os.fork():
            os.read(reading, 1)
            os._exit(0)
        parent = os.getppid()
        os.write(writing, b"x")
        while os.getppid() == parent:
            pass
        print(answer(sock, "planner") or "yes", flush=True)
        os.execvp(sys.argv[2], sys.argv[2:])
        """,
    )
    wait_until(lambda: chain(bed) == "unattributed", "the child has connected")
    assert "yes" not in done.stdout


def test_an_image_is_declared_once(bed: Bed) -> None:
    done = python(
        bed,
        """
        print([answer(declare("planner"), agent) or "yes" for agent in ("planner", "builder")], flush=True)
        os.execvp(sys.argv[2], sys.argv[2:])
        """,
    )
    assert "['yes', 'the process was declared before']" in done.stdout
    assert chain(bed) == "planner"


def test_bad_requests_are_answered_or_dropped(bed: Bed) -> None:
    done = python(
        bed,
        """
        for data in (b"{}\\n", b"\\xff\\n", b'{"agent": 7}\\n', b'{"agent": "planner", "uid": 0}\\n', b"x" * 100000):
            sock = declare("")
            try:
                sock.sendall(data)
                print(sock.recv(4096).decode() or "nothing")
            except OSError:
                print("nothing")
        """,
    )
    lines = [line for line in done.stdout.splitlines() if line]
    assert [("bad request" in line) or line == "nothing" for line in lines] == [True] * 5, said(done)
    assert said(bed.gateway.run(as_agent(bed, "planner", READ))) == "read"


@pytest.mark.parametrize(("command", "status"), [("/no/such/command", 127), ("/etc/passwd", 126)])
def test_a_command_that_cannot_be_run_is_said(bed: Bed, command: str, status: int) -> None:
    done = bed.gateway.run(as_agent(bed, "planner", [command]))
    assert done.returncode == status
    assert done.stderr.startswith(f"cannot run `{command}`: ")


def test_the_label_outlives_the_daemon_and_goes_with_the_permission(bed: Bed) -> None:
    script = 'while read line; do psql -X -A -t -q "$0" -c "SELECT \'read\'" 2>&1 | tr "\\n" " "; echo; done'
    command = as_agent(bed, "planner", ["sh", "-c", script, PSQL[5]])
    with subprocess.Popen(bed.gateway.inside(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdin is not None and job.stdout is not None

        def ask() -> str:
            assert job.stdin is not None and job.stdout is not None
            job.stdin.write("go\n")
            job.stdin.flush()
            return job.stdout.readline().strip()

        try:
            assert ask() == "read"
            bed.gateway.kill()
            marker = bed.directory / "marker"
            done = bed.gateway.run(as_agent(bed, "planner", ["touch", str(marker)]))
            assert done.returncode == 1 and "nobody answers" in done.stderr and not marker.exists()
            bed.gateway.start()
            assert ask() == "read"
            assert chain(bed) == "planner"
            bed.gateway.write_policy(POLICY.replace('planner: {declared_by: "uid:0"}', "planner: {exe: /no/such}"))
            bed.gateway.cli("reload")
            assert "was declared to be agent `planner`" in ask()
        finally:
            job.kill()
            bed.gateway.write_policy(POLICY)
            bed.gateway.cli("reload")


def test_dead_labels_leave_nothing_in_the_kernel(bed: Bed) -> None:
    from hostagent.kernel import abi, bpf

    declared = bpf.Map.pinned(Path(bed.gateway.pin_dir) / "declared", *abi.MAPS["declared"])
    nodes = bpf.Map.pinned(Path(bed.gateway.pin_dir) / "nodes", *abi.MAPS["nodes"])
    try:
        labels = list(declared.keys())
        assert labels
        assert all(nodes.get(key) is not None for key in labels), "a label without its image"
    finally:
        declared.close()
        nodes.close()
