"""The policy that is in force: loaded from its directory, names resolved, compiled, and replaced only by a good one.

    nothing (everything is denied) --load--> a version --load--> the next version
                                       a bad one keeps what is there, loudly

At start there is nothing to keep: a directory that cannot be loaded leaves everything denied, which the status says.

What names resolve to may change under the same version: only where the targets are is then different.
"""

from __future__ import annotations

from pathlib import Path

import structlog

from hostagent.errors import OperatorError
from hostagent.names import Names
from hostagent.resolver import Answer
from proxy.model import Target
from proxy.policy.compile import CompiledPolicy
from proxy.policy.document import DEFAULT_PORTS, Document, PolicyError, resolve
from proxy.policy.load import load

log = structlog.get_logger()


class PolicyUnusable(OperatorError):
    """One line a problem, `file:line: message`."""


class ActivePolicy:
    """`problem` is empty, or says why what is on disk is not what is in force; `loaded` is whether any ever was."""

    def __init__(self, directory: Path, mask_key: bytes, names: Names | None = None) -> None:
        self._directory = directory
        self._mask_key = mask_key
        self._names = names or Names()
        self._document = _nothing()
        self.resolved = resolve(self._document, self._names.addresses)
        self.compiled = CompiledPolicy(self.resolved, mask_key)
        self.problem = "no policy was loaded: everything is denied"
        self.loaded = False

    @property
    def targets(self) -> dict[str, Target]:
        """The targets by name."""
        return {target.name: target for target in self.resolved.targets}

    def reload(self) -> None:
        """Takes what is on disk. Raises `PolicyUnusable`, and keeps what was in force."""
        try:
            document = load(self._directory)
            resolved = resolve(document, self._names.addresses, self._names.former)
            compiled = CompiledPolicy(resolved, self._mask_key)
        except PolicyError as error:
            self.problem = f"{len(error.problems)} problems, the first: {error.problems[0]}"
            self._names.keep_only(self._document.names)
            log.error("policy not loaded", kept=self.compiled.version, problems=error.problems)
            raise PolicyUnusable(str(error)) from error
        self._document, self.resolved, self.compiled, self.problem = document, resolved, compiled, ""
        self.loaded = True
        self._names.keep_only(document.names)
        log.info("policy loaded", version=compiled.version, targets=sorted(self.targets))

    def readdress(self, name: str, outcome: Answer | OSError, in_use: frozenset[str]) -> bool:
        """Takes what a name resolves to now; true when that changes where the targets are. An answer that gives one
        target another's address is not taken."""
        before = self._names.state(name)
        if name not in self._document.names:
            return False
        if not self._names.learn(name, outcome, in_use):
            return False
        try:
            resolved = resolve(self._document, self._names.current, self._names.former)
        except PolicyError as error:
            self._names.restore(name, before)
            self._names.alert(
                f"new addresses of host name `{name}` are not taken: {error}", done="the old ones are kept"
            )
            return False
        if resolved == self.resolved:
            return False
        self.resolved, self.compiled = resolved, CompiledPolicy(resolved, self._mask_key)
        log.info("a name has other addresses", name=name, addresses=self._names.current(name))
        return True


def _nothing() -> Document:
    """No agent, no target, no rule; the well-known ports are protected all the same."""
    ports = {port: protocol for protocol, port in DEFAULT_PORTS.items()}
    return Document(agents=(), targets=(), rules=(), protected_ports=ports)
