"""Credentials in a directory: the file `NAME` holds the keys `user` and `password`, in YAML, for root only.

    user: orders_app
    password: "..."

Under systemd's `LoadCredential=credential:DIRECTORY` (systemd.exec(5)) the file is called `credential_NAME`, and is
read by the service manager at start: a changed credential then takes a restart. Elsewhere it counts at once.

Blind spot: the mode and owner of the file are checked, not those of the directories above it.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path

import yaml

from hostagent.credentials.broker import Credential, CredentialUnavailable

DEFAULT_DIRECTORY = Path("/etc/hopgate/credentials")
_SYSTEMD_PREFIX = "credential_"
_MAX_BYTES = 16 * 1024
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_Stamp = tuple[int, int, int, int, int]


class CredentialFiles:
    """A `Source`. `directory` None means `$CREDENTIALS_DIRECTORY`, or `/etc/hopgate/credentials` when that is unset."""

    def __init__(self, directory: Path | None = None, environ: Mapping[str, str] = os.environ) -> None:
        given = environ.get("CREDENTIALS_DIRECTORY", "")
        self._prefix = ""
        if directory is None and given:
            self._prefix = _SYSTEMD_PREFIX
            directory = Path(given)
        self.directory = directory or DEFAULT_DIRECTORY
        self._read: dict[str, tuple[_Stamp, Credential]] = {}

    def credential(self, name: str) -> Credential:
        """Raises `CredentialUnavailable`."""
        if not _NAME.fullmatch(name):
            raise CredentialUnavailable(f"`{name}` is no name of a credential: expected letters, digits, `.`, `_`, `-`")
        path = self.directory / (self._prefix + name)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise CredentialUnavailable(f"cannot read credential `{name}` from `{path}`: {error.strerror}") from error
        try:
            status = os.fstat(descriptor)
            _check_private(path, status)
            stamp = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
            kept = self._read.get(name)
            if kept is not None and kept[0] == stamp:
                return kept[1]
            data = os.read(descriptor, _MAX_BYTES + 1)
        except OSError as error:
            raise CredentialUnavailable(f"cannot read credential `{path}`: {error.strerror}") from error
        finally:
            os.close(descriptor)
        credential = _parse(path, data)
        self._read[name] = (stamp, credential)
        return credential


def _check_private(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise CredentialUnavailable(f"credential `{path}` is no regular file")
    if status.st_uid != 0:
        raise CredentialUnavailable(f"credential `{path}` belongs to uid `{status.st_uid}`: `chown root {path}`")
    if status.st_mode & 0o077:
        mode = f"{stat.S_IMODE(status.st_mode):04o}"
        raise CredentialUnavailable(f"credential `{path}` has mode `{mode}`, others may use it: `chmod 600 {path}`")


def _parse(path: Path, data: bytes) -> Credential:
    """No message of the YAML parser is passed on, nor chained: it may quote what it read."""
    if len(data) > _MAX_BYTES:
        raise CredentialUnavailable(f"credential `{path}` is larger than `{_MAX_BYTES}` bytes")
    line = 0
    try:
        # the C loader overflows the stack, and dies, on what is nested deeply
        document = yaml.compose(data, Loader=yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
    except (yaml.YAMLError, RecursionError):
        line = 1
    if line:
        raise CredentialUnavailable(f"{path}:{line}: credential is not valid YAML")
    values: dict[str, str] = {}
    if isinstance(document, yaml.MappingNode):
        for key, value in document.value:
            if not isinstance(key, yaml.ScalarNode) or not isinstance(value, yaml.ScalarNode) or key.value in values:
                values.clear()
                break
            values[key.value] = value.value
    if values.keys() != {"user", "password"} or not all(values.values()):
        raise CredentialUnavailable(f"{path}:1: a credential has the keys `user` and `password`, and nothing else")
    return Credential(values["user"], values["password"])
