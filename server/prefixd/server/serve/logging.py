"""Log lines: structlog, with the standard library's loggers in the same format."""

import logging
import sys
import time
from typing import Any

import structlog

from prefixd.server.serve.settings import LogFormat, LogLevel

_QUIET = (
    "uvicorn.access",
    "uvicorn.error",
    "httpx",
    "httpx2",
    "filelock",
    "urllib3",
    "alembic.runtime.plugins",
)

_WARNING_INTERVAL_S = 1.0


def configure(level: LogLevel, log_format: LogFormat) -> None:
    """Send all log lines to standard error, once per process."""
    shared: list[structlog.types.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    # Tracebacks without local variables: those may hold prompts and keys.
    renderers: list[structlog.types.Processor]
    if log_format == "json":
        renderers = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        renderers = [
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
            )
        ]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *renderers],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    for name in _QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)


class LimitedWarning:
    """A warning that is logged at most once a second, however often its cause occurs."""

    def __init__(self, event: str) -> None:
        self._event = event
        self._next = 0.0
        self._count = 0

    def log(self, **fields: Any) -> None:
        """Log ``fields`` and how often this was called since the last line, or only count."""
        self._count += 1
        now = time.monotonic()
        if now < self._next:
            return
        structlog.get_logger("prefixd").warning(self._event, **fields, count=self._count)
        self._next, self._count = now + _WARNING_INTERVAL_S, 0
