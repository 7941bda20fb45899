"""Credential plug-ins, as kubeconfig has them (Kubernetes, "client-go credential plugins"): a command that prints an
`ExecCredential`, with a token or a client certificate in it and the time it is good for.

A plug-in runs with the environment that its entry gives it and nothing else of ours, has `TIMEOUT_S`, and is asked
again a minute before what it gave expires. While that is still good, a plug-in that fails is only logged.

Blind spot: what it prints without an expiry is taken to be good for ten minutes.
"""

from __future__ import annotations

import asyncio
import datetime
import os
import stat
import time
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import msgspec
import structlog

from hostagent.credentials.broker import Credential, CredentialUnavailable

log = structlog.get_logger()

TIMEOUT_S = 15.0
MAX_OUTPUT = 256 * 1024
RENEW_BEFORE_S = 60.0
UNTIL_ASKED_AGAIN_S = 600.0
_VERSIONS = ("client.authentication.k8s.io/v1", "client.authentication.k8s.io/v1beta1")


class _Call(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    command: Annotated[str, msgspec.Meta(pattern="^/")]
    args: tuple[str, ...] = ()
    env: dict[str, str] = {}
    user: str = ""
    api_version: str = _VERSIONS[0]


class _Status(msgspec.Struct, frozen=True, rename="camel"):
    token: str = ""
    client_certificate_data: str = ""
    client_key_data: str = ""
    expiration_timestamp: datetime.datetime | None = None


class _ExecCredential(msgspec.Struct, frozen=True, rename="camel"):
    api_version: str
    kind: str
    status: _Status


class Plugin:
    """One command. `parse` makes it."""

    def __init__(self, place: str, call: _Call, clock: Callable[[], float] = time.time) -> None:
        self._place = place
        self._call = call
        self._clock = clock
        self._kept: Credential | None = None
        self._renew_at_s = 0.0
        self._expires_s = 0.0
        self._asking = asyncio.Lock()

    @classmethod
    def parse(cls, place: str, entry: Mapping[str, Any]) -> Plugin:
        """From the `exec` entry of a credential at `place`. Raises `CredentialUnavailable`."""
        try:
            call = msgspec.convert({key: value for key, value in entry.items() if value is not None}, type=_Call)
        except msgspec.ValidationError:
            raise CredentialUnavailable(
                f"{place}: `exec` has `command` (an absolute path), `args`, `env`, `user` and `api_version`"
            ) from None
        if call.api_version not in _VERSIONS:
            raise CredentialUnavailable(f"{place}: `{call.api_version}` is none of {', '.join(_VERSIONS)}")
        return cls(place, call)

    async def credential(self) -> Credential:
        """What it gave last, or gives now. Raises `CredentialUnavailable`."""
        async with self._asking:
            if self._kept is not None and self._clock() < self._renew_at_s:
                return self._kept
            try:
                self._kept = await self._ask()
            except CredentialUnavailable as error:
                if self._kept is None or self._clock() >= self._expires_s:
                    self._kept = None
                    raise
                log.error("credential not renewed", why=str(error))
            return self._kept

    async def _ask(self) -> Credential:
        output = await self._run()
        try:
            given = msgspec.json.decode(output, type=_ExecCredential)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise self._failed("it prints no ExecCredential") from None
        if given.kind != "ExecCredential" or given.api_version != self._call.api_version:
            raise self._failed(f"it prints no ExecCredential of `{self._call.api_version}`")
        status = given.status
        certificate = b""
        if status.client_certificate_data or status.client_key_data:
            if (
                "PRIVATE KEY-----" not in status.client_key_data
                or "CERTIFICATE-----" not in status.client_certificate_data
            ):
                raise self._failed("its client certificate or key is no PEM")
            certificate = f"{status.client_key_data}\n{status.client_certificate_data}".encode()
        if not (status.token or certificate) or any(not "!" <= letter <= "~" for letter in status.token):
            raise self._failed("it gives neither a token nor a client certificate")
        now = self._clock()
        expires = status.expiration_timestamp
        self._expires_s = expires.timestamp() if expires is not None else now + UNTIL_ASKED_AGAIN_S
        if self._expires_s <= now:
            raise self._failed("what it gives has expired")
        self._renew_at_s = self._expires_s - RENEW_BEFORE_S if expires is not None else self._expires_s
        return Credential(password=status.token, certificate=certificate)

    async def _run(self) -> bytes:
        self._check_command()
        spec = {"apiVersion": self._call.api_version, "kind": "ExecCredential", "spec": {"interactive": False}}
        environment = {"PATH": os.defpath, "KUBERNETES_EXEC_INFO": msgspec.json.encode(spec).decode(), **self._call.env}
        who: dict[str, Any] = {"user": self._call.user, "extra_groups": []} if self._call.user else {}
        try:
            process = await asyncio.create_subprocess_exec(
                self._call.command,
                *self._call.args,
                env=environment,
                cwd="/",
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.DEVNULL,
                start_new_session=True,
                limit=MAX_OUTPUT,
                **who,
            )
        except (OSError, KeyError, ValueError) as error:
            why = os.strerror(error.errno).lower() if isinstance(error, OSError) and error.errno else str(error)
            raise self._failed(f"it cannot be started: {why}") from None
        assert process.stdout is not None
        try:
            async with asyncio.timeout(TIMEOUT_S):
                output = await process.stdout.read(MAX_OUTPUT + 1)
                while len(output) <= MAX_OUTPUT and (more := await process.stdout.read(MAX_OUTPUT)):
                    output += more
                status = await process.wait() if len(output) <= MAX_OUTPUT else -1
        except TimeoutError:
            raise self._failed(f"it did not end within {TIMEOUT_S:g} s") from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if len(output) > MAX_OUTPUT:
            raise self._failed(f"it prints more than `{MAX_OUTPUT}` bytes")
        if status:
            raise self._failed(f"it ended with status `{status}`")
        return output

    def _check_command(self) -> None:
        """What runs with our rights may be changed by root only."""
        try:
            status = os.stat(self._call.command)
        except OSError as error:
            raise self._failed((error.strerror or str(error)).lower()) from None
        if not stat.S_ISREG(status.st_mode) or status.st_uid != 0 or status.st_mode & 0o022:
            raise self._failed("it has to be a file of root's that others cannot write to")

    def _failed(self, why: str) -> CredentialUnavailable:
        return CredentialUnavailable(f"{self._place}: the credential plug-in `{self._call.command}` failed: {why}")
