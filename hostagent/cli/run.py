"""`hopgate run`: the host agent, in the foreground."""

from __future__ import annotations

from hostagent.cli.options import DEFAULT_CONFIG, Config, settings


def run(config: Config = DEFAULT_CONFIG) -> None:
    """Run the host agent in the foreground (as the systemd unit does)."""
    given = settings(config)
    from hostagent import daemon

    daemon.run(given, config)
