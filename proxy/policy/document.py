"""What a policy says, in three forms: as written (`PolicyFile`), as read (`Document`) and as workers get it
(`ResolvedPolicy`).

`PolicyFile` and its parts are the grammar of the YAML files: the loader reads by them, and `policies/schema.json` is
made from them. `Document` is what all files of a directory say together, checked. `ResolvedPolicy` has addresses in
place of names and carries a version: two policies with the same version rule alike, in whatever order they were
written, and whatever their names resolve to at the time.
"""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import msgspec

from proxy.model import Endpoint, Prefix, Target, TlsMode

DEFAULT_HOLD_S = 60.0
"""How long a hold waits when the rule does not say: short, since inside a transaction it holds locks."""

DEFAULT_PORTS = {"postgresql": 5432, "kubernetes": 6443}
"""Port of an address that has none, by protocol; its keys are the protocols there are."""

MASK_METHODS = ("redact", "hash", "partial")
"""Strictest first."""

ProtocolName = Literal["postgresql", "kubernetes"]
DecisionName = Literal["allow", "deny", "hold"]
MaskMethod = Literal["redact", "hash", "partial"]
Intercept = Literal["targets", "all"]
ObjectMaskMethod = Literal["redact", "hash", "partial", "hide"]
Words = str | tuple[str, ...]
Duration = Annotated[str, msgspec.Meta(pattern="^[0-9]+(ms|s|m|h)$", description="for example 60s or 5m")]


def words(value: Words) -> tuple[str, ...]:
    """One word may be written without a list."""
    return ((value,) if value else ()) if isinstance(value, str) else value


class PolicyError(Exception):
    """The policy cannot be used. `problems` are all of them, each as `file:line: message`."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


# --- as written -------------------------------------------------------------------------------------------------------


class AgentEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which process images are this agent: those for which all conditions hold, and those declared to be it."""

    exe: Annotated[str, msgspec.Meta(description="absolute path of the executable; compared as the file it is")] = ""
    sha256: Annotated[str, msgspec.Meta(description="of the executable, 64 hex digits")] = ""
    argv: Annotated[str, msgspec.Meta(description="glob over the arguments joined by spaces")] = ""
    uid: int | None = None
    cgroup: Annotated[str, msgspec.Meta(description="glob over the cgroup's path")] = ""
    declared_by: Annotated[
        Words,
        msgspec.Meta(description="agents and uid:N that may declare it with `hopgate exec`; then exe is optional"),
    ] = ()
    intercept: Annotated[
        Intercept, msgspec.Meta(description="`all`: databases where no target is are denied to whatever it starts")
    ] = "targets"


class TlsEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """TLS towards the target; `ca` empty means the system's trusted roots."""

    mode: TlsMode = TlsMode.VERIFY_FULL
    ca: Annotated[str, msgspec.Meta(description="PEM file, absolute or relative to the policy file")] = ""


class TargetEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A database or API server under protection."""

    protocol: ProtocolName
    addresses: Annotated[Words, msgspec.Meta(description="host, network/prefix, either with :port; v6 in brackets")]
    credential: Annotated[str, msgspec.Meta(description="entry of the host's credential source")]
    server_name: Annotated[str, msgspec.Meta(description="what verify-full checks; default: name in addresses")] = ""
    serving: Annotated[
        str, msgspec.Meta(description="credential with the certificate to show to clients; default: the host CA's own")
    ] = ""
    tls: TlsEntry = TlsEntry()
    databases: Annotated[Words, msgspec.Meta(description="databases that may be opened; default: any")] = ()


class MaskEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One masked column of a database, or one masked field of objects of an API server."""

    method: Annotated[ObjectMaskMethod, msgspec.Meta(description="`hide` leaves objects out; it is for `resource`")]
    column: Annotated[str, msgspec.Meta(description="schema.relation.column, as the catalog spells it")] = ""
    resource: Annotated[str, msgspec.Meta(description="Kubernetes: resource as kubectl spells it, or *")] = ""
    field: Annotated[str, msgspec.Meta(description="path as in spec.containers[*].image, data.*")] = ""
    namespaces: Annotated[Words, msgspec.Meta(description="globs; default: any")] = ()
    names: Annotated[Words, msgspec.Meta(description="globs on the object's name; default: any")] = ()


class ConditionEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"within": "in"}):
    """A condition on the body of a request."""

    path: Annotated[str, msgspec.Meta(description="path as in spec.containers[*].image")]
    within: Annotated[Words, msgspec.Meta(description="globs that the values have to meet")] = ()
    not_in: Annotated[Words, msgspec.Meta(description="globs that the values may not meet")] = ()
    absent: Annotated[bool, msgspec.Meta(description="there may be no value; alone: there has to be none")] = False


class RuleEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Says a decision on statements or requests, or masks columns or fields, or both."""

    name: str
    agents: Annotated[Words, msgspec.Meta(description="agent names, or * for all agents (not `unattributed`)")]
    targets: Annotated[Words, msgspec.Meta(description="target names, or *")]
    decision: DecisionName | None = None
    statements: Annotated[Words, msgspec.Meta(description="SQL: statement kinds, groups, globs, or *")] = ()
    relations: Annotated[Words, msgspec.Meta(description="SQL: schema.relation, * allowed; default: any")] = ()
    functions: Annotated[Words, msgspec.Meta(description="SQL: functions beyond the safe built-in ones")] = ()
    verbs: Annotated[Words, msgspec.Meta(description="Kubernetes: RBAC verbs, read, write, or *")] = ()
    resources: Annotated[Words, msgspec.Meta(description="Kubernetes: pods, deployments.apps, pods/log, or *")] = ()
    paths: Annotated[Words, msgspec.Meta(description="Kubernetes: globs on other paths, in place of resources")] = ()
    namespaces: Annotated[Words, msgspec.Meta(description="Kubernetes: globs; default: any, and none")] = ()
    names: Annotated[Words, msgspec.Meta(description="Kubernetes: globs on the object's name")] = ()
    commands: Annotated[Words, msgspec.Meta(description="Kubernetes exec: globs on the command")] = ()
    ports: Annotated[int | tuple[int, ...], msgspec.Meta(description="Kubernetes port-forward: ports in the pod")] = ()
    where: Annotated[
        tuple[ConditionEntry, ...], msgspec.Meta(description="Kubernetes create, update, patch: all have to hold")
    ] = ()
    record: Annotated[
        Literal["", "input"], msgspec.Meta(description="Kubernetes exec, attach: `input` records what is typed, too")
    ] = ""
    timeout: Duration | None = None
    hint: Annotated[str, msgspec.Meta(description="what the denied person may do next")] = ""
    masks: tuple[MaskEntry, ...] = ()


class PolicyFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One YAML file."""

    agents: dict[str, AgentEntry] = {}
    targets: dict[str, TargetEntry] = {}
    rules: tuple[RuleEntry, ...] = ()
    protect: Annotated[
        dict[int, ProtocolName],
        msgspec.Meta(description="ports that are redirected for any address; adds to 5432 and 6443"),
    ] = {}


# --- as read ----------------------------------------------------------------------------------------------------------


class Agent(msgspec.Struct, frozen=True):
    """A named identity and the process images that have it. Empty or None: any, but without `exe` it can only be
    declared, by those in `declared_by`: agents, and `uid:N`. `intercept` counts for every chain that it is in."""

    name: str
    exe: str = ""
    sha256: str = ""
    argv: str = ""
    uid: int | None = None
    cgroup: str = ""
    declared_by: tuple[str, ...] = ()
    intercept: Intercept = "targets"


class Mask(msgspec.Struct, frozen=True):
    """A masked column, and the method."""

    schema: str
    relation: str
    column: str
    method: MaskMethod


class ObjectMask(msgspec.Struct, frozen=True):
    """A masked field of objects, and the method; with `hide` the objects themselves, and no field."""

    resource: str
    namespaces: tuple[str, ...]
    names: tuple[str, ...]
    field: str
    method: ObjectMaskMethod


class Where(msgspec.Struct, frozen=True):
    """A condition on a request's body. `absent` alone: there is no value at the path; beside globs: there may be
    none."""

    path: str
    within: tuple[str, ...]
    outside: tuple[str, ...]
    absent: bool


class Requests(msgspec.Struct, frozen=True):
    """What a rule says of requests to an API server, of `resources` or of other `paths`. Empty: any."""

    verbs: tuple[str, ...]
    resources: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()
    namespaces: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    commands: tuple[str, ...] = ()
    ports: tuple[int, ...] = ()
    where: tuple[Where, ...] = ()
    record_input: bool = False


class Rule(msgspec.Struct, frozen=True):
    """One rule, in the words of one protocol. `agents` and `targets` are names or `("*",)`. Empty `relations`: any.
    `decision` None: only masks."""

    name: str
    agents: tuple[str, ...]
    targets: tuple[str, ...]
    decision: DecisionName | None
    statements: tuple[str, ...]
    relations: tuple[str, ...]
    functions: tuple[str, ...]
    timeout_s: float
    hint: str
    masks: tuple[Mask, ...]
    requests: Requests | None = None
    object_masks: tuple[ObjectMask, ...] = ()


class Host(msgspec.Struct, frozen=True):
    """An address as written: a numeric one, a network (`10.20.0.0/16`) or a name, a port, and where it was written."""

    host: str
    port: int
    place: str

    @property
    def numeric(self) -> bool:
        try:
            ipaddress.ip_address(self.host)
        except ValueError:
            return self.network
        return True

    @property
    def network(self) -> bool:
        return "/" in self.host


class NamedTarget(msgspec.Struct, frozen=True):
    """A target whose addresses may still be names."""

    name: str
    protocol: ProtocolName
    hosts: tuple[Host, ...]
    server_name: str
    tls_mode: TlsMode
    ca_pem: str
    credential: str
    databases: tuple[str, ...]
    serving: str = ""


class Document(msgspec.Struct, frozen=True):
    """What all files say together, checked. `files` are those that were read."""

    agents: tuple[Agent, ...]
    targets: tuple[NamedTarget, ...]
    rules: tuple[Rule, ...]
    protected_ports: dict[int, str]
    files: tuple[str, ...] = ()

    @property
    def names(self) -> frozenset[str]:
        """The host names that have to be resolved."""
        return frozenset(host.host for target in self.targets for host in target.hosts if not host.numeric)


# --- as workers get it ------------------------------------------------------------------------------------------------


class ResolvedPolicy(msgspec.Struct, frozen=True):
    """The policy with numeric addresses. `version` is twelve hex digits of SHA-256 over the rest, in canonical order
    and with addresses as they were written."""

    version: str
    agents: tuple[Agent, ...]
    targets: tuple[Target, ...]
    rules: tuple[Rule, ...]
    protected_ports: dict[int, str]


Resolver = Callable[[str], Sequence[str]]
"""Turns a host name into numeric addresses. Raises `OSError` when it cannot."""


def numeric_address(text: str) -> str:
    """The canonical spelling of an address; a v4-mapped IPv6 address becomes IPv4. Raises `ValueError`."""
    address = ipaddress.ip_address(text)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(address)


def _addresses(host: Host, resolver: Resolver) -> Sequence[str]:
    if host.numeric:
        return (host.host,)
    try:
        found = resolver(host.host)
    except OSError as error:
        raise PolicyError([f"{host.place}: host name `{host.host}` does not resolve: {error}"]) from None
    if not found:
        raise PolicyError([f"{host.place}: host name `{host.host}` has no address"])
    return found


def resolve(document: Document, resolver: Resolver, former: Resolver = lambda _name: ()) -> ResolvedPolicy:
    """Puts addresses in place of names. Raises `PolicyError` when a name has none, or when two targets share an address
    or a network; where one target's network holds another's address or network, the narrower counts. A `former` address
    of a name stays the target's unless another one has it."""
    problems: list[str] = []
    owners: dict[Endpoint | Prefix, str] = {}
    targets: list[Target] = []
    for named in sorted(document.targets, key=lambda target: target.name):
        endpoints: set[Endpoint] = set()
        prefixes: set[Prefix] = set()
        for host in named.hosts:
            found: list[Endpoint | Prefix] = []
            try:
                if host.network:
                    prefixes.add(Prefix(host.host, host.port))
                    found.append(Prefix(host.host, host.port))
                else:
                    resolved = {Endpoint(numeric_address(each), host.port) for each in _addresses(host, resolver)}
                    endpoints |= resolved
                    found += sorted(resolved)
            except PolicyError as error:
                problems += error.problems
                continue
            problems += [
                f"{host.place}: `{each}` of target `{named.name}` is also an address of target `{owners[each]}`"
                for each in found
                if owners.setdefault(each, named.name) != named.name
            ]
        targets.append(
            Target(
                name=named.name,
                protocol=named.protocol,
                endpoints=tuple(sorted(endpoints)),
                tls_mode=named.tls_mode,
                server_name=named.server_name,
                ca_pem=named.ca_pem,
                credential=named.credential,
                databases=named.databases,
                prefixes=tuple(sorted(prefixes)),
                serving=named.serving,
            )
        )
    if problems:
        raise PolicyError(problems)
    targets = _with_former(document, targets, owners, former)
    unversioned = ResolvedPolicy(
        version="",
        agents=tuple(sorted(document.agents, key=lambda agent: agent.name)),
        targets=tuple(targets),
        rules=tuple(sorted(document.rules, key=lambda rule: rule.name)),
        protected_ports=dict(sorted(document.protected_ports.items())),
    )
    return msgspec.structs.replace(unversioned, version=_version(document, unversioned))


def _with_former(
    document: Document, targets: list[Target], owners: dict[Endpoint | Prefix, str], former: Resolver
) -> list[Target]:
    hosts = {target.name: [host for host in target.hosts if not host.numeric] for target in document.targets}
    kept: list[Target] = []
    for target in targets:
        before = {
            Endpoint(numeric_address(each), host.port) for host in hosts[target.name] for each in former(host.host)
        }
        more = {endpoint for endpoint in before if owners.setdefault(endpoint, target.name) == target.name}
        kept.append(msgspec.structs.replace(target, endpoints=tuple(sorted(more.union(target.endpoints)))))
    return kept


def _version(document: Document, unversioned: ResolvedPolicy) -> str:
    written = {target.name: sorted({(host.host, host.port) for host in target.hosts}) for target in document.targets}
    nowhere = msgspec.structs.replace(
        unversioned, targets=tuple(msgspec.structs.replace(each, endpoints=()) for each in unversioned.targets)
    )
    said = [msgspec.to_builtins(nowhere, str_keys=True), written]
    return hashlib.sha256(msgspec.json.encode(said, order="sorted")).hexdigest()[:12]


def schema() -> dict[str, object]:
    """The JSON schema of one policy file, for editors."""
    made: dict[str, object] = msgspec.json.schema(PolicyFile)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "hopgate policy", **made}
