"""Reads the YAML files of a policy directory into a checked `Document`. The only module of the policy that reads files.

YAML is composed into nodes, not objects, so that everything that is wrong can be said with its file and line; and all
of it is said at once. The shape comes from `document.PolicyFile`: there is no second list of keys.

States: read → shaped (each file by itself) → merged (names unique over all files) → checked (references, patterns).
A later state is entered even if an earlier one found something, so that one run shows as much as it can.

Blind spots: whether an address answers, whether a CA is the right one and whether a relation exists is for the host to
find.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec
import yaml

from proxy.model import UNATTRIBUTED, TlsMode
from proxy.policy import names, vocabulary
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
    Words,
    numeric_address,
)

MAX_FILE = 1 << 20
"""Bytes of one policy file."""

MAX_HOLD_S = 24 * 3600.0

_Path = tuple[str | int, ...]
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,62}")
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,252})")
_KEYWORDS = {
    "tag:yaml.org,2002:str": "text",
    "tag:yaml.org,2002:int": "a number",
    "tag:yaml.org,2002:float": "a number with a fraction",
    "tag:yaml.org,2002:bool": "a boolean",
    "tag:yaml.org,2002:null": "nothing",
}
_UNITS_S = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
_WRONG = object()


def load(directory: Path) -> Document:
    """Reads every `*.yaml` of the directory. Raises `PolicyError` with all problems."""
    if not directory.is_dir():
        raise PolicyError([f"{directory}: no such directory: the policy is read from `*.yaml` files in it"])
    return load_files(sorted(directory.glob("*.yaml")))


def load_files(paths: Iterable[Path]) -> Document:
    """Reads these files as one policy. Raises `PolicyError` with all problems."""
    sources = [_Source(path) for path in paths]
    return _Merge(sources).document()


class _Source:
    """One file: its entries, where each stands, and what is wrong with it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problems: list[str] = []
        self._lines: dict[_Path, int] = {}
        self.entries = PolicyFile()
        node = self._compose()
        if node is not None:
            shaped = self._shape(node, msgspec.inspect.type_info(PolicyFile), ())
            if shaped is not _WRONG:
                self.entries = shaped

    def place(self, *path: str | int) -> str:
        """`file:line` of the entry, or of what it is in."""
        while path and path not in self._lines:
            path = path[:-1]
        return f"{self.path}:{self._lines.get(path, 1)}"

    def _compose(self) -> yaml.Node | None:
        try:
            data = self.path.read_bytes()
        except OSError as error:
            self.problems.append(f"{self.path}:1: cannot be read: {error.strerror}")
            return None
        if len(data) > MAX_FILE:
            self.problems.append(f"{self.path}:1: file has `{len(data)}` bytes, more than `{MAX_FILE}`")
            return None
        try:
            documents = list(yaml.compose_all(data, Loader=yaml.CSafeLoader))
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            said = " ".join(filter(None, (error.context, error.problem)))
            self.problems.append(f"{self.path}:{mark.line + 1 if mark else 1}: not YAML: {said}")
            return None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            self.problems.append(f"{self.path}:1: not YAML: {' '.join(str(error).split())}")
            return None
        except RecursionError:
            self.problems.append(f"{self.path}:1: not YAML: nested too deeply")
            return None
        if len(documents) > 1:
            line = documents[1].start_mark.line + 1
            self.problems.append(f"{self.path}:{line}: a second document: use one document a file")
            return None
        return documents[0] if documents else None

    def _complain(self, node: yaml.Node, message: str) -> object:
        self.problems.append(f"{self.path}:{node.start_mark.line + 1}: {message}")
        return _WRONG

    def _shape(self, node: yaml.Node, shape: msgspec.inspect.Type, path: _Path) -> Any:
        """The node as a value of that type, or `_WRONG` after complaining. Recursion is bounded by the type."""
        self._lines.setdefault(path, node.start_mark.line + 1)
        match shape:
            case msgspec.inspect.Metadata():
                return self._shape(node, shape.type, path)
            case msgspec.inspect.UnionType():
                return self._shape_union(node, shape, path)
            case msgspec.inspect.StructType():
                return self._shape_struct(node, shape, path)
            case msgspec.inspect.DictType():
                return self._shape_dict(node, shape, path)
            case msgspec.inspect.VarTupleType():
                if not isinstance(node, yaml.SequenceNode):
                    return self._complain(node, f"`{_last(path)}` wants a list")
                items = [self._shape(item, shape.item_type, (*path, at)) for at, item in enumerate(node.value)]
                return _WRONG if any(item is _WRONG for item in items) else tuple(items)
            case _:
                return self._shape_scalar(node, shape, path)

    def _shape_union(self, node: yaml.Node, shape: msgspec.inspect.UnionType, path: _Path) -> Any:
        """Of a union, the member that fits the kind of node: `text | list`, or `something | nothing`."""
        members = [member for member in shape.types if not isinstance(member, msgspec.inspect.NoneType)]
        sequence = isinstance(node, yaml.SequenceNode)
        for member in members:
            if isinstance(member, msgspec.inspect.VarTupleType) == sequence:
                return self._shape(node, member, path)
        return self._shape(node, members[0], path)

    def _pairs(self, node: yaml.Node, path: _Path) -> list[tuple[str, yaml.Node, yaml.Node]] | None:
        if not isinstance(node, yaml.MappingNode):
            self._complain(node, f"`{_last(path)}` wants `key: value` lines")
            return None
        pairs: list[tuple[str, yaml.Node, yaml.Node]] = []
        seen: dict[str, yaml.Node] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self._complain(key, "a key has to be plain text")
            elif key.value in seen:
                first = seen[key.value].start_mark.line + 1
                self._complain(key, f"key `{key.value}` is given twice (first at line {first})")
            else:
                seen[key.value] = key
                pairs.append((key.value, key, value))
        return pairs

    def _shape_struct(self, node: yaml.Node, shape: msgspec.inspect.StructType, path: _Path) -> Any:
        pairs = self._pairs(node, path)
        if pairs is None:
            return _WRONG
        fields = {field.encode_name: field for field in shape.fields}
        values: dict[str, Any] = {}
        wrong = False
        for name, key, value in pairs:
            if name not in fields:
                wrong = True
                self._complain(key, f"unknown key `{name}`: known are {_listed(fields)}")
                continue
            self._lines[(*path, name)] = key.start_mark.line + 1
            values[fields[name].name] = shaped = self._shape(value, fields[name].type, (*path, name))
            wrong |= shaped is _WRONG
        for field in shape.fields:
            if field.required and field.encode_name not in (name for name, _, _ in pairs):
                wrong = True
                self._complain(node, f"`{field.encode_name}` is missing in `{_last(path)}`")
        if not wrong:
            return shape.cls(**values)
        # The file's own entries are kept as far as they are right, so that the checks that follow say what they can.
        if shape.cls is PolicyFile:
            return PolicyFile(**{name: value for name, value in values.items() if value is not _WRONG})
        return _WRONG

    def _shape_dict(self, node: yaml.Node, shape: msgspec.inspect.DictType, path: _Path) -> Any:
        pairs = self._pairs(node, path)
        if pairs is None:
            return _WRONG
        made: dict[Any, Any] = {}
        wrong = False
        for name, key, value in pairs:
            made_key = self._shape_scalar(key, shape.key_type, (*path, name))
            self._lines[(*path, name)] = key.start_mark.line + 1
            shaped = self._shape(value, shape.value_type, (*path, name))
            wrong |= made_key is _WRONG or shaped is _WRONG
            made[made_key] = shaped
        return _WRONG if wrong else made

    def _shape_scalar(self, node: yaml.Node, shape: msgspec.inspect.Type, path: _Path) -> Any:
        if not isinstance(node, yaml.ScalarNode):
            return self._complain(node, f"`{_last(path)}` wants one value")
        given = _KEYWORDS.get(node.tag, f"`{node.tag}`")
        value: str = node.value
        match shape:
            case msgspec.inspect.StrType():
                if node.tag != "tag:yaml.org,2002:str":
                    return self._complain(node, f"`{_last(path)}` wants text, `{value}` is {given}: put it in quotes")
                if shape.pattern and not re.search(shape.pattern, value):
                    return self._complain(node, f"`{_last(path)}` cannot be `{value}`: wants the form {shape.pattern}")
                return value
            case msgspec.inspect.IntType():
                if node.tag != "tag:yaml.org,2002:int" or not re.fullmatch(r"-?[0-9]{1,12}", value):
                    return self._complain(node, f"`{_last(path)}` wants a number, `{value}` is {given}")
                return int(value)
            case msgspec.inspect.LiteralType():
                if value not in shape.values:
                    return self._complain(node, f"`{_last(path)}` cannot be `{value}`: wants {_listed(shape.values)}")
                return value
            case msgspec.inspect.EnumType():
                choices = [member.value for member in shape.cls]
                if value not in choices:
                    return self._complain(node, f"`{_last(path)}` cannot be `{value}`: wants {_listed(choices)}")
                return shape.cls(value)
            case _:
                raise TypeError(f"the policy's own types have no reader for {shape}")


class _Merge:
    """All files together."""

    def __init__(self, sources: list[_Source]) -> None:
        self._sources = sources
        self._problems = [problem for source in sources for problem in source.problems]
        self._shapeless = bool(self._problems)

    def _complain(self, place: str, message: str) -> None:
        self._problems.append(f"{place}: {message}")

    def _unique(self, section: str) -> dict[str, tuple[_Source, Any]]:
        """The named entries of all files, complaining about a name that stands in two of them."""
        found: dict[str, tuple[_Source, Any]] = {}
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
            agents=tuple(self._agent(name, source, entry) for name, (source, entry) in agents.items()),
            targets=tuple(self._target(name, source, entry) for name, (source, entry) in targets.items()),
            rules=self._rules(agents.keys() | {UNATTRIBUTED}, targets.keys()),
            protected_ports=self._ports(),
            files=tuple(str(source.path) for source in self._sources),
        )
        if self._problems:
            raise PolicyError(self._problems)
        return document

    def _agent(self, name: str, source: _Source, entry: AgentEntry) -> Agent:
        def at(key: str) -> str:
            return source.place("agents", name, key)

        if not PurePosixPath(entry.exe).is_absolute():
            self._complain(at("exe"), f"`{entry.exe}` is not an absolute path")
        if entry.sha256 and not re.fullmatch(r"[0-9a-fA-F]{64}", entry.sha256):
            self._complain(at("sha256"), f"`{entry.sha256}` is not 64 hex digits")
        if entry.uid is not None and not 0 <= entry.uid < 2**32 - 1:
            self._complain(at("uid"), f"`{entry.uid}` is not a uid")
        for key in ("argv", "cgroup"):
            glob: str = getattr(entry, key)
            if glob.count("[") != glob.count("]") or "[]" in glob:
                self._complain(at(key), f"bad glob `{glob}`: a `[` without its `]`; write `[[]` for a bracket")
        return Agent(name, entry.exe, entry.sha256.lower(), entry.argv, entry.uid, entry.cgroup)

    def _target(self, name: str, source: _Source, entry: TargetEntry) -> NamedTarget:
        def at(*key: str | int) -> str:
            return source.place("targets", name, *key)

        hosts = []
        for index, text in enumerate(_words(entry.addresses)):
            try:
                hosts.append(_split_address(text, DEFAULT_PORTS[entry.protocol], at("addresses", index)))
            except ValueError as error:
                self._complain(at("addresses", index), str(error))
        if not _words(entry.addresses):
            self._complain(at("addresses"), "a target needs at least one address")
        named = [host.host for host in hosts if not host.numeric] or [host.host for host in hosts]
        if not entry.credential:
            self._complain(at("credential"), "`credential` is empty: name an entry of the credential source")
        return NamedTarget(
            name=name,
            protocol=entry.protocol,
            hosts=tuple(hosts),
            server_name=entry.server_name or (named[0] if named else ""),
            tls_mode=entry.tls.mode,
            ca_pem=self._certificates(source, entry, at("tls", "ca")),
            credential=entry.credential,
            databases=_words(entry.databases),
        )

    def _certificates(self, source: _Source, entry: TargetEntry, place: str) -> str:
        if not entry.tls.ca:
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

    def _rules(self, agents: Iterable[str], targets: Iterable[str]) -> tuple[Rule, ...]:
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
                rules.append(self._rule(source, index, entry, set(agents), set(targets)))
        return tuple(rules)

    def _rule(self, source: _Source, index: int, entry: RuleEntry, agents: set[str], targets: set[str]) -> Rule:
        def at(*key: str | int) -> str:
            return source.place("rules", index, *key)

        def check(key: str, accept: Callable[[str], object], *, empty: bool = True) -> tuple[str, ...]:
            words = _words(getattr(entry, key))
            if not words and (not empty or isinstance(getattr(entry, key), str)):
                self._complain(at(key), f"`{key}` of rule `{entry.name}` is empty")
            for position, word in enumerate(words):
                try:
                    accept(word)
                except ValueError as error:
                    self._complain(at(key, position), str(error))
            return words

        def known(what: str, choices: set[str]) -> Callable[[str], object]:
            def accept(word: str) -> None:
                # With a file that could not be read, everything it defines would be reported as unknown.
                if word != "*" and word not in choices and not self._shapeless:
                    raise ValueError(f"unknown {what} `{word}` in rule `{entry.name}`: known are {_listed(choices)}")

            return accept

        def statement(word: str) -> None:
            if not vocabulary.expand(word):
                raise ValueError(f"unknown statement kind `{word}` in rule `{entry.name}`: see docs/policy.md")

        statements = check("statements", statement)
        for key, length in (("relations", entry.relations), ("functions", entry.functions)):
            if length and not statements:
                self._complain(at(key), f"`{key}` without `statements` in rule `{entry.name}`")
        if entry.decision is None and (statements or not entry.masks):
            self._complain(at(), f"rule `{entry.name}` has no `decision`: allow, deny or hold")
        if entry.decision is not None and not statements:
            self._complain(at("decision"), f"rule `{entry.name}` decides on no `statements`")
        if entry.timeout is not None and entry.decision != "hold":
            self._complain(at("timeout"), f"`timeout` is for `hold`, rule `{entry.name}` is none")
        timeout_s = _seconds(entry.timeout) if entry.timeout else DEFAULT_HOLD_S
        if not 1 <= timeout_s <= MAX_HOLD_S:
            self._complain(at("timeout"), f"`{entry.timeout}` is not between 1s and 24h")
        return Rule(
            name=entry.name,
            agents=check("agents", known("agent", agents), empty=False),
            targets=check("targets", known("target", targets), empty=False),
            decision=entry.decision,
            statements=statements,
            relations=check("relations", names.RelationPattern.parse),
            functions=check("functions", names.FunctionPattern.parse),
            timeout_s=timeout_s,
            hint=" ".join(entry.hint.split()),
            masks=tuple(self._masks(entry.masks, at)),
        )

    def _masks(self, entries: tuple[MaskEntry, ...], at: Callable[..., str]) -> Iterable[Mask]:
        seen: set[tuple[str, str, str]] = set()
        for index, entry in enumerate(entries):
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


def _words(value: Words) -> tuple[str, ...]:
    """One word may be written without a list."""
    return ((value,) if value else ()) if isinstance(value, str) else value


def _listed(choices: Iterable[object]) -> str:
    return ", ".join(f"`{choice}`" for choice in sorted(map(str, choices))) or "none"


def _last(path: _Path) -> str:
    """What a person would call the entry: its key, or its list's key and position."""
    if not path:
        return "the file"
    if isinstance(path[-1], int):
        return f"{_last(path[:-1])}[{path[-1]}]"
    return path[-1]


def _seconds(text: str) -> float:
    digits = text.rstrip("hms")
    return int(digits[:9]) * _UNITS_S[text[len(digits) :]]


def _split_address(text: str, default_port: int, place: str) -> Host:
    """Raises `ValueError` for what is neither `host`, `host:port`, `[v6]:port` nor a bare IPv6 address."""
    if text.startswith("["):
        host, bracket, port = text[1:].partition("]")
        if not bracket or (port and not port.startswith(":")):
            raise ValueError(f"`{text}` is not an address: wants host:port or [v6]:port")
        port = port[1:]
        host = numeric_address(host)
    elif text.count(":") > 1:
        host, port = numeric_address(text), ""
    else:
        host, _, port = text.partition(":")
        if not _HOST.fullmatch(host):
            raise ValueError(f"`{text}` is not an address: wants host:port or [v6]:port")
        try:
            host = numeric_address(host)
        except ValueError:
            if re.fullmatch(r"[0-9.]+", host):
                raise ValueError(f"`{host}` is not an address") from None
            host = host.lower()
    if not re.fullmatch(r"[0-9]{0,5}", port) or not 0 < int(port or default_port) < 65536:
        raise ValueError(f"`{port}` in `{text}` is not a port")
    return Host(host, int(port or default_port), place)
