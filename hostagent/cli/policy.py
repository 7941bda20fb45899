"""`hopgate policy`: work on policies before they are in force."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from hostagent.cli.options import DEFAULT_CONFIG, Config, settings

app = typer.Typer(help="Work on policies.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _policy() -> None:
    """Work on policies."""


@app.command("check")
def check(
    directory: Annotated[
        Path | None, typer.Argument(metavar="DIRECTORY", help="Directory of policy files; default: the settings' own.")
    ] = None,
    config: Config = DEFAULT_CONFIG,
) -> None:
    """Check policy files without a running host agent; exit 1 and one line a problem when they cannot be used."""
    from proxy.policy.document import PolicyError
    from proxy.policy.load import load

    checked = directory or settings(config).policy_dir
    try:
        document = load(checked)
    except PolicyError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from error
    counts = f"{len(document.agents)} agents, {len(document.targets)} targets, {len(document.rules)} rules"
    print(f"{checked}: {counts}: no problem found")


@app.command("test")
def test(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Files of policy tests.", exists=True)],
    _config: Config = DEFAULT_CONFIG,  # every verb takes it; here the tests name their policy
) -> None:
    """Run the tests of a policy, in the policy's own CI; exit 1 and one line a difference when one fails."""
    from proxy.model import Operation, OperationKind
    from proxy.policy.document import PolicyError
    from proxy.policy.testing import run
    from proxy.protocols.postgres.operations import describe

    def operation(sql: str) -> Operation:
        return describe(OperationKind.QUERY, sql.encode(), "utf-8").operation

    try:
        outcomes = [outcome for file in files for outcome in run(file, operation)]
    except PolicyError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from error
    failed = [outcome for outcome in outcomes if not outcome.passed]
    for outcome in failed:
        name = f" ({outcome.name})" if outcome.name else ""
        print(
            f"{outcome.place}: `{outcome.sql}`{name}: expected {outcome.expected}, seen {outcome.seen}: {outcome.why}",
            file=sys.stderr,
        )
    print(f"{len(outcomes)} statements, {len(failed)} ruled otherwise than expected")
    if failed:
        raise typer.Exit(1)
