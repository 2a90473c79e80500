"""What an operator chose about files and batches."""

from dataclasses import dataclass
from datetime import timedelta

ENDPOINTS = ("/v1/completions", "/v1/chat/completions", "/v1/responses")
"""The routes that the lines of a batch may name."""


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """``max_lines`` run at a time on this server, of all batches together; with 0 it runs none.
    Files are kept for ``files_kept`` unless they say otherwise (None: without an end)."""

    max_lines: int = 0
    files_kept: timedelta | None = None
