"""Rates and concurrency: counted across replicas, refilled by the clock, reported in headers."""

import math
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Engine, select
from sqlalchemy.exc import OperationalError

from prefixd.server.errors import RateLimited
from prefixd.server.tenants.limiter import LEASE_S, Limiter, duration
from prefixd.server.tenants.quotas import Quota
from prefixd.server.tenants.registry import Tenants
from prefixd.server.tenants.tables import rate_limits, request_leases
from prefixd.store.db.database import reading
from tests.tenants.tenants_clock import Clock


@pytest.fixture
def limiter(engine: Engine, clock: Clock, tenants: Tenants) -> Limiter:
    tenants.create_tenant("acme")
    tenants.create_tenant("beta")
    return Limiter(engine, now=clock.time)


def admitted(limiter: Limiter, quota: Quota, *, tokens: int = 1, tries: int = 100) -> int:
    """How many successive requests are admitted."""
    for count in range(tries):
        try:
            limiter.admit("acme", quota, tokens=tokens)
        except RateLimited:
            return count
    return tries


def test_the_request_bucket_empties_and_refills(limiter: Limiter, clock: Clock) -> None:
    quota = Quota(requests_per_minute=6)
    assert admitted(limiter, quota) == 6
    with pytest.raises(RateLimited) as refused:
        limiter.admit("acme", quota, tokens=1)
    assert refused.value.retry_after == pytest.approx(10)
    assert limiter.admit("beta", quota, tokens=1)
    clock.now += timedelta(seconds=20)
    assert admitted(limiter, quota) == 2
    clock.now += timedelta(hours=1)
    assert admitted(limiter, quota) == 6


@pytest.mark.parametrize("per_minute", [1, 7, 60, 10_000])
def test_a_request_is_admitted_after_retry_after_and_not_before(
    limiter: Limiter, clock: Clock, per_minute: int
) -> None:
    quota = Quota(tokens_per_minute=per_minute)
    limiter.admit("acme", quota, tokens=per_minute)
    for _ in range(5):
        with pytest.raises(RateLimited) as refused:
            limiter.admit("acme", quota, tokens=1)
        wait = refused.value.retry_after
        assert wait is not None
        clock.now += timedelta(seconds=wait * 0.99)
        with pytest.raises(RateLimited):
            limiter.admit("acme", quota, tokens=1)
        clock.now += timedelta(seconds=wait * 0.01 + 1e-5)
        limiter.admit("acme", quota, tokens=1)


def test_a_rejected_request_takes_nothing_from_the_buckets(limiter: Limiter, clock: Clock) -> None:
    quota = Quota(requests_per_minute=10, tokens_per_minute=100)
    limiter.admit("acme", quota, tokens=90)
    for _ in range(20):
        with pytest.raises(RateLimited):
            limiter.admit("acme", quota, tokens=50)
    grant = limiter.admit("acme", quota, tokens=10)
    assert grant.headers["x-ratelimit-remaining-requests"] == "8"


def test_output_is_charged_at_the_end_and_may_exceed_the_limit(
    limiter: Limiter, clock: Clock
) -> None:
    quota = Quota(tokens_per_minute=60)
    grant = limiter.admit("acme", quota, tokens=10)
    limiter.settle(grant, output_tokens=80)  # 30 below zero
    with pytest.raises(RateLimited) as refused:
        limiter.admit("acme", quota, tokens=10)
    assert refused.value.retry_after == pytest.approx(40)
    assert refused.value.headers["x-ratelimit-remaining-tokens"] == "0"


def test_the_output_of_a_long_request_is_charged_to_a_full_bucket(
    limiter: Limiter, clock: Clock
) -> None:
    quota = Quota(tokens_per_minute=60)
    grant = limiter.admit("acme", quota, tokens=10)
    clock.now += timedelta(minutes=10)  # the bucket is full, and holds no more than its limit
    limiter.settle(grant, output_tokens=60)
    with pytest.raises(RateLimited):
        limiter.admit("acme", quota, tokens=1)


def test_a_prompt_larger_than_the_limit_waits_for_a_full_bucket(
    limiter: Limiter, clock: Clock
) -> None:
    quota = Quota(tokens_per_minute=60)
    limiter.admit("acme", quota, tokens=600)
    with pytest.raises(RateLimited) as refused:
        limiter.admit("acme", quota, tokens=600)
    assert refused.value.retry_after == pytest.approx(600)


def test_admission_returns_the_rate_limit_headers(limiter: Limiter) -> None:
    quota = Quota(requests_per_minute=60, tokens_per_minute=600)
    assert limiter.admit("acme", quota, tokens=90).headers == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "510",
        "x-ratelimit-reset-tokens": "9s",
    }
    assert limiter.admit("beta", Quota(), tokens=90).headers == {}


def test_concurrent_requests_are_limited(limiter: Limiter, clock: Clock) -> None:
    quota = Quota(max_concurrent_requests=2)
    grants = [limiter.admit("acme", quota, tokens=1) for _ in range(2)]
    with pytest.raises(RateLimited) as refused:
        limiter.admit("acme", quota, tokens=1)
    assert refused.value.code == "concurrency_limit_exceeded"
    assert refused.value.retry_after
    limiter.admit("beta", quota, tokens=1)
    limiter.settle(grants[0], output_tokens=1)
    limiter.admit("acme", quota, tokens=1)


def test_leases_of_a_killed_replica_expire_and_those_of_a_running_one_do_not(
    open_engine: Callable[[], Engine], limiter: Limiter, clock: Clock
) -> None:
    quota = Quota(max_concurrent_requests=2)
    living = Limiter(open_engine(), now=clock.time)
    limiter.admit("acme", quota, tokens=1)  # its replica is killed: never settled, never renewed
    living.admit("acme", quota, tokens=1)
    for _ in range(3):
        clock.now += timedelta(seconds=LEASE_S / 2)
        living.renew()
    living.admit("acme", quota, tokens=1)
    with pytest.raises(RateLimited):
        living.admit("acme", quota, tokens=1)


def test_a_lease_that_could_not_be_freed_expires(
    limiter: Limiter, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the database is unavailable when a request ends, its server must stop renewing the
    lease."""
    quota = Quota(max_concurrent_requests=2)
    running, ended = (limiter.admit("acme", quota, tokens=1) for _ in range(2))

    def fail(*_: object) -> None:
        raise OperationalError("DELETE", {}, Exception("gone"))

    with monkeypatch.context() as patch:
        patch.setattr("prefixd.server.tenants.limiter._free", fail)
        for end in (
            lambda: limiter.settle(ended, output_tokens=1),
            lambda: limiter.give_back(ended, tokens=1),
        ):
            with pytest.raises(OperationalError):
                end()
    for _ in range(3):
        clock.now += timedelta(seconds=LEASE_S / 2)
        limiter.renew()
    assert admitted(limiter, quota) == 1
    limiter.settle(running, output_tokens=1)
    assert admitted(limiter, quota) == 1


def test_a_new_limit_starts_full_and_no_limit_stores_no_row(
    limiter: Limiter, engine: Engine
) -> None:
    limiter.settle(limiter.admit("acme", Quota(), tokens=10**9), output_tokens=10**9)
    with reading(engine) as connection:
        assert connection.execute(select(rate_limits)).all() == []
    assert limiter.admit("acme", Quota(requests_per_minute=5), tokens=10**6)
    assert admitted(limiter, Quota(tokens_per_minute=3), tokens=1) == 3


def test_replicas_share_one_bucket_and_one_concurrency_limit(
    open_engine: Callable[[], Engine], limiter: Limiter, clock: Clock
) -> None:
    """Eight threads on four replicas send 200 requests: 50 are admitted, at most 7 at a time."""
    replicas = [Limiter(open_engine(), now=clock.time) for _ in range(4)]
    quota = Quota(requests_per_minute=50, max_concurrent_requests=7)
    outcomes: list[str] = []

    def one(number: int) -> None:
        replica = replicas[number % 4]
        try:
            grant = replica.admit("acme", quota, tokens=1)
        except RateLimited as error:
            outcomes.append(error.code)
            return
        outcomes.append("ok")
        replica.settle(grant, output_tokens=1)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(200)))
    refused_busy = outcomes.count("concurrency_limit_exceeded")
    assert outcomes.count("ok") == 50
    assert outcomes.count("rate_limit_exceeded") == 150 - refused_busy


_PROCESS = """
import sys
from prefixd.store.db.database import open_database
from prefixd.server.errors import RateLimited
from prefixd.server.tenants.limiter import Limiter
from prefixd.server.tenants.quotas import Quota
limiter = Limiter(open_database(sys.argv[1]), now=lambda: 1_000_000.0)
quota = Quota(requests_per_minute=40, max_concurrent_requests=30)
ok = 0
sys.stdin.readline()
for _ in range(30):
    try:
        limiter.admit("acme", quota, tokens=1)
        ok += 1
    except RateLimited:
        pass
print(ok)
"""


def test_two_processes_share_one_bucket_and_one_set_of_leases(
    limiter: Limiter, engine: Engine
) -> None:
    url = engine.url.render_as_string(hide_password=False)
    children = [
        subprocess.Popen(
            [sys.executable, "-c", _PROCESS, url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        for _ in range(2)
    ]
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    admitted_by_child = [int(child.communicate(timeout=60)[0]) for child in children]
    assert sum(admitted_by_child) == 30
    with reading(engine) as connection:
        assert len(connection.execute(select(request_leases)).all()) == 30


@given(seconds=st.floats(min_value=0, max_value=10**7))
def test_reset_durations_are_rounded_up(seconds: float) -> None:
    total, number = 0.0, ""
    text = duration(seconds)
    if text.endswith("ms"):
        total = int(text[:-2]) / 1000
    else:
        for letter in text:
            if letter in "hms":
                total += float(number) * {"h": 3600, "m": 60, "s": 1}[letter]
                number = ""
            else:
                number += letter
    assert seconds - 1e-9 * math.fabs(seconds) <= total <= seconds + 0.0011


def test_reset_durations_have_openais_format() -> None:
    shown = [duration(s) for s in (0, 0.12, 1, 7.66, 59.9995, 360, 3720, 86400)]
    assert shown == ["0ms", "120ms", "1s", "7.66s", "1m0s", "6m0s", "1h2m0s", "24h0m0s"]
