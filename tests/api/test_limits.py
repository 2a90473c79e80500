"""A tenant's limits over HTTP: 429 with valid headers, and no lease is leaked."""

import asyncio
import random
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select
from sqlalchemy.event import listen
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from prefixd.server.api.metrics import Outcome
from prefixd.server.api.request_record import RequestRecord
from prefixd.server.engine.request import AdmittedRequest
from prefixd.server.engine.step import Step, StepOutput
from prefixd.server.tenants.limiter import Grant
from prefixd.server.tenants.tables import rate_limits, request_leases
from prefixd.store.db.database import reading
from tests.api.api_world import World, error_of, put_text
from tests.api.test_disconnect import Caller, outcome, run_with_engine


def quota(world: World, **limits: int | None) -> None:
    world.tenants.set_quota("acme", limits)


def complete(client: TestClient, **fields: Any) -> Any:
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 5, **fields}
    return client.post("/v1/completions", json=body)


def num_leases(world: World) -> int:
    with reading(world.database) as connection:
        return len(connection.execute(select(request_leases)).all())


def test_tenant_without_limits_gets_no_rate_limit_headers(client: TestClient) -> None:
    assert not [name for name in complete(client).headers if name.startswith("x-ratelimit")]


def test_requests_per_minute_limit_the_rate(client: TestClient, world: World) -> None:
    quota(world, requests_per_minute=2)
    answer = complete(client)
    assert answer.headers["x-ratelimit-limit-requests"] == "2"
    assert answer.headers["x-ratelimit-remaining-requests"] == "1"
    assert answer.headers["x-ratelimit-reset-requests"] == "30s"
    assert complete(client, stream=True).headers["x-ratelimit-remaining-requests"] == "0"
    refused = complete(client)
    assert refused.status_code == 429
    error = error_of(refused)
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert refused.headers["retry-after"] == "30"
    assert refused.headers["x-ratelimit-remaining-requests"] == "0"
    assert refused.headers["x-ratelimit-reset-requests"] == "1m0s"
    world.clock.now += 29
    assert complete(client).status_code == 429
    world.clock.now += 1
    assert complete(client).status_code == 200
    body = {"model": "tiny", "prompt": "x", "max_tokens": 1}
    other = client.post("/v1/completions", json=body, headers=world.headers("beta"))
    assert other.status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_per_minute_count_prompt_and_output(
    client: TestClient, world: World, *, stream: bool
) -> None:
    quota(world, tokens_per_minute=60)
    first = complete(client, stream=stream, n=2)  # 5 of prompt now, 2 times 5 of output later
    assert first.headers["x-ratelimit-remaining-tokens"] == "55"
    second = complete(client, stream=stream)
    assert second.headers["x-ratelimit-remaining-tokens"] == "40"
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "x" * 300}], "max_tokens": 1}
    refused = client.post("/v1/chat/completions", json=chat)
    assert refused.status_code == 429
    assert "60 tokens per minute" in error_of(refused)["message"]


def test_refused_request_is_not_charged(client: TestClient, world: World) -> None:
    quota(world, requests_per_minute=1)
    assert complete(client, model="else").status_code == 404
    assert complete(client, max_tokens=100_000).status_code == 400
    assert complete(client).status_code == 200


def test_uploads_count_as_requests_without_tokens(client: TestClient, world: World) -> None:
    quota(world, requests_per_minute=3, tokens_per_minute=10)
    assert complete(client, max_tokens=9).status_code == 200  # the token bucket is now negative
    body = {"kind": "text", "text": "hello"}
    answer = client.put("/v1/prefixes/voice", json=body)
    assert answer.status_code == 201
    assert answer.headers["x-ratelimit-remaining-requests"] == "1"
    assert client.put("/v1/prefixes/voice", json={"kind": "text"}).status_code == 400
    refused = client.put("/v1/prefixes/voice", json=body)
    assert refused.status_code == 429
    assert error_of(refused)["code"] == "rate_limit_exceeded"
    assert "3 requests per minute" in error_of(refused)["message"]
    assert refused.headers["retry-after"] == "20"
    world.clock.now += 20
    assert client.put("/v1/prefixes/voice", json=body).status_code == 200
    quota(world, requests_per_minute=None)
    assert "x-ratelimit-limit-requests" not in client.put("/v1/prefixes/voice", json=body).headers


@pytest.mark.parametrize("stream", [True, False])
def test_concurrent_requests_above_the_limit_are_refused(world: World, *, stream: bool) -> None:
    quota(world, max_concurrent_requests=2)

    async def scenario() -> None:
        world.runner.gate.clear()
        callers = [Caller(world, {"stream": stream, "max_tokens": 9}) for _ in range(2)]
        running = [asyncio.create_task(one.run()) for one in callers]
        while num_leases(world) < 2:  # noqa: ASYNC110 - the catalog has no events
            await asyncio.sleep(0.001)
        third = Caller(world, {})
        await third.run()
        start = await third.sent.get()
        assert start["status"] == 429
        assert dict(start["headers"])[b"retry-after"] == b"1"
        world.runner.gate.set()
        await asyncio.gather(*running)
        assert num_leases(world) == 0
        after = Caller(world, {"max_tokens": 1})
        await after.run()
        assert (await after.sent.get())["status"] == 200

    run_with_engine(world, scenario)


@pytest.mark.parametrize("stream", [True, False])
def test_requests_under_large_limits_are_settled_in_few_transactions(
    world: World, monkeypatch: pytest.MonkeyPatch, *, stream: bool
) -> None:
    """What a server still holds is returned when it stops."""
    monkeypatch.setattr("prefixd.server.serve.lifespan._RETURN_EVERY_S", 1e6)
    quota(world, requests_per_minute=25_600, tokens_per_minute=10**6, max_concurrent_requests=512)
    statements: list[str] = []

    def count(*arguments: Any) -> None:
        statements.extend(text for text in arguments if "UPDATE rate_limits" in str(text))

    listen(world.database, "before_cursor_execute", count)
    with TestClient(world.app, headers=world.headers()) as client:
        for _ in range(20):
            assert complete(client, stream=stream).status_code == 200
        assert complete(client, model="else").status_code == 404
        assert num_leases(world) > 0
    assert len(statements) <= 5
    assert num_leases(world) == 0
    with reading(world.database) as connection:
        row = connection.execute(select(rate_limits)).one()
    assert (row.requests, row.tokens) == (25_600 - 20, 10**6 - 20 * 10)


def test_lease_is_released_before_the_last_event_of_a_stream(world: World) -> None:
    quota(world, max_concurrent_requests=1)
    leases_at_the_end = []

    class Reading(Caller):
        async def send(self, message: dict[str, Any]) -> None:
            if b"[DONE]" in message.get("body", b""):
                leases_at_the_end.append(num_leases(world))

    run_with_engine(world, Reading(world, {"stream": True, "max_tokens": 3}).run)
    assert leases_at_the_end == [0]


@pytest.mark.parametrize("stream", [True, False])
def test_disconnect_or_failure_releases_the_lease(world: World, *, stream: bool) -> None:
    quota(world, max_concurrent_requests=1, tokens_per_minute=1000)

    async def scenario() -> None:
        world.runner.hold_after = 3
        caller = Caller(world, {"stream": stream, "max_tokens": 300})
        request = asyncio.create_task(caller.run())
        await asyncio.to_thread(world.runner.held.wait, 20)
        caller.disconnects.set()
        await request
        assert num_leases(world) == 0
        world.runner.hold_after = None
        world.runner.gate.set()
        world.runner.fail = True
        failing = Caller(world, {"stream": stream})
        await failing.run()
        assert num_leases(world) == 0

    run_with_engine(world, scenario)


@pytest.mark.parametrize("stream", [True, False])
def test_complete_response_is_sent_when_its_charge_cannot_be_settled(
    client: TestClient, world: World, monkeypatch: pytest.MonkeyPatch, *, stream: bool
) -> None:
    quota(world, max_concurrent_requests=1)

    def database_unavailable(*_: object, **__: object) -> None:
        raise OperationalError("DELETE", {}, Exception("gone"))

    with monkeypatch.context() as patch:
        patch.setattr(world.limiter, "settle", database_unavailable)
        answer = complete(client, stream=stream)
    assert answer.status_code == 200
    assert not stream or answer.text.endswith("data: [DONE]\n\n")
    assert outcome(world, "ok") == 1


def test_lease_renewal_continues_after_a_database_error(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed_once, renewed = threading.Event(), threading.Event()

    def renew() -> None:
        if not failed_once.is_set():
            failed_once.set()
            raise SQLAlchemyError
        renewed.set()

    monkeypatch.setattr("prefixd.server.serve.lifespan.RENEW_EVERY_S", 0.001)
    monkeypatch.setattr(world.limiter, "renew", renew)
    with TestClient(world.app):
        assert renewed.wait(20)


def test_limits_on_stored_prefixes_and_bytes(client: TestClient, world: World) -> None:
    quota(world, max_prefixes=2)
    for name in "ab":
        put_text(client, name, f"prefix {name}", world.headers())
    refused = client.put("/v1/prefixes/c", json={"kind": "text", "text": "one too many"})
    assert refused.status_code == 429
    error = error_of(refused)
    assert (error["type"], error["code"]) == ("insufficient_quota", "insufficient_quota")
    assert error["param"] == "max_prefixes"
    assert "retry-after" not in refused.headers
    assert client.get("/v1/prefixes/c").status_code == 404
    put_text(client, "a", "another version is no other prefix", world.headers())
    client.delete("/v1/prefixes/b")
    size = put_text(client, "c", "in place of b", world.headers())["size_bytes"]
    quota(world, max_bytes=size)
    refused = client.put("/v1/prefixes/c", json={"kind": "text", "text": "x" * 60})
    assert error_of(refused)["param"] == "max_bytes"
    assert len(client.get("/v1/prefixes/c/versions").json()["data"]) == 1
    put_text(client, "c", "in place of b", world.headers())  # the same bytes: no new version


def test_limit_on_virtual_tokens_of_one_prefix(client: TestClient, world: World) -> None:
    quota(world, max_virtual_tokens=8)
    put_text(client, "short", "x" * 8, world.headers())
    refused = client.put("/v1/prefixes/long", json={"kind": "text", "text": "x" * 9})
    assert refused.status_code == 422
    assert "8" in error_of(refused)["message"]


def test_resident_token_cap_is_passed_to_the_engine_or_refuses_a_longer_prefix(
    client: TestClient, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_text(client, "voice", "x" * 20, world.headers())
    quota(world, max_resident_tokens=19)
    refused = complete(client, model="voice")
    assert refused.status_code == 429
    assert error_of(refused)["param"] == "max_resident_tokens"
    submitted: list[AdmittedRequest] = []
    submit = world.engine.submit

    def spy(request: AdmittedRequest, on_event: Any, **options: Any) -> None:
        submitted.append(request)
        submit(request, on_event, **options)

    monkeypatch.setattr(world.engine, "submit", spy)
    quota(world, max_resident_tokens=20)
    assert complete(client, model="voice").status_code == 200
    quota(world, max_resident_tokens=None)
    assert complete(client, model="voice").status_code == 200
    assert [request.max_resident_tokens for request in submitted] == [20, None]


def test_concurrent_uploads_do_not_exceed_the_prefix_limit(
    either_client: TestClient, either_world: World
) -> None:
    client, world = either_client, either_world
    quota(world, max_prefixes=3)

    def put(number: int) -> int:
        body = {"kind": "text", "text": f"prefix {number}"}
        return client.put(f"/v1/prefixes/p{number}", json=body).status_code

    with ThreadPoolExecutor(8) as pool:
        statuses = sorted(pool.map(put, range(12)))
    assert statuses == [201] * 3 + [429] * 9


def test_prefixes_of_a_tenant_at_its_resident_cap_are_swapped(
    client: TestClient, world: World
) -> None:
    """All requests complete, and the tenant's prefixes in the pool never exceed the cap."""
    quota(world, max_resident_tokens=30)
    for name in ("first", "second", "third"):
        put_text(client, name, f"A text of {name:>6}.", world.headers())  # 17 virtual tokens each
    resident: list[int] = []
    run = world.runner.run

    def watch(step: Step) -> StepOutput:
        resident.append(world.engine.core.scheduler.memory.residency.tokens_of("acme"))
        return run(step)

    world.runner.run = watch  # type: ignore[method-assign]
    names = ["first", "second", "third"] * 4
    with ThreadPoolExecutor(len(names)) as pool:
        answers = list(pool.map(lambda name: complete(client, model=name), names))
    assert [answer.status_code for answer in answers] == [200] * len(names)
    assert max(resident) == 17
    assert world.engine.stats().prefix_evictions >= 2


def test_cancelled_request_is_recorded_as_aborted_and_settled(world: World) -> None:
    """At shutdown the task of a request is cancelled, and may be cancelled again meanwhile."""
    quota(world, max_concurrent_requests=1)

    async def scenario() -> None:
        world.runner.gate.clear()
        caller = Caller(world, {"max_tokens": 300})
        request = asyncio.create_task(caller.run())
        assert await asyncio.to_thread(world.runner.entered.wait, 20)
        assert num_leases(world) == 1
        request.cancel()
        await asyncio.sleep(0)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        while num_leases(world):  # noqa: ASYNC110 - the catalog has no events
            await asyncio.sleep(0.001)
        world.runner.gate.set()

    run_with_engine(world, scenario)
    assert outcome(world, "aborted") == 1


class Leaving(Caller):
    """Disconnects once ``messages_before_leaving`` messages were sent to it; 0: never."""

    messages_before_leaving = 0
    messages_sent = 0

    async def send(self, message: dict[str, Any]) -> None:
        self.messages_sent += 1
        if self.messages_sent == self.messages_before_leaving:
            self.disconnects.set()


def test_every_request_is_recorded_and_settled_once_however_it_ends(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = random.Random(1)
    quota(world, max_concurrent_requests=100)
    num_requests, records, settled = 60, list[RequestRecord](), list[str | None]()

    class Records:
        def __call__(self, record: RequestRecord) -> None:
            records.append(record)

        def close(self) -> None:
            pass

    def settling(call: Callable[..., None]) -> Callable[..., None]:
        def settle(grant: Grant, **amounts: int) -> None:
            settled.append(grant.lease)
            call(grant, **amounts)

        return settle

    run = world.runner.run

    def run_or_fail(step: Step) -> StepOutput:
        if choose.random() < 0.05:
            raise RuntimeError("a broken pass")
        return run(step)

    monkeypatch.setattr(world.runner, "run", run_or_fail)
    monkeypatch.setattr(world.limiter, "settle", settling(world.limiter.settle))
    monkeypatch.setattr(world.limiter, "give_back", settling(world.limiter.give_back))
    world.app = world.make_app(trace=Records())

    async def request() -> None:
        body = {
            "stream": choose.random() < 0.6,
            "n": choose.choice([1, 2]),
            "max_tokens": choose.choice([3, 30, 10**6]),
            "timeout": choose.choice([0.01, 60.0, 60.0]),
        }
        caller = Leaving(world, body)
        caller.messages_before_leaving = choose.choice([0, 0, 1, 2, 5])
        await caller.run()

    async def scenario() -> None:
        await asyncio.gather(*(request() for _ in range(num_requests)))
        world.runner.gate.clear()  # of those above, any may end before its client has left
        gone = Caller(world, {"stream": True})
        gone.disconnects.set()
        await gone.run()
        world.runner.gate.set()
        assert not world.drain_state.running
        assert num_leases(world) == 0

    run_with_engine(world, scenario)
    assert len(records) == num_requests + 1
    assert {record.outcome for record in records} >= {Outcome.OK, Outcome.REFUSED, Outcome.ABORTED}
    admitted = [record for record in records if record.admitted is not None]
    assert len(settled) == len(set(settled)) == len(admitted)
    world.engine.core.scheduler.check_integrity()
