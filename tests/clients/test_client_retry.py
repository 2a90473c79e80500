"""Only requests that the server has not begun are retried, a bounded number of times."""

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


def _unavailable(retry_after: float | None) -> ApiError:
    return UnavailableError("full", status=503, retry_after=retry_after)


@pytest.mark.parametrize(
    "error", [ConnectError("x"), _unavailable(None), RateLimitError("slow down", status=429)]
)
def test_requests_that_the_server_did_not_begin_are_retried(error: ClientError):
    waits = [POLICY.wait(error, attempt=n, jitter=0.0) for n in (1, 2, 3)]
    assert waits == [0.5, 1.0, None]


@pytest.mark.parametrize(
    "error",
    [TimedOutError("x"), StreamInterruptedError("x"), ServerError("x", status=500)],
)
def test_requests_that_may_have_begun_are_not_retried(error: ClientError):
    assert POLICY.wait(error, attempt=1, jitter=0.0) is None


def test_retry_after_replaces_the_wait():
    assert POLICY.wait(_unavailable(3.0), attempt=1, jitter=0.9) == 3.0


def test_no_retry_when_retry_after_exceeds_max_wait():
    assert POLICY.wait(_unavailable(60.0), attempt=1, jitter=0.0) is None


def test_jitter_spreads_the_wait_over_its_upper_half():
    assert POLICY.wait(ConnectError("x"), attempt=2, jitter=0.5) == 1.5
