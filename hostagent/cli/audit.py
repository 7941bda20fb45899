"""`hopgate audit verify`: do all recordings hold against the index?"""

from __future__ import annotations

import typer

from hostagent.cli.options import DEFAULT_CONFIG, Config, settings

app = typer.Typer(help="Check the recordings.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _audit() -> None:
    """Check the recordings."""


@app.command("verify")
def verify(config: Config = DEFAULT_CONFIG) -> None:
    """Verify every recording against its hash chain and the index; exit 1 when one does not hold."""
    from hostagent.cli import terminal
    from hostagent.control.audit import verify_all
    from hostagent.control.store import opened

    given = settings(config)
    with opened(given.store_path) as store:
        report = verify_all(store, given.recordings_dir)
    if report.findings:
        terminal.table(
            ("VERDICT", "RECORDING", "LINE", "WHAT"),
            [
                ("broken" if each.fault else "note", given.recordings_dir / each.path, each.line or "-", each.reason)
                for each in report.findings
            ],
        )
    faults = sum(each.fault for each in report.findings)
    print(f"{report.sessions} sessions, {report.records} records: {f'{faults} broken' if faults else 'all hold'}")
    if not report.holds:
        raise typer.Exit(1)
