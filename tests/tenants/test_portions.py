"""Portions of large limits: most requests need no transaction, and the limits hold all the same."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from functools import partial
from threading import Barrier

import pytest
from sqlalchemy import Engine, event, select
from sqlalchemy.exc import OperationalError

from prefixd.server.errors import RateLimited
from prefixd.server.tenants.limiter import Limiter
from prefixd.server.tenants.portions import PORTION_S
from prefixd.server.tenants.quotas import DEFAULT_QUOTA, Quota
from prefixd.server.tenants.registry import Tenants
from prefixd.server.tenants.tables import rate_limits, request_leases
from prefixd.store.db.database import reading
from tests.tenants.tenants_clock import Clock

LIMIT = 25_600
LARGE = Quota(requests_per_minute=LIMIT, tokens_per_minute=100 * LIMIT, max_concurrent_requests=512)


@pytest.fixture
def limiter(engine: Engine, clock: Clock, tenants: Tenants) -> Limiter:
    tenants.create_tenant("acme")
    limiter = Limiter(engine, now=clock.time)
    limiter._portions._now = clock.time  # none is refilled or grows old while this machine pauses
    return limiter


@pytest.fixture
def commits(engine: Engine) -> list[str]:
    """Grows with each transaction that is committed."""
    seen: list[str] = []
    event.listen(engine, "commit", lambda _connection: seen.append("commit"))
    return seen


def levels(engine: Engine) -> tuple[float, float]:
    with reading(engine) as connection:
        row = connection.execute(select(rate_limits)).one()
    return row.requests, row.tokens


def num_leases(engine: Engine) -> int:
    with reading(engine) as connection:
        return len(connection.execute(select(request_leases)).all())


def run_one(limiter: Limiter, *, quota: Quota = LARGE, tokens: int = 10, output: int = 5) -> None:
    grant = limiter.admit("acme", quota, tokens=tokens)
    if not limiter.settle_later(grant, output_tokens=output):
        limiter.settle(grant, output_tokens=output)


def admitted(limiter: Limiter, quota: Quota) -> int:
    """How many requests are admitted before one is refused; none of them ends."""
    count = 0
    with suppress(RateLimited):
        while limiter.admit("acme", quota, tokens=1):
            count += 1
    return count


@pytest.mark.parametrize("quota", [LARGE, DEFAULT_QUOTA], ids=["large", "default"])
def test_a_hundred_requests_need_few_transactions(
    limiter: Limiter, commits: list[str], engine: Engine, quota: Quota
) -> None:
    for _ in range(100):
        run_one(limiter, quota=quota)
    assert len(commits) <= 4
    limiter.return_portions(all_of_them=True)
    assert quota.requests_per_minute is not None
    assert quota.tokens_per_minute is not None
    assert levels(engine) == (quota.requests_per_minute - 100, quota.tokens_per_minute - 1500)
    assert num_leases(engine) == 0


def test_small_limits_are_counted_in_the_catalog_at_once(limiter: Limiter, engine: Engine) -> None:
    quota = Quota(requests_per_minute=2000, tokens_per_minute=10_000, max_concurrent_requests=100)
    for number in range(1, 4):
        run_one(limiter, quota=quota)
        assert levels(engine) == (2000 - number, 10_000 - 15 * number)
        assert num_leases(engine) == 0
    assert not limiter.has_portions


def test_a_limit_holds_across_processes_with_portions(
    open_engine: Callable[[], Engine], limiter: Limiter, clock: Clock
) -> None:
    """Four replicas together admit the limit exactly, however they share it."""
    quota = Quota(requests_per_minute=2560)
    replicas = [limiter, *(Limiter(open_engine(), now=clock.time) for _ in range(3))]

    with ThreadPoolExecutor(4) as pool:
        first = sum(pool.map(partial(admitted, quota=quota), replicas))
    for replica in replicas:
        replica.return_portions(all_of_them=True)
    assert first + sum(admitted(replica, quota) for replica in replicas) == 2560


def test_a_concurrency_limit_holds_with_spare_leases(
    open_engine: Callable[[], Engine], limiter: Limiter, clock: Clock
) -> None:
    quota = Quota(max_concurrent_requests=256)
    other = Limiter(open_engine(), now=clock.time)
    for _ in range(40):
        run_one(other, quota=quota)
    first = admitted(limiter, quota)
    assert first < 256, "spare leases of the other process count"
    other.return_portions(all_of_them=True)
    assert first + admitted(limiter, quota) == 256


def test_a_portion_is_returned_after_a_second(
    limiter: Limiter, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 50.0
    monkeypatch.setattr(limiter._portions, "_now", lambda: now)
    run_one(limiter)
    limiter.return_portions()
    assert levels(engine)[0] < LIMIT - 1, "it is not old enough"
    now += PORTION_S
    limiter.return_portions()
    assert not limiter.has_portions
    assert levels(engine) == (LIMIT - 1, 100 * LIMIT - 15)
    assert num_leases(engine) == 0


def test_requests_that_arrive_together_share_a_portion(
    limiter: Limiter, commits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefixd.server.tenants.portions.TURN_S", 30.0)
    gate = Barrier(12)

    def admit(_: int) -> None:
        gate.wait(30)
        limiter.admit("acme", LARGE, tokens=10)

    with ThreadPoolExecutor(12) as pool:
        list(pool.map(admit, range(12)))
    assert len(commits) == 1


def test_a_request_does_not_wait_for_long_for_the_portion_of_another(
    limiter: Limiter, commits: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefixd.server.tenants.portions.TURN_S", 0.0)
    with limiter._portions.turn("acme", LARGE):
        limiter.admit("acme", LARGE, tokens=10)
    assert len(commits) == 1


def test_requests_that_outlast_their_portion_are_charged_together(
    limiter: Limiter, engine: Engine, commits: list[str]
) -> None:
    grants = [limiter.admit("acme", LARGE, tokens=10) for _ in range(30)]
    limiter.return_portions(all_of_them=True)
    commits.clear()
    assert all(limiter.settle_later(grant, output_tokens=5) for grant in grants)
    assert commits == []
    limiter.return_portions(all_of_them=True)
    assert len(commits) == 1
    assert levels(engine) == (LIMIT - 30, 100 * LIMIT - 450)
    assert num_leases(engine) == 0


def test_what_is_owed_is_not_held_back_when_the_buckets_are_not_half_full(
    limiter: Limiter, engine: Engine
) -> None:
    limiter.admit("acme", LARGE, tokens=60 * LIMIT)
    grant = limiter.admit("acme", LARGE, tokens=10)
    assert not limiter.settle_later(grant, output_tokens=5)
    assert not limiter.has_portions


def test_a_kept_portion_has_its_headers_together_with_what_is_owed(limiter: Limiter) -> None:
    first = limiter.admit("acme", LARGE, tokens=10)
    portion = limiter._portions.take_old(all_of_them=True)["acme"]
    assert limiter.settle_later(first, output_tokens=5)
    limiter._portions.keep("acme", portion)
    assert limiter.admit("acme", LARGE, tokens=10).headers.keys() == first.headers.keys()


def test_headers_count_every_request_of_a_portion(limiter: Limiter) -> None:
    shown = []
    for _ in range(4):
        grant = limiter.admit("acme", LARGE, tokens=10)
        remaining = [grant.headers[f"x-ratelimit-remaining-{of}"] for of in ("requests", "tokens")]
        shown.append(tuple(map(int, remaining)))
    assert shown == [(LIMIT - number, 100 * LIMIT - 10 * number) for number in range(1, 5)]


def test_what_could_not_be_returned_is_kept_and_charged_later(
    limiter: Limiter, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_one(limiter)

    def fail(*_: object) -> None:
        raise OperationalError("UPDATE", {}, Exception("gone"))

    with monkeypatch.context() as patch:
        patch.setattr("prefixd.server.tenants.limiter.delete_leases", fail)
        with pytest.raises(OperationalError):
            limiter.return_portions(all_of_them=True)
    run_one(limiter)
    limiter.return_portions(all_of_them=True)
    assert levels(engine) == (LIMIT - 2, 100 * LIMIT - 30)
    assert num_leases(engine) == 0


def test_a_failed_admission_keeps_what_the_process_held(
    limiter: Limiter, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_one(limiter, output=7)
    with monkeypatch.context() as patch:
        patch.setattr("prefixd.server.tenants.limiter.take", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            limiter.admit("acme", LARGE, tokens=50 * LIMIT)  # more than the portion has
    limiter.return_portions(all_of_them=True)
    assert levels(engine) == (LIMIT - 1, 100 * LIMIT - 17)


def test_a_changed_limit_applies_to_the_next_request(limiter: Limiter, engine: Engine) -> None:
    run_one(limiter)
    quota = Quota(requests_per_minute=1)
    limiter.admit("acme", quota, tokens=1)
    with pytest.raises(RateLimited):
        limiter.admit("acme", quota, tokens=1)


def test_no_portion_is_taken_from_buckets_that_are_not_half_full(
    limiter: Limiter, engine: Engine
) -> None:
    grant = limiter.admit("acme", LARGE, tokens=60 * LIMIT)
    limiter.settle(grant, output_tokens=0)
    limiter.return_portions(all_of_them=True)
    before = levels(engine)
    run_one(limiter)
    assert levels(engine) == (before[0] - 1, before[1] - 15)


def test_spare_leases_are_renewed_with_the_others(
    limiter: Limiter, engine: Engine, clock: Clock
) -> None:
    run_one(limiter)
    spare = num_leases(engine)
    assert spare > 1
    for _ in range(3):
        clock.now += timedelta(seconds=40)
        limiter.renew()
    limiter.admit("acme", LARGE, tokens=1)
    assert num_leases(engine) == spare
