"""The virtual token counter: shares, return from idleness, and order within a tenant."""

import itertools
from collections import Counter

import pytest

from prefixd.server.engine.fair_queue import FairQueue
from prefixd.server.engine.request import (
    AdmittedRequest,
    PrefixHandle,
    PrefixKey,
    SamplingParams,
    StopParams,
)
from prefixd.server.engine.sequence import Sequence

_ids = itertools.count()


def sequence(
    tenant: str,
    *,
    weight: float = 1.0,
    priority: int = 0,
    prefix: PrefixHandle | None = None,
) -> Sequence:
    number = next(_ids)
    request = AdmittedRequest(
        request_id=str(number),
        tenant=tenant,
        prompt=(1, 2),
        prefix=prefix,
        sampling=SamplingParams(),
        stop=StopParams(max_tokens=8),
        weight=weight,
        priority=priority,
    )
    return Sequence(number, request, 0, 0, [1, 2])


def serve(queue: FairQueue, count: int, *, tokens: int = 10) -> list[str]:
    """Serve the next ``count`` sequences and charge each the same."""
    served = []
    for sequence in queue.in_order(ready=(), depth=1000):
        queue.remove(sequence)
        queue.charge(sequence.tenant, tokens)
        served.append(sequence.tenant)
        if len(served) == count:
            break
    return served


def test_backlogged_tenants_are_served_by_weight() -> None:
    queue = FairQueue()
    for _ in range(300):
        queue.push(sequence("a"))
        queue.push(sequence("b", weight=2.0))
        queue.push(sequence("c", weight=0.5))
    assert Counter(serve(queue, 210)) == {"a": 60, "b": 120, "c": 30}


def test_new_tenant_is_served_before_a_backlogged_one() -> None:
    queue = FairQueue()
    for _ in range(50):
        queue.push(sequence("backlogged"))
    serve(queue, 20)
    queue.push(sequence("new"))
    assert "new" in serve(queue, 2)


def test_idle_tenant_earns_no_credit() -> None:
    queue = FairQueue()
    queue.push(sequence("a"))
    queue.push(sequence("b"))
    serve(queue, 2)
    for _ in range(100):
        queue.push(sequence("b"))
    serve(queue, 90)
    for _ in range(100):
        queue.push(sequence("a"))
    assert Counter(serve(queue, 10)) == {"a": 5, "b": 5}


def test_idle_tenant_earns_no_credit_while_the_queue_is_empty() -> None:
    """All requests of b run and none waits: a is lifted to the counter of b, the last to empty."""
    queue = FairQueue()
    for _ in range(100):
        queue.push(sequence("b"))
    serve(queue, 100)
    for _ in range(10):
        queue.push(sequence("a"))
        queue.push(sequence("b"))
    assert Counter(serve(queue, 10)) == {"a": 5, "b": 5}


def test_order_within_a_tenant_is_priority_then_arrival() -> None:
    queue = FairQueue()
    late, first, second, urgent = (sequence("t", priority=p) for p in (1, 0, 0, -1))
    for pushed in (late, second, first, urgent):
        queue.push(pushed)
    assert list(queue.in_order(ready=(), depth=10)) == [urgent, first, second, late]
    queue.remove(second)
    assert list(queue.in_order(ready=(), depth=10)) == [urgent, first, late]
    assert list(queue.in_order(ready=(), depth=1)) == [urgent]


def test_waiting_tokens_are_counted() -> None:
    queue = FairQueue()
    first, second = sequence("a"), sequence("a")
    queue.push(first)
    queue.push(second)
    assert (queue.num_tokens, queue.tokens_of("a"), queue.tokens_of("b")) == (20, 20, 0)
    queue.remove(first)
    assert (queue.num_tokens, queue.tokens_of("a")) == (10, 10)


def test_counters_of_idle_tenants_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefixd.server.engine.fair_queue._REMEMBERED_TENANTS", 10)
    queue = FairQueue()
    for number in range(500):
        queue.push(sequence(f"t{number}"))
        serve(queue, 1)
    assert len(queue._counters) < 50
    queue.push(sequence("t3"))
    queue.push(sequence("new"))
    assert queue.counter("t3") == queue.counter("new")


def test_walk_opens_only_tenant_queues_it_can_use(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    queue = FairQueue()
    for number in range(100):
        queue.push(sequence(f"bare {number}"))
        tenant = f"under a prefix {number}"
        queue.push(sequence(tenant, prefix=PrefixHandle(PrefixKey(tenant, "x"), 4)))
    opened = 0
    choose = FairQueue._choose

    def count(*args: object) -> object:
        nonlocal opened
        opened += 1
        return choose(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(FairQueue, "_choose", staticmethod(count))
    assert len(list(queue.in_order(ready=(), depth=0, lookahead=10))) == 10
    assert opened == 10
    assert len(list(queue.in_order(ready=(), depth=1, lookahead=10))) == 110
    assert opened == 10 + 110
