"""Whether this server accepts work, and the responses in progress."""

from typing import Protocol

from prefixd.server.errors import Unavailable

RETRY_AFTER_S = 5.0
"""Until then another server, or this one restarted, may be ready."""


class Running(Protocol):
    """A response in progress."""

    def end(self) -> None:
        """End it now, incomplete."""
        ...


class DrainState:
    """Open until it is closed, once. ``running`` is used on the event loop only; ``reason`` says
    why it is closed."""

    def __init__(self) -> None:
        self.closed = False
        self.reason = "the server is shutting down"
        self.running: set[Running] = set()

    def close(self, reason: str | None = None) -> None:
        """Accept no more work. Safe in a signal handler, and in any thread."""
        self.reason = reason or self.reason
        self.closed = True

    def end_running(self) -> None:
        """End every response in progress, incomplete."""
        for response in tuple(self.running):
            response.end()

    def refusal(self, message: str | None = None) -> Unavailable:
        """The error for a request that came too late or was not complete in time."""
        return Unavailable(message or self.reason, code="shutting_down", retry_after=RETRY_AFTER_S)
