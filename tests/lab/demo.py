"""The nested-agents scenario in a lab: the runner in one network namespace, a real PostgreSQL with TLS and SCRAM in
another.

`scripts/demo` runs it. Needs root, and leaves nothing behind.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

from tests.lab import demo_cluster
from tests.lab.cgroups import cgroup
from tests.lab.hopgate import Gateway, gateway
from tests.lab.namespaces import linked_namespaces
from tests.lab.postgres import postgres
from vagrant.scenario import perform

EXAMPLE = Path(__file__).parents[2] / "policies" / "examples" / "nested-agents"
RUNNER, DATABASE = "192.0.2.1", "192.0.2.10"


class LabBed:
    """Jobs run as `nobody` in the runner's namespace; the gateway is a process of ours."""

    def __init__(self, running: Gateway, agents: Path, work: Path, password: str) -> None:
        self.gateway = running
        self.agents = agents
        self.work = work
        self.password = password
        self.recordings = running.state_dir / "recordings"

    def start_job(self, command: Sequence[str]) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.gateway.inside(["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", *command]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.work,
            env={
                "PATH": "/usr/bin:/bin",
                "LANG": "C.UTF-8",
                "SHOP_DSN": f"host={DATABASE} dbname=shop user=agent sslmode=require",
                "ORPHAN_OUTPUT": str(self.work / "orphan"),
                "AGENT_PYTHON": "/usr/bin/python3",
            },
        )

    def hopgate(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.gateway.cli(*arguments, check=False)

    def kill(self) -> None:
        self.gateway.kill()

    def start(self) -> None:
        self.gateway.start()

    def evidence(self) -> Iterable[str]:
        yield self.gateway.log()
        for path in self.gateway.state_dir.rglob("*"):
            if path.is_file():
                yield f"{path}: {path.read_bytes().decode(errors='replace')}"


def main() -> int:
    if os.geteuid() != 0:
        sys.exit("run as root: the demo makes network namespaces, and the kernel programs need it")
    password = secrets.token_hex(16)
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hopgate-demo-")))
        directory.chmod(0o711)
        agents = directory / "agents"
        shutil.copytree(EXAMPLE, agents)
        work = directory / "work"
        work.mkdir()
        shutil.chown(work, "nobody", "nogroup")
        print("demo: two hosts, a PostgreSQL with TLS and SCRAM", file=sys.stderr)
        runner, database = stack.enter_context(linked_namespaces(RUNNER, DATABASE))
        server = stack.enter_context(postgres(address=DATABASE, namespace=database, server_name="db.shop.example"))
        server.run_sql(f"CREATE ROLE shop_app LOGIN PASSWORD '{password}'")
        server.run_sql("CREATE DATABASE shop OWNER shop_app")
        server.run_sql(f"SET ROLE shop_app; {(EXAMPLE / 'shop.sql').read_text()}", database="shop")
        hooked = stack.enter_context(cgroup("demo"))
        running = stack.enter_context(gateway(directory / "gateway", namespace=runner, cgroup=hooked))
        shutil.copy(server.ca_path, running.directory / "shop-ca.pem")
        running.write_policy((EXAMPLE / "policy.yaml").read_text())
        running.write_credential("shop", "shop_app", password)
        print("demo: hopgate", file=sys.stderr)
        running.start()
        status = perform(LabBed(running, agents, work, password))
    return demo_cluster.perform() or status


if __name__ == "__main__":
    sys.exit(main())
