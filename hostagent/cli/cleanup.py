"""`hopgate cleanup`: take off this host what the host agent put on it."""

from __future__ import annotations

from hostagent.cli.options import DEFAULT_CONFIG, Config, settings


def cleanup(config: Config = DEFAULT_CONFIG) -> None:
    """Take the rules, programs and maps off this host: from then on nothing is protected. Stop the service first."""
    given = settings(config)
    from hostagent import kernel

    for line in kernel.cleanup(given.pin_dir):
        print(line)
