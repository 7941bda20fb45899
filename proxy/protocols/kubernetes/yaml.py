"""Reads the YAML that a client may send in place of JSON, as the values that JSON has.

Everything that two readers could read differently, or that grows when it is read, is refused: anchors and aliases,
tags, a second document, a key that is there twice or is no string, nesting beyond `MAX_DEPTH`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import yaml

MAX_YAML = 64 * 1024
"""Bytes: it is read in Python, and everybody else waits meanwhile. JSON may be larger."""
MAX_DEPTH = 100


class YamlUnreadable(Exception):
    """The text is not read; the message says why and where."""


_BASE: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""libyaml where PyYAML was built with it, seven times as fast. It would overflow the stack on what is nested deeply,
which `_check_events` has refused by then."""


class _Loader(_BASE):  # type: ignore[misc,valid-type]
    """YAML 1.1 as Kubernetes' own reader has it: no dates, nothing to the base of 60."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("bool", r"y|Y|yes|Yes|YES|n|N|no|No|NO|true|True|TRUE|false|False|FALSE|on|On|ON|off|Off|OFF", "yYnNtTfFoO"),
    ("int", r"[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]*|[1-9][0-9_]*)", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?",
        "-+0123456789.",
    ),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"(?:{_pattern})$"), list(_first))
_Loader.bool_values = {**yaml.SafeLoader.bool_values, "y": True, "n": False}
_PLAIN = frozenset(f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "map", "seq"))


def read_yaml(text: bytes) -> object:
    """The one document in `text`. Raises `YamlUnreadable`."""
    if len(text) > MAX_YAML:
        raise YamlUnreadable(f"it has more than `{MAX_YAML}` bytes; send JSON")
    try:
        decoded = text.decode("utf-8")
        _check_events(yaml.parse(decoded, Loader=_Loader))
        loader = _Loader(decoded)
        try:
            node = loader.get_single_node()
            if node is None:
                raise YamlUnreadable("it is empty")
            _check_nodes(node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlUnreadable(f"line {mark.line + 1 if mark else 1}: {error.problem or 'it is malformed'}") from None
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError):
        raise YamlUnreadable("it is malformed") from None


def _check_events(events: Iterator[yaml.Event]) -> None:
    """Before anything is built of it."""
    depth = documents = 0
    for event in events:
        match event:
            case yaml.AliasEvent():
                raise YamlUnreadable(f"{_line(event)}: aliases are not read; write the value out")
            case yaml.CollectionStartEvent():
                depth += 1
                if depth > MAX_DEPTH:
                    raise YamlUnreadable(f"{_line(event)}: it is nested too deeply")
            case yaml.CollectionEndEvent():
                depth -= 1
            case yaml.DocumentStartEvent():
                documents += 1
                if documents > 1:
                    raise YamlUnreadable("it has more than one document")
        if getattr(event, "anchor", None):
            raise YamlUnreadable(f"{_line(event)}: anchors are not read; write the value out")


def _check_nodes(node: yaml.Node) -> None:
    if node.tag not in _PLAIN:
        raise YamlUnreadable(f"{_line(node)}: the tag `{node.tag[:64]}` is not read")
    match node:
        case yaml.MappingNode():
            seen = set()
            for key, value in node.value:
                if key.tag != "tag:yaml.org,2002:str":
                    raise YamlUnreadable(f"{_line(key)}: a key is no string; put it in quotes")
                if key.value in seen:
                    raise YamlUnreadable(f"{_line(key)}: the key `{key.value[:64]}` is there twice")
                seen.add(key.value)
                _check_nodes(value)
        case yaml.SequenceNode():
            for value in node.value:
                _check_nodes(value)
        case yaml.ScalarNode(tag="tag:yaml.org,2002:float") if not math.isfinite(_number(node.value)):
            raise YamlUnreadable(f"{_line(node)}: `{node.value[:16]}` is no number that JSON has")


def _line(part: yaml.Event | yaml.Node) -> str:
    return f"line {part.start_mark.line + 1}" if part.start_mark is not None else "line 1"


def _number(text: str) -> float:
    try:
        return float(text.replace("_", ""))
    except ValueError:
        return math.inf if "inf" in text.lower() or "nan" in text.lower() else 0.0
