"""Clients do not notice the gateway: the short form of `./scripts/conformance kubernetes`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.clusters import ClusterBed
from tests.lab import conformance
from tests.lab.kubernetes import current_kubectl, oldest_kubectl
from tests.lab.kubernetes.presence import built_or_skipped

SHORT = [
    ("kubectl", "formats"),
    ("kubectl", "server-side apply"),
    ("kubectl", "errors"),
    ("kubectl", "exec"),
    ("oldest kubectl", "patch, label, edit"),
    ("oldest kubectl", "port-forward"),
    ("helm", "install, list"),
    ("Python kubernetes", "create, read, update, delete"),
    ("Python kr8s", "watch"),
    ("Go client-go, protobuf", "apply"),
]


@pytest.fixture(scope="module")
def bed() -> Iterator[ClusterBed]:
    built_or_skipped()
    with conformance.opened_bed() as made:
        yield made


@pytest.mark.parametrize("name, operation", SHORT, ids=lambda word: str(word).replace(", ", "-").replace(" ", "-"))
def test_it_is_the_same_through_the_gateway(bed: ClusterBed, name: str, operation: str) -> None:
    known = {
        "kubectl": f"kubectl {current_kubectl().name}",
        "oldest kubectl": f"kubectl {oldest_kubectl().name}",
    }
    (client,) = [
        each for each in conformance.clients() if each.name == known.get(name, name) and operation in each.operations
    ]
    assert conformance.differences(bed, client, operation) == []
