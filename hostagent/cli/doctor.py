"""`hopgate doctor`: examine this host."""

from __future__ import annotations

import typer

from hostagent.cli.options import DEFAULT_CONFIG, Config, Json, settings


def doctor(config: Config = DEFAULT_CONFIG, as_json: Json = False) -> None:
    """Examine this host: what is missing, wrong or weak, each with its fix; exit 1 when something is wrong."""
    import msgspec

    from hostagent.cli import terminal
    from hostagent.doctor import State, examine

    findings = examine(settings(config))
    wrong = sum(finding.state is State.WRONG for finding in findings)
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(findings)).decode())
    else:
        terminal.table(
            ("", "CHECK", "FINDING", "FIX"),
            [(finding.state, finding.check, finding.what, finding.fix) for finding in findings],
        )
        weak = sum(finding.state is State.WEAK for finding in findings)
        print(f"{wrong} wrong, {weak} weak")
    if wrong:
        raise typer.Exit(1)
