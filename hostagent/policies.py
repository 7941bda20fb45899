"""The policy that is in force: loaded from its directory, names resolved, compiled, and replaced only by a good one.

    nothing (everything is denied) --load--> a version --load--> the next version
                                       a bad one keeps what is there, loudly

At start there is nothing to keep: a directory that cannot be loaded leaves everything denied, which the status says.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

import structlog

from hostagent.errors import OperatorError
from proxy.model import Target
from proxy.policy.compile import CompiledPolicy
from proxy.policy.document import DEFAULT_PORTS, Document, PolicyError, ResolvedPolicy, resolve
from proxy.policy.load import load

log = structlog.get_logger()


class PolicyUnusable(OperatorError):
    """One line a problem, `file:line: message`."""


class ActivePolicy:
    """`problem` is empty, or says why what is on disk is not what is in force."""

    def __init__(self, directory: Path, mask_key: bytes) -> None:
        self._directory = directory
        self._mask_key = mask_key
        self.resolved = _nothing()
        self.compiled = CompiledPolicy(self.resolved, mask_key)
        self.problem = "no policy was loaded: everything is denied"

    @property
    def targets(self) -> dict[str, Target]:
        """The targets by name."""
        return {target.name: target for target in self.resolved.targets}

    def reload(self) -> None:
        """Takes what is on disk. Raises `PolicyUnusable`, and keeps what was in force."""
        try:
            resolved = resolve(load(self._directory), addresses_of)
            compiled = CompiledPolicy(resolved, self._mask_key)
        except PolicyError as error:
            self.problem = f"{len(error.problems)} problems, the first: {error.problems[0]}"
            log.error("policy not loaded", kept=self.compiled.version, problems=error.problems)
            raise PolicyUnusable(str(error)) from error
        self.resolved, self.compiled, self.problem = resolved, compiled, ""
        log.info("policy loaded", version=compiled.version, targets=sorted(self.targets))


def _nothing() -> ResolvedPolicy:
    """No agent, no target, no rule; the well-known ports are protected all the same."""
    ports = {port: protocol for protocol, port in DEFAULT_PORTS.items()}
    return resolve(Document(agents=(), targets=(), rules=(), protected_ports=ports), addresses_of)


def addresses_of(name: str) -> Sequence[str]:
    """All addresses of a host name, IPv4 and IPv6. Raises OSError when it does not resolve."""
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return sorted({str(entry[4][0]) for entry in found})
