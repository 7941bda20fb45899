"""Reads one YAML file by a msgspec type, and says everything that is wrong with it, each with file and line.

YAML is composed into nodes and not into objects: nodes know their lines. The type decides what is looked at, so an
alias that refers to itself ends nowhere deep. No key is accepted that the type does not have.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec
import yaml

MAX_FILE = 1 << 20
"""Bytes of one file."""

T = TypeVar("T", bound=msgspec.Struct)

_Path = tuple[str | int, ...]
_KEYWORDS = {
    "tag:yaml.org,2002:str": "text",
    "tag:yaml.org,2002:int": "a number",
    "tag:yaml.org,2002:float": "a number with a fraction",
    "tag:yaml.org,2002:bool": "a boolean",
    "tag:yaml.org,2002:null": "nothing",
}
_WRONG = object()


class Source(Generic[T]):
    """One file: its entries, where each stands, and what is wrong with it.

    `entries` hold what is right; a file that cannot be read has the type's defaults (it has to have some for every
    field)."""

    def __init__(self, path: Path, kind: type[T]) -> None:
        self.path = path
        self.problems: list[str] = []
        self._lines: dict[_Path, int] = {}
        self._kind = kind
        self.entries = kind()
        node = self._compose()
        if node is not None:
            shaped = self._shape(node, msgspec.inspect.type_info(self._kind), ())
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
            case msgspec.inspect.AnyType():
                try:
                    return yaml.constructor.SafeConstructor().construct_document(node)
                except yaml.YAMLError as error:
                    return self._complain(node, f"`{_last(path)}` cannot be read: {' '.join(str(error).split())}")
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
                self._complain(key, f"unknown key `{name}`: known are {listed(fields)}")
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
        if shape.cls is self._kind:
            return self._kind(**{name: value for name, value in values.items() if value is not _WRONG})
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
            case msgspec.inspect.BoolType():
                if node.tag != "tag:yaml.org,2002:bool" or value not in ("true", "false"):
                    return self._complain(node, f"`{_last(path)}` wants true or false, `{value}` is {given}")
                return value == "true"
            case msgspec.inspect.LiteralType():
                if value not in shape.values:
                    return self._complain(node, f"`{_last(path)}` cannot be `{value}`: wants {listed(shape.values)}")
                return value
            case msgspec.inspect.EnumType():
                choices = [member.value for member in shape.cls]
                if value not in choices:
                    return self._complain(node, f"`{_last(path)}` cannot be `{value}`: wants {listed(choices)}")
                return shape.cls(value)
            case _:
                raise TypeError(f"the policy's own types have no reader for {shape}")


def listed(choices: Iterable[object]) -> str:
    """Words in back-ticks, for a message."""
    return ", ".join(f"`{choice}`" for choice in sorted(map(str, choices))) or "none"


def _last(path: _Path) -> str:
    """What a person would call the entry: its key, or its list's key and position."""
    if not path:
        return "the file"
    if isinstance(path[-1], int):
        return f"{_last(path[:-1])}[{path[-1]}]"
    return path[-1]
