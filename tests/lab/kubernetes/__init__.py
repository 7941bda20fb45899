"""A Kubernetes cluster of the laboratory: real programs, built once from Go modules and kept outside the checkout.

    from tests.lab.kubernetes import kubernetes, running_node

    with kubernetes(users={"developer": ["team"]}) as server, running_node(server) as node:
        server.kubectl("create", "configmap", "a")
        node.run_pod("shell", ["sleep", "infinity"])
        server.kubectl("exec", "shell", "--", "id")

`binaries` builds the programs; `server` runs etcd, the API server and, when asked, the controller manager; `node` runs
pods as local processes behind the kubelet's streaming protocols; `clients` finds old and new kubectls; `certificates`
makes what they all trust.
"""

from tests.lab.kubernetes.binaries import Binaries, GoMissing, binaries
from tests.lab.kubernetes.clients import Kubectl, current_kubectl, kubectls, oldest_kubectl
from tests.lab.kubernetes.node import Node, running_node
from tests.lab.kubernetes.server import GATEWAY, SERVER_NAME, Answer, KubernetesServer, kubernetes

__all__ = [
    "GATEWAY",
    "SERVER_NAME",
    "Answer",
    "Binaries",
    "GoMissing",
    "Kubectl",
    "KubernetesServer",
    "Node",
    "binaries",
    "current_kubectl",
    "kubectls",
    "kubernetes",
    "oldest_kubectl",
    "running_node",
]
