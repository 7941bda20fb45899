"""Credentials in a directory: the file `NAME`, in YAML, for root only, holds one of

    user: orders_app                      a login
    password: "..."

    token: "..."                          a bearer token
    token_file: /path                     the same, in a file that somebody rotates
    in_cluster: true                      the same, the service account of the pod that we run in

    client_certificate: /path             a TLS client certificate: files with PEM
    client_key: /path

    exec: {command: /path, args: [...], env: {...}, user: NAME}    a credential plug-in (`plugin`)

Under systemd's `LoadCredential=credential:DIRECTORY` (systemd.exec(5)) the file is called `credential_NAME`, and is
read by the service manager at start: a changed credential then takes a restart. Elsewhere it counts at once, and so
does whatever the file points to.

The service account's token has the mode that the kubelet gives it, which is 0644 unless the pod names a user or a group
(kubelet, `pkg/volume/projected`), and nobody in the pod can change it: others may read that one, but not write it.

Blind spot: the mode and owner of the files are checked, not those of the directories above them.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path

import yaml

from hostagent.credentials.broker import Credential, CredentialUnavailable
from hostagent.credentials.plugin import Plugin

DEFAULT_DIRECTORY = Path("/etc/hopgate/credentials")
IN_CLUSTER = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")
_OTHERS, _OTHERS_WRITE = 0o077, 0o022
_SYSTEMD_PREFIX = "credential_"
_MAX_BYTES = 64 * 1024
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_TOKEN = re.compile(r"[\x21-\x7e]+")
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
        self._read: dict[str, tuple[_Stamp, Mapping[str, object]]] = {}
        self._plugins: dict[str, Plugin] = {}

    async def credential(self, name: str) -> Credential:
        """Raises `CredentialUnavailable`."""
        found = self.read(name)
        return await found.credential() if isinstance(found, Plugin) else found

    def read(self, name: str) -> Credential | Plugin:
        """What the file of this name holds, or the plug-in that it names. Raises `CredentialUnavailable`."""
        if not _NAME.fullmatch(name):
            raise CredentialUnavailable(f"`{name}` is no name of a credential: expected letters, digits, `.`, `_`, `-`")
        path = self.directory / (self._prefix + name)
        kept = self._read.get(name)
        stamp, data = _content(path, f"`{name}` from `{path}`", kept[0] if kept else None)
        if kept is None or data is not None:
            kept = self._read[name] = (stamp, _parse(path, data or b""))
            self._plugins.pop(name, None)
        return self._resolve(name, path, kept[1])

    def _resolve(self, name: str, path: Path, entry: Mapping[str, object]) -> Credential | Plugin:
        match dict(entry):
            case {"user": str(user), "password": str(password), **rest} if not rest:
                return Credential(user, password)
            case {"token": str(token), **rest} if not rest:
                return Credential(password=_token(path, token))
            case {"token_file": str(where), **rest} if not rest:
                return Credential(password=_token(Path(where), _text(path, where)))
            case {"in_cluster": "true", **rest} if not rest:
                return Credential(password=_token(IN_CLUSTER, _text(path, str(IN_CLUSTER), _OTHERS_WRITE)))
            case {"client_certificate": str(chain), "client_key": str(key), **rest} if not rest:
                return Credential(certificate=_pem(path, key, chain))
            case {"exec": dict(call), **rest} if not rest:
                if name not in self._plugins:
                    self._plugins[name] = Plugin.parse(f"{path}:1", call)
                return self._plugins[name]
            case _:
                raise CredentialUnavailable(
                    f"{path}:1: a credential has the keys `user` and `password`, or `token`, or `token_file`, or "
                    "`in_cluster: true`, or `client_certificate` and `client_key`, or `exec`, and nothing else"
                )


def _content(
    path: Path, what: str, known: _Stamp | None = None, unwanted: int = _OTHERS
) -> tuple[_Stamp, bytes | None]:
    """The file's stamp and its content, or None when it is the one already known. Bits of `unwanted` may not be in its
    mode."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise CredentialUnavailable(f"cannot read credential {what}: {error.strerror}") from error
    try:
        status = os.fstat(descriptor)
        _check_private(path, status, unwanted)
        stamp = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        if stamp == known:
            return stamp, None
        data = os.read(descriptor, _MAX_BYTES + 1)
    except OSError as error:
        raise CredentialUnavailable(f"cannot read credential `{path}`: {error.strerror}") from error
    finally:
        os.close(descriptor)
    if len(data) > _MAX_BYTES:
        raise CredentialUnavailable(f"credential `{path}` is larger than `{_MAX_BYTES}` bytes")
    return stamp, data


def _check_private(path: Path, status: os.stat_result, unwanted: int) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise CredentialUnavailable(f"credential `{path}` is no regular file")
    if status.st_uid != 0:
        raise CredentialUnavailable(f"credential `{path}` belongs to uid `{status.st_uid}`: `chown root {path}`")
    if status.st_mode & unwanted:
        mode = f"{stat.S_IMODE(status.st_mode):04o}"
        raise CredentialUnavailable(f"credential `{path}` has mode `{mode}`, others may use it: `chmod 600 {path}`")


def _text(entry: Path, where: str, unwanted: int = _OTHERS) -> str:
    """The content of a file that a credential points to."""
    if not os.path.isabs(where):
        raise CredentialUnavailable(f"{entry}:1: `{where}` is not an absolute path")
    _, data = _content(Path(where), f"file `{where}`, which `{entry}` names", unwanted=unwanted)
    try:
        return (data or b"").decode("ascii")
    except UnicodeDecodeError:
        raise CredentialUnavailable(f"credential file `{where}` holds what is no ASCII text") from None


def _token(path: Path, text: str) -> str:
    token = text.strip()
    if not _TOKEN.fullmatch(token):
        raise CredentialUnavailable(f"credential `{path}` holds no token: it is empty, or has spaces in it")
    return token


def _pem(entry: Path, key: str, chain: str) -> bytes:
    parts = [_text(entry, key), _text(entry, chain)]
    for where, text, word in ((key, parts[0], "PRIVATE KEY"), (chain, parts[1], "CERTIFICATE")):
        if f"{word}-----" not in text:
            raise CredentialUnavailable(f"credential file `{where}` holds no PEM {word.lower()}")
    if "ENCRYPTED" in parts[0]:
        raise CredentialUnavailable(f"the key in `{key}` is encrypted: nobody is there to type its password")
    return "\n".join(parts).encode()


def _parse(path: Path, data: bytes) -> Mapping[str, object]:
    """No message of the YAML parser is passed on, nor chained: it may quote what it read."""
    line = 0
    try:
        # the C loader overflows the stack, and dies, on what is nested deeply
        value = _plain(yaml.compose(data, Loader=yaml.BaseLoader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
    except (yaml.YAMLError, RecursionError):
        line = 1
    if line:
        raise CredentialUnavailable(f"{path}:{line}: credential is not valid YAML")
    return value if isinstance(value, dict) else {}


def _plain(node: yaml.Node | None, depth: int = 0) -> object:
    """Mappings, lists and text; empty where a value is empty, a key is there twice, or it is nested deeply."""
    match node:
        case yaml.ScalarNode():
            return node.value or None
        case yaml.SequenceNode() if depth < 4:
            return [_plain(each, depth + 1) for each in node.value]
        case yaml.MappingNode() if depth < 4:
            found = {
                key.value: _plain(value, depth + 1) for key, value in node.value if isinstance(key, yaml.ScalarNode)
            }
            return found if len(found) == len(node.value) else None
        case _:
            return None
