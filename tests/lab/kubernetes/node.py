"""A node for a cluster of the laboratory: the program `node`, which runs pods as local processes.

    with kubernetes() as server, running_node(server) as node:
        node.run_pod("a", ["sh", "-c", "echo hello; sleep infinity"])
        server.kubectl("exec", "a", "--", "id")

States: certificate made -> program started -> Node object ready -> stopped, with every pod's processes.

Blind spot: what `programs/node/main.go` says about pods: no image, no volume, no isolation; a container's relative
paths are its own, absolute ones are the machine's.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.lab.kubernetes.processes import start, stop
from tests.lab.kubernetes.server import KubernetesServer
from tests.lab.postgres import LabError

READY_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Node:
    """A node that is ready. `address` is also every pod's."""

    server: KubernetesServer
    name: str
    address: str
    directory: Path
    pid: int

    def run_pod(
        self,
        name: str,
        command: Sequence[str],
        *,
        namespace: str = "default",
        labels: Mapping[str, str] | None = None,
        env: Mapping[str, str] | None = None,
        stdin: bool = False,
        tty: bool = False,
        restart: str = "Always",
    ) -> dict[str, Any]:
        """Creates a pod with one container, `main`, waits until it runs, and gives the object. Raises `LabError`."""
        container = {
            "name": "main",
            "image": "hopgate.test/any",
            "command": list(command),
            "env": [{"name": key, "value": value} for key, value in (env or {}).items()],
            "stdin": stdin,
            "tty": tty,
        }
        self.server.create(
            f"/api/v1/namespaces/{namespace}/pods",
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": name, "labels": dict(labels or {})},
                "spec": {"containers": [container], "restartPolicy": restart},
            },
        )
        return self.await_pod(name, namespace=namespace)

    def await_pod(self, name: str, *, namespace: str = "default", phase: str = "Running") -> dict[str, Any]:
        """Waits until the pod is in `phase`, and ready if that is `Running`. Raises `LabError`."""
        deadline = time.monotonic() + READY_TIMEOUT_S
        while True:
            pod: dict[str, Any] = self.server.request("GET", f"/api/v1/namespaces/{namespace}/pods/{name}").json()
            status = pod.get("status", {})
            ready = any(c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions", []))
            if status.get("phase") == phase and (ready or phase != "Running"):
                return pod
            if time.monotonic() > deadline:
                raise LabError(f"pod `{namespace}/{name}` is not `{phase}`: {status}\n{self.server.log()}")
            time.sleep(0.05)


@contextlib.contextmanager
def running_node(server: KubernetesServer, *, name: str = "node", address: str = "") -> Iterator[Node]:
    """Starts a node in the server's network namespace and ends it with all its pods. It takes every pod that names no
    node: run one. `address` has to exist there, and defaults to the server's own. Raises `LabError`."""
    address = address or server.host
    files = server.directory / f"node-{name}"
    files.mkdir()
    pair = server.kubelet_authority.server(f"system:node:{name}", [name, address])
    (files / "serving.pem").write_bytes(pair.certificate)
    (files / "serving.key").touch(0o600)
    (files / "serving.key").write_bytes(pair.key)
    flags: dict[str, str | Path] = {
        "kubeconfig": server.kubeconfig,
        "name": name,
        "address": address,
        "certificate": files / "serving.pem",
        "key": files / "serving.key",
        "client-ca": server.directory / "kubelet-ca.pem",
        "directory": files / "pods",
    }
    command: list[str | Path] = [server.programs.node, *(f"--{key}={value}" for key, value in flags.items())]
    process = start(server.directory, server.namespace, f"node-{name}", command, ask_first=True)
    try:
        _await_ready(server, name, process)
        yield Node(server, name, address, files, process.pid)
    finally:
        stop(process)


def _await_ready(server: KubernetesServer, name: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while True:
        answer = server.request("GET", f"/api/v1/nodes/{name}")
        if answer.status == 200 and answer.json()["status"].get("conditions"):
            return
        if process.poll() is not None or time.monotonic() > deadline:
            raise LabError(f"the node did not start\n{server.log()}")
        time.sleep(0.05)
