"""The option that every verb has."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from hostagent.settings import Settings

Config = Annotated[Path, typer.Option("--config", help="Settings of the host agent.", show_default=True)]
DEFAULT_CONFIG = Path("/etc/hopgate/hopgate.yaml")
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def settings(config: Path) -> Settings:
    """Raises `SettingsError`."""
    from hostagent.settings import load

    return load(config)
