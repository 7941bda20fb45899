"""`hopgate reload`: take the policies that are on disk."""

from __future__ import annotations

from hostagent.cli.options import DEFAULT_CONFIG, Config, settings


def reload(config: Config = DEFAULT_CONFIG) -> None:
    """Load the policies again; when they are bad, the old ones stay."""
    from hostagent.control import client, messages

    answer = client.ask(settings(config).control_socket, messages.Reload(), messages.Reloaded)
    print(f"policy {answer.policy} is in force")
