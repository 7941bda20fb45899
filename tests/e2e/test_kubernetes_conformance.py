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
MASKED = [
    ("kubectl", "formats"),
    ("kubectl", "apply, diff"),
    ("oldest kubectl", "patch, label, edit"),
    ("kubectl", "rollout"),
    ("Python kr8s", "watch"),
    ("Go client-go, protobuf", "apply"),
]


@pytest.fixture(scope="module")
def bed() -> Iterator[ClusterBed]:
    built_or_skipped()
    with conformance.opened_bed() as made:
        yield made


@pytest.fixture(scope="module")
def masked_bed() -> Iterator[ClusterBed]:
    built_or_skipped()
    with conformance.opened_bed(conformance.POLICY + conformance.MASKS) as made:
        yield made


def named(word: str) -> str:
    return word.replace(", ", "-").replace(" ", "-")


def differences(bed: ClusterBed, name: str, operation: str) -> list[str]:
    known = {
        "kubectl": f"kubectl {current_kubectl().name}",
        "oldest kubectl": f"kubectl {oldest_kubectl().name}",
    }
    (client,) = [
        each for each in conformance.clients() if each.name == known.get(name, name) and operation in each.operations
    ]
    return conformance.differences(bed, client, operation)


@pytest.mark.parametrize("name, operation", SHORT, ids=named)
def test_it_is_the_same_through_the_gateway(bed: ClusterBed, name: str, operation: str) -> None:
    assert differences(bed, name, operation) == []


@pytest.mark.parametrize("name, operation", MASKED, ids=named)
def test_it_is_the_same_through_masks_that_find_nothing(masked_bed: ClusterBed, name: str, operation: str) -> None:
    assert differences(masked_bed, name, operation) == []
