"""The one place that configures logging: structured lines on standard error, for operators, never evidence.

Nothing that a client or server sent is logged above DEBUG, and secrets have a redacted `repr`.
"""

from __future__ import annotations

import logging
import sys

import structlog


def configure(level: str, **context: object) -> None:
    """Sets up structlog for this process: JSON lines, or coloured text on a terminal. `context` is bound to every
    line."""
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.bind_contextvars(**context)
