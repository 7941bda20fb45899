"""Reads the YAML files of a policy directory into a checked `Document`. With `source`, the only part of the policy that
reads files.

The shape comes from `document.PolicyFile`: there is no second list of keys. All that is wrong is said at once.

States: read and shaped (each file by itself) → merged (names unique over all files) → checked (references, patterns). A
later state is entered even if an earlier one found something, so that one run shows as much as it can.

Blind spots: whether an address answers, whether a CA is the right one and whether a relation exists is for the host to
find.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from proxy.model import UNATTRIBUTED, TlsMode
from proxy.policy import names, terms, vocabulary
from proxy.policy.document import (
    DEFAULT_HOLD_S,
    DEFAULT_PORTS,
    Agent,
    AgentEntry,
    Document,
    Host,
    Mask,
    MaskEntry,
    NamedTarget,
    PolicyError,
    PolicyFile,
    Rule,
    RuleEntry,
    TargetEntry,
    numeric_address,
    words,
)
from proxy.policy.source import Source, listed

MAX_HOLD_S = 24 * 3600.0

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,62}")
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}")
_UID = re.compile(r"uid:(0|[1-9][0-9]{0,9})")
_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def load(directory: Path) -> Document:
    """Reads every `*.yaml` of the directory as one policy. Raises `PolicyError` with all problems."""
    if not directory.is_dir():
        raise PolicyError([f"{directory}: no such directory: the policy is read from `*.yaml` files in it"])
    return load_files(sorted(directory.glob("*.yaml")))


def load_files(paths: Iterable[Path], *, certificates: bool = True) -> Document:
    """Reads these files as one policy. Raises `PolicyError` with all problems. Without `certificates` the CA files,
    which only the host has, are not looked at."""
    sources = [Source(path, PolicyFile) for path in paths]
    return _Merge(sources, certificates).document()


class _Merge:
    """All files together."""

    def __init__(self, sources: list[Source[PolicyFile]], certificates: bool) -> None:
        self._sources = sources
        self._certificates_wanted = certificates
        self._problems = [problem for source in sources for problem in source.problems]
        self._shapeless = bool(self._problems)

    def _complain(self, place: str, message: str) -> None:
        self._problems.append(f"{place}: {message}")

    def _unique(self, section: str) -> dict[str, tuple[Source[PolicyFile], Any]]:
        """The named entries of all files, complaining about a name that stands in two of them."""
        found: dict[str, tuple[Source[PolicyFile], Any]] = {}
        for source in self._sources:
            for name, entry in getattr(source.entries, section).items():
                place = source.place(section, name)
                if not _NAME.fullmatch(name) or name == UNATTRIBUTED:
                    self._complain(place, f"`{name}` cannot be a name in `{section}`: letters, digits, `.`, `_`, `-`")
                if name in found:
                    first = found[name][0].place(section, name)
                    self._complain(place, f"`{name}` in `{section}` is defined twice (first at {first})")
                    continue
                found[name] = (source, entry)
        return found

    def document(self) -> Document:
        agents = self._unique("agents")
        targets = self._unique("targets")
        document = Document(
            agents=tuple(self._agent(name, source, entry, agents.keys()) for name, (source, entry) in agents.items()),
            targets=tuple(self._target(name, source, entry) for name, (source, entry) in targets.items()),
            rules=self._rules(
                agents.keys() | {UNATTRIBUTED}, {name: entry.protocol for name, (_, entry) in targets.items()}
            ),
            protected_ports=self._ports(),
            files=tuple(str(source.path) for source in self._sources),
        )
        if self._problems:
            raise PolicyError(self._problems)
        return document

    def _agent(self, name: str, source: Source[PolicyFile], entry: AgentEntry, agents: Collection[str]) -> Agent:
        def at(*key: str | int) -> str:
            return source.place("agents", name, *key)

        declarers = words(entry.declared_by)
        if not entry.exe and not declarers:
            self._complain(at(), f"agent `{name}` needs `exe`, or `declared_by` for those who may declare it")
        if entry.exe and not PurePosixPath(entry.exe).is_absolute():
            self._complain(at("exe"), f"`{entry.exe}` is not an absolute path")
        for key in ("sha256", "argv", "uid", "cgroup"):
            if declarers and not entry.exe and getattr(entry, key) not in ("", None):
                self._complain(at(key), f"`{key}` without `exe`: a declaration does not look at it")
        for index, word in enumerate(declarers):
            if not _UID.fullmatch(word) and (word not in agents or word == name) and not self._shapeless:
                others = sorted(set(agents) - {name})
                self._complain(
                    at("declared_by", index), f"`{word}` is neither uid:N nor another agent: {listed(others)}"
                )
        if entry.sha256 and not re.fullmatch(r"[0-9a-fA-F]{64}", entry.sha256):
            self._complain(at("sha256"), f"`{entry.sha256}` is not 64 hex digits")
        if entry.uid is not None and not 0 <= entry.uid < 2**32 - 1:
            self._complain(at("uid"), f"`{entry.uid}` is not a uid")
        for key in ("argv", "cgroup"):
            glob: str = getattr(entry, key)
            if glob.count("[") != glob.count("]") or "[]" in glob:
                self._complain(at(key), f"bad glob `{glob}`: a `[` without its `]`; write `[[]` for a bracket")
        return Agent(
            name, entry.exe, entry.sha256.lower(), entry.argv, entry.uid, entry.cgroup, declarers, entry.intercept
        )

    def _target(self, name: str, source: Source[PolicyFile], entry: TargetEntry) -> NamedTarget:
        def at(*key: str | int) -> str:
            return source.place("targets", name, *key)

        hosts = []
        for index, text in enumerate(words(entry.addresses)):
            try:
                hosts.append(_split_address(text, DEFAULT_PORTS[entry.protocol], at("addresses", index)))
            except ValueError as error:
                self._complain(at("addresses", index), str(error))
        if not words(entry.addresses):
            self._complain(at("addresses"), "a target needs at least one address")
        named = [host.host for host in hosts if not host.numeric] or [host.host for host in hosts if not host.network]
        if not entry.credential:
            self._complain(at("credential"), "`credential` is empty: name an entry of the credential source")
        if entry.protocol == "kubernetes":
            if entry.tls.mode not in (TlsMode.VERIFY_FULL, TlsMode.VERIFY_CA):
                self._complain(
                    at("tls", "mode"), f"`{entry.tls.mode}`: an API server is spoken to by verify-full or verify-ca"
                )
            if entry.databases:
                self._complain(at("databases"), "an API server has no `databases`: use `namespaces` in rules")
        return NamedTarget(
            name=name,
            protocol=entry.protocol,
            hosts=tuple(hosts),
            server_name=entry.server_name or (named[0] if named else ""),
            tls_mode=entry.tls.mode,
            ca_pem=self._certificates(source, entry, at("tls", "ca")),
            credential=entry.credential,
            databases=words(entry.databases),
            serving=entry.serving,
        )

    def _certificates(self, source: Source[PolicyFile], entry: TargetEntry, place: str) -> str:
        if not entry.tls.ca or not self._certificates_wanted:
            return ""
        if entry.tls.mode == TlsMode.DISABLE:
            self._complain(place, "a CA without TLS: `mode` is `disable`")
        path = source.path.parent / entry.tls.ca
        try:
            text = path.read_text(encoding="ascii")
        except OSError as error:
            self._complain(place, f"CA file `{path}` cannot be read: {error.strerror}")
            return ""
        except UnicodeDecodeError:
            text = ""
        if "-----BEGIN CERTIFICATE-----" not in text:
            self._complain(place, f"CA file `{path}` holds no PEM certificate")
        if "PRIVATE KEY-----" in text:
            self._complain(place, f"CA file `{path}` holds a private key: keep that elsewhere")
        return text

    def _rules(self, agents: Iterable[str], targets: Mapping[str, str]) -> tuple[Rule, ...]:
        rules: list[Rule] = []
        places: dict[str, str] = {}
        for source in self._sources:
            for index, entry in enumerate(source.entries.rules):
                place = source.place("rules", index, "name")
                if not _NAME.fullmatch(entry.name):
                    self._complain(place, f"`{entry.name}` cannot be a rule's name: letters, digits, `.`, `_`, `-`")
                if entry.name in places:
                    self._complain(place, f"rule `{entry.name}` is defined twice (first at {places[entry.name]})")
                places.setdefault(entry.name, place)
                rules.append(self._rule(source, index, entry, set(agents), targets))
        return tuple(rules)

    def _rule(
        self, source: Source[PolicyFile], index: int, entry: RuleEntry, agents: set[str], targets: Mapping[str, str]
    ) -> Rule:
        def at(*key: str | int) -> str:
            return source.place("rules", index, *key)

        def check(key: str, accept: Callable[[str], object], *, empty: bool = True) -> tuple[str, ...]:
            given = words(getattr(entry, key))
            if not given and not empty:
                self._complain(at(key), f"`{key}` of rule `{entry.name}` is empty")
            for position, word in enumerate(given):
                try:
                    accept(word)
                except ValueError as error:
                    self._complain(at(key, position), str(error))
            return given

        def known(what: str, choices: set[str]) -> Callable[[str], object]:
            def accept(word: str) -> None:
                # With a file that could not be read, everything it defines would be reported as unknown.
                if word != "*" and word not in choices and not self._shapeless:
                    raise ValueError(f"unknown {what} `{word}` in rule `{entry.name}`: known are {listed(choices)}")

            return accept

        def statement(word: str) -> None:
            if not vocabulary.expand(word):
                raise ValueError(f"unknown statement kind `{word}` in rule `{entry.name}`: see docs/policy.md")

        statements = check("statements", statement)
        for key, length in (("relations", entry.relations), ("functions", entry.functions)):
            if length and not statements:
                self._complain(at(key), f"`{key}` without `statements` in rule `{entry.name}`")
        protocol = self._protocol_of(entry, at, targets)
        decides = entry.verbs if protocol == "kubernetes" else statements
        if entry.decision is None and (decides or not entry.masks):
            self._complain(at(), f"rule `{entry.name}` has no `decision`: allow, deny or hold")
        if entry.decision is not None and not decides:
            wanted = "`verbs`" if protocol == "kubernetes" else "`statements` (and no `verbs`, for an API server)"
            self._complain(at("decision"), f"rule `{entry.name}` decides on no {wanted}")
        if entry.timeout is not None and entry.decision != "hold":
            self._complain(at("timeout"), f"`timeout` is for `hold`, rule `{entry.name}` is none")
        timeout_s = _seconds(entry.timeout) if entry.timeout else DEFAULT_HOLD_S
        if not 1 <= timeout_s <= MAX_HOLD_S:
            self._complain(at("timeout"), f"`{entry.timeout}` is not between 1s and 24h")
        return Rule(
            name=entry.name,
            agents=check("agents", known("agent", agents), empty=False),
            targets=check("targets", known("target", set(targets)), empty=False),
            decision=entry.decision,
            statements=statements,
            relations=check("relations", names.RelationPattern.parse),
            functions=check("functions", names.FunctionPattern.parse),
            timeout_s=timeout_s,
            hint=" ".join(entry.hint.split()),
            masks=tuple(self._masks(entry.masks, at)),
            requests=terms.RequestTerms(entry, at, self._complain).checked() if entry.verbs else None,
            object_masks=tuple(
                terms.object_masks(
                    [(index, mask) for index, mask in enumerate(entry.masks) if mask.resource], at, self._complain
                )
            ),
        )

    def _protocol_of(self, entry: RuleEntry, at: Callable[..., str], targets: Mapping[str, str]) -> str:
        """The protocol in whose words the rule is written, complaining about words and targets of another one."""
        said: dict[str, list[tuple[str, str]]] = {"postgresql": [], "kubernetes": []}
        for key in ("statements", "relations", "functions", *terms.KEYS):
            if getattr(entry, key) not in ((), ""):
                said["kubernetes" if key in terms.KEYS else "postgresql"].append((key, at(key)))
        for index, mask in enumerate(entry.masks):
            said["kubernetes" if mask.resource else "postgresql"].append(("masks", at("masks", index)))
        requests = said["kubernetes"]
        if requests and said["postgresql"]:
            key, place = max(requests[0], said["postgresql"][0], key=lambda each: int(each[1].rpartition(":")[2]))
            self._complain(place, f"rule `{entry.name}` speaks of SQL and of requests: `{key}` belongs in another rule")
        protocol = "kubernetes" if requests else "postgresql"
        if said[protocol]:
            key = said[protocol][0][0]
            for index, name in enumerate(words(entry.targets)):
                if targets.get(name, protocol) != protocol:
                    self._complain(
                        at("targets", index), f"target `{name}` is `{targets[name]}`, `{key}` in `{entry.name}` is not"
                    )
        if requests and not entry.verbs and requests[0][0] != "masks":
            self._complain(requests[0][1], f"`{requests[0][0]}` without `verbs` in rule `{entry.name}`")
        return protocol

    def _masks(self, entries: tuple[MaskEntry, ...], at: Callable[..., str]) -> Iterable[Mask]:
        seen: set[tuple[str, str, str]] = set()
        for index, entry in enumerate(entries):
            if bool(entry.column) is bool(entry.resource):
                wanted = "a mask needs `column`, or `resource` and `field`, and not both"
                self._complain(at("masks", index), wanted)
            if entry.resource:
                continue
            for key in ("field", "namespaces", "names"):
                if getattr(entry, key):
                    self._complain(at("masks", index, key), f"`{key}` of a mask is for a `resource`, not for a column")
            if entry.method == "hide":
                self._complain(at("masks", index, "method"), "`hide` is for a `resource`, not for a column")
                continue
            if not entry.column:
                continue
            try:
                column = names.split_column(entry.column)
            except names.BadName as error:
                self._complain(at("masks", index, "column"), str(error))
                continue
            if column in seen:
                self._complain(at("masks", index, "column"), f"`{entry.column}` is masked twice in this rule")
            if names.is_system_schema(column[0]):
                self._complain(
                    at("masks", index, "column"), f"`{entry.column}`: columns of the catalog cannot be masked"
                )
            seen.add(column)
            yield Mask(*column, entry.method)

    def _ports(self) -> dict[int, str]:
        ports: dict[int, str] = {port: protocol for protocol, port in DEFAULT_PORTS.items()}
        for source in self._sources:
            for port, protocol in source.entries.protect.items():
                if not 0 < port < 65536:
                    self._complain(source.place("protect", str(port)), f"`{port}` is not a port")
                elif ports.setdefault(port, protocol) != protocol:
                    self._complain(source.place("protect", str(port)), f"port `{port}` is `{ports[port]}` already")
        return ports


def _seconds(text: str) -> float:
    digits = text.rstrip("hms")
    return int(digits[:9]) * _UNITS_S[text[len(digits) :]]


def _split_address(text: str, default_port: int, place: str) -> Host:
    """Raises `ValueError` for what is neither `host`, `host:port`, `[v6]:port` nor a bare IPv6 address; a numeric host
    may be a network."""
    bracketed = re.fullmatch(r"\[(.*)\](?::(.*))?", text)
    if bracketed:
        host, port = bracketed[1], bracketed[2]
    elif text.count(":") > 1:
        host, port = text, None
    else:
        host, colon, after = text.partition(":")
        port = after if colon else None
    try:
        host = _network(host) if "/" in host else numeric_address(host)
    except _BadNetwork:
        raise
    except ValueError:
        # What holds a colon or only digits was meant as an address.
        if not _HOST.fullmatch(host) or re.fullmatch(r"[0-9.]+", host):
            raise ValueError(
                f"`{text}` is not an address: wants host, host:port or [v6]:port; a numeric host may be a network"
            ) from None
        host = host.lower()
    if port is not None and not (re.fullmatch(r"[0-9]{1,5}", port) and 0 < int(port) < 65536):
        raise ValueError(f"`{port}` in `{text}` is not a port")
    return Host(host, int(port or default_port), place)


class _BadNetwork(ValueError):
    pass


def _network(text: str) -> str:
    """The canonical spelling of a network; one with a single address is that address. Raises `ValueError`."""
    address, _, length = text.partition("/")
    if not re.fullmatch(r"[0-9]{1,3}", length):
        raise _BadNetwork(f"`{text}` is not a network: wants a prefix length after the `/`, as in 10.20.0.0/16")
    try:
        network = ipaddress.ip_network((address, int(length)), strict=False)
    except ValueError as error:
        raise _BadNetwork(f"`{text}` is not a network: {error}") from None
    if isinstance(network, ipaddress.IPv6Network) and network.network_address.ipv4_mapped is not None:
        raise _BadNetwork(f"`{text}` is a v4-mapped network: write it as an IPv4 network")
    if ipaddress.ip_address(address) != network.network_address:
        raise _BadNetwork(f"`{text}` has bits beyond its prefix: write `{network}`, or the address alone")
    if not network.prefixlen:
        raise _BadNetwork(f"`{text}` is every address: use `protect` for a port, and targets for what is there")
    return str(network.network_address) if network.prefixlen == network.max_prefixlen else str(network)
