"""Calls on a catalog that hangs: bounded waits, a circuit breaker, nothing leaked."""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import Engine as Database
from sqlalchemy.exc import OperationalError

from prefixd.server.api.catalog_access import CatalogAccess
from prefixd.server.api.catalog_calls import CatalogCalls
from prefixd.server.api.catalog_health import (
    NOT_READY_AFTER_S,
    PROBE_TIMEOUT_S,
    CatalogHealth,
    ProbeState,
)
from prefixd.server.api.catalog_metrics import CatalogCollector
from prefixd.server.api.settlements import Settlements
from prefixd.server.errors import Unavailable
from prefixd.server.serve import catalog_probe, lifespan
from prefixd.server.serve.catalog_probe import CatalogProbe
from prefixd.server.tenants.registry import Tenants
from tests.api.api_world import World, error_of

SHORT_S = 0.05
"""A wait that ends before anything that a test holds back."""


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Gate:
    """A call that returns when the gate opens."""

    def __init__(self) -> None:
        self.entered, self.opened, self.left = (threading.Event() for _ in range(3))

    def __call__(self, *_: Any) -> str:
        self.entered.set()
        assert self.opened.wait(30)
        self.left.set()
        return "result"


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.opened.set()


def failing(state: ProbeState) -> None:
    state.begin()
    state.fail()


def test_a_probe_that_has_not_ended_in_time_has_failed_since_it_began() -> None:
    clock = Clock()
    state = ProbeState(now=clock)
    assert state.failed_for_s == 0
    state.begin()
    clock.now += PROBE_TIMEOUT_S
    assert state.failed_for_s == 0
    clock.now += 1
    assert state.failed_for_s == PROBE_TIMEOUT_S + 1
    state.fail()
    clock.now += 1
    state.begin()
    assert state.failed_for_s == PROBE_TIMEOUT_S + 2
    state.succeed()
    assert state.failed_for_s == 0


@pytest.mark.parametrize("kind", ["reads", "writes"])
def test_readiness_follows_the_probe_after_some_seconds(kind: str) -> None:
    clock = Clock()
    health = CatalogHealth(now=clock)
    state: ProbeState = getattr(health, kind)
    failing(state)
    assert health.writes_refused
    assert health.reads_refused == (kind == "reads")
    clock.now += NOT_READY_AFTER_S - 0.1
    assert health.trouble is None
    clock.now += 0.2
    assert "catalog" in str(health.trouble)
    state.succeed()
    assert health.trouble is None
    assert not health.writes_refused


def test_the_breaker_logs_each_change_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    health = CatalogHealth()
    for change in (lambda: None, lambda: failing(health.writes), health.writes.succeed):
        change()
        health.report()
        health.report()
    states = [
        record.getMessage().partition("state='")[2].partition("'")[0] for record in caplog.records
    ]
    assert states == ["open for writes", "closed"]


def test_a_caller_is_refused_while_its_call_still_runs(gate: Gate) -> None:
    calls = CatalogCalls(CatalogHealth(), wait_s=SHORT_S)

    async def call() -> None:
        with pytest.raises(Unavailable) as refused:
            await calls.read(gate)
        assert refused.value.code == "storage_unavailable"
        assert refused.value.retry_after
        assert not gate.left.is_set()
        assert calls.num_calls == 1

    asyncio.run(call())
    gate.opened.set()
    calls.close(timeout_s=10)
    assert gate.left.is_set()
    assert calls.num_calls == 0


def test_the_time_that_a_request_waited_before_counts(gate: Gate) -> None:
    calls = CatalogCalls(CatalogHealth(), wait_s=1000)

    async def call() -> None:
        with pytest.raises(Unavailable):
            await calls.read(gate, waited=1000)

    asyncio.run(call())


def test_calls_beyond_the_queue_are_refused_at_once(gate: Gate) -> None:
    calls = CatalogCalls(CatalogHealth(), wait_s=1000, threads=1, max_waiting=1)

    async def call() -> list[str]:
        taken = [asyncio.create_task(calls.read(gate)) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(Unavailable):
            await calls.read(gate)
        gate.opened.set()
        return await asyncio.gather(*taken)

    assert asyncio.run(call()) == ["result", "result"]


def test_an_open_breaker_refuses_without_calling() -> None:
    health = CatalogHealth()
    calls = CatalogCalls(health)
    failing(health.writes)

    async def call() -> None:
        with pytest.raises(Unavailable):
            await calls.write(pytest.fail, "the call ran")
        assert await calls.read(str, 1) == "1"
        failing(health.reads)
        with pytest.raises(Unavailable):
            await calls.read(pytest.fail, "the call ran")

    asyncio.run(call())


def test_a_long_call_waits_until_the_breaker_opens(gate: Gate) -> None:
    catalog = CatalogAccess.make(wait_s=SHORT_S)

    async def call() -> None:
        waiting = asyncio.create_task(catalog.long_calls.write(gate))
        await asyncio.to_thread(gate.entered.wait, 10)
        with pytest.raises(Unavailable):
            await catalog.calls.read(gate)  # a short call was refused by now
        assert not waiting.done()
        failing(catalog.health.reads)
        with pytest.raises(Unavailable):
            await waiting

    asyncio.run(call())


def test_the_result_of_an_abandoned_call_is_undone_once(gate: Gate) -> None:
    calls, undone = CatalogCalls(CatalogHealth(), wait_s=SHORT_S), list[str]()

    async def call() -> None:
        with pytest.raises(Unavailable):
            await calls.write(gate, undo=undone.append)

    asyncio.run(call())
    assert undone == []
    gate.opened.set()
    calls.close(timeout_s=10)
    assert undone == ["result"]


def test_a_settlement_is_retried_as_unsure() -> None:
    settlements, attempts = Settlements(CatalogHealth()), list[bool]()

    def settle(unsure: bool) -> None:
        attempts.append(unsure)
        if len(attempts) < 2:
            raise OperationalError("UPDATE", {}, Exception("locked"))

    asyncio.run(settlements.settle(settle))
    settlements.close(timeout_s=10)
    assert attempts == [False, True]
    assert (settlements.pending, settlements.dropped) == (0, 0)


def test_settlements_are_dropped_and_counted_after_their_time() -> None:
    health = CatalogHealth()
    failing(health.writes)
    settlements = Settlements(health, retry_for_s=0.0)
    asyncio.run(settlements.settle(lambda _: pytest.fail("the breaker is open")))
    settlements.close(timeout_s=10)
    assert (settlements.pending, settlements.dropped) == (0, 1)


def test_settlements_beyond_the_most_are_dropped() -> None:
    health = CatalogHealth()
    failing(health.writes)
    settlements = Settlements(health, max_pending=2)
    for _ in range(3):
        settlements.add(lambda _: None)
    assert (settlements.pending, settlements.dropped) == (2, 1)
    settlements.close(timeout_s=10)


def test_health_and_metrics_respond_while_every_thread_hangs(
    world: World, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    authenticate = Tenants.authenticate

    def late(tenants: Tenants, key: str) -> Any:
        gate()
        return authenticate(tenants, key)

    monkeypatch.setattr(Tenants, "authenticate", late)
    with TestClient(world.app, headers=world.headers()) as client:
        hung = [
            threading.Thread(target=client.get, args=("/v1/models",), daemon=True)
            for _ in range(50)
        ]
        for thread in hung:
            thread.start()
        assert gate.entered.wait(10)
        for path in ("/health/live", "/health/ready", "/metrics"):
            assert client.get(path).status_code == 200
        assert not gate.left.is_set()
        gate.opened.set()
        for thread in hung:
            thread.join()


def test_a_request_refused_during_its_admission_gives_back_what_it_was_charged(
    world: World, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.tenants.set_quota("acme", {"max_concurrent_requests": 1, "requests_per_minute": 5})
    admit = world.limiter.admit

    def late(*values: Any, **options: Any) -> Any:
        grant = admit(*values, **options)
        gate()
        return grant

    app = world.make_app(wait_s=0.5)
    with TestClient(app, headers=world.headers()) as client:
        body = {"model": "tiny", "prompt": "x", "max_tokens": 1}
        with monkeypatch.context() as patch:
            patch.setattr(world.limiter, "admit", late)
            refused = client.post("/v1/completions", json=body)
        assert (refused.status_code, error_of(refused)["code"]) == (503, "storage_unavailable")
        gate.opened.set()
        assert gate.left.wait(10)
        app.state.catalog.settlements.wait_until_idle(timeout_s=10)
        answer = client.post("/v1/completions", json=body)
        assert answer.status_code == 200
        assert answer.headers["x-ratelimit-remaining-requests"] == "4"


def test_the_probe_in_progress_ends_before_the_database_is_disposed_of(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connection would stay open after that."""
    begun, waits, events = threading.Event(), threading.Event(), list[str]()
    join, dispose = CatalogProbe.join, world.database.dispose

    def check(database: Database) -> None:
        with database.begin():
            begun.set()
            assert waits.wait(30)
        events.append("connection returned")

    def joined(probe: CatalogProbe, *, timeout_s: float) -> None:
        waits.set()
        join(probe, timeout_s=30 * timeout_s)

    def disposed() -> None:
        events.append("disposed")
        waits.set()
        dispose()

    monkeypatch.setattr(catalog_probe, "check_readable", check)
    monkeypatch.setattr(catalog_probe, "check_writable", lambda _: events.append("next probe"))
    monkeypatch.setattr(CatalogProbe, "join", joined)
    monkeypatch.setattr(world.database, "dispose", disposed)
    monkeypatch.setattr(lifespan, "CLOSING_S", 10.0)
    with TestClient(world.app):
        assert begun.wait(30)
    assert events == ["connection returned", "disposed"]


def test_the_metrics_show_the_breaker_and_the_settlements() -> None:
    catalog = CatalogAccess.make()
    failing(catalog.health.writes)
    families = {family.name: family for family in CatalogCollector(catalog).collect()}
    breaker = families["prefixd_catalog_circuit_open"].samples
    assert {sample.labels["calls"]: sample.value for sample in breaker} == {"read": 0, "write": 1}
    assert {"prefixd_settlements_pending", "prefixd_settlements_dropped"} <= set(families)
