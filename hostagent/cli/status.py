"""`hopgate status`: what the host agent says of itself."""

from __future__ import annotations

from hostagent.cli.options import DEFAULT_CONFIG, Config, Json, settings


def status(config: Config = DEFAULT_CONFIG, as_json: Json = False) -> None:
    """Show whether the host agent runs, with which policy, and what is wrong."""
    import msgspec

    from hostagent.control import client, messages
    from proxy.recording.replay import visible

    report = client.ask(settings(config).control_socket, messages.AskStatus(), messages.Status).report
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(report)).decode())
        return
    width = max(map(len, report), default=0)
    for name, value in report.items():
        print(f"{visible(name.replace('_', ' ')):<{width}}  {visible(_told(value))}")


def _told(value: object) -> str:
    match value:
        case None | "" | [] | {}:
            return "-"
        case bool():
            return "yes" if value else "no"
        case dict():
            return ", ".join(f"{name} {_told(inner)}" for name, inner in value.items())
        case list():
            return ", ".join(map(_told, value))
        case _:
            return str(value)
