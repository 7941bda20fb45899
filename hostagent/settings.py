"""The host agent's own configuration: `/etc/hopgate/hopgate.yaml`, one flat mapping, every key optional.

Read once, at start. Unknown keys, keys given twice and values of the wrong kind are refused with file and line.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import yaml

from hostagent.errors import OperatorError

DEFAULT_PATH = Path("/etc/hopgate/hopgate.yaml")
_MAX_BYTES = 64 * 1024
_ENTRIES_MAX = 1 << 24
_MAPS = (
    *("procs", "nodes", "graveyard", "connects", "scope", "exempt", "passing", "declared", "event_bytes"),
    *("agent_files", "spared", "unwatched"),
)
"""Of `hostagent/kernel/settings.py`, which would have to load a lot to be asked."""
_LEVELS = ("debug", "info", "warning", "error")


class SettingsError(OperatorError):
    """`file:line: message`."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """`cgroup` is the hooked cgroup2 directory, None for the mount's root. `worker_cgroup` is where the workers live,
    None for a directory below the daemon's own. `workers` 0 means one per core. `credentials_dir` None means
    `$CREDENTIALS_DIRECTORY` where the service manager set it, else `/etc/hopgate/credentials`.

    `adopt` says what becomes of connections that are older than the redirect: `leave`, or `reset` once.

    `maps` are sizes of the kernel's maps, as `map_NAME` in the file, where they are not the default ones.

    `listen_port` is below 1024: the redirect leads there also while nobody listens, and no user may then take it. It is
    below 512 because others take privileged ports above for clients of theirs (bindresvport(3))."""

    cgroup: Path | None = None
    worker_cgroup: Path | None = None
    worker_user: str = "hopgate"
    workers: int = 0
    listen_port: int = 301
    policy_dir: Path = Path("/etc/hopgate/policy.d")
    state_dir: Path = Path("/var/lib/hopgate")
    run_dir: Path = Path("/run/hopgate")
    pin_dir: Path = Path("/sys/fs/bpf/hopgate")
    credentials_dir: Path | None = None
    offer_tls: bool = True
    adopt: str = "leave"
    log_level: str = "info"
    maps: dict[str, int] = {}

    @property
    def store_path(self) -> Path:
        return self.state_dir / "control.sqlite"

    @property
    def recordings_dir(self) -> Path:
        return self.state_dir / "recordings"

    @property
    def control_socket(self) -> Path:
        return self.run_dir / "control.sock"


def load(path: Path) -> Settings:
    """Reads the file; raises `SettingsError`. A default configuration needs an empty file, not a missing one."""
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise SettingsError(f"cannot read settings `{path}`: {error.strerror}; name the file with --config") from error
    if len(data) > _MAX_BYTES:
        raise SettingsError(f"{path}:1: settings are larger than `{_MAX_BYTES}` bytes")
    try:
        # the C loader overflows the stack, and dies, on what is nested deeply
        document = yaml.compose(data, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise SettingsError(f"{path}:{mark.line + 1 if mark else 1}: bad YAML: {error.problem}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise SettingsError(f"{path}:1: bad YAML: {' '.join(str(error).split())}") from error
    if document is None:
        return Settings()
    if not isinstance(document, yaml.MappingNode):
        raise SettingsError(f"{path}:{document.start_mark.line + 1}: settings have to be a mapping of keys to values")
    values = _values(path, document)
    maps = {name: values.pop(f"map_{name}") for name in _MAPS if f"map_{name}" in values}
    return Settings(**values, maps=maps)


def _values(path: Path, document: yaml.MappingNode) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key_node, node in document.value:
        where = f"{path}:{key_node.start_mark.line + 1}"
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else "?"
        parse = _PARSERS.get(key)
        if parse is None:
            raise SettingsError(f"{where}: unknown key `{key}`: expected one of {', '.join(_PARSERS)}")
        if key in values:
            raise SettingsError(f"{where}: key `{key}` is given twice")
        if not isinstance(node, yaml.ScalarNode):
            raise SettingsError(f"{where}: `{key}` has to be a single value")
        try:
            values[key] = parse(yaml.constructor.SafeConstructor().construct_object(node))
        except yaml.YAMLError as error:
            raise SettingsError(f"{where}: `{key}` has the tag `{node.tag}`: expected a plain value") from error
        except ValueError as error:
            raise SettingsError(f"{where}: `{key}` is `{node.value}`: {error}") from error
    return values


def _path(value: object) -> Path:
    if not isinstance(value, str) or not value.startswith("/"):
        raise ValueError("expected an absolute path")
    return Path(value)


def _path_or_auto(value: object) -> Path | None:
    if value == "auto":
        return None
    if not isinstance(value, str) or not value.startswith("/"):
        raise ValueError("expected `auto` or an absolute path")
    return Path(value)


def _user(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[a-z_][a-z0-9_-]{0,31}", value):
        raise ValueError("expected the name of a user")
    return value


def _whole(low: int, high: int) -> Callable[[object], int]:
    def parse(value: object) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ValueError(f"expected a whole number from {low} to {high}")
        return value

    return parse


def _switch(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError("expected true or false")
    return value


def _adopt(value: object) -> str:
    if value not in ("leave", "reset"):
        raise ValueError("expected leave or reset")
    return str(value)


def _level(value: object) -> str:
    if value not in _LEVELS:
        raise ValueError(f"expected one of {', '.join(_LEVELS)}")
    return str(value)


_PARSERS: dict[str, Callable[[object], object]] = {
    "cgroup": _path_or_auto,
    "worker_cgroup": _path_or_auto,
    "worker_user": _user,
    "workers": _whole(0, 256),
    "listen_port": _whole(1, 65535),
    "policy_dir": _path,
    "state_dir": _path,
    "run_dir": _path,
    "pin_dir": _path,
    "credentials_dir": _path_or_auto,
    "offer_tls": _switch,
    "adopt": _adopt,
    "log_level": _level,
    **{f"map_{name}": _whole(1, _ENTRIES_MAX) for name in _MAPS},
}
