"""The policies that are shipped: they load, their tests pass, and their schema is that of the loader."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from proxy.model import Operation, OperationKind
from proxy.policy import PolicyError, housekeeping, load_files, resources, terms, vocabulary
from proxy.policy.document import schema
from proxy.policy.testing import Outcome, run
from proxy.protocols.postgres.operations import describe

POLICIES = Path(__file__).parents[2] / "policies"
SUITES = sorted(POLICIES.glob("examples/*/tests.yaml"))


def operation(sql: str) -> Operation:
    return describe(OperationKind.QUERY, sql.encode(), "utf-8").operation


@pytest.mark.parametrize("suite", SUITES, ids=lambda path: path.parent.name)
def test_an_example_does_what_its_tests_say(suite: Path) -> None:
    outcomes = run(suite, operation)
    assert outcomes
    assert [outcome for outcome in outcomes if not outcome.passed] == []


def test_every_example_has_tests() -> None:
    assert {path.parent for path in SUITES} == {path for path in (POLICIES / "examples").iterdir() if path.is_dir()}


def test_the_default_policy_names_nobody() -> None:
    document = load_files([POLICIES / "default.yaml"])
    assert (document.agents, document.targets, document.rules) == ((), (), ())
    assert document.protected_ports == {5432: "postgresql", 6443: "kubernetes"}


def test_the_schema_is_current() -> None:
    """Made by scripts/generate-policy-schema."""
    assert json.loads((POLICIES / "schema.json").read_text()) == json.loads(json.dumps(schema()))


def written(folder: Path, body: str) -> Path:
    (folder / "policy.yaml").write_text((POLICIES / "examples/nested-agents/policy.yaml").read_text())
    path = folder / "tests.yaml"
    path.write_text(f"policy: policy.yaml\ntests:\n{body}\n")
    return path


def test_a_test_that_expects_something_else_fails(tmp_path: Path) -> None:
    path = written(tmp_path, "  - {chain: agent-a, target: shop, sql: SELECT 1, expect: deny, masks: []}")
    (outcome,) = run(path, operation)
    assert outcome == Outcome(
        place=f"{path}:3",
        name="",
        sql="SELECT 1",
        expected="deny, masks none",
        seen="allow, masks none",
        why="target `shop`: agent `agent-a` may select",
        passed=False,
    )


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("  - {chain: agent-x, target: shop, sql: SELECT 1, expect: deny}", ":3: unknown agent `agent-x` in the chain"),
        ("  - {chain: agent-a, target: shops, sql: SELECT 1, expect: deny}", ":3: unknown target `shops`"),
        ("  - {chain: agent-a, target: shop, sql: SELECT 1, expect: refuse}", "`expect` cannot be `refuse`"),
        ("  - {chain: agent-a, target: shop, expect: deny}", ":3: `sql` is missing in `tests[0]`"),
    ],
)
def test_a_test_that_cannot_be_run_says_where(tmp_path: Path, body: str, said: str) -> None:
    with pytest.raises(PolicyError) as raised:
        run(written(tmp_path, body), operation)
    assert said in str(raised.value)


def test_the_manual_lists_every_kind_and_every_guarded_relation() -> None:
    manual = (POLICIES.parent / "docs/policy.md").read_text()
    words = set(re.findall(r"`([^`\n]+)`", manual))
    verbs = {f"{verb}-{noun}" for verb in ("create", "alter", "drop") for noun in words}
    assert words | verbs >= vocabulary.KINDS
    assert set(vocabulary.GROUPS) | housekeeping.GUARDED_FIXED <= words
    assert resources.VERBS | resources.GROUPS.keys() | resources.GUARDED <= words
    assert set(terms.KEYS) <= words


REQUEST = "  - {chain: A, target: k, requests: %s, expect: deny%s}"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (REQUEST % ("delete", ""), ":3: `delete` is not a request"),
        (REQUEST % ("'delete pods/web'", ", sql: x"), ":3: `sql` is not for target `k`: write `requests`"),
        ("  - {chain: A, target: k, expect: deny}", ":3: `requests` is missing in `tests[0]`"),
        ("  - {chain: A, target: p, requests: x, expect: deny}", ":3: `requests` is not for target `p`: write `sql`"),
        (REQUEST % ("'patch pods/web'", ", patch: yaml"), "`patch` cannot be `yaml`"),
        (REQUEST % ("'patch pods/web'", ", body: !x y"), "`body` cannot be read"),
        (REQUEST % ("'patch pods/web'", ", body: &a [*a]"), ":3: `body` is nothing that can be sent as JSON"),
    ],
)
def test_a_test_of_requests_that_cannot_be_run_says_where(tmp_path: Path, body: str, said: str) -> None:
    (tmp_path / "policy.yaml").write_text(
        "agents: {A: {exe: /a}}\n"
        "targets: {k: {protocol: kubernetes, addresses: a, credential: c},"
        " p: {protocol: postgresql, addresses: b, credential: c}}"
    )
    path = tmp_path / "tests.yaml"
    path.write_text(f"policy: policy.yaml\ntests:\n{body}\n")
    with pytest.raises(PolicyError) as raised:
        run(path, operation)
    assert said in str(raised.value)
