"""Tests of a policy, as YAML beside it: who asks what, and what is to come of it.

    policy: policy.yaml                  # a file or directory, seen from here
    tests:
      - name: B may not drop
        chain: [agent-a, agent-b]        # the hops, root first; or [unattributed]
        target: shop
        database: shop                   # default: the target's first
        sql: DROP TABLE orders           # or a list: all of them
        expect: deny                     # allow | deny | hold
        rule: b-changes-nothing          # optional: a hop's reason has to name it
        masks: [public.customers.email]  # optional: exactly these columns are masked for this chain

A chain that may not log in gets that for every statement. Certificates and addresses of targets are not looked at, so
the tests run where the policy is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import msgspec

from proxy.model import Decision, Operation, Ruling
from proxy.policy.compile import CompiledPolicy
from proxy.policy.document import DecisionName, PolicyError, Words, resolve, words
from proxy.policy.load import load_files
from proxy.policy.source import Source

Describe = Callable[[str], Operation]
"""Turns SQL into an operation; the caller knows the protocol."""

_TEST_KEY = bytes(32)


class TestEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One test."""

    __test__ = False

    chain: Words
    target: str
    sql: Words
    expect: DecisionName
    name: str = ""
    database: str = ""
    rule: str = ""
    masks: Annotated[Words | None, msgspec.Meta(description="schema.relation.column of every mask")] = None


class TestFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The tests of one policy."""

    __test__ = False

    policy: str = "."
    tests: tuple[TestEntry, ...] = ()


class Outcome(msgspec.Struct, frozen=True):
    """What came of one statement. `seen` has the decision, and `why` the ruling's message."""

    place: str
    name: str
    sql: str
    expected: str
    seen: str
    why: str
    passed: bool


def run(path: Path, describe: Describe) -> list[Outcome]:
    """Runs a file of tests. Raises `PolicyError` when it, or the policy that it names, cannot be read."""
    source = Source(path, TestFile)
    if source.problems:
        raise PolicyError(source.problems)
    named = path.parent / source.entries.policy
    paths = sorted(each for each in named.glob("*.yaml") if each != path) if named.is_dir() else [named]
    addresses: dict[str, str] = {}

    def invent(name: str) -> Sequence[str]:
        return (addresses.setdefault(name, f"2001:db8::{len(addresses) + 1:x}"),)

    policy = CompiledPolicy(resolve(load_files(paths, certificates=False), invent), _TEST_KEY)
    return [
        outcome
        for index, entry in enumerate(source.entries.tests)
        for outcome in _outcomes(policy, entry, source.place("tests", index), describe)
    ]


def _outcomes(policy: CompiledPolicy, entry: TestEntry, place: str, describe: Describe) -> Iterator[Outcome]:
    target = policy.targets.get(entry.target)
    if target is None:
        raise PolicyError([f"{place}: unknown target `{entry.target}`"])
    chain = words(entry.chain)
    unknown = [agent for agent in chain if agent not in policy.agents]
    if unknown or not chain:
        raise PolicyError([f"{place}: unknown agent `{', '.join(unknown)}` in the chain"])
    database = entry.database or (target.databases[0] if target.databases else "")
    login = policy.login(chain, target, database)
    judge = policy.bind(chain, target, database)
    for sql in words(entry.sql):
        ruling = judge.decide(describe(sql)) if login.decision == Decision.ALLOW else login
        masks = sorted(f"{mask.schema}.{mask.relation}.{mask.column}" for mask in judge.masks)
        expected: str = entry.expect
        seen = str(ruling.decision)
        if entry.rule:
            expected += f" by {entry.rule}"
            seen += f" by {_rules(ruling, entry.rule)}"
        if entry.masks is not None:
            expected += f", masks {', '.join(sorted(words(entry.masks))) or 'none'}"
            seen += f", masks {', '.join(masks) or 'none'}"
        yield Outcome(place, entry.name, sql, expected, seen, ruling.message, expected == seen)


def _rules(ruling: Ruling, wanted: str) -> str:
    """The wanted rule if a decisive reason names it, or else all that are named."""
    named = [
        name for reason in ruling.reasons if reason.decision == ruling.decision for name in reason.rule.split(", ")
    ]
    return wanted if wanted in named else " and ".join(named)
