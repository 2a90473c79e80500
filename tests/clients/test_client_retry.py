"""Only what the server has not begun is sent again, a bounded number of times."""

import pytest

from prefixd.client.errors import (
    ApiError,
    ClientError,
    ConnectError,
    RateLimitError,
    ServerError,
    StreamInterruptedError,
    TimedOutError,
    UnavailableError,
)
from prefixd.client.transport import RetryPolicy

POLICY = RetryPolicy(attempts=3, first_wait=1.0, max_wait=5.0)


def _busy(retry_after: float | None) -> ApiError:
    return UnavailableError("full", status=503, retry_after=retry_after)


@pytest.mark.parametrize(
    "error", [ConnectError("x"), _busy(None), RateLimitError("slow down", status=429)]
)
def test_what_never_began_is_tried_again(error: ClientError):
    waits = [POLICY.wait(error, attempt=n, jitter=0.0) for n in (1, 2, 3)]
    assert waits == [0.5, 1.0, None]


@pytest.mark.parametrize(
    "error",
    [TimedOutError("x"), StreamInterruptedError("x"), ServerError("x", status=500)],
)
def test_what_may_have_begun_is_not(error: ClientError):
    assert POLICY.wait(error, attempt=1, jitter=0.0) is None


def test_the_server_says_how_long():
    assert POLICY.wait(_busy(3.0), attempt=1, jitter=0.9) == 3.0


def test_a_long_wait_is_the_callers_business():
    assert POLICY.wait(_busy(60.0), attempt=1, jitter=0.0) is None


def test_jitter_spreads_over_the_upper_half():
    assert POLICY.wait(ConnectError("x"), attempt=2, jitter=0.5) == 1.5
