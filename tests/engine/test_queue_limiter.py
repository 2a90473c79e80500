"""What may wait: the bound, each tenant's share of it, and an honest answer for the others."""

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


def gate(bound: int | None) -> QueueLimiter:
    return QueueLimiter(SchedulerConfig(num_blocks=9, max_waiting_tokens=bound))


def waiting(*tenants: str, weight: float = 1.0) -> FairQueue:
    queue = FairQueue()
    for number, tenant in enumerate(tenants):
        asked = request(tenant, weight=weight)
        queue.push(Sequence(number, asked, 0, 0, list(asked.prompt)))
    return queue


def test_without_a_bound_all_enter() -> None:
    unbounded = gate(None)
    for _ in range(100):
        unbounded.enter(request("a", n=50))


def test_what_is_on_its_way_counts_as_what_waits_does() -> None:
    bounded = gate(30)
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


def test_a_tenant_below_its_share_enters_a_full_queue() -> None:
    bounded = gate(40)
    bounded.publish(waiting("crowd", "crowd", "crowd", "crowd"))
    bounded.rate = 1e9
    with pytest.raises(QueueFull) as refused:
        bounded.enter(request("crowd"))
    assert refused.value.retry_after == 1.0, "never less than a second"
    bounded.enter(request("lone", n=2))
    with pytest.raises(QueueFull):
        bounded.enter(request("lone"))


def test_the_share_is_by_weight() -> None:
    bounded = gate(40)
    bounded.publish(waiting("crowd", "crowd", "crowd", "crowd"))
    bounded.rate = 1.0
    with pytest.raises(QueueFull):
        bounded.enter(request("light", weight=0.25))
    bounded.enter(request("heavy", n=3, weight=3.0))


def test_an_empty_queue_takes_even_one_that_is_larger_than_it() -> None:
    gate(5).enter(request("a"))


def test_a_closed_gate_says_why() -> None:
    closed = gate(None)
    closed.closed = "the server is shutting down"
    with pytest.raises(QueueFull, match="shutting down"):
        closed.enter(request("a"))


def test_who_would_be_refused_anyhow_is_told_without_a_request() -> None:
    bounded = gate(40)
    bounded.publish(waiting("crowd", "crowd", "crowd", "crowd"))
    bounded.rate = 1.0
    with pytest.raises(QueueFull, match="40 tokens wait, of at most 40"):
        bounded.check("crowd", weight=1.0)
    for _ in range(5):
        bounded.check("lone", weight=1.0)  # asking takes no room
    bounded.enter(request("lone", n=2))
