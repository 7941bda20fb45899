"""Speaks to systemd: sd_notify(3), without its library. Does nothing when systemd did not start us."""

from __future__ import annotations

import contextlib
import os
import socket


def notify(**fields: str | int) -> None:
    """Sends e.g. `READY=1`, `STATUS=…`, `WATCHDOG=1`, `STOPPING=1`, as sd_notify(3) names them."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    message = "\n".join(f"{name}={value}" for name, value in fields.items())
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock,
        # whoever started us may have stopped listening: no reason to stop serving
        contextlib.suppress(OSError),
    ):
        sock.sendto(message.encode(), address)


def watchdog_interval_s() -> float:
    """Half of the unit's `WatchdogSec`, in seconds; 0 when there is no watchdog."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return 0.0
    return int(os.environ.get("WATCHDOG_USEC", "0")) / 2_000_000
