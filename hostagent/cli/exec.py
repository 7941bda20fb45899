"""`hopgate exec`: run a command as an agent that the policy lets us declare."""

from __future__ import annotations

from typing import Annotated

import typer

from hostagent.cli.options import DEFAULT_CONFIG, Config, settings

NOT_FOUND, NOT_EXECUTABLE = 127, 126


def execute(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND…", help="What to run, and its arguments.")],
    agent: Annotated[str, typer.Option("--agent", help="The agent of the policy that the command is.")],
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Become the agent, then run the command in the same process. Without the host agent's consent nothing is run."""
    import os
    import sys

    from hostagent import declarations

    declarations.ask(settings(config).run_dir / declarations.SOCKET, agent)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"cannot run `{command[0]}`: {(error.strerror or str(error)).lower()}", file=sys.stderr)
        raise typer.Exit(NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE) from error
