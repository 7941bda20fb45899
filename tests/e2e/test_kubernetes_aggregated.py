"""An API that another server serves behind the API server: judged, masked and recorded as the API server's own."""

from __future__ import annotations

import datetime
import json
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.e2e.harbour import POD, Harbour, until
from tests.lab.namespaces import entered, ip

SERVICE_ADDRESS = "10.96.44.44"
VERSION = "metrics.k8s.io/v1beta1"
APIS = "/apis/apiregistration.k8s.io/v1/apiservices"
POLICY = """\
rules:
  - name: reader-measures
    agents: reader
    targets: cluster
    verbs: read
    resources: pods.metrics.k8s.io
    namespaces: default
    decision: allow
  - name: masked-measures
    agents: masked
    targets: cluster
    masks: [{resource: pods.metrics.k8s.io, field: "containers[*].usage.memory", method: redact}]
"""
MEASURED = {
    "metadata": {"name": POD, "namespace": "default"},
    "window": "10s",
    "containers": [{"name": "main", "usage": {"cpu": "21m", "memory": "42Mi"}}],
}


class MetricsServer(BaseHTTPRequestHandler):
    """Enough of a metrics server for `kubectl top pods`."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = self.path.split("?")[0]
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        pods = {"name": "pods", "namespaced": True, "kind": "PodMetrics", "verbs": ["get", "list"], "singularName": ""}
        answers: dict[str, dict[str, object]] = {
            f"/apis/{VERSION}": {
                "kind": "APIResourceList",
                "apiVersion": "v1",
                "groupVersion": VERSION,
                "resources": [pods],
            },
            f"/apis/{VERSION}/namespaces/default/pods": {
                "kind": "PodMetricsList",
                "apiVersion": VERSION,
                "metadata": {},
                "items": [{**MEASURED, "timestamp": now}],
            },
        }
        body = json.dumps(answers.get(path, {"kind": "Status", "apiVersion": "v1", "code": 404})).encode()
        self.send_response(200 if path in answers else 404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope="module")
def metrics(harbour: Harbour, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The service's address is one of the cluster's own network namespace: nobody here routes services."""
    server = harbour.server
    assert server.namespace is not None
    where: Path = tmp_path_factory.mktemp("metrics")
    pair = server.authority.server("metrics", ["metrics.default.svc"])
    (where / "chain.pem").write_bytes(pair.certificate)
    (where / "key.pem").touch(0o600)
    (where / "key.pem").write_bytes(pair.key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(where / "chain.pem", where / "key.pem")
    ip("-n", server.namespace, "address", "add", f"{SERVICE_ADDRESS}/32", "dev", "lo")
    with entered(server.namespace):
        serving = ThreadingHTTPServer((SERVICE_ADDRESS, 443), MetricsServer)
    serving.daemon_threads = True
    serving.socket = context.wrap_socket(serving.socket, server_side=True)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    server.create(
        "/api/v1/namespaces/default/services",
        {"metadata": {"name": "metrics"}, "spec": {"clusterIP": SERVICE_ADDRESS, "ports": [{"port": 443}]}},
    )
    slices = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices"
    server.create(
        slices,
        {
            "metadata": {"name": "metrics", "labels": {"kubernetes.io/service-name": "metrics"}},
            "addressType": "IPv4",
            "endpoints": [{"addresses": [server.host], "conditions": {"ready": True}}],
            "ports": [{"port": 443}],
        },
    )
    service = {"name": "metrics", "namespace": "default", "port": 443}
    spec = {"group": "metrics.k8s.io", "version": "v1beta1", "groupPriorityMinimum": 100, "versionPriority": 100}
    trust = {"insecureSkipTLSVerify": True}
    name = f"v1beta1.{spec['group']}"
    server.create(APIS, {"metadata": {"name": name}, "spec": {**spec, **trust, "service": service}})
    harbour.gateway.write_policy(POLICY, "metrics.yaml")
    harbour.reload(harbour.policy)
    try:
        until(lambda: server.request("GET", f"/apis/{VERSION}").status == 200, "the aggregated API")
        yield
    finally:
        server.request("DELETE", f"{APIS}/{name}")
        server.request("DELETE", "/api/v1/namespaces/default/services/metrics")
        server.request("DELETE", f"{slices}/metrics")
        (harbour.gateway.policy_dir / "metrics.yaml").unlink()
        harbour.reload(harbour.policy)
        serving.shutdown()
        serving.server_close()
        ip("-n", server.namespace, "address", "delete", f"{SERVICE_ADDRESS}/32", "dev", "lo")


def test_what_it_serves_is_judged_by_its_own_name(harbour: Harbour, metrics: None, tmp_path: Path) -> None:
    # discovery of before it was there is kept in another HOME
    home = {"HOME": str(tmp_path)}
    mark = harbour.mark()
    done = harbour.kubectl("reader", "top", "pods", "--no-headers", **home)
    assert done.stdout.split() == [POD, "21m", "42Mi"], done.stderr
    assert "list pods.metrics.k8s.io in default" in [record.text for record in harbour.ruled_since(mark)]
    done = harbour.kubectl("limited", "top", "pods", **home)
    assert "agent `limited` may not list pods.metrics.k8s.io in default (no rule allows it)" in done.stderr


def test_what_it_serves_is_masked(harbour: Harbour, metrics: None) -> None:
    path = f"/apis/{VERSION}/namespaces/default/pods"
    (item,) = json.loads(harbour.kubectl("full", "get", "--raw", path).stdout)["items"]
    assert item["containers"] == MEASURED["containers"]
    (item,) = json.loads(harbour.kubectl("masked", "get", "--raw", path).stdout)["items"]
    assert item["containers"] == [{"name": "main", "usage": {"cpu": "21m", "memory": "***"}}]
