"""A Kubernetes cluster of the laboratory: real programs, built once from Go modules and kept outside the checkout.

    from tests.lab.kubernetes import kubernetes

    with kubernetes(users={"developer": ["team"]}) as server:
        server.kubectl("create", "configmap", "a")

`binaries` builds the programs, `server` runs etcd, the API server and, when asked, the controller manager;
`certificates` makes what they trust.
"""

from tests.lab.kubernetes.binaries import Binaries, GoMissing, binaries
from tests.lab.kubernetes.server import GATEWAY, SERVER_NAME, Answer, KubernetesServer, kubernetes

__all__ = ["GATEWAY", "SERVER_NAME", "Answer", "Binaries", "GoMissing", "KubernetesServer", "binaries", "kubernetes"]
