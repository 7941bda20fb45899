"""`hopgate replay`: what happened in one session."""

from __future__ import annotations

from typing import Annotated

import typer

from hostagent.cli.options import DEFAULT_CONFIG, Config, Json, settings

_STYLES = {"allow": "green", "hold": "yellow", "deny": "red", "denied": "red", "approved": "green"}


def replay(
    session: Annotated[str, typer.Argument(metavar="SESSION", help="Id, as `hopgate sessions` shows it.")],
    config: Config = DEFAULT_CONFIG,
    as_json: Json = False,
    operation: Annotated[
        int | None, typer.Option(metavar="N", help="Only what belongs to operation `#N` of the session.")
    ] = None,
    asciicast: Annotated[
        bool, typer.Option("--asciicast", help="The terminal of that operation as asciicast v2, for `asciinema play`.")
    ] = False,
) -> None:
    """Tell what one session did, from its verified recording; exit 1 when the recording is not whole."""
    import msgspec
    from rich.text import Text

    from hostagent.cli import terminal
    from hostagent.control.sessions import recording_path
    from hostagent.errors import OperatorError
    from proxy.recording import BrokenRecording, read
    from proxy.recording.asciicast import NothingRecorded, cast
    from proxy.recording.records import Alert, Decided, Login, Ruled
    from proxy.recording.replay import tell

    path = recording_path(settings(config).recordings_dir, session)
    if path is None:
        raise OperatorError(f"`{session}` is no session id: `hopgate sessions` lists them")
    if asciicast and operation is None:
        raise OperatorError("`--asciicast` needs `--operation N`: `hopgate replay` without it tells their numbers")
    console = terminal.console()
    try:
        if asciicast and operation is not None:
            for line in cast(read(path, session), operation):
                print(line)
            return
        for record, text in tell(read(path, session)):
            if operation is not None and getattr(record, "op", None) != operation:
                continue
            if as_json:
                print(msgspec.json.encode(record).decode())
                continue
            style = "red" if isinstance(record, Alert) else ""
            if isinstance(record, Ruled | Login):
                style = _STYLES.get(record.decision, "")
            elif isinstance(record, Decided):
                style = _STYLES.get(record.outcome, "")
            console.print(Text(text, style=style), soft_wrap=True)
    except NothingRecorded as error:
        raise OperatorError(str(error)) from error
    except BrokenRecording as error:
        raise OperatorError(f"recording `{path}` {'was torn' if error.torn else 'is broken'}: {error}") from error
    except FileNotFoundError as error:
        raise OperatorError(f"no recording of session `{session}`: `{path}` is not there") from error
    except OSError as error:
        raise OperatorError(f"recording `{path}` cannot be read: {error.strerror}") from error
