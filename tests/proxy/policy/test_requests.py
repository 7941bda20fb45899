"""What a chain may do at a Kubernetes API server: verbs, resources, names, bodies, streams, holds and masks."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from proxy.model import Decision, Operation, OperationKind, Phase, Ruling
from proxy.policy import CompiledPolicy, Judge, PolicyError, load, resolve
from proxy.policy.testing import request
from proxy.protocols.kubernetes.requests import Head, classify, describe, tell

ALLOW, HOLD, DENY = Decision.ALLOW, Decision.HOLD, Decision.DENY
KEY = bytes(32)
CLUSTER = {"protocol": "kubernetes", "addresses": "192.0.2.20", "credential": "cluster"}
DATABASE = {"protocol": "postgresql", "addresses": "192.0.2.30", "credential": "shop"}


def rule(name: str, decision: str | None, verbs: object = "*", resources: object = "*", **more: object) -> Any:
    """A rule for agent A at the cluster, unless said otherwise."""
    made: dict[str, object] = {"name": name, "agents": "A", "targets": "cluster"}
    if decision:
        made |= {"decision": decision, "verbs": verbs, **({} if "paths" in more else {"resources": resources})}
    return made | more


def policy(folder: Path, *rules: Any) -> CompiledPolicy:
    text = yaml.safe_dump(
        {
            "agents": {name: {"exe": f"/{name}"} for name in "ABC"},
            "targets": {"cluster": CLUSTER, "shop": DATABASE},
            "rules": list(rules),
        }
    )
    (folder / "p.yaml").write_text(text)
    return CompiledPolicy(resolve(load(folder), lambda name: []), KEY)


class Bench:
    """Makes judges from rules."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, *rules: Any, chain: str = "A", target: str = "cluster") -> Judge:
        compiled = policy(self._folder, *rules)
        return compiled.bind(tuple(chain.split()), compiled.targets[target], "")


@pytest.fixture
def judge(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def ruled(judge: Judge, text: str, body: object = None, patch: str = "") -> Ruling:
    return judge.decide(request(text, body, patch))


def decided(judge: Judge, text: str, body: object = None, patch: str = "") -> Decision:
    return ruled(judge, text, body, patch).decision


READ = rule("read", "allow", "read", ["pods", "pods/log", "deployments.apps"], namespaces=["shop", "ci-*"])

# --- one hop ----------------------------------------------------------------------------------------------------------


def test_nothing_is_allowed_by_default_and_the_message_names_target_hop_and_deed(judge: Bench) -> None:
    ruling = ruled(judge(READ), "delete deployments.apps/web in shop")
    assert ruling.decision == DENY
    assert ruling.message == (
        "target `cluster`: agent `A` may not delete deployments.apps/web in shop (no rule allows it)"
    )
    assert ruling.hint == "ask those who keep the policy for a rule that allows `delete deployments.apps` there"
    assert [(each.hop, each.rule) for each in ruling.reasons] == [("A", "[no rule allows it]")]


@pytest.mark.parametrize(
    ("text", "decision"),
    [
        ("list pods in shop", ALLOW),
        ("watch pods in ci-7 where app=web", ALLOW),
        ("get pods/web log in shop", ALLOW),
        ("get deployments.apps/web in shop", ALLOW),
        ("get deployments/web in shop", DENY),
        ("get deployments.extensions/web in shop", DENY),
        ("get deployments.apps/web scale in shop", DENY),
        ("list pods in kube-system", DENY),
        ("list pods", DENY),
        ("list pods with metadata.namespace=shop", DENY),
        ("get secrets/a in shop", DENY),
        ("create pods/web in shop", DENY),
        ("create pods/web exec in shop: ls", DENY),
    ],
)
def test_a_grant_covers_what_it_names(judge: Bench, text: str, decision: Decision) -> None:
    assert decided(judge(READ), text) == decision


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_deny_beats_hold_beats_allow_in_any_order(judge: Bench, order: tuple[int, ...]) -> None:
    rules = [
        rule("a", "allow", ["read", "write"], "pods"),
        rule("h", "hold", ["delete", "update"], "pods", timeout="5m"),
        rule("d", "deny", "delete", "pods", names="db-*", hint="leave it"),
    ]
    bound = judge(*(rules[index] for index in order))
    assert decided(bound, "get pods/db-1 in shop") == ALLOW
    held = ruled(bound, "delete pods/web in shop")
    assert (held.decision, held.hold_timeout_s, held.reasons[0].rule) == (HOLD, 300.0, "h")
    assert held.message == "target `cluster`: agent `A` needs approval to delete pods/web in shop (rule `h`)"
    denied = ruled(bound, "delete pods/db-1 in shop")
    assert (denied.decision, denied.hint, denied.reasons[0].rule) == (DENY, "leave it", "d")


@pytest.mark.parametrize(
    ("resources", "covered", "not_covered"),
    [
        (["*"], ["pods", "deployments.apps", "x.example.com"], ["pods/web log", "pods/web status"]),
        (["pods/*"], ["pods/web log", "pods/web status"], ["pods", "nodes/a status"]),
        (["*/*"], ["pods/web log", "x.example.com/a scale"], ["pods"]),
        (
            ["*.example.com"],
            ["x.example.com", "y.example.com/a"],
            ["x.sub.example.com", "pods", "x.example.com/a scale"],
        ),
        (["*.apps/scale"], ["deployments.apps/web scale"], ["deployments.apps/web status", "deployments.apps/web"]),
        (["*/exec"], ["pods/web exec in shop"], ["pods/web attach in shop", "pods"]),
        (["pod*"], ["pods", "podtemplates"], ["pods.metrics.k8s.io"]),
    ],
)
def test_stars_in_resources(judge: Bench, resources: list[str], covered: list[str], not_covered: list[str]) -> None:
    bound = judge(rule("r", "allow", "*", resources))
    assert {what: decided(bound, f"create {what}") for what in covered} == dict.fromkeys(covered, ALLOW)
    assert {what: decided(bound, f"create {what}") for what in not_covered} == dict.fromkeys(not_covered, DENY)


DANGEROUS = [
    "create pods/web exec in shop: sh",
    "create pods/web attach in shop",
    "create pods/web portforward in shop",
    "create pods/web proxy in shop",
    "create nodes/n1 proxy",
    "create services/web proxy in shop",
    "create serviceaccounts/admin token in shop",
    "update pods/web ephemeralcontainers in shop",
    "create pods/web eviction in shop",
    "create pods/web binding in shop",
    "update certificatesigningrequests.certificates.k8s.io/a approval",
    "update namespaces/shop finalize in shop",
]


@pytest.mark.parametrize("text", DANGEROUS)
def test_no_star_grants_what_does_more_than_it_stands_under(judge: Bench, text: str) -> None:
    assert decided(judge(rule("r", "allow", "*", ["*", "*/*", "pods/*", "*.*/*"])), text) == DENY
    assert decided(judge(rule("r", "allow", "*", f"*/{text.split()[2].rstrip(':')}")), text) == ALLOW


@pytest.mark.parametrize("text", [*DANGEROUS, "delete pods/web in shop", "list x.example.com", "get nodes/a status"])
def test_a_star_of_a_denial_or_a_hold_is_everything(judge: Bench, text: str) -> None:
    allow = rule("r", "allow", "*", ["*", "*/*", *sorted({f"*/{each.split()[2].rstrip(':')}" for each in DANGEROUS})])
    assert decided(judge(allow), text) == ALLOW
    assert decided(judge(allow, rule("d", "deny")), text) == DENY
    assert decided(judge(allow, rule("h", "hold")), text) == HOLD


def test_impersonation_is_ruled_beside_the_request_and_covered_by_no_star(judge: Bench) -> None:
    asked = request("list pods in shop")
    acting = replace(asked, requests=(*asked.requests, *request("impersonate users/jane").requests))
    star = rule("r", "allow", "*", "*")
    assert judge(star).decide(asked).decision == ALLOW
    assert judge(star).decide(acting).decision == DENY
    assert judge(star, rule("i", "allow", "impersonate", "users", names="jane")).decide(acting).decision == ALLOW
    assert judge(star, rule("i", "allow", "impersonate", "users", names="john")).decide(acting).decision == DENY
    assert judge(star, rule("i", "hold", "impersonate", "users")).decide(acting).decision == HOLD
    both = judge(star, rule("i", "allow", "impersonate", "users"), rule("d", "deny", "*", "users"))
    assert both.decide(acting).decision == DENY


def test_a_rule_with_names_covers_only_what_has_one(judge: Bench) -> None:
    bound = judge(rule("r", "allow", "*", "pods", names=["web-*"]))
    assert decided(bound, "get pods/web-1 in shop") == ALLOW
    assert decided(bound, "get pods/db-1 in shop") == DENY
    for text in ("list pods in shop", "deletecollection pods in shop", "watch pods"):
        assert decided(bound, text) == DENY
    assert decided(bound, "create pods in shop", {"metadata": {"name": "web-1"}}) == ALLOW
    assert decided(bound, "create pods in shop", {"metadata": {"name": "db-1"}}) == DENY
    assert decided(bound, "create pods in shop", {"metadata": {"generateName": "web-"}}) == DENY
    assert decided(bound, "create pods in shop", "odd") == DENY


def test_a_restriction_on_names_and_namespaces_touches_what_could_be_meant(judge: Bench) -> None:
    allow = rule("r", "allow", "*", "*")
    named = judge(allow, rule("d", "deny", "*", "pods", names="db-*"))
    for text in ("list pods", "deletecollection pods in shop", "get pods/db-1 in shop"):
        assert decided(named, text) == DENY
    assert decided(named, "create pods in shop", {"metadata": {"generateName": "x-"}}) == DENY
    assert decided(named, "get pods/web in shop") == ALLOW
    placed = judge(allow, rule("d", "deny", "*", "*", namespaces="prod*"))
    for text in ("list pods", "deletecollection pods", "watch x.example.com", "get pods/a in prod-1"):
        assert decided(placed, text) == DENY
    assert decided(placed, "create x.example.com", {"metadata": {"namespace": "prod"}}) == DENY
    for text in (
        "list pods in shop",
        "list nodes",
        "list namespaces",
        "get nodes/a",
        "list clusterroles.rbac.authorization.k8s.io",
    ):
        assert decided(placed, text) == ALLOW


@pytest.mark.parametrize(
    ("verb", "also", "apart"),
    [
        ("get", ["list", "watch"], ["create", "delete"]),
        ("list", ["watch"], ["get", "create"]),
        ("watch", [], ["get", "list"]),
        ("delete", ["deletecollection"], ["update"]),
        ("update", ["patch"], ["create"]),
        ("patch", ["update"], ["create"]),
    ],
)
def test_a_restriction_touches_verbs_that_come_to_the_same_and_a_grant_does_not(
    judge: Bench, verb: str, also: list[str], apart: list[str]
) -> None:
    denied = judge(ANY, rule("d", "deny", verb, "pods"))
    assert [decided(denied, f"{each} pods in shop") for each in (verb, *also)] == [DENY] * (1 + len(also))
    assert [decided(denied, f"{each} pods in shop") for each in apart] == [ALLOW] * len(apart)
    granted = judge(rule("a", "allow", verb, "pods"))
    assert decided(granted, f"{verb} pods in shop") == ALLOW
    assert [decided(granted, f"{each} pods in shop") for each in also] == [DENY] * len(also)


def test_paths_are_for_what_is_no_resource(judge: Bench) -> None:
    bound = judge(rule("r", "allow", "get", paths=["/metrics*", "/logs/*"]))
    assert decided(bound, "get /metrics") == ALLOW
    assert decided(bound, "get /metrics/slis") == ALLOW
    assert decided(bound, "post /metrics") == DENY
    assert decided(bound, "get /debug/pprof") == DENY
    assert decided(bound, "get pods/metrics in shop") == DENY
    assert decided(judge(rule("r", "allow", "*", "*")), "get /metrics") == DENY
    both = [rule("r", "allow", "*", paths="/*"), rule("d", "deny", "get", paths="/debug/*")]
    assert decided(judge(*both), "get /debug/pprof") == DENY
    assert decided(judge(*both), "post /anything") == ALLOW


def test_what_is_unclassified_or_no_request_is_denied(judge: Bench) -> None:
    bound = judge(rule("r", "allow", "*", "*"))
    ruling = bound.decide(replace(request("list pods"), unclassified="the path has an empty segment"))
    assert ruling.decision == DENY
    assert "the path has an empty segment" in ruling.message
    assert "statement" not in ruling.hint
    for kind in (OperationKind.REQUEST, OperationKind.QUERY):
        nothing = Operation("kubernetes", kind, Phase.EXECUTE, "", "", ())
        assert bound.decide(nothing).decision == DENY


# --- the chain, the protocols and the cache ---------------------------------------------------------------------------


def test_every_hop_counts(judge: Bench) -> None:
    rules = [
        READ | {"agents": ["A", "B"]},
        rule("d", "allow", "delete", "pods"),
        rule("h", "hold", "*", "*", agents="B"),
    ]
    assert decided(judge(*rules), "delete pods/a in shop") == ALLOW
    assert decided(judge(*rules, chain="A B"), "delete pods/a in shop") == HOLD
    assert decided(judge(*rules, chain="B"), "list pods in shop") == HOLD
    ruling = ruled(judge(*rules, chain="A B C"), "list pods in shop")
    assert (ruling.decision, [each.decision for each in ruling.reasons]) == (DENY, [ALLOW, HOLD, DENY])


def test_rules_of_one_protocol_grant_nothing_at_the_other(tmp_path: Path) -> None:
    statements = {"name": "s", "agents": "A", "targets": "*", "statements": "select", "decision": "allow"}
    requests = {"name": "r", "agents": "B", "targets": "*", "verbs": "*", "resources": "*", "decision": "allow"}
    compiled = policy(tmp_path, statements, requests)
    cluster, shop = compiled.targets["cluster"], compiled.targets["shop"]
    assert compiled.login(("A",), shop, "").decision == compiled.login(("B",), cluster, "").decision == ALLOW
    assert compiled.login(("A",), cluster, "").decision == compiled.login(("B",), shop, "").decision == DENY
    assert decided(compiled.bind(("A",), cluster, ""), "get /version") == DENY
    assert decided(compiled.bind(("B",), cluster, ""), "get /version") == ALLOW
    assert decided(compiled.bind(("A",), shop, ""), "get /version") == DENY


def test_what_is_asked_once_is_not_kept(judge: Bench) -> None:
    bound = judge(READ)
    decided(bound, "list pods in shop")
    assert not bound._cache


# --- housekeeping -----------------------------------------------------------------------------------------------------

CHORES = [
    "get /api",
    "get /api/v1",
    "get /apis",
    "get /apis/apps",
    "get /apis/apps/v1/",
    "get /openapi/v2",
    "get /openapi/v3/apis/apps/v1",
    "head /version",
    "get /healthz",
    "get /livez/poststarthook/x",
    "get /readyz",
    "create selfsubjectaccessreviews.authorization.k8s.io",
    "create selfsubjectrulesreviews.authorization.k8s.io",
    "create selfsubjectreviews.authentication.k8s.io",
]


@pytest.mark.parametrize("text", CHORES)
def test_clients_keep_house_unless_it_is_denied(judge: Bench, text: str) -> None:
    ruling = ruled(judge(READ), text)
    assert (ruling.decision, ruling.reasons[0].rule) == (ALLOW, "[client housekeeping]")
    assert (
        decided(judge(rule("m", None, masks=[{"resource": "secrets", "field": "data", "method": "redact"}])), text)
        == DENY
    )
    assert decided(judge(READ, rule("h", "hold", "*", "*"), rule("p", "hold", "*", paths="*")), text) == ALLOW
    denied = judge(READ, rule("d", "deny", "*", "*"), rule("p", "deny", "*", paths="*"))
    assert decided(denied, text) == DENY


@pytest.mark.parametrize(
    "text",
    [
        *["post /api/v1", "get /apis/a/b/c", "get /metrics", "get /versions", "get /", "get /openapi"],
        *["get /api/../metrics", "create subjectaccessreviews.authorization.k8s.io"],
        *["create tokenreviews.authentication.k8s.io"],
    ],
)
def test_but_nothing_else(judge: Bench, text: str) -> None:
    assert decided(judge(READ), text) == DENY


# --- streams ----------------------------------------------------------------------------------------------------------


def test_commands_are_held_against_the_command(judge: Bench) -> None:
    bound = judge(rule("r", "allow", "create", "pods/exec", commands=["ls *", "id"]))
    assert decided(bound, "create pods/web exec in shop: ls -l /tmp") == ALLOW
    assert decided(bound, "create pods/web exec in shop: id") == ALLOW
    for text in ("sh -c ls", "id -u", "lsof x"):
        assert decided(bound, f"create pods/web exec in shop: {text}") == DENY
    assert decided(bound, "create pods/web exec in shop") == DENY
    shells = judge(rule("a", "allow", "create", "pods/exec"), rule("d", "deny", "create", "pods/exec", commands="*sh*"))
    assert decided(shells, "create pods/web exec in shop: bash") == DENY
    assert decided(shells, "create pods/web exec in shop: ls") == ALLOW


def test_a_protected_port_has_to_be_named(judge: Bench) -> None:
    plain = judge(rule("r", "allow", "create", "pods/portforward"))
    assert decided(plain, "create pods/web portforward in shop") == ALLOW
    assert decided(plain, "create pods/web portforward in shop to 8080") == ALLOW
    assert decided(plain, "forward pods/web in shop to 8080") == ALLOW
    for text in ("forward pods/db in shop to 5432", "create pods/db portforward in shop to 8080, 5432"):
        ruling = ruled(plain, text)
        assert ruling.decision == DENY
        assert "rule `r` does not name port 5432" in ruling.message
    assert decided(plain, "forward pods/db in shop") == DENY
    named = judge(rule("r", "allow", "create", "pods/portforward", ports=[5432, 8080]))
    assert decided(named, "create pods/db portforward in shop to 5432, 8080") == ALLOW
    assert decided(named, "forward pods/db in shop to 5432") == ALLOW
    assert decided(named, "forward pods/db in shop to 9090") == DENY
    assert decided(named, "create pods/db portforward in shop to 9090") == DENY


def test_ports_add_up_over_rules(judge: Bench) -> None:
    two = [rule(f"r{port}", "allow", "create", "pods/portforward", ports=port) for port in (1, 2)]
    assert ruled(judge(*two), "create pods/a portforward in shop to 1, 2").reasons[0].rule == "r1, r2"
    assert decided(judge(*two), "create pods/a portforward in shop to 1, 3") == DENY


def test_a_port_forward_is_held_where_the_rule_speaks(judge: Bench) -> None:
    opening = judge(rule("h", "hold", "create", "pods/portforward"))
    assert decided(opening, "create pods/web portforward in shop") == HOLD
    assert decided(opening, "forward pods/web in shop to 8080") == ALLOW
    assert decided(opening, "forward pods/web in shop to 5432") == DENY
    inside = judge(rule("h", "hold", "create", "pods/portforward", ports=5432))
    assert decided(inside, "create pods/web portforward in shop") == ALLOW
    assert decided(inside, "create pods/web portforward in shop to 5432") == ALLOW
    assert decided(inside, "forward pods/web in shop to 5432") == HOLD
    assert decided(inside, "forward pods/web in shop to 8080") == DENY
    denied = judge(
        rule("a", "allow", "create", "pods/portforward"), rule("d", "deny", "create", "pods/portforward", ports=22)
    )
    assert decided(denied, "create pods/web portforward in shop") == ALLOW
    assert decided(denied, "create pods/web portforward in shop to 22") == DENY
    assert decided(denied, "forward pods/web in shop to 22") == DENY
    assert decided(denied, "forward pods/web in shop to 23") == ALLOW


# --- conditions -------------------------------------------------------------------------------------------------------

IMAGES = "spec.template.spec.containers[*].image"


def deployment(*images: str | None, **spec: object) -> dict[str, Any]:
    containers = [{"name": f"c{at}"} | ({"image": image} if image else {}) for at, image in enumerate(images)]
    return {"spec": {"template": {"spec": {"containers": containers, **spec}}}}


def deploy(*where: object, verbs: object = ("create", "update", "patch")) -> Any:
    return rule("deploy", "allow", list(verbs), "deployments.apps", where=list(where))  # type: ignore[call-overload]


FROM_REGISTRY = {"path": IMAGES, "in": "registry.example/*"}
GOOD, BAD = "registry.example/web:1", "evil.example/web:1"


@pytest.mark.parametrize(
    ("body", "decision"),
    [
        (deployment(GOOD), ALLOW),
        (deployment(GOOD, GOOD), ALLOW),
        (deployment(GOOD, BAD), DENY),
        (deployment(GOOD, None), DENY),
        (deployment(), DENY),
        ({"spec": {"containers": [{"image": GOOD}]}}, DENY),
        ({"spec": {"template": {"spec": {"containers": {"image": GOOD}}}}}, DENY),
        ({"spec": {"template": {"spec": {"containers": [{"image": [GOOD]}]}}}}, DENY),
        ({"spec": {"template": {"spec": {"containers": [{"image": None}]}}}}, DENY),
        ({"spec": {"template": {"spec": {"containers": [GOOD]}}}}, DENY),
        ({"spec": "x"}, DENY),
        (None, DENY),
        ([], DENY),
    ],
)
def test_a_grant_with_a_condition_needs_every_value_to_fit(judge: Bench, body: object, decision: Decision) -> None:
    for verb in ("create", "update"):
        assert decided(judge(deploy(FROM_REGISTRY)), f"{verb} deployments.apps/web in shop", body) == decision


def test_absence_fits_only_where_it_is_said(judge: Bench) -> None:
    init = {"path": "spec.template.spec.initContainers[*].image", "in": "registry.example/*"}
    create = "create deployments.apps/web in shop"
    assert decided(judge(deploy(FROM_REGISTRY, init)), create, deployment(GOOD)) == DENY
    both = judge(deploy(FROM_REGISTRY, init | {"absent": True}))
    assert decided(both, create, deployment(GOOD)) == ALLOW
    assert decided(both, create, deployment(GOOD, initContainers=[{"image": GOOD}, {}])) == ALLOW
    assert decided(both, create, deployment(GOOD, initContainers=[{"image": BAD}])) == DENY
    none = judge(deploy({"path": "spec.template.spec.volumes[*].hostPath", "absent": True}))
    assert decided(none, create, deployment(GOOD)) == ALLOW
    assert decided(none, create, deployment(GOOD, volumes=[{"name": "a", "emptyDir": {}}])) == ALLOW
    assert decided(none, create, deployment(GOOD, volumes=[{"name": "a", "hostPath": {"path": "/"}}])) == DENY
    other = judge(deploy({"path": IMAGES, "not_in": ["*:latest"]}))
    assert decided(other, create, deployment(GOOD)) == ALLOW
    assert decided(other, create, deployment("web:latest")) == DENY


def test_values_that_are_no_text_are_compared_as_json_spells_them(judge: Bench) -> None:
    bound = judge(
        deploy(
            {"path": "spec.replicas", "in": ["1", "2"]},
            {"path": "spec.template.spec.hostNetwork", "in": "false", "absent": True},
        )
    )
    create = "create deployments.apps/web in shop"
    assert decided(bound, create, {"spec": {"replicas": 2}}) == ALLOW
    assert decided(bound, create, {"spec": {"replicas": 3}}) == DENY
    assert decided(bound, create, {"spec": {"replicas": 10**5000}}) == DENY
    assert decided(bound, create, {"spec": {"replicas": 2, "template": {"spec": {"hostNetwork": True}}}}) == DENY
    assert decided(bound, create, {"spec": {"replicas": 2, "template": {"spec": {"hostNetwork": False}}}}) == ALLOW


def op(kind: str, path: str, **more: object) -> dict[str, object]:
    return {"op": kind, "path": path, **more}


C = "/spec/template/spec/containers"


@pytest.mark.parametrize(
    ("patch", "body", "decision"),
    [
        ("merge", {"metadata": {"labels": {"a": "b"}}}, ALLOW),
        ("merge", deployment(GOOD), ALLOW),
        ("merge", deployment(GOOD, BAD), DENY),
        ("merge", deployment(None), DENY),
        ("merge", {"spec": {"template": None}}, DENY),
        ("merge", {"spec": {"template": {"spec": {"containers": None}}}}, DENY),
        ("merge", {"spec": []}, DENY),
        ("merge", [], DENY),
        ("strategic", deployment(GOOD), ALLOW),
        ("strategic", deployment(BAD), DENY),
        ("strategic", deployment(None), DENY),
        ("strategic", {"spec": {"template": {"metadata": {"annotations": {"at": "now"}}}}}, ALLOW),
        ("strategic", deployment(GOOD, **{"$setElementOrder/containers": [{"name": "c0"}]}), ALLOW),
        ("strategic", deployment(BAD, **{"$setElementOrder/containers": [{"name": "c0"}]}), DENY),
        ("strategic", deployment(GOOD, **{"$patch": "replace"}), DENY),
        ("strategic", {"spec": {"template": {"spec": {"$retainKeys": ["volumes"]}}}}, DENY),
        ("strategic", {"spec": {"template": {"spec": {"containers": [{"$patch": "delete", "name": "a"}]}}}}, DENY),
        ("apply", deployment(GOOD), ALLOW),
        ("apply", deployment(BAD), DENY),
        ("apply", {"metadata": {"labels": {}}}, DENY),
        ("json", [], ALLOW),
        ("json", [op("replace", f"{C}/0/image", value=GOOD)], ALLOW),
        ("json", [op("replace", f"{C}/0/image", value=BAD)], DENY),
        ("json", [op("add", f"{C}/-", value={"name": "x", "image": BAD})], DENY),
        ("json", [op("add", f"{C}/-", value={"name": "x", "image": GOOD})], ALLOW),
        ("json", [op("add", f"{C}/-1/image", value=BAD)], DENY),
        ("json", [op("add", f"{C}/-", value={"name": "x"})], DENY),
        ("json", [op("replace", "/spec/template", value=deployment(GOOD)["spec"]["template"])], ALLOW),
        ("json", [op("replace", "/spec/template", value=deployment(BAD)["spec"]["template"])], DENY),
        ("json", [op("replace", "", value=deployment(BAD))], DENY),
        ("json", [op("replace", f"{C}/0/image/x", value=GOOD)], DENY),
        ("json", [op("replace", f"{C}/0/image")], DENY),
        ("json", [op("remove", f"{C}/0")], DENY),
        ("json", [op("remove", "/metadata/labels/a")], ALLOW),
        ("json", [op("test", f"{C}/0/image", value=BAD)], ALLOW),
        ("json", [{"op": "copy", "from": "/metadata/name", "path": f"{C}/0/image"}], DENY),
        ("json", [{"op": "move", "from": f"{C}/0/image", "path": "/metadata/annotations/a"}], DENY),
        ("json", [{"op": "copy", "from": f"{C}/0/image", "path": "/metadata/annotations/a"}], ALLOW),
        ("json", [op("frobnicate", "/metadata")], DENY),
        ("json", [op("add", "spec", value={})], DENY),
        ("json", [{"op": "add"}], DENY),
        ("json", ["x"], DENY),
        ("json", {"op": "add"}, DENY),
        ("cbor", deployment(GOOD), DENY),
    ],
)
def test_a_grant_with_a_condition_on_a_patch_needs_certainty(
    judge: Bench, patch: str, body: object, decision: Decision
) -> None:
    assert decided(judge(deploy(FROM_REGISTRY)), "patch deployments.apps/web in shop", body, patch) == decision


def test_the_message_says_which_condition_does_not_hold(judge: Bench) -> None:
    ruling = ruled(judge(deploy(FROM_REGISTRY)), "create deployments.apps/web in shop", deployment(BAD))
    assert f"(rule `deploy` does not allow it with this `{IMAGES}`)" in ruling.message


def test_server_side_apply_needs_create_too(judge: Bench) -> None:
    text, body = "patch deployments.apps/web in shop", deployment(GOOD)
    assert decided(judge(deploy(FROM_REGISTRY, verbs=["patch"])), text, body, "strategic") == ALLOW
    assert decided(judge(deploy(FROM_REGISTRY, verbs=["patch"])), text, body, "apply") == DENY
    held = rule("h", "hold", "create", "deployments.apps")
    assert decided(judge(deploy(FROM_REGISTRY), held), text, body, "apply") == HOLD


ANY = rule("any", "allow", ["read", "write"], ["*", "*/exec"])


@pytest.mark.parametrize(
    ("text", "patch", "body", "decision"),
    [
        ("create pods/a in shop", "", {"spec": {"containers": [{}, {"securityContext": {"privileged": True}}]}}, DENY),
        ("create pods/a in shop", "", {"spec": {"containers": [{"securityContext": {"privileged": False}}]}}, ALLOW),
        ("create pods/a in shop", "", {"spec": {"containers": "odd"}}, DENY),
        ("create pods/a in shop", "", None, DENY),
        ("delete pods/a in shop", "", None, ALLOW),
        ("create pods/a exec in shop: ls", "", None, ALLOW),
        ("patch pods/a in shop", "merge", {"metadata": {"labels": {"a": "b"}}}, ALLOW),
        (
            "patch pods/a in shop",
            "strategic",
            {"spec": {"containers": [{"securityContext": {"privileged": True}}]}},
            DENY,
        ),
        (
            "patch pods/a in shop",
            "json",
            [op("add", "/spec/containers/0/securityContext/privileged", value=True)],
            DENY,
        ),
        (
            "patch pods/a in shop",
            "json",
            [op("add", "/spec", value={"containers": [{"securityContext": {"privileged": True}}]})],
            DENY,
        ),
        ("patch pods/a in shop", "json", [{"op": "copy", "from": "/a", "path": "/spec/containers/0"}], DENY),
        ("patch pods/a in shop", "json", [op("add", "/metadata/labels/a", value="b")], ALLOW),
        ("patch pods/a in shop", "json", "odd", DENY),
        ("patch pods/a in shop", "apply", {"spec": {"containers": [{"securityContext": {"privileged": True}}]}}, DENY),
    ],
)
def test_a_denial_with_a_condition_touches_what_could_come_true(
    judge: Bench, text: str, patch: str, body: object, decision: Decision
) -> None:
    privileged = {"path": "spec.containers[*].securityContext.privileged", "in": "true"}
    denied = rule("d", "deny", ["create", "update", "patch"], ["*"], where=[privileged])
    assert decided(judge(ANY, denied), text, body, patch) == decision


def test_conditions_of_a_denial_hold_together_with_what_a_patch_leaves_alone(judge: Bench) -> None:
    where = [{"path": "spec.hostNetwork", "in": "true"}, {"path": "spec.nodeName", "in": "edge-*"}]
    bound = judge(ANY, rule("d", "deny", ["create", "patch"], "pods", where=where))
    assert decided(bound, "create pods/a in shop", {"spec": {"hostNetwork": True}}) == ALLOW
    assert decided(bound, "create pods/a in shop", {"spec": {"hostNetwork": True, "nodeName": "edge-1"}}) == DENY
    assert decided(bound, "patch pods/a in shop", {"spec": {"nodeName": "edge-1"}}, "merge") == DENY
    assert (
        decided(bound, "patch pods/a in shop", {"spec": {"nodeName": "edge-1", "hostNetwork": False}}, "merge") == ALLOW
    )
    lacking = {"path": "spec.containers[*].resources.limits.memory", "absent": True}
    held = judge(ANY, rule("h", "hold", "create", "pods", where=[lacking]))
    limited = {"resources": {"limits": {"memory": "1Gi"}}}
    assert decided(held, "create pods/a in shop", {"spec": {"containers": [limited]}}) == ALLOW
    assert decided(held, "create pods/a in shop", {"spec": {"containers": [limited, {}]}}) == HOLD
    objects = judge(ANY, rule("d", "deny", "create", "pods", where=[{"path": "spec.volumes[*].hostPath", "in": "*"}]))
    assert decided(objects, "create pods/a in shop", {"spec": {"volumes": [{"hostPath": {"path": "/"}}]}}) == DENY
    assert decided(objects, "create pods/a in shop", {"spec": {"volumes": [{"emptyDir": {}}]}}) == ALLOW


def test_globs_take_no_time_worth_mentioning() -> None:
    from proxy.policy.resources import Glob

    assert Glob.parse("*a" * 20 + "*b").matches("a" * 100_000) is False
    assert Glob.parse("a*a").matches("a") is False
    assert [Glob.parse("a*b*c").matches(text) for text in ("abc", "a-b-c", "ac", "acb")] == [True, True, False, False]
    assert Glob.parse("a.[b]?").matches("a.[b]?")


# --- masks ------------------------------------------------------------------------------------------------------------


def masked(name: str, *masks: dict[str, object], agents: str = "A") -> Any:
    return rule(name, None, agents=agents, masks=list(masks))


def mask(resource: str, field: str, method: str = "redact", **more: object) -> dict[str, object]:
    return {"resource": resource, "method": method, **({"field": field} if field else {}), **more}


EVERYTHING = rule("all", "allow", "*", ["*", "*/*", "*/proxy"], agents="*")
SECRETS = masked("m", mask("secrets", "data.*"))
APPLIED = "/metadata/annotations/kubectl.kubernetes.io~1last-applied-configuration"


def test_masks_are_united_over_the_hops_and_the_strictest_counts(judge: Bench) -> None:
    rules = [
        EVERYTHING,
        masked("a", mask("secrets", "data.*", "partial"), mask("pods", "", "hide", names="x-*")),
        masked(
            "b", mask("secrets", "data.*", "hash"), mask("secrets", "data.*", "redact", namespaces="prod"), agents="B"
        ),
    ]
    one = judge(*rules, chain="A")
    assert [(each.resource, each.path, each.label) for each in one.field_masks] == [
        ("pods", "", "hide"),
        ("secrets", "data.*", "partial"),
    ]
    both = judge(*rules, chain="A B")
    assert [(each.path, each.label, each.namespaces, each.names) for each in both.field_masks] == [
        ("", "hide", (), ("x-*",)),
        ("data.*", "redact", ("prod",), ()),
        ("data.*", "hash", (), ()),
    ]
    assert [each.mask(b"x" * 20) for each in both.field_masks[:2]] == [b"***", b"***"]
    assert len(both.field_masks[2].mask(b"x")) == 16
    assert both.mask_signature == judge(*reversed(rules), chain="B A").mask_signature
    assert both.mask_signature != one.mask_signature
    assert both.masks == ()
    assert judge(*rules, chain="A", target="shop").field_masks == ()


def test_reading_and_writing_what_is_masked_goes_on(judge: Bench) -> None:
    bound = judge(EVERYTHING, SECRETS)
    for text in ("get secrets/a in shop", "list secrets", "watch secrets where app=web", "delete secrets/a in shop"):
        assert decided(bound, text) == ALLOW
    for text in ("list secrets with metadata.name=a", "list secrets with type=Opaque,metadata.namespace!=shop"):
        assert decided(bound, text) == ALLOW
    assert decided(bound, "create secrets/a in shop", {"data": {"a": "bmV3"}}) == ALLOW
    assert decided(bound, "create secrets/a in shop (dry run)", {"data": {"a": "bmV3"}}) == ALLOW
    assert decided(bound, "update secrets/a in shop", {"data": {"a": "bmV3"}}) == ALLOW
    assert decided(bound, "patch secrets/a in shop", {"data": {"a": "bmV3"}}, "strategic") == ALLOW
    assert decided(bound, "patch secrets/a in shop", [op("replace", "/data/a", value="bmV3")], "json") == ALLOW
    assert decided(bound, "patch secrets/a in shop", {"metadata": {"labels": {"a": "b"}}}, "apply") == ALLOW


@pytest.mark.parametrize(
    ("text", "patch", "body", "why"),
    [
        ("list secrets with data.password=x", "", None, "the field selector `data.password=x`"),
        ("list secrets with type=Opaque,data!=x", "", None, "the field selector"),
        ("watch secrets with type=a\\\\,data.a=x", "", None, "the field selector"),
        ("deletecollection secrets with data", "", None, "the field selector"),
        ("patch secrets/a in shop", "json", [op("test", "/data/a", value="x")], "a JSON patch with `test`"),
        ("patch secrets/a in shop", "json", [op("test", "/data", value={})], "a JSON patch with `test`"),
        ("patch secrets/a in shop", "json", [op("test", "", value={})], "a JSON patch with `test`"),
        (
            "patch secrets/a in shop",
            "json",
            [{"op": "copy", "from": "/data/a", "path": "/metadata/annotations/a"}],
            "`copy`",
        ),
        (
            "patch secrets/a in shop",
            "json",
            [{"op": "move", "from": "/data", "path": "/metadata/annotations"}],
            "`move`",
        ),
        ("patch secrets/a in shop", "json", [{"op": "copy", "from": "/data/a"}], "`copy`"),
        (
            "patch secrets/a in shop",
            "json",
            [{"op": "copy", "from": APPLIED, "path": "/metadata/annotations/a"}],
            "`copy`",
        ),
        ("patch secrets/a in shop (dry run)", "merge", {"stringData": {"a": "new"}}, "trying a value in a dry run"),
        ("update secrets/a in shop", "", {"data": {"a": "Kioq"}}, "writing the mask in place of the value"),
        ("update secrets/a in shop", "", {"stringData": {"a": "***"}}, "writing the mask"),
        ("create secrets/a in shop", "", {"data": {"a": "KioqMTIzNA=="}}, "writing the mask"),
        ("patch secrets/a in shop", "strategic", {"data": {"a": "Kioq"}}, "writing the mask"),
        ("patch secrets/a in shop", "json", [op("add", "/data", value={"a": "Kioq"})], "writing the mask"),
        ("patch secrets/a in shop (dry run)", "merge", {"data": {"a": "bmV3"}}, "trying a value in a dry run"),
        ("update secrets/a in shop (dry run)", "", {"data": {"a": "bmV3"}}, "trying a value in a dry run"),
        ("patch secrets/a in shop", "apply", {"data": {"a": "bmV3"}}, "trying a value with a server-side apply"),
        ("patch secrets/a in shop", "strategic", {"$deleteFromPrimitiveList/data": ["x"]}, "deleteFromPrimitiveList"),
    ],
)
def test_what_would_tell_or_overwrite_a_masked_value_is_denied(
    judge: Bench, text: str, patch: str, body: object, why: str
) -> None:
    ruling = ruled(judge(EVERYTHING, SECRETS), text, body, patch)
    assert ruling.decision == DENY
    assert "agent `A` sees secrets " in ruling.message and why in ruling.message and "(rule `m`)" in ruling.message
    assert ruling.hint
    assert decided(judge(EVERYTHING), text, body, patch) == ALLOW


@pytest.mark.parametrize(
    ("container", "decision"),
    [
        ({"name": "c", "$deleteFromPrimitiveList/args": ["--password=guess"]}, DENY),
        ({"name": "c", "$deleteFromPrimitiveList/command": ["x"]}, ALLOW),
        ({"name": "c", "$setElementOrder/args": ["--password=guess"]}, ALLOW),
        ({"name": "c", "args": ["x"]}, ALLOW),
    ],
)
def test_a_list_does_not_tell_by_what_is_taken_out_of_it(
    judge: Bench, container: dict[str, object], decision: Decision
) -> None:
    bound = judge(EVERYTHING, masked("m", mask("deployments.apps", "spec.template.spec.containers[*].args[*]")))
    body = {"spec": {"template": {"spec": {"containers": [container]}}}}
    assert decided(bound, "patch deployments.apps/web in shop", body, "strategic") == decision
    assert decided(bound, "patch deployments.apps/web in shop", body, "merge") == ALLOW


@pytest.mark.parametrize(
    ("resource", "field", "selector"),
    [
        ("pods", "spec.nodeName", "spec.host=n1"),
        ("jobs.batch", "status.succeeded", "status.successful!=0"),
        ("events", "reportingComponent", "type=Normal,source=x"),
        ("events", "source.component", "source=x"),
    ],
)
def test_another_name_of_a_field_in_a_selector_is_no_way_around(
    judge: Bench, resource: str, field: str, selector: str
) -> None:
    bound = judge(EVERYTHING, masked("m", mask(resource, field)))
    assert decided(bound, f"list {resource} in shop with {selector}") == DENY
    assert decided(bound, f"list {resource} in shop with metadata.name=a") == ALLOW


def test_masks_concern_only_their_objects(judge: Bench) -> None:
    guess = ([op("test", "/data/a", value="x")], "json")
    bound = judge(EVERYTHING, masked("m", mask("secrets", "data.*", namespaces="prod*", names="db-*")))
    assert decided(bound, "patch secrets/db-1 in prod-1", *guess) == DENY
    assert decided(bound, "patch secrets/db-1 in shop", *guess) == ALLOW
    assert decided(bound, "patch secrets/web in prod-1", *guess) == ALLOW
    assert decided(bound, "patch configmaps/db-1 in prod-1", *guess) == ALLOW
    assert decided(bound, "list secrets with data.a=x") == DENY
    everywhere = judge(EVERYTHING, masked("m", mask("*", "metadata.labels.*")))
    assert decided(everywhere, "list x.example.com where a=b") == DENY
    assert decided(everywhere, "list x.example.com") == ALLOW


def test_a_mask_of_any_hop_binds_the_chain(judge: Bench) -> None:
    guess = ("patch secrets/a in shop", [op("test", "/data/a", value="x")], "json")
    assert decided(judge(EVERYTHING, SECRETS, chain="A B"), *guess) == DENY
    assert decided(judge(EVERYTHING, SECRETS, chain="B"), *guess) == ALLOW


def test_what_nobody_sees_into_is_denied_beside_masks(judge: Bench) -> None:
    def proxied(text: str) -> Operation:
        made = request(text)
        return replace(made, requests=(replace(made.requests[0], opaque=("what the proxied server answers",)),))

    bound = judge(EVERYTHING, masked("m", mask("pods", "spec.containers[*].env[*].value")))
    ruling = bound.decide(proxied("create pods/web proxy in shop"))
    assert ruling.decision == DENY
    assert (
        "agent `A` sees pods spec.containers[*].env[*].value masked: what the proxied server answers" in ruling.message
    )
    assert bound.decide(proxied("create services/web proxy in shop")).decision == ALLOW


def test_a_hash_is_not_written_back(judge: Bench) -> None:
    bound = judge(EVERYTHING, masked("m", mask("configmaps", "data.*", "hash")))
    assert decided(bound, "update configmaps/a in shop", {"data": {"a": "0123456789abcdef"}}) == DENY
    assert decided(bound, "update configmaps/a in shop", {"data": {"a": "0123456789abcdefg"}}) == ALLOW


def test_what_is_hidden_cannot_be_named(judge: Bench) -> None:
    bound = judge(EVERYTHING, masked("m", mask("secrets", "", "hide", names="internal-*")))
    for text in ("list secrets", "get secrets/web in shop", "list secrets with metadata.name!=a", "list pods"):
        assert decided(bound, text) == ALLOW
    for text in (
        "get secrets/internal-a in shop",
        "delete secrets/internal-a in shop",
        "watch secrets/internal-a in shop",
    ):
        ruling = ruled(bound, text)
        assert ruling.decision == DENY
        assert "it is hidden (rule `m`)" in ruling.message
    assert decided(bound, "create secrets in shop", {"metadata": {"name": "internal-a"}}) == DENY


def test_arbitrary_bodies_never_break_the_judge(judge: Bench) -> None:
    bound = judge(
        deploy(FROM_REGISTRY),
        rule("d", "deny", "patch", "*", where=[{"path": "metadata.annotations.*", "in": "x"}]),
        masked("m", mask("*", 'metadata.annotations["a/b"]'), mask("*", "spec.*")),
    )
    odd: list[object] = [
        None,
        1,
        "x",
        [],
        {},
        [[]],
        [{}],
        {"metadata": 1},
        {"metadata": [1]},
        {"spec": {"template": 1}},
    ]
    odd += [[{"op": ["add"], "path": "/spec"}], [{"op": "add", "path": 3}], [{"op": "copy", "path": "/a", "from": 3}]]
    odd += [json.loads("[" * 400 + "]" * 400), {"metadata": {"annotations": {"\ud800": "\ud800", "a/b": "\ud800"}}}]
    for body, patch, verb in itertools.product(
        odd, ("", "json", "merge", "strategic", "apply", "?"), ("create", "update", "patch", "delete")
    ):
        assert decided(bound, f"{verb} deployments.apps/web in shop", body, patch) in (ALLOW, DENY)


# --- from the wire ----------------------------------------------------------------------------------------------------


def sent(method: str, target: str, body: object = None, content_type: str = "application/json") -> Operation:
    head = Head(method, target, (("content-type", content_type),))
    return describe(classify(head), head, b"" if body is None else json.dumps(body).encode()).operation


@pytest.mark.parametrize(
    ("operation", "decision"),
    [
        (sent("GET", "/api/v1/namespaces/shop/pods"), ALLOW),
        (sent("GET", "/api/v1/watch/namespaces/shop/pods"), ALLOW),
        (sent("GET", "/api/v1/namespaces/shop/pods/web/log?container=a"), ALLOW),
        (sent("GET", "/api/v1/pods"), DENY),
        (sent("GET", "/api/v1/namespaces/shop/pods/web/exec?command=ls&command=-l"), ALLOW),
        (sent("POST", "/api/v1/namespaces/shop/pods/web/exec?command=sh"), DENY),
        (sent("GET", "/api/v1/namespaces/shop/pods/web/portforward?ports=5432"), DENY),
        (sent("GET", "/api/v1/namespaces/shop//pods"), DENY),
        (sent("GET", "/api/v1/namespaces/shop/pods/..%2f..%2fsecrets"), DENY),
        (sent("DELETE", "/api/v1/namespaces/shop/pods"), DENY),
        (sent("POST", "/apis/apps/v1/namespaces/shop/deployments", deployment(GOOD)), ALLOW),
        (sent("POST", "/apis/apps/v1/namespaces/shop/deployments", deployment(BAD)), DENY),
        (
            sent(
                "PATCH",
                "/apis/apps/v1/namespaces/shop/deployments/web",
                deployment(GOOD),
                "application/strategic-merge-patch+json",
            ),
            ALLOW,
        ),
        (
            sent("PATCH", "/apis/apps/v1/namespaces/shop/deployments/web", deployment(GOOD), "application/json"),
            DENY,
        ),
        (sent("GET", "/apis/apps/v1"), ALLOW),
        (sent("GET", "/metrics"), DENY),
    ],
    ids=lambda value: value.text[:60] if isinstance(value, Operation) else "",
)
def test_what_comes_from_a_client_is_ruled_alike(judge: Bench, operation: Operation, decision: Decision) -> None:
    shell = rule("shell", "allow", "create", "pods/exec", commands="ls *", namespaces="shop")
    assert judge(READ, shell, deploy(FROM_REGISTRY)).decide(operation).decision == decision


@pytest.mark.parametrize(
    "text",
    [
        "delete deployments.apps/web in shop",
        "create pods/web exec in shop: ls -l",
        "list pods in shop where app=web with status.phase=Running",
        "create pods/web portforward in shop to 80, 443",
        "patch secrets/a in shop (dry run)",
        "get /healthz",
    ],
)
def test_a_test_of_a_policy_spells_requests_as_recordings_do(text: str) -> None:
    (facts,) = request(text).requests
    assert tell(facts) == text


# --- what goes on record ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decision", ["allow", "hold"])
def test_what_is_typed_goes_on_record_where_any_hop_says_so(judge: Bench, decision: str) -> None:
    shell = rule("shell", decision, "create", "pods/exec", commands="sh", record="input", agents="B")
    plain = rule("plain", "allow", "create", ["pods/exec", "pods/attach"])
    both = judge(shell, plain, plain | {"name": "too", "agents": "B"}, chain="A B")
    assert ruled(both, "create pods/x exec in shop: sh").record_input
    assert not ruled(both, "create pods/x exec in shop: ls").record_input
    assert not ruled(both, "create pods/x attach in shop").record_input
    assert not ruled(judge(shell, plain), "create pods/x exec in shop: sh").record_input


@pytest.mark.parametrize(
    "wrong",
    [
        rule("r", "allow", "create", ["pods/exec", "pods"], record="input"),
        rule("r", "deny", "create", "pods/exec", record="input"),
        rule("r", "allow", "get", paths=["/x"], record="input"),
    ],
)
def test_only_a_terminal_that_is_granted_has_input_to_record(tmp_path: Path, wrong: Any) -> None:
    with pytest.raises(PolicyError, match="`record` is of"):
        policy(tmp_path, wrong)


# --- spelled in another way -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["private", "private:80", "http:private:80", "https:private:", ":private:"])
def test_a_scheme_and_a_port_around_a_proxied_name_do_not_hide_it(judge: Bench, name: str) -> None:
    everything = rule("all", "allow", "*", "*/proxy")
    operation = sent("GET", f"/api/v1/namespaces/shop/services/{name}/proxy/")

    def decided(bound: Judge) -> Decision:
        return bound.decide(operation).decision

    assert decided(judge(everything)) == ALLOW
    assert decided(judge(everything, rule("no", "deny", "create", "services/proxy", names="private"))) == DENY
    hidden = rule("hidden", None, masks=[{"resource": "services", "names": "private", "method": "hide"}])
    assert decided(judge(everything, hidden)) == DENY
    # but a grant is for the name as it stands
    granted = decided(judge(rule("one", "allow", "create", "services/proxy", names="private")))
    assert granted == (ALLOW if name == "private" else DENY)


def test_a_slash_at_the_end_of_a_path_does_not_lead_around_a_denial(judge: Bench) -> None:
    bound = judge(rule("all", "allow", "*", paths="*"), rule("no", "deny", "*", paths=["/version", "/logs/"]))
    for path in ("/version", "/version/", "/logs", "/logs/"):
        assert decided(bound, f"get {path}") == DENY
    assert decided(bound, "get /logs/x") == ALLOW
    assert decided(judge(rule("one", "allow", "get", paths="/metrics")), "get /metrics/") == DENY


def test_bindings_have_to_be_named(judge: Bench) -> None:
    assert decided(judge(rule("all", "allow")), "create bindings/web in shop") == DENY
    assert decided(judge(rule("one", "allow", "create", "bindings")), "create bindings/web in shop") == ALLOW
    assert decided(judge(rule("all", "allow"), rule("no", "deny")), "create bindings/web in shop") == DENY


@pytest.mark.parametrize("spelled", ["0", "0.0", "-0.0", "0e5"])
def test_a_whole_number_is_the_same_however_it_is_spelled(judge: Bench, spelled: str) -> None:
    """A server that merges strategically takes 0.0 for 0."""
    stop = rule("stop", "deny", "patch", "deployments.apps", where=[{"path": "spec.replicas", "in": "0"}])
    body = json.loads(f'{{"spec": {{"replicas": {spelled}}}}}')
    assert decided(judge(rule("all", "allow"), stop), "patch deployments.apps/web in shop", body, "strategic") == DENY


@pytest.mark.parametrize(
    ("body", "patch"),
    [
        ({"spec": {"containers": []}}, "merge"),
        ({"spec": {"containers": []}}, "strategic"),
        ([{"op": "replace", "path": "/spec/containers", "value": []}], "json"),
        ([{"op": "add", "path": "/spec", "value": {"containers": {}}}], "json"),
    ],
)
def test_a_patch_that_empties_a_list_takes_its_values_away(judge: Bench, body: object, patch: str) -> None:
    def granted(**more: object) -> Decision:
        where = [{"path": "spec.containers[*].image", "in": "x/*", **more}]
        return decided(judge(rule("one", "allow", "patch", "pods", where=where)), "patch pods/a in shop", body, patch)

    assert (granted(), granted(absent=True)) == (DENY, ALLOW)


def test_more_values_than_are_looked_at_cannot_be_told(judge: Bench) -> None:
    body = {"spec": {"containers": [{"image": "x/a"}] * 300_000}}
    where = [{"path": "spec.containers[*].image", "in": "x/*"}]
    began = time.process_time()
    assert decided(judge(rule("one", "allow", "update", "pods", where=where)), "update pods/a in shop", body) == DENY
    other = [{"path": "spec.containers[*].image", "in": "y/*"}]
    denies = (rule(f"no-{index}", "deny", "update", "pods", where=other) for index in range(20))
    assert decided(judge(rule("all", "allow"), *denies), "update pods/a in shop", body) == DENY
    assert time.process_time() - began < 1
