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
      - name: B may not delete
        chain: [agent-a, agent-b]
        target: cluster
        requests: delete deployments.apps/web in shop  # in place of sql, for an API server; or a list
        expect: deny
        masks: [secrets data.*]          # resource and field; `pods hide` for what is left out

A request is written as recordings tell it (`request`); what it sends is `body`, and `patch` the kind of a patch.

A chain that may not log in gets that for every statement. Certificates and addresses of targets are not looked at, so
the tests run where the policy is written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from proxy.model import Decision, Operation, OperationKind, Phase, RequestFacts, Ruling
from proxy.policy.compile import CompiledPolicy
from proxy.policy.document import DecisionName, PolicyError, Words, resolve, words
from proxy.policy.load import load_files
from proxy.policy.source import Source

Describe = Callable[[str], Operation]
"""Turns SQL into an operation; the caller knows the protocol."""

_TEST_KEY = bytes(32)

_REQUEST = re.compile(
    r"(?P<verb>[a-z]+) (?P<what>\S+?)(?: (?!(?:in|where|with|to) )(?P<subresource>[a-z][A-Za-z0-9.-]*))?"
    r"(?: in (?P<namespace>\S+?))?(?: where (?P<labels>.+?))?(?: with (?P<fields>.+?))?"
    r"(?: to (?P<ports>[0-9]{1,5}(?:, ?[0-9]{1,5})*))?(?:: (?P<command>.+?))?(?P<dry> \(dry run\))?",
)


class TestEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One test."""

    __test__ = False

    chain: Words
    target: str
    expect: DecisionName
    sql: Words = ()
    requests: Words = ()
    body: Annotated[Any, msgspec.Meta(description="what the requests send")] = None
    patch: Literal["", "json", "merge", "strategic", "apply"] = ""
    name: str = ""
    database: str = ""
    rule: str = ""
    masks: Annotated[
        Words | None, msgspec.Meta(description="every mask: schema.relation.column, or resource field")
    ] = None


class TestFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The tests of one policy."""

    __test__ = False

    policy: str = "."
    tests: tuple[TestEntry, ...] = ()


class Outcome(msgspec.Struct, frozen=True):
    """What came of one statement, or request. `seen` has the decision, and `why` the ruling's message."""

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
        for outcome in _outcomes(policy, entry, source.place("tests", index), f"tests[{index}]", describe)
    ]


def request(text: str, body: object = None, patch: str = "") -> Operation:
    """The operation of a request that is written as recordings tell it: `delete deployments.apps/web in shop`,
    `create pods/web exec in shop: ls -l`, `get /metrics`, `list pods in shop where app=web`, `patch … (dry run)`; and
    `forward pods/web in shop to 5432` for one connection inside a port-forward. Raises `ValueError`."""
    match = _REQUEST.fullmatch(text)
    if match is None:
        raise ValueError(f"`{text}` is not a request: wants `verb resource/name subresource in namespace: command`")
    whole, _, name = match["what"].partition("/")
    resource, _, group = whole.partition(".")
    forward = match["verb"] == "forward"
    facts = RequestFacts(
        verb="create" if forward else match["verb"],
        path=match["what"],
        resource=resource,
        group=group,
        subresource="portforward" if forward else match["subresource"] or "",
        namespace=match["namespace"] or "",
        name=name if whole else "",
        label_selector=match["labels"] or "",
        field_selector=match["fields"] or "",
        dry_run=bool(match["dry"]),
        command=tuple((match["command"] or "").split()),
        ports=tuple(int(port) for port in (match["ports"] or "").replace(",", " ").split()),
        body=body,
        patch=patch,
    )
    kind = OperationKind.FORWARD if forward else OperationKind.REQUEST
    return Operation("kubernetes", kind, Phase.EXECUTE, text, text, (), once=True, requests=(facts,))


def _outcomes(
    policy: CompiledPolicy, entry: TestEntry, place: str, where: str, describe: Describe
) -> Iterator[Outcome]:
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
    masks = sorted(
        [f"{mask.schema}.{mask.relation}.{mask.column}" for mask in judge.masks]
        + [f"{mask.resource} {mask.path or mask.label}" for mask in judge.field_masks]
    )
    kubernetes = target.protocol == "kubernetes"
    wanted, other = ("requests", "sql") if kubernetes else ("sql", "requests")
    if getattr(entry, other):
        raise PolicyError([f"{place}: `{other}` is not for target `{entry.target}`: write `{wanted}`"])
    if not getattr(entry, wanted):
        raise PolicyError([f"{place}: `{wanted}` is missing in `{where}`"])
    try:
        body = msgspec.json.decode(msgspec.json.encode(entry.body))
    except (TypeError, ValueError, RecursionError):
        raise PolicyError([f"{place}: `body` is nothing that can be sent as JSON"]) from None
    for sql in words(getattr(entry, wanted)):
        try:
            operation = request(sql, body, entry.patch) if kubernetes else describe(sql)
        except ValueError as error:
            raise PolicyError([f"{place}: {error}"]) from None
        ruling = judge.decide(operation) if login.decision == Decision.ALLOW else login
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
