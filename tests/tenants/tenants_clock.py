"""A clock for tests of the tenants room."""

from datetime import UTC, datetime


class Clock:
    """A clock that a test moves: a datetime when called, seconds as ``time()``."""

    def __init__(self) -> None:
        self.now = datetime(2026, 11, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now

    def time(self) -> float:
        return self.now.timestamp()
