"""`hopgate metrics`: the status as numbers, in the text format of Prometheus, for a collector that reads files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from hostagent.cli.options import DEFAULT_CONFIG, Config, settings


def metrics(config: Config = DEFAULT_CONFIG) -> None:
    """Print counts and the use of the kernel's maps, for node_exporter's textfile collector and its like."""
    from hostagent.control import client, messages

    report = client.ask(settings(config).control_socket, messages.AskStatus(), messages.Status).report
    print("\n".join(exposed(report)))


def exposed(report: Mapping[str, object]) -> Iterator[str]:
    """The lines for a report of the host agent. Names of maps and events are ours, and need no quoting."""
    for name, kind, of in _PLAIN:
        if isinstance(value := report.get(of), int):
            yield f"# TYPE hopgate_{name} {kind}"
            yield f"hopgate_{name} {int(value)}"
    maps, events = report.get("maps"), report.get("kernel")
    if isinstance(maps, Mapping):
        parts = {name: str(value).split("/") for name, value in maps.items()}
        for place, what in enumerate(("entries", "entries_max")):
            yield f"# TYPE hopgate_map_{what} gauge"
            yield from (f'hopgate_map_{what}{{map="{name}"}} {part[place]}' for name, part in parts.items())
    if isinstance(events, Mapping):
        yield "# TYPE hopgate_kernel_events_total counter"
        yield from (f'hopgate_kernel_events_total{{event="{name}"}} {value}' for name, value in events.items())


_PLAIN = (
    ("open_sessions", "gauge", "open_sessions"),
    ("workers", "gauge", "workers"),
    ("worker_deaths_total", "counter", "worker_deaths"),
    ("alerts_total", "counter", "alerts"),
    ("labels_lost", "gauge", "overflowed"),
    ("up_seconds", "gauge", "up_s"),
)
