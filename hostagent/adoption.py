"""What becomes of connections to protected destinations that are older than the redirect.

    leave   they go on, unseen, until they end; `hopgate status` lists them
    reset   they are reset once, when the redirect is there, so that their clients come back through the proxy

That is decided (`adopt` in the settings) when the daemon starts and whenever more becomes protected.

Blind spot: what `hostagent/kernel/sockets.py` does not see.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog

from hostagent.kernel import KernelError, Scope, Sockets

log = structlog.get_logger()

LISTED_MAX = 50


class Adoption:
    """`sockets` are those of the listener's network namespace; `alert` tells the operators what could not be done."""

    def __init__(self, sockets: Sockets, *, reset: bool, alert: Callable[..., None]) -> None:
        self._sockets = sockets
        self._reset = reset
        self._alert = alert

    def close(self) -> None:
        self._sockets.close()

    def adopt(self, scope: Scope) -> None:
        """To be called when the redirect of the scope is in."""
        try:
            found = self._sockets.past(scope)
        except OSError as error:
            self._alert(f"connections that go past the proxy cannot be looked for: {error.strerror or error}")
            return
        for bypass in found:
            if not self._reset:
                log.warning("connection is older than the redirect and goes past the proxy", connection=str(bypass))
                continue
            try:
                ended = self._sockets.reset(bypass)
            except KernelError as error:
                self._alert(str(error))
                return
            log.warning("connection older than the redirect", connection=str(bypass), reset=ended)

    def report(self, scope: Scope) -> dict[str, object]:
        """For `hopgate status`: those that are there now."""
        try:
            found = [str(bypass) for bypass in self._sockets.past(scope)]
        except OSError as error:
            return {"past_the_proxy": f"not known: {error.strerror or error}"}
        more = len(found) - LISTED_MAX
        return {"past_the_proxy": found[:LISTED_MAX] + ([f"and {more} more"] if more > 0 else [])}
