"""A Kubernetes API server with its own etcd, made for one use and gone after it.

    with kubernetes() as server:
        server.kubectl("get", "namespaces")             # as cluster-admin
        server.request("GET", "/version")               # the same, without kubectl
        server.write_kubeconfig(path, token=server.tokens["developer"])
        server.audit(user="developer")                  # what the server really got

States: files made -> etcd started -> API server started -> ready -> bound roles made -> stopped and removed. It listens
on the given address only; etcd listens on loopback of the same network namespace. Every process is a child of ours.

Blind spot: without `controllers` nobody makes default service accounts or finishes the deletion of a namespace, and
pods are admitted without a service account. `nodes/proxy` and `pods/proxy` to loopback addresses are refused by the
API server itself: give the namespace an address of its own to try them.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import secrets
import shutil
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.lab.kubernetes.binaries import Binaries, binaries
from tests.lab.kubernetes.certificates import Authority, Pair, make_signing_key
from tests.lab.kubernetes.processes import start, stop
from tests.lab.namespaces import entered
from tests.lab.postgres import LabError, free_port

START_TIMEOUT_S = 60.0
SERVER_NAME = "kubernetes.hopgate.test"
"""The name that the server's certificate carries, beside its address and the names it has in every cluster."""
GATEWAY = "hopgate"
"""The user of `KubernetesServer.token`: bound to the role `cluster-admin`, so that RBAC and not a bypass lets it in."""

_AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [
        {"level": "None", "userGroups": ["system:masters", "system:nodes"]},
        {"level": "None", "users": ["system:apiserver", "system:kube-controller-manager"]},
        {"level": "None", "userGroups": ["system:serviceaccounts:kube-system"]},
        {"level": "Metadata"},
    ],
}


@dataclass(frozen=True)
class Answer:
    """What the server answered to one request."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class KubernetesServer:
    """A server that is up. `tokens` has a bearer token for each user that it was started with; `other_ca_path` is a
    root that did not sign its certificate. `admin_certificate` and `admin_key` are of the group `system:masters`,
    whose requests the audit log leaves out: what a test itself asks is not what it looks for there."""

    host: str
    port: int
    namespace: str | None
    server_name: str
    directory: Path
    ca_path: Path
    other_ca_path: Path
    admin_certificate: Path
    admin_key: Path
    tokens: Mapping[str, str] = field(repr=False)
    programs: Binaries
    pid: int
    etcd_pid: int
    authority: Authority = field(repr=False)
    kubelet_authority: Authority = field(repr=False)

    @property
    def endpoint(self) -> str:
        return f"https://[{self.host}]:{self.port}" if ":" in self.host else f"https://{self.host}:{self.port}"

    @property
    def ca_pem(self) -> bytes:
        return self.ca_path.read_bytes()

    @property
    def token(self) -> str:
        """The bearer token of the gateway's own user."""
        return self.tokens[GATEWAY]

    @property
    def kubeconfig(self) -> Path:
        """The administrator's, by client certificate."""
        return self.directory / "admin.kubeconfig"

    def client_certificate(self, user: str, groups: Sequence[str] = (), *, expired: bool = False) -> tuple[Path, Path]:
        """Files with a certificate that the server takes for `user` of `groups`, and its key."""
        pair = self.authority.client(user, groups, expired=expired)
        return _write_pair(self.directory, f"client-{secrets.token_hex(4)}", pair)

    def write_kubeconfig(
        self,
        path: Path,
        *,
        endpoint: str = "",
        ca_path: Path | None = None,
        token: str = "",
        certificate: tuple[Path, Path] | None = None,
        namespace: str = "default",
        server_name: str = "",
    ) -> Path:
        """A kubeconfig at `path`; with neither `token` nor `certificate` it carries no credential. `endpoint` and
        `ca_path` default to the server's own; `server_name` is what the client then verifies instead of the
        endpoint's host."""
        cluster: dict[str, object] = {
            "server": endpoint or self.endpoint,
            "certificate-authority": str(ca_path or self.ca_path),
        }
        if server_name:
            cluster["tls-server-name"] = server_name
        user: dict[str, object] = {}
        if token:
            user["token"] = token
        if certificate:
            user["client-certificate"], user["client-key"] = map(str, certificate)
        path.touch(0o600)
        path.write_text(  # JSON is YAML
            json.dumps(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "clusters": [{"name": "lab", "cluster": cluster}],
                    "users": [{"name": "lab", "user": user}],
                    "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": "lab", "namespace": namespace}}],
                    "current-context": "lab",
                },
                indent=1,
            )
        )
        return path

    def command(self, command: Sequence[str | Path]) -> list[str]:
        """The command, in the server's network namespace."""
        words = [str(word) for word in command]
        return words if self.namespace is None else ["nsenter", f"--net=/run/netns/{self.namespace}", *words]

    def kubectl(self, *arguments: str | Path, stdin: str = "", timeout_s: float = 60) -> str:
        """What `kubectl ARGUMENTS` prints for the administrator. Raises `LabError` with what it said."""
        done = subprocess.run(
            self.command([self.programs.kubectl, *arguments]),
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=self.environment(),
            check=False,
        )
        if done.returncode:
            words = " ".join(map(str, arguments))
            raise LabError(f"`kubectl {words}` ended with {done.returncode}: {done.stderr.strip()}")
        return done.stdout

    def environment(self, kubeconfig: Path | None = None) -> dict[str, str]:
        """What a client needs around it: no proxy, no cache or configuration of whoever runs the test."""
        return {
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "HOME": str(self.directory),
            "KUBECONFIG": str(kubeconfig or self.kubeconfig),
        }

    def request(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        token: str = "",
        headers: Mapping[str, str] | None = None,
        timeout_s: float = 30,
    ) -> Answer:
        """One request over a connection of its own, straight to the server: by client certificate as the
        administrator, or with `token`. A `body` that is no bytes is sent as JSON. `path` is sent as it is."""
        context = ssl.create_default_context(cafile=str(self.ca_path))
        if not token:
            context.load_cert_chain(self.admin_certificate, self.admin_key)
        sent = {"Accept": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        if data is not None:
            sent["Content-Type"] = "application/json"
        with contextlib.closing(http.client.HTTPSConnection(self.host, self.port, context=context)) as connection:
            with _within(self.namespace):
                raw = socket.create_connection((self.host, self.port), timeout_s)
            connection.sock = context.wrap_socket(raw, server_hostname=self.server_name)
            connection.request(method, path, data, {**sent, **(headers or {})})
            answer = connection.getresponse()
            return Answer(answer.status, dict(answer.headers), answer.read())

    def create(self, path: str, body: Mapping[str, object]) -> Any:
        """Creates an object as the administrator; that it is there already is fine. Raises `LabError`."""
        answer = self.request("POST", path, body)
        if answer.status not in (200, 201, 409):
            raise LabError(f"`POST {path}` was answered with {answer.status}: {answer.body.decode(errors='replace')}")
        return answer.json()

    def bind(self, user: str, role: str) -> None:
        """Gives a user a cluster role everywhere. Raises `LabError`."""
        self.create(
            "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings",
            {
                "apiVersion": "rbac.authorization.k8s.io/v1",
                "kind": "ClusterRoleBinding",
                "metadata": {"name": f"{user}-{role}".replace(":", "-")},
                "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role},
                "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": user}],
            },
        )

    def audit(self, *, user: str | None = None, since: int = 0) -> list[dict[str, Any]]:
        """The server's own audit events (`audit.k8s.io/v1`), oldest first: of one user, after the first `since` bytes
        of the log (see `audit_size`). An event may come an instant after the answer that it tells of. Lasting requests
        have one when they start (stage `ResponseStarted`) and one when they end (`ResponseComplete`)."""
        with (self.directory / "audit.log").open("rb") as log:
            log.seek(since)
            events = [json.loads(line) for line in log if line.endswith(b"\n")]
        return [event for event in events if user is None or event["user"].get("username") == user]

    def audit_size(self) -> int:
        return (self.directory / "audit.log").stat().st_size

    def log(self) -> str:
        """The end of what the processes said."""
        logs = [path for path in sorted(self.directory.glob("*.log")) if path.name != "audit.log"]
        return "\n".join(f"== {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in logs)


@contextlib.contextmanager
def kubernetes(
    *,
    address: str = "127.0.0.1",
    port: int = 0,
    namespace: str | None = None,
    server_name: str = SERVER_NAME,
    names: Sequence[str] = (),
    users: Mapping[str, Sequence[str]] | None = None,
    controllers: bool = False,
    settings: Mapping[str, str] | None = None,
) -> Iterator[KubernetesServer]:
    """Starts a server on `address` and `port` (0: a free one, or 6443 in a `namespace`, a network namespace's name)
    and ends it.

    `names` are more names and addresses for its certificate. `users` maps names to groups: each gets a bearer token;
    the gateway's user is always there. With `controllers` the controller manager runs too: namespaces are really
    deleted, service accounts and workloads come to life. `settings` are more flags of the API server. Raises
    `GoMissing` where the programs cannot be built, `LabError` when it does not start.
    """
    programs = binaries()
    port = port or (free_port(address) if namespace is None else 6443)
    directory = Path(tempfile.mkdtemp(prefix="hopgate-kubernetes-"))
    processes: list[subprocess.Popen[bytes]] = []
    try:
        authority, kubelet_authority = Authority("hopgate lab cluster"), Authority("hopgate lab kubelets")
        tokens = _write_files(directory, authority, kubelet_authority, address, [server_name, *names], users or {})
        with _within(namespace):
            etcd_port, peer_port = free_port(), free_port()
        etcd = f"http://127.0.0.1:{etcd_port}"
        processes.append(start(directory, namespace, "etcd", _etcd(programs, directory, etcd, peer_port)))
        flags = {**_api_server_flags(directory, address, port, etcd), **(settings or {})}
        if not controllers:
            flags.setdefault("disable-admission-plugins", "ServiceAccount")
        api = start(directory, namespace, "kube-apiserver", [programs.kube_apiserver, *_words(flags)])
        processes.append(api)
        server = KubernetesServer(
            host=address,
            port=port,
            namespace=namespace,
            server_name=server_name,
            directory=directory,
            ca_path=directory / "ca.pem",
            other_ca_path=directory / "other-ca.pem",
            admin_certificate=directory / "admin.pem",
            admin_key=directory / "admin.key",
            tokens=tokens,
            programs=programs,
            pid=api.pid,
            etcd_pid=processes[0].pid,
            authority=authority,
            kubelet_authority=kubelet_authority,
        )
        _await_ready(server, processes)
        server.write_kubeconfig(server.kubeconfig, certificate=(server.admin_certificate, server.admin_key))
        server.bind(GATEWAY, "cluster-admin")
        if controllers:
            processes.append(
                start(directory, namespace, "kube-controller-manager", _controller_manager(server, directory))
            )
            _await_default_account(server, processes)
        yield server
    finally:
        for process in reversed(processes):
            stop(process)
        shutil.rmtree(directory, ignore_errors=True)


def _within(namespace: str | None) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if namespace is None else entered(namespace)


def _write_pair(directory: Path, name: str, pair: Pair) -> tuple[Path, Path]:
    certificate, key = directory / f"{name}.pem", directory / f"{name}.key"
    certificate.write_bytes(pair.certificate)
    key.touch(0o600)
    key.write_bytes(pair.key)
    return certificate, key


def _write_files(
    directory: Path,
    authority: Authority,
    kubelet_authority: Authority,
    address: str,
    names: list[str],
    users: Mapping[str, Sequence[str]],
) -> dict[str, str]:
    front_proxy = Authority("hopgate lab front proxy")
    in_every_cluster = ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "localhost", "10.96.0.1"]
    for name, pair in (
        ("serving", authority.server("kube-apiserver", [*names, address, *in_every_cluster])),
        ("admin", authority.client("lab-admin", ["system:masters"])),
        ("controller-manager", authority.client("system:kube-controller-manager")),
        ("kubelet-client", kubelet_authority.client("kube-apiserver-kubelet-client", ["system:masters"])),
        ("front-proxy-client", front_proxy.client("front-proxy-client")),
        ("service-account", make_signing_key()),
    ):
        _write_pair(directory, name, pair)
    (directory / "ca.pem").write_bytes(authority.pem)
    (directory / "kubelet-ca.pem").write_bytes(kubelet_authority.pem)
    (directory / "front-proxy-ca.pem").write_bytes(front_proxy.pem)
    (directory / "other-ca.pem").write_bytes(Authority("another lab cluster").pem)
    (directory / "audit-policy.json").write_text(json.dumps(_AUDIT_POLICY))
    (directory / "audit.log").touch()
    tokens = {user: secrets.token_urlsafe(24) for user in (GATEWAY, *users)}
    lines = [f'{token},{user},{user},"{",".join(users.get(user, ()))}"\n' for user, token in tokens.items()]
    (directory / "tokens.csv").touch(0o600)
    (directory / "tokens.csv").write_text("".join(lines))
    return tokens


def _words(flags: Mapping[str, str]) -> list[str]:
    return [f"--{name}={value}" for name, value in flags.items()]


def _etcd(programs: Binaries, directory: Path, client_url: str, peer_port: int) -> list[str | Path]:
    peer_url = f"http://127.0.0.1:{peer_port}"
    flags = {
        "name": "lab",
        "data-dir": str(directory / "etcd"),
        "listen-client-urls": client_url,
        "advertise-client-urls": client_url,
        "listen-peer-urls": peer_url,
        "initial-advertise-peer-urls": peer_url,
        "initial-cluster": f"lab={peer_url}",
        "unsafe-no-fsync": "true",
        "log-level": "warn",
    }
    return [programs.etcd, *_words(flags)]


def _api_server_flags(directory: Path, address: str, port: int, etcd: str) -> dict[str, str]:
    return {
        "bind-address": address,
        "secure-port": str(port),
        # not used by anybody here; without it the server looks for a route, which a test's namespace does not have
        "advertise-address": "192.0.2.1",
        "endpoint-reconciler-type": "none",
        "etcd-servers": etcd,
        "tls-cert-file": str(directory / "serving.pem"),
        "tls-private-key-file": str(directory / "serving.key"),
        "client-ca-file": str(directory / "ca.pem"),
        "token-auth-file": str(directory / "tokens.csv"),
        "authorization-mode": "RBAC",
        "service-account-issuer": "https://kubernetes.default.svc",
        "service-account-key-file": str(directory / "service-account.pem"),
        "service-account-signing-key-file": str(directory / "service-account.key"),
        "service-cluster-ip-range": "10.96.0.0/16",
        "kubelet-certificate-authority": str(directory / "kubelet-ca.pem"),
        "kubelet-client-certificate": str(directory / "kubelet-client.pem"),
        "kubelet-client-key": str(directory / "kubelet-client.key"),
        "kubelet-preferred-address-types": "InternalIP",
        "requestheader-client-ca-file": str(directory / "front-proxy-ca.pem"),
        "requestheader-allowed-names": "front-proxy-client",
        "requestheader-username-headers": "X-Remote-User",
        "requestheader-group-headers": "X-Remote-Group",
        "requestheader-extra-headers-prefix": "X-Remote-Extra-",
        "proxy-client-cert-file": str(directory / "front-proxy-client.pem"),
        "proxy-client-key-file": str(directory / "front-proxy-client.key"),
        "allow-privileged": "true",
        "audit-policy-file": str(directory / "audit-policy.json"),
        "audit-log-path": str(directory / "audit.log"),
        "audit-log-mode": "blocking-strict",
    }


def _controller_manager(server: KubernetesServer, directory: Path) -> list[str | Path]:
    kubeconfig = server.write_kubeconfig(
        directory / "controller-manager.kubeconfig",
        certificate=(directory / "controller-manager.pem", directory / "controller-manager.key"),
    )
    flags = {
        "kubeconfig": str(kubeconfig),
        "authentication-kubeconfig": str(kubeconfig),
        "authorization-kubeconfig": str(kubeconfig),
        "bind-address": "127.0.0.1",
        "secure-port": "0",
        "leader-elect": "false",
        "use-service-account-credentials": "true",
        "root-ca-file": str(directory / "ca.pem"),
        "service-account-private-key-file": str(directory / "service-account.key"),
        # the lab's node sends no heartbeats
        "controllers": "*,-node-lifecycle-controller,-taint-eviction-controller",
    }
    return [server.programs.kube_controller_manager, *_words(flags)]


def _await_ready(server: KubernetesServer, processes: Sequence[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    said = ""
    while True:
        try:
            answer = server.request("GET", "/readyz?verbose", timeout_s=5)
            if answer.status == 200:
                return
            said = answer.body.decode(errors="replace")
        except (OSError, http.client.HTTPException) as error:
            said = str(error)
        _check_alive(server, processes, deadline, said)
        time.sleep(0.05)


def _await_default_account(server: KubernetesServer, processes: Sequence[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    path = "/api/v1/namespaces/default/serviceaccounts/default"
    while (answer := server.request("GET", path)).status != 200:
        _check_alive(server, processes, deadline, answer.body.decode(errors="replace"))
        time.sleep(0.05)


def _check_alive(
    server: KubernetesServer, processes: Sequence[subprocess.Popen[bytes]], deadline: float, said: str
) -> None:
    if any(process.poll() is not None for process in processes) or time.monotonic() > deadline:
        raise LabError(f"the cluster did not start: {said}\n{server.log()}")
