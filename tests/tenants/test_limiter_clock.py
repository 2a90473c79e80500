"""Limits and leases while the clock is set back or forward, and with clocks that differ."""

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, event, select

from prefixd.server.errors import RateLimited
from prefixd.server.tenants.limiter import LEASE_S, Limiter
from prefixd.server.tenants.quotas import Quota
from prefixd.server.tenants.registry import Tenants
from prefixd.server.tenants.tables import rate_limits, request_leases
from prefixd.store.db.database import reading
from tests.tenants.tenants_clock import Clock

HOUR = timedelta(hours=1)
SIX = Quota(requests_per_minute=6)
TWO_AT_ONCE = Quota(max_concurrent_requests=2)


@pytest.fixture
def limiter(engine: Engine, clock: Clock, tenants: Tenants) -> Limiter:
    tenants.create_tenant("acme")
    tenants.create_tenant("beta")
    return Limiter(engine, now=clock.time)


def admits(limiter: Limiter, quota: Quota, tenant: str = "acme") -> bool:
    try:
        limiter.admit(tenant, quota, tokens=1)
    except RateLimited:
        return False
    return True


def admitted(limiter: Limiter, quota: Quota) -> int:
    """How many successive requests are admitted, of at most 100."""
    return next(count for count in range(100) if not admits(limiter, quota))


def lease_ids(engine: Engine) -> set[str]:
    with reading(engine) as connection:
        return set(connection.scalars(select(request_leases.c.id)))


def bucket_time(engine: Engine) -> float:
    with reading(engine) as connection:
        return connection.execute(select(rate_limits.c.at)).scalar_one()


@pytest.mark.parametrize("back", [timedelta(seconds=61), HOUR, timedelta(days=900)])
def test_an_empty_bucket_refills_after_the_clock_was_set_back(
    limiter: Limiter, clock: Clock, back: timedelta
) -> None:
    assert admitted(limiter, SIX) == 6
    clock.now -= back
    assert admitted(limiter, SIX) == 0  # the jump itself grants nothing
    clock.now += timedelta(seconds=20)
    assert admitted(limiter, SIX) == 2
    clock.now += timedelta(minutes=1)
    assert admitted(limiter, SIX) == 6


def test_a_bucket_refills_after_the_clock_was_set_forward_and_right_again(
    limiter: Limiter, clock: Clock
) -> None:
    assert admitted(limiter, SIX) == 6
    clock.now += HOUR
    assert admitted(limiter, SIX) == 6
    clock.now -= HOUR
    assert admitted(limiter, SIX) == 0
    clock.now += timedelta(minutes=1)
    assert admitted(limiter, SIX) == 6


@pytest.mark.parametrize("end", ["settle", "give_back"])
def test_the_end_of_a_request_resets_a_time_from_the_future(
    limiter: Limiter, engine: Engine, clock: Clock, end: str
) -> None:
    quota = Quota(tokens_per_minute=60)
    grant = limiter.admit("acme", quota, tokens=50)
    clock.now -= HOUR
    if end == "settle":
        limiter.settle(grant, output_tokens=10)
    else:
        limiter.give_back(grant, tokens=50)
    assert bucket_time(engine) == pytest.approx(clock.time())
    clock.now += timedelta(seconds=30)
    assert limiter.count("acme", Quota(requests_per_minute=100, tokens_per_minute=60))[
        "x-ratelimit-remaining-tokens"
    ] == ("30" if end == "settle" else "60")


def test_a_small_lead_gives_no_refill_and_stays(
    limiter: Limiter, engine: Engine, clock: Clock
) -> None:
    assert admitted(limiter, SIX) == 6
    ahead = bucket_time(engine)
    clock.now -= timedelta(seconds=59)
    assert admitted(limiter, SIX) == 0
    clock.now += timedelta(seconds=59)
    assert (admitted(limiter, SIX), bucket_time(engine)) == (0, ahead)
    clock.now += timedelta(seconds=10)
    assert admitted(limiter, SIX) == 1


def test_two_limiters_five_seconds_apart_grant_no_more_than_the_leading_one(
    open_engine: Callable[[], Engine], limiter: Limiter, clock: Clock
) -> None:
    quota = Quota(requests_per_minute=60)
    leading = Limiter(open_engine(), now=lambda: clock.time() + 5)
    counts = {"acme": 0, "beta": 0}
    for number in range(400):
        # Both began at the time of the one that is behind; beta then sees the leading one alone.
        counts["acme"] += admits(leading if number % 2 else limiter, quota, "acme")
        counts["beta"] += admits(leading if number else limiter, quota, "beta")
        clock.now += timedelta(seconds=0.2)
    assert 60 + 70 < counts["acme"] <= counts["beta"]


def test_processes_take_the_time_of_postgresql(
    open_engine: Callable[[], Engine], limiter: Limiter, monkeypatch: pytest.MonkeyPatch
) -> None:
    del limiter  # made the tenants
    if open_engine().dialect.name != "postgresql":
        pytest.skip("SQLite has no clock of its own")
    offset = 0.0
    read = time.time
    monkeypatch.setattr(time, "time", lambda: read() + offset)
    replicas = [Limiter(open_engine()), Limiter(open_engine())]
    quota = Quota(requests_per_minute=60, max_concurrent_requests=1000)
    started, count = time.monotonic(), 0
    for offset in (0.0, 5.0) * 40 + (3600.0,) * 40:
        count += admits(replicas[int(offset > 0)], quota)
    assert 60 <= count <= 60 + (time.monotonic() - started)
    with reading(open_engine()) as connection:
        ends = connection.scalars(select(request_leases.c.expires_at)).all()
    assert max(ends) <= read() + LEASE_S + 1


def test_leases_from_the_future_survive_no_restart(
    open_engine: Callable[[], Engine], limiter: Limiter, clock: Clock
) -> None:
    assert admitted(limiter, TWO_AT_ONCE) == 2  # its process is killed
    clock.now -= HOUR
    assert admitted(Limiter(open_engine(), now=clock.time), TWO_AT_ONCE) == 2


def test_a_lease_up_to_two_lifetimes_ahead_counts(
    open_engine: Callable[[], Engine], limiter: Limiter, clock: Clock
) -> None:
    assert admitted(limiter, TWO_AT_ONCE) == 2
    restarted = Limiter(open_engine(), now=clock.time)
    clock.now -= timedelta(seconds=LEASE_S)
    assert admitted(restarted, TWO_AT_ONCE) == 0
    clock.now -= timedelta(seconds=1)
    assert admitted(restarted, TWO_AT_ONCE) == 2


@pytest.mark.parametrize("jump", [HOUR, -HOUR], ids=["forward", "back"])
def test_leases_of_this_process_survive_a_jump(
    limiter: Limiter, clock: Clock, jump: timedelta
) -> None:
    grants = [limiter.admit("acme", TWO_AT_ONCE, tokens=1) for _ in range(2)]
    clock.now += jump
    assert admitted(limiter, TWO_AT_ONCE) == 0
    clock.now += timedelta(seconds=LEASE_S / 2)
    assert admitted(limiter, TWO_AT_ONCE) == 0
    for grant in grants:
        limiter.settle(grant, output_tokens=1)
    assert admitted(limiter, TWO_AT_ONCE) == 2


@pytest.mark.parametrize("jump", [HOUR, -HOUR], ids=["forward", "back"])
def test_leases_that_another_replica_deleted_are_inserted_again(
    open_engine: Callable[[], Engine], limiter: Limiter, clock: Clock, jump: timedelta
) -> None:
    grants = [limiter.admit("acme", TWO_AT_ONCE, tokens=1) for _ in range(2)]
    clock.now += jump
    other = Limiter(open_engine(), now=clock.time)
    other.settle(other.admit("acme", TWO_AT_ONCE, tokens=1), output_tokens=1)
    assert lease_ids(open_engine()) == set()
    limiter.renew()
    assert lease_ids(open_engine()) == {grant.lease for grant in grants}
    assert admitted(other, TWO_AT_ONCE) == admitted(limiter, TWO_AT_ONCE) == 0
    limiter.settle(grants[0], output_tokens=1)
    assert admitted(other, TWO_AT_ONCE) == 1


def test_a_request_that_ends_during_its_renewal_leaves_no_lease(
    open_engine: Callable[[], Engine], engine: Engine, limiter: Limiter, clock: Clock
) -> None:
    ending, running = (limiter.admit("acme", TWO_AT_ONCE, tokens=1) for _ in range(2))
    clock.now += HOUR
    other = Limiter(open_engine(), now=clock.time)
    other.settle(other.admit("acme", TWO_AT_ONCE, tokens=1), output_tokens=1)
    settling = threading.Thread(target=limiter.settle, args=(ending,), kwargs={"output_tokens": 1})

    def settle_before_the_insert(*arguments: Any) -> None:
        insert = arguments[2].startswith("INSERT INTO request_leases")
        if insert and settling.ident is None:
            settling.start()
            # On SQLite it waits for the transaction of the renewal.
            settling.join(None if engine.dialect.name == "postgresql" else 0.1)

    event.listen(engine, "before_cursor_execute", settle_before_the_insert)
    limiter.renew()
    settling.join()
    assert lease_ids(engine) == {running.lease}
