"""`hopgate cleanup`: take off this host what the host agent put on it."""

from __future__ import annotations

from hostagent.cli.options import DEFAULT_CONFIG, Config, settings


def cleanup(config: Config = DEFAULT_CONFIG) -> None:
    """Take rules, programs and pins off this host: nothing is protected any more. Stop the service first."""
    import os

    given = settings(config)
    from hostagent import kernel
    from hostagent.control import client
    from hostagent.errors import OperatorError

    if os.geteuid() != 0:
        raise OperatorError("cleanup has to be done by root")
    if client.answers(given.control_socket):
        raise OperatorError("hopgate is running and would put everything back: `systemctl stop hopgate` first")
    for removed in kernel.cleanup(given.pin_dir):
        print(f"removed {removed}")
    print("nothing is protected any more")
