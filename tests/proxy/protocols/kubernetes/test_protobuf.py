"""Protobuf read as the JSON that it stands for: held against a real API server, which says the same objects in both."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.protocols.kubernetes.protobuf import MAGIC, ProtobufUnreadable, read_protobuf
from proxy.protocols.kubernetes.requests import Head, classify, describe
from tests.lab.kubernetes import KubernetesServer, kubernetes
from tests.lab.kubernetes.presence import built_or_skipped

PROTOBUF = "application/vnd.kubernetes.protobuf"
CONFIG_MAP = (
    MAGIC
    + bytes.fromhex("0a0f 0a02 7631 1209 436f6e6669674d6170")  # typeMeta: v1, ConfigMap
    + bytes.fromhex("1213 0a11 0a01 62 1200 1a00 2200 2a00 3200 3800 4200")  # raw: metadata with the name b
)

POD: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {
        "name": "all",
        "labels": {"a": "b", "c": ""},
        "annotations": {"x/y": "é\u2028"},
        "finalizers": ["example.com/f"],
        "ownerReferences": [
            {"apiVersion": "v1", "kind": "ConfigMap", "name": "x", "uid": "u", "controller": False},
        ],
    },
    "spec": {
        "terminationGracePeriodSeconds": 0,
        "automountServiceAccountToken": False,
        "activeDeadlineSeconds": 600,
        "hostNetwork": True,
        "nodeSelector": {"disk": "ssd"},
        "tolerations": [{"key": "k", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 0}],
        "securityContext": {"runAsUser": 0, "runAsNonRoot": False, "sysctls": [{"name": "a.b", "value": "1"}]},
        "topologySpreadConstraints": [
            {"maxSkew": 1, "topologyKey": "z", "whenUnsatisfiable": "DoNotSchedule", "labelSelector": {}}
        ],
        "affinity": {
            "nodeAffinity": {
                "preferredDuringSchedulingIgnoredDuringExecution": [
                    {"weight": 1, "preference": {"matchExpressions": [{"key": "k", "operator": "In", "values": ["v"]}]}}
                ]
            }
        },
        "containers": [
            {
                "name": "main",
                "image": "web",
                "args": ["-x", ""],
                "env": [
                    {"name": "A", "value": "1"},
                    {"name": "B", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k", "optional": False}}},
                    {"name": "C", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu", "divisor": "1m"}}},
                ],
                "resources": {"limits": {"cpu": "1500m", "memory": "1Gi"}, "requests": {"cpu": "0"}},
                "ports": [{"containerPort": 80, "protocol": "TCP"}],
                "livenessProbe": {"httpGet": {"path": "/", "port": "web"}, "initialDelaySeconds": 3},
                "readinessProbe": {"tcpSocket": {"port": 80}},
                "securityContext": {"privileged": False, "capabilities": {"drop": ["ALL"]}},
                "volumeMounts": [{"name": "v", "mountPath": "/v", "readOnly": True}],
                "stdin": True,
            }
        ],
        "volumes": [
            {"name": "v", "emptyDir": {"sizeLimit": "1Gi"}},
            {"name": "w", "configMap": {"name": "c", "items": [{"key": "k", "path": "p", "mode": 0}]}},
            {
                "name": "p",
                "projected": {"sources": [{"secret": {"name": "s", "optional": True}}]},
            },
            {"name": "h", "hostPath": {"path": "/"}},
        ],
    },
}
OBJECTS: list[tuple[str, Mapping[str, Any]]] = [
    ("/api/v1/namespaces/default/pods", POD),
    (
        "/api/v1/namespaces/default/secrets",
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "all"}, "data": {"k": "AP8=", "e": ""}},
    ),
    (
        "/api/v1/namespaces/default/services",
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "all"},
            "spec": {"ports": [{"name": "a", "port": 80, "targetPort": "w"}, {"name": "b", "port": 8}]},
        },
    ),
    (
        "/apis/apps/v1/namespaces/default/deployments",
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "all"},
            "spec": {
                "replicas": 0,
                "selector": {"matchLabels": {"a": "b"}},
                "strategy": {"rollingUpdate": {"maxSurge": "25%", "maxUnavailable": 0}},
                "template": {
                    "metadata": {"labels": {"a": "b"}},
                    "spec": {"containers": [{"name": "m", "image": "web"}]},
                },
            },
        },
    ),
    (
        "/apis/rbac.authorization.k8s.io/v1/clusterroles",
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRole",
            "metadata": {"name": "all"},
            "rules": [{"verbs": ["get"], "apiGroups": [""], "resources": ["pods"]}],
            "aggregationRule": {"clusterRoleSelectors": [{"matchExpressions": [{"key": "a", "operator": "Exists"}]}]},
        },
    ),
    (
        "/apis/coordination.k8s.io/v1/namespaces/default/leases",
        {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": "all"},
            "spec": {"holderIdentity": "me", "leaseDurationSeconds": 15, "renewTime": "2026-01-02T03:04:05.000678Z"},
        },
    ),
    (
        "/apis/networking.k8s.io/v1/namespaces/default/networkpolicies",
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"name": "all"},
            "spec": {"podSelector": {}, "ingress": [{}], "egress": [{"ports": [{"port": 53, "endPort": 54}]}]},
        },
    ),
    (
        "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations",
        {
            "apiVersion": "admissionregistration.k8s.io/v1",
            "kind": "ValidatingWebhookConfiguration",
            "metadata": {"name": "all"},
            "webhooks": [
                {
                    "name": "a.example.com",
                    "clientConfig": {"url": "https://example.com", "caBundle": "AAEC"},
                    "sideEffects": "None",
                    "admissionReviewVersions": ["v1"],
                    "failurePolicy": "Ignore",
                    "namespaceSelector": {"matchLabels": {"never": "matches"}},
                }
            ],
        },
    ),
]  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[KubernetesServer]:
    built_or_skipped()
    with kubernetes() as made:
        yield made


def _without_nulls(value: Any) -> Any:
    match value:
        case dict():
            return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
        case list():
            return [_without_nulls(inner) for inner in value]
        case _:
            return value


@pytest.mark.e2e
@pytest.mark.parametrize(("path", "sent"), OBJECTS, ids=[str(each["kind"]) for _, each in OBJECTS])
def test_both_encodings_of_a_server_are_the_same_object(
    server: KubernetesServer, path: str, sent: Mapping[str, Any]
) -> None:
    server.create(path, sent)
    where = f"{path}/{sent['metadata']['name']}"
    plain = server.request("GET", where).json()
    packed = server.request("GET", where, headers={"Accept": PROTOBUF}).body
    assert packed.startswith(MAGIC)
    assert _without_nulls(read_protobuf(packed)) == _without_nulls(plain)


@pytest.mark.e2e
def test_what_was_read_can_be_sent_in_its_place(server: KubernetesServer) -> None:
    path = "/apis/apps/v1/namespaces/default/deployments"
    source = dict(OBJECTS[3][1], metadata={"name": "again"})
    server.create(path, source)
    packed = server.request("GET", f"{path}/again", headers={"Accept": PROTOBUF}).body
    head = Head("PUT", f"{path}/again", (("content-type", PROTOBUF),))
    described = describe(classify(head), head, packed)
    assert not described.operation.unclassified
    assert described.content_type == "application/json"
    answer = server.request("PUT", f"{path}/again", described.body)
    assert answer.status == 200
    assert answer.json()["spec"]["replicas"] == 0


def test_a_small_one() -> None:
    assert read_protobuf(CONFIG_MAP) == {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "b"}}


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "does not start"),
        (b"{}", "does not start"),
        (MAGIC, "the kind `/` is none"),
        (MAGIC + b"\x0a\x05\x0a\x01x\x12\x00", "the kind `x/` is none"),
        (MAGIC + b"\x0a\xff\xff\xff\xff\x0f", "ends in the middle"),
        (MAGIC + b"\x80" * 20, "does not end"),
        (MAGIC + b"\x0b\x0c", "group"),
        (CONFIG_MAP + b"\x1a\x04gzip", "another encoding"),
        (CONFIG_MAP + b"\x22\x10application/json", "another encoding"),
        (CONFIG_MAP + b"\x12\x00", "envelope has a field"),
        (CONFIG_MAP[:21] + b"\x12\x03\xfa\x3f\x00", "which is not known"),
        (CONFIG_MAP[:21] + b"\x12\x02\x08\x01", "`metadata` is not encoded"),
        (CONFIG_MAP[:21] + b"\x12\x06\x0a\x04\x0a\x02\xff\xfe", "no UTF-8"),
    ],
)
def test_what_cannot_be_read(body: bytes, why: str) -> None:
    with pytest.raises(ProtobufUnreadable, match=why):
        read_protobuf(body)
    head = Head("POST", "/api/v1/namespaces/default/configmaps", (("content-type", PROTOBUF),))
    if body:
        assert "send application/json" in describe(classify(head), head, body).operation.unclassified


@given(st.binary(max_size=200), st.integers(0, 60))
def test_any_bytes_are_an_object_or_refused(noise: bytes, at: int) -> None:
    for body in (MAGIC + noise, CONFIG_MAP[:at] + noise, CONFIG_MAP[:at] + noise + CONFIG_MAP[at:]):
        with contextlib.suppress(ProtobufUnreadable):
            json.dumps(read_protobuf(body), allow_nan=False)
