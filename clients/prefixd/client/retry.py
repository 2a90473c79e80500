"""When a request may be sent again, and after how long. Pure: the shells sleep."""

from dataclasses import dataclass

from prefixd.client.errors import (
    ApiError,
    ClientError,
    ConnectError,
    RateLimitError,
    UnavailableError,
)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Retries only what the server has not begun: no connection, 429 and 503.

    ``attempts`` counts the first try. Waits double from ``first_wait`` seconds; the server's
    ``Retry-After`` replaces them. A wait longer than ``max_wait`` is not waited: the error is
    raised, and the caller decides.
    """

    attempts: int = 4
    first_wait: float = 0.25
    max_wait: float = 10.0

    def wait(self, error: ClientError, *, attempt: int, jitter: float) -> float | None:
        """Seconds to wait after try number ``attempt`` (from 1) failed; None to give up.

        ``jitter`` in [0, 1) spreads clients that failed together over the upper half of the wait.
        """
        if attempt >= self.attempts:
            return None
        if not isinstance(error, ConnectError | RateLimitError | UnavailableError):
            return None
        wait = self.first_wait * 2 ** (attempt - 1) * (0.5 + jitter / 2)
        if isinstance(error, ApiError) and error.retry_after is not None:
            wait = error.retry_after
        return wait if wait <= self.max_wait else None
