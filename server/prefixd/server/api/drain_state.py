"""Whether this server takes requests to generate, and the answers that are being made."""

from typing import Protocol

from prefixd.server.errors import Unavailable

RETRY_AFTER_S = 5.0
"""When another server, or this one again, may have come up."""


class Running(Protocol):
    """An answer that is being made."""

    def end(self) -> None:
        """Let it come to its end now, as if the engine had given it up."""
        ...


class DrainState:
    """Open until it is closed, once and for good. ``running`` is the event loop's alone."""

    def __init__(self) -> None:
        self.closed = False
        self.running: set[Running] = set()

    def close(self) -> None:
        """Take no more. Safe in a signal handler."""
        self.closed = True

    def check(self) -> None:
        """Raise Unavailable when closed."""
        if self.closed:
            raise self.refusal("the server is shutting down")

    def end_running(self) -> None:
        """Have every answer that is being made told that it will not be complete."""
        for one in tuple(self.running):
            one.end()

    def refusal(self, message: str) -> Unavailable:
        """What a caller is told who came too late, or whose answer was not complete in time."""
        return Unavailable(message, code="shutting_down", retry_after=RETRY_AFTER_S)
