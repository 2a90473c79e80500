"""The bound on queued tokens: each tenant's share of it, and the refusal."""

import pytest

from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.fair_queue import FairQueue
from prefixd.server.engine.queue_limiter import QueueLimiter
from prefixd.server.engine.request import AdmittedRequest, QueueFull, SamplingParams, StopParams
from prefixd.server.engine.sequence import Sequence


def request(tenant: str, *, tokens: int = 10, n: int = 1, weight: float = 1.0) -> AdmittedRequest:
    return AdmittedRequest(
        request_id="r",
        tenant=tenant,
        prompt=(1,) * (tokens - 4),
        prefix=None,
        sampling=SamplingParams(),
        stop=StopParams(max_tokens=4),
        n=n,
        weight=weight,
    )


def limiter(bound: int | None) -> QueueLimiter:
    return QueueLimiter(SchedulerConfig(num_blocks=9, max_waiting_tokens=bound))


def waiting(*tenants: str, weight: float = 1.0) -> FairQueue:
    queue = FairQueue()
    for number, tenant in enumerate(tenants):
        new_request = request(tenant, weight=weight)
        queue.push(Sequence(number, new_request, 0, 0, list(new_request.prompt)))
    return queue


def test_unbounded_queue_admits_everything() -> None:
    unbounded = limiter(None)
    for _ in range(100):
        unbounded.enter(request("a", n=50))


def test_requests_not_yet_queued_count_as_waiting() -> None:
    bounded = limiter(30)
    first = request("a")
    bounded.enter(first)
    bounded.enter(request("a"))
    bounded.entered(first)
    bounded.publish(waiting("a"))
    bounded.rate = 5.0
    bounded.enter(request("a"))
    with pytest.raises(QueueFull, match="30 tokens wait, of at most 30") as refused:
        bounded.enter(request("a"))
    assert refused.value.retry_after == 6.0  # 30 tokens at 5 a second


def test_tenant_below_its_share_enters_a_full_queue() -> None:
    bounded = limiter(40)
    bounded.publish(waiting("backlogged", "backlogged", "backlogged", "backlogged"))
    bounded.rate = 1e9
    with pytest.raises(QueueFull) as refused:
        bounded.enter(request("backlogged"))
    assert refused.value.retry_after == 1.0, "at least one second"
    bounded.enter(request("second", n=2))
    with pytest.raises(QueueFull):
        bounded.enter(request("second"))


def test_share_of_the_queue_is_by_weight() -> None:
    bounded = limiter(40)
    bounded.publish(waiting("backlogged", "backlogged", "backlogged", "backlogged"))
    bounded.rate = 1.0
    with pytest.raises(QueueFull):
        bounded.enter(request("light", weight=0.25))
    bounded.enter(request("heavy", n=3, weight=3.0))


def test_empty_queue_admits_a_request_larger_than_its_bound() -> None:
    limiter(5).enter(request("a"))


def test_closed_queue_gives_its_reason() -> None:
    closed = limiter(None)
    closed.closed = "the server is shutting down"
    with pytest.raises(QueueFull, match="shutting down"):
        closed.enter(request("a"))


def test_check_refuses_without_taking_room() -> None:
    bounded = limiter(40)
    bounded.publish(waiting("backlogged", "backlogged", "backlogged", "backlogged"))
    bounded.rate = 1.0
    with pytest.raises(QueueFull, match="40 tokens wait, of at most 40"):
        bounded.check("backlogged", weight=1.0)
    for _ in range(5):
        bounded.check("second", weight=1.0)  # a check takes no room
    bounded.enter(request("second", n=2))
