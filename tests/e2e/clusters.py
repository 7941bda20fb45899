"""Where the end-to-end tests of Kubernetes stand: a runner with a gateway in one network namespace, a real API server
with a node in another. Jobs have a kubeconfig that holds this host's CA and no credential.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.lab.cgroups import cgroup
from tests.lab.hopgate import Gateway, gateway
from tests.lab.kubernetes import Kubectl, KubernetesServer, Node, current_kubectl, kubernetes, running_node
from tests.lab.namespaces import linked_namespaces

RUNNER = "192.0.2.1"
CLUSTER = "192.0.2.20"
TARGETS = f"""\
targets:
  cluster:
    protocol: kubernetes
    addresses: "{CLUSTER}:6443"
    tls: {{ca: cluster-ca.pem}}
    credential: cluster
"""


@dataclass
class ClusterBed:
    """`server` and `node` run; nothing of the gateway is started before `start`."""

    directory: Path
    server: KubernetesServer
    node: Node
    gateway: Gateway

    @property
    def kubeconfig(self) -> Path:
        return self.directory / "kubeconfig"

    def start(self, policy: str) -> None:
        """Starts the gateway with this policy, to which the target is added, and writes the jobs' kubeconfig."""
        self.gateway.write_policy(TARGETS + policy)
        self.gateway.write_entry("cluster", {"token": self.server.token})
        self.gateway.start()
        self.kubeconfig.write_text(self.gateway.cli("kubeconfig", "cluster").stdout)
        self.kubeconfig.chmod(0o644)

    def environment(self) -> dict[str, str]:
        home = self.directory / "home"
        home.mkdir(exist_ok=True)
        home.chmod(0o777)
        return {"KUBECONFIG": str(self.kubeconfig), "HOME": str(home)}

    def kubectl(
        self,
        *arguments: str,
        kubectl: Kubectl | None = None,
        stdin: str = "",
        direct: bool = False,
        timeout_s: float = 60,
    ) -> subprocess.CompletedProcess[str]:
        """`kubectl ARGUMENTS` as a job on the runner, or with the gateway's own token beside the server (`direct`)."""
        program = kubectl or current_kubectl()
        if direct:
            config = self.server.directory / "direct.kubeconfig"
            self.server.write_kubeconfig(config, token=self.server.token)
            command = self.server.command([program.path, *arguments])
            environment = {**self.server.environment(config), **program.environment}
        else:
            command = self.gateway.inside(["/bin/sh", "-c", '"$0" "$@"; exit $?', str(program.path), *arguments])
            environment = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", **self.environment(), **program.environment}
        return subprocess.run(
            command, input=stdin, capture_output=True, text=True, env=environment, cwd="/", timeout=timeout_s
        )

    def sessions(self) -> list[dict[str, object]]:
        found: list[dict[str, object]] = json.loads(self.gateway.cli("sessions", "--json", "--limit", "0").stdout)
        return found

    def records(self) -> Iterator[Mapping[str, object]]:
        """All records of all sessions, the oldest session first."""
        for session in reversed(self.sessions()):
            for line in self.gateway.cli("replay", str(session["id"]), "--json").stdout.splitlines():
                yield json.loads(line)


@contextmanager
def cluster_bed(
    name: str, *, settings: Mapping[str, object] | None = None, controllers: bool = False
) -> Iterator[ClusterBed]:
    """With `controllers` the cluster has a controller manager too."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"hopgate-{name}-")))
        directory.chmod(0o711)
        runner, cluster = stack.enter_context(linked_namespaces(RUNNER, CLUSTER))
        server = stack.enter_context(
            kubernetes(address=CLUSTER, namespace=cluster, users={"developer": []}, controllers=controllers)
        )
        node = stack.enter_context(running_node(server))
        hooked = stack.enter_context(cgroup(name))
        made = stack.enter_context(gateway(directory / "gateway", namespace=runner, cgroup=hooked, settings=settings))
        shutil.copy(server.ca_path, made.directory / "policy.d" / "cluster-ca.pem")
        yield ClusterBed(directory, server, node, made)
