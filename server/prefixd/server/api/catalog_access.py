"""All ways in which requests reach the catalog and the blobs, for one application."""

import time
from dataclasses import dataclass, field
from typing import Self

from prefixd.server.api.catalog_calls import WAIT_S, CatalogCalls
from prefixd.server.api.catalog_health import CatalogHealth
from prefixd.server.api.settlements import Settlements

LONG_THREADS = 8
MAX_LONG_WAITING = 100


@dataclass(frozen=True, slots=True)
class CatalogAccess:
    """``calls`` are short; ``long_calls`` also transfer artifacts, or write many rows."""

    health: CatalogHealth
    calls: CatalogCalls
    long_calls: CatalogCalls
    settlements: Settlements = field(repr=False)

    @classmethod
    def make(cls, *, wait_s: float = WAIT_S) -> Self:
        """Access whose callers wait up to ``wait_s`` seconds for the catalog."""
        health = CatalogHealth()
        return cls(
            health=health,
            calls=CatalogCalls(health, wait_s=wait_s),
            long_calls=CatalogCalls(
                health,
                wait_s=None,
                threads=LONG_THREADS,
                max_waiting=MAX_LONG_WAITING,
                name="prefixd-long",
            ),
            settlements=Settlements(health),
        )

    def close(self, *, timeout_s: float) -> None:
        """Wait up to ``timeout_s`` seconds for calls in progress, and accept no more. Blocking."""
        deadline = time.monotonic() + timeout_s
        for part in (self.settlements, self.calls, self.long_calls):
            part.close(timeout_s=max(0.0, deadline - time.monotonic()))
