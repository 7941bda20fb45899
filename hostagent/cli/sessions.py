"""`hopgate sessions`: the index of sessions, newest first."""

from __future__ import annotations

from typing import Annotated

import typer

from hostagent.cli.options import DEFAULT_CONFIG, Config, Json, settings


def sessions(
    config: Config = DEFAULT_CONFIG,
    limit: Annotated[int, typer.Option("--limit", min=0, help="Sessions to show; 0 for all.")] = 50,
    live: Annotated[bool, typer.Option("--open", help="Only sessions that are open.")] = False,
    as_json: Json = False,
) -> None:
    """List sessions, newest first: who, where to, and how it went."""
    import msgspec

    from hostagent.cli import terminal
    from hostagent.control.rows import SessionState
    from hostagent.control.store import opened

    with opened(settings(config).store_path) as store:
        rows = store.sessions(state=SessionState.OPEN if live else None, limit=limit or None)
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(rows)).decode())
        return
    terminal.table(
        ("SESSION", "OPENED (UTC)", "STATE", "CHAIN", "TARGET", "DATABASE", "OPERATIONS", "DENIED", "REFUSAL"),
        [
            (
                row.id,
                terminal.moment(row.opened_us),
                row.state,
                row.chain or "-",
                row.target or row.dialled,
                row.database or "-",
                row.operations,
                row.denied,
                row.refusal or "-",
            )
            for row in rows
        ],
    )
