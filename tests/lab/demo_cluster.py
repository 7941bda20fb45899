"""The second act of the demo: the nested agents at a real Kubernetes API server, in network namespaces of their own.

`scripts/demo` runs it after the first. Where the API server cannot be built it says so, and no promise is broken.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from tests.lab.cgroups import cgroup
from tests.lab.hopgate import Gateway, gateway
from tests.lab.kubernetes import GoMissing, KubernetesServer, kubernetes, running_node
from tests.lab.namespaces import linked_namespaces
from vagrant.scenario import tell, wait

EXAMPLE = Path(__file__).parents[2] / "policies" / "examples" / "nested-agents-cluster"
RUNNER, CLUSTER = "192.0.2.1", "192.0.2.20"
DEPLOYMENT = {
    "apiVersion": "apps/v1",
    "kind": "Deployment",
    "metadata": {"name": "web"},
    "spec": {
        "replicas": 0,
        "selector": {"matchLabels": {"app": "web"}},
        "template": {
            "metadata": {"labels": {"app": "web"}},
            "spec": {"containers": [{"name": "web", "image": "shop.example/web:1"}]},
        },
    },
}


class ClusterAct:
    """Collects whether the promises were kept."""

    def __init__(self, running: Gateway, server: KubernetesServer, directory: Path, value: str) -> None:
        self.gateway = running
        self.server = server
        self.directory = directory
        self.value = value
        self.kept: list[bool] = []
        self.outputs: list[str] = []

    def start_job(self, command: Sequence[str | Path]) -> subprocess.Popen[str]:
        whole = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", *map(str, command)]
        return subprocess.Popen(
            self.gateway.inside(whole),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.directory / "work",
            env={
                "PATH": "/usr/bin:/bin",
                "LANG": "C.UTF-8",
                "HOME": str(self.directory / "work"),
                "KUBECONFIG": str(self.directory / "kubeconfig"),
                "KUBECTL": str(self.directory / "kubectl"),
            },
        )

    def job(self, *command: str | Path) -> str:
        with self.start_job(command) as process:
            output, _ = process.communicate(timeout=60)
        self.outputs.append(output)
        return output.strip()

    def agent_a(self, *arguments: str) -> list[str | Path]:
        return ["/usr/bin/python3", self.directory / "agents" / "agent_a.py", *arguments]

    def agent_b(self, job: str) -> str:
        return self.job(*self.agent_a("start-b", job))

    def row(self, promise: str, expected: str, seen: str, kept: bool) -> None:
        self.kept.append(kept)
        tell(promise, expected, seen, kept)

    def run(self) -> bool:
        """True when every promise was kept."""
        seen = self.agent_b("pods")
        self.row("B, started by A, lists pods", "pod/web", seen, seen == "pod/web")
        self.secret()
        self.denials()
        self.hold()
        self.terminal()
        self.secrecy()
        return all(self.kept)

    def secret(self) -> None:
        seen = self.job(*self.agent_a("kubectl", "get", "secret", "payments", "-o", "jsonpath={.data.key}"))
        self.row("A reads a Secret", "its value", "its value" if seen == self.value else seen, seen == self.value)
        self.outputs.pop()
        seen = self.agent_b("secret")
        value = "".join(re.findall(r"^  key: .*", seen, re.M)).strip()
        self.row("B reads it, as YAML", "key: Kioq, which is *** in base64", value or seen, value == "key: Kioq")

    def denials(self) -> None:
        seen = self.agent_b("configmap")
        kept = all(part in seen for part in ("may not", "`agent-b`", "`cluster`", "configmaps"))
        self.row("B creates what only A may", "denied by B's hop", seen, kept)
        seen = self.job(self.directory / "kubectl", "get", "pods")
        self.row("a shell outside any agent", "denied as unattributed", seen, "`unattributed`" in seen)

    def hold(self) -> None:
        process = self.start_job(self.agent_a("start-b", "delete"))

        def waiting() -> str:
            found = json.loads(self.gateway.cli("approvals", "--json").stdout)
            return str(found[0]["id"]) if found else ""

        asked = wait(waiting, bool)
        there = self.server.kubectl("get", "deployment", "web", "--namespace", "shop", "--output=name").strip()
        approved = self.gateway.cli("approve", asked or "none", "--reason", "seen", check=False)
        output, _ = process.communicate(timeout=60)
        self.outputs.append(output)
        gone = self.server.kubectl("get", "deployments", "--namespace", "shop", "--output=name").strip() == ""
        seen = f"{there} waits as {asked} | hopgate approve: {approved.returncode} | {output.strip()}"
        kept = approved.returncode == 0 and gone and there == "deployment.apps/web" and "deleted" in output
        self.row("B deletes a deployment: held, approved", "it is there until then, then gone", seen, kept)

    def terminal(self) -> None:
        seen = self.agent_b("exec")
        listing = ["/etc/hostname", "/etc/hosts"]
        self.row("B looks into a pod with exec", " ".join(listing), seen, seen.split() == listing)
        session = json.loads(self.gateway.cli("sessions", "--json").stdout)[0]["id"]
        cast = self.gateway.cli("replay", str(session), "--operation", "1", "--asciicast").stdout.splitlines()
        header, events = json.loads(cast[0]), [json.loads(line) for line in cast[1:]]
        told = "".join(text for _, kind, text in events if kind == "o").split()
        seen = f"asciicast v{header['version']}, `{header.get('title', '')}`: {' '.join(told)}"
        self.row("hopgate replay --asciicast", "what B saw", seen, header["version"] == 2 and told == listing)

    def secrecy(self) -> None:
        self.agent_b("environment")
        written = [self.gateway.log()] + [
            path.read_bytes().decode(errors="replace") for path in self.gateway.state_dir.rglob("*") if path.is_file()
        ]
        secret = [self.server.token, self.value]
        found = [text[:80] for text in (*self.outputs, *written) if any(each in text for each in secret)]
        seen = f"{len(found)} places" + (f": {found[0]}" if found else "")
        self.row("the token, and the Secret, where B, recordings or logs are", "0 places", seen, not found)
        verified = self.gateway.cli("audit", "verify", check=False)
        seen = " ".join((verified.stdout + verified.stderr).split())
        self.row("hopgate audit verify", "holds", seen, verified.returncode == 0)


def perform() -> int:
    """Runs the act; 0 when every promise was kept, or when there is no API server to be had."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="hopgate-demo-")))
        directory.chmod(0o711)
        (directory / "work").mkdir()
        shutil.chown(directory / "work", "nobody", "nogroup")
        runner, cluster = stack.enter_context(linked_namespaces(RUNNER, CLUSTER))
        print("\ndemo: a Kubernetes API server with a node (built from source the first time)", file=sys.stderr)
        try:
            server = stack.enter_context(kubernetes(address=CLUSTER, namespace=cluster, server_name="api.shop.example"))
        except GoMissing as missing:
            print(f"demo: the second act, Kubernetes, is left out: {missing}", file=sys.stderr)
            return 0
        node = stack.enter_context(running_node(server))
        value = secrets.token_hex(16)
        server.kubectl("create", "namespace", "shop")
        server.kubectl("create", "secret", "generic", "payments", f"--from-literal=key={value}", "--namespace=shop")
        server.create("/apis/apps/v1/namespaces/shop/deployments", DEPLOYMENT)
        node.run_pod("web", ["sleep", "infinity"], namespace="shop")
        encoded = server.kubectl("get", "secret", "payments", "-n", "shop", "-o", "jsonpath={.data.key}")

        hooked = stack.enter_context(cgroup("demo-cluster"))
        running = stack.enter_context(gateway(directory / "gateway", namespace=runner, cgroup=hooked))
        shutil.copytree(EXAMPLE, directory / "agents")
        shutil.copy(server.programs.kubectl, directory / "kubectl")
        shutil.copy(server.ca_path, running.directory / "cluster-ca.pem")
        running.write_policy((EXAMPLE / "policy.yaml").read_text())
        running.write_entry("cluster", {"token": server.token})
        running.start()
        (directory / "kubeconfig").write_text(running.cli("kubeconfig", "cluster", "--namespace", "shop").stdout)
        act = ClusterAct(running, server, directory, encoded)
        kept = act.run()
        wrong = act.kept.count(False)
        print(f"all {len(act.kept)} promises were kept" if kept else f"{len(act.kept)} promises, {wrong} not kept")
        return 0 if kept else 1
