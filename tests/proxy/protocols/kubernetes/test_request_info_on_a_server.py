"""What a request asks for, told here and by a real API server in its audit log, for spellings of every kind: both tell
the same, of what the client wrote and of what would be sent for it. Some are sent with headers that other servers take
for another method or path."""

from __future__ import annotations

import re
import socket
import ssl
import time
from collections.abc import Iterator
from typing import Any

import pytest

from proxy.model import RequestFacts
from proxy.protocols.kubernetes.requests import Head, Request, classify
from tests.lab.kubernetes import GATEWAY, KubernetesServer, kubernetes
from tests.lab.kubernetes.presence import built_or_skipped

pytestmark = pytest.mark.e2e

CONNECTING = {"exec", "attach", "portforward", "proxy"}
POD = "/api/v1/namespaces/default/pods/web"
PODS = "/api/v1/namespaces/default/pods"
APPS = "/apis/apps/v1/namespaces/default/deployments"

TOLD = [
    # plain ones
    *(f"{method} {POD}" for method in ("GET", "HEAD", "PUT", "PATCH", "DELETE", "POST")),
    *(f"{method} {PODS}" for method in ("GET", "HEAD", "PUT", "PATCH", "DELETE", "POST")),
    *(f"{method} {APPS}/web" for method in ("GET", "PUT", "PATCH", "DELETE")),
    "GET /api/v1/pods",
    "GET /api/v1/nodes",
    "GET /api/v1/nodes/n",
    "GET /api/v1/namespaces",
    "GET /api/v1/namespaces/default",
    "PUT /api/v1/namespaces/default/finalize",
    "PUT /api/v1/namespaces/default/status",
    "GET /api/v1/namespaces/status",
    "GET /api/v1/namespaces/finalize/pods",
    "GET /api/v1/namespaces/default/namespaces",
    "GET /api/v1/namespaces/default/nodes/n",
    "GET /apis/rbac.authorization.k8s.io/v1/clusterroles/view",
    "GET /apis/example.test/v1/widgets/w/status",
    "GET /apis/example.test/v1/namespaces/default/widgets/w/scale",
    # subresources
    *(
        f"{method} {POD}/{sub}"
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE")
        for sub in ("status", "log", "eviction", "ephemeralcontainers", "binding", "resize", "token", "anything")
    ),
    *(f"{method} {POD}/{sub}" for method in ("GET", "POST") for sub in sorted(CONNECTING)),
    f"GET {POD}/exec?command=id&stdout=1",
    f"GET {POD}/proxy/a/b?c=d",
    f"PUT {POD}/proxy/",
    f"DELETE {POD}/proxy/a/",
    "GET /api/v1/nodes/n/proxy/pods",
    "GET /api/v1/nodes/n:10250/proxy/exec/default/web/c?command=id",
    "GET /api/v1/namespaces/default/services/https:web:443/proxy/x",
    f"PATCH {APPS}/web/scale",
    "POST /api/v1/namespaces/default/serviceaccounts/a/token",
    # spellings of watch
    *(
        f"GET {PODS}?{query}"
        for query in (
            "watch",
            "watch=",
            "watch=1",
            "watch=0",
            "watch=true",
            "watch=false",
            "watch=False",
            "watch=FALSE",
            "watch=no",
            "watch=%31",
            "%77atch=1",
            "watch=%30",
            "watch=+0",
            "watch=0%20",
            "Watch=1",
            "WATCH=1",
            "watch=1&limit=x",
            "watch=1&timeoutSeconds=abc",
            "timeoutSeconds=abc",
            "watch=0&resourceVersion=abc",
            "&&watch=1",
            "watch=1&",
            "=&watch=1",
            "=watch=1",
            "watch=1=0",
            "watch==0",
            "allowWatchBookmarks=true",
            "limit=1&limit=2",
        )
    ),
    f"GET {POD}?watch=1",
    f"HEAD {PODS}?watch=1",
    f"POST {PODS}?watch=1",
    f"DELETE {PODS}?watch=1",
    "GET /api/v1/watch/pods",
    "GET /api/v1/watch/namespaces/default/pods",
    "GET /api/v1/watch/namespaces/default/pods/web",
    "GET /api/v1/watch/namespaces",
    "GET /api/v1/watch/namespaces/default",
    "GET /api/v1/watch/nodes/n",
    "HEAD /api/v1/watch/pods",
    "GET /api/v1/watch/namespaces/default/pods?watch=0",
    "GET /api/v1/watch/namespaces/default/pods/web/status",
    "GET /api/v1/watch/watch/pods",
    # selectors
    *(
        f"{method} {PODS}?fieldSelector={selector}"
        for method in ("GET", "DELETE")
        for selector in (
            "metadata.name%3Dweb",
            "metadata.name=web",
            "metadata.name%3D%3Dweb",
            "metadata.name!%3Dweb",
            "metadata.name%3Dweb,metadata.namespace%3Ddefault",
            "metadata.namespace%3Ddefault,metadata.name%3Dweb",
            "metadata.name%3Da%2Cmetadata.name%3Db",
            "metadata.name%3D",
            "metadata.name",
            "metadata.name%3Da%5C%2Cb",
            "metadata.name%3Da%252Fb",
            "metadata.name%3D..",
            "metadata.name%3Da%2Fb",
            "+metadata.name%3Dweb",
            "metadata.name%3D+web",
            "metadata.name%3Dweb%20",
            "Metadata.name%3Dweb",
        )
    ),
    f"GET {PODS}?fieldSelector=metadata.name%3Dweb&watch=1",
    f"GET {PODS}?fieldSelector=metadata.name%3Dweb&watch=1&limit=x",
    f"GET {PODS}?fieldSelector=metadata.name%3Dweb&timeoutSeconds=x",
    f"GET {PODS}?fieldselector=metadata.name%3Dweb",
    f"GET {PODS}?labelSelector={'a%2C' * 2000}a",
    "GET /api/v1/watch/pods?fieldSelector=metadata.name%3Dweb",
    # paths
    f"GET {PODS}/",
    f"GET {POD}/",
    f"GET {POD}/status/",
    "GET /%61pi/v1/pods",
    "GET /api/v1/%70ods/",
    "GET /api/v1/namespaces/default/pods/we%62",
    "GET /api/v1/namespaces/default/pods/web%3Fwatch=1",
    "GET /api/v1/namespaces/default/pods/web%23x",
    "GET /api/v1/namespaces/default/pods/web%20x",
    "GET /api/v1/namespaces/default/pods/we+b",
    "GET /api/v1/namespaces/default/pods/%C3%A9",
    "GET /api/v1/namespaces/default/pods;a=b/web",
    "GET /api/v1/namespaces/default/pods/web;exec",
    "GET /api/v1/namespaces/default/pods/a:b@c,d",
    "GET /API/v1/pods",
    "GET /api/V1/pods",
    "GET /api/v1/Pods",
    "GET /api/v1/PODS/web",
    "GET /api/v1/NAMESPACES/default/pods",
    "GET /api/v1/pods/web",
    "GET /api/v1/pods/web/exec",
    "GET /api/v1/namespaces/default/pods/proxy",
    "GET /api/v1/namespaces/default/proxy",
    "GET /api/v1/namespaces/proxy/pods/web",
    "GET /api/v1/namespaces/watch/pods",
    "GET /api/v1/namespaces/default/watch",
    "GET /api/v2/pods",
    "GET /apis/v1/pods",
    "GET /apis/apps/v1",
    "GET /apis/apps",
    "GET /apis/apps/v1/watch/namespaces/default/deployments",
    "GET /api",
    "GET /api/",
    "GET /api/v1",
    "GET /api/v1/",
    "GET /apis/",
    "GET /",
    "GET /version",
    "GET /metrics/",
    "POST /metrics",
    "PUT /healthz",
    "OPTIONS /version",
    "POST /apis/authorization.k8s.io/v1/selfsubjectaccessreviews",
    # parameters that are nobody's
    f"GET {POD}?method=DELETE&_method=DELETE&verb=delete",
    f"GET {PODS}?namespace=kube-system&name=x",
    f"DELETE {POD}?dryRun=All&dryRun=None",
    f"GET {POD}?pretty",
    f"GET {POD}?",
    f"GET {POD}??watch=1",
]

REFUSED = [
    *(
        f"{method} {PODS}?fieldSelector=metadata.name%3Dweb{end}"
        for method in ("GET", "DELETE")
        for end in ("%00", "%0A")
    ),
    "POST /api/v1/watch/pods",
    "DELETE /api/v1/watch/namespaces/default/pods/web",
    "GET /api/v1/watch",
    "GET /api/v1/proxy/namespaces/default/pods/web",
    "GET /api/v1/proxy/nodes/n/x",
    "GET /api/v1/proxy",
    f"GET {PODS}?fieldSelector=metadata.name%3Da&fieldSelector=metadata.name%3Db",
    f"GET {PODS}?fieldSelector=%zz",
    f"GET {PODS}?labelSelector=%zz&watch=1",
    f"GET {PODS}?labelSelector=a;watch=1",
    f"GET {PODS}?watch=0;watch=1",
    f"GET {POD}//status",
    f"GET {POD}/status//",
    f"GET /{PODS}",
    "GET //api/v1/pods",
    "GET /api//v1/pods",
    "GET /api/v1//pods",
    "GET /api/v1/namespaces//pods",
    "GET /api/v1/namespaces/default//pods/web",
    "GET /api/v1/namespaces/default/pods//web",
    "GET /api/v1/./pods",
    "GET /api/v1/namespaces/../pods",
    "GET /api/v1/namespaces/kube-system/../default/pods",
    "GET /api/v1/namespaces/kube-system/%2e%2e/default/pods",
    "GET /api/v1/namespaces/kube-system%2F..%2Fdefault/pods",
    "GET /api/v1/namespaces/default%2Fpods",
    "GET /api%2Fv1/pods",
    "GET /api/v1/namespaces/default/pods/web%2Fstatus",
    "GET /api/v1/namespaces/default/pods/web%2fexec",
    "GET /api/v1/namespaces/default/pods/web#x",
    "GET /api/v1/namespaces/default/pods/web%00",
    "GET /api/v1/namespaces/default/pods/%FF",
    "GET /api/v1/namespaces/default/pods/%zz",
    "GET /api/v1/namespaces/default/pods/%",
    "GET /api/v1/namespaces/default/pods/web\\status",
    "GET /api/v1/namespaces/default/pods/web%5Cstatus",
    "GET /api/v1/pods/default/web/exec",
    f"GET {POD}/status/x",
    f"GET {POD}/exec/x",
    f"GET {POD}/status/proxy",
    "GET /apis/apps/v1/proxy/namespaces/default/deployments/web",
    "OPTIONS /api/v1/pods",
    "TRACE /api/v1/pods",
    "CONNECT /api/v1/pods",
    "PURGE /api/v1/pods",
    "get /api/v1/pods",
    f"GET {POD}?%00=x",
]
HEADERS = ("", "X-HTTP-Method-Override: DELETE", "X-Method-Override: DELETE", "X-Original-URL: /api/v1/secrets")


@pytest.fixture(scope="module")
def server() -> Iterator[KubernetesServer]:
    built_or_skipped()
    with kubernetes() as server:
        yield server


def ask(server: KubernetesServer, method: str, target: str, agent: str, more: str) -> int:
    """The status of the answer to a head that is sent as it is; of its body nothing is waited for."""
    context = ssl.create_default_context(cafile=str(server.ca_path))
    lines = [f"{method} {target} HTTP/1.1", f"Host: {server.server_name}", f"User-Agent: {agent}", "Connection: close"]
    lines += [f"Authorization: Bearer {server.tokens[GATEWAY]}", *([more] if more else [])]
    lines += ["Content-Length: 0"] if method in ("POST", "PUT", "PATCH") else []
    with (
        socket.create_connection((server.host, server.port), 10) as raw,
        context.wrap_socket(raw, server_hostname=server.server_name) as connection,
    ):
        connection.sendall("\r\n".join([*lines, "", ""]).encode("latin-1"))
        answer = connection.recv(64)
    return int(answer.split(b" ")[1]) if answer.startswith(b"HTTP/1.1 ") else 0


def first_events(server: KubernetesServer, since: int, count: int) -> dict[str, dict[str, Any]]:
    """The first event of each client, by its `User-Agent`, once there are so many."""
    deadline = time.monotonic() + 10
    while True:
        found: dict[str, dict[str, Any]] = {}
        for event in server.audit(since=since):
            found.setdefault(event.get("userAgent", ""), event)
        if len(found) >= count or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def told_by(event: dict[str, Any] | None) -> tuple[str, ...] | None:
    """Verb, group, resource, subresource, namespace and name; the verb alone of what is no resource's."""
    if event is None:
        return None
    ref = event.get("objectRef", {})
    names = ("apiGroup", "resource", "subresource", "namespace", "name")
    return (event["verb"], *(ref.get(name, "") for name in names))


def told_by_us(facts: RequestFacts) -> tuple[str, ...]:
    return (facts.verb, facts.group, facts.resource, facts.subresource, facts.namespace, facts.name)


def differs(request: Request, theirs: tuple[str, ...], status: int) -> bool:
    """Whether it is told otherwise, but for what is so on purpose: what connects is `create`; of a selector of several
    terms no name is told, so that no grant by names covers it; and the server, too, refuses a request whose options it
    cannot read."""
    ours = told_by_us(request.facts)
    if ours[3] in CONNECTING:
        return ours[0] != "create" or ours[1:] != theirs[1:]
    if re.search(r",|\\\\", request.facts.field_selector):
        return ours != (*theirs[:-1], "")
    return ours != theirs and (status != 400 or ours[:-1] != theirs[:-1])


def test_it_is_told_as_the_server_tells_it(server: KubernetesServer) -> None:
    size = server.audit_size()
    asked: dict[str, tuple[str, Request, int]] = {}
    for number, line in enumerate(TOLD):
        method, _, target = line.partition(" ")
        request = classify(Head(method, target, ()))
        assert not request.unclassified, line
        for how, sent in (("as written", target), ("as sent", request.target)):
            agent = f"case {number} {how}"
            asked[agent] = (f"{line} {how}", request, ask(server, method, sent, agent, HEADERS[number % len(HEADERS)]))
    events = first_events(server, size, len(asked))
    different = [
        f"{line}: {told_by_us(request.facts)} here, {theirs} there ({status})"
        for agent, (line, request, status) in asked.items()
        if (theirs := told_by(events.get(agent))) is None or differs(request, theirs, status)
    ]
    assert not different, "\n".join(different)


@pytest.mark.parametrize("line", REFUSED)
def test_what_servers_read_differently_is_refused(line: str) -> None:
    method, _, target = line.partition(" ")
    assert classify(Head(method, target, ())).unclassified
