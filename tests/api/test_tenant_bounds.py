"""What one tenant, key or address may take of a server process at a time."""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.testclient import TestClient
from starlette.datastructures import Address

from prefixd.server.api.dependencies import authenticated
from prefixd.server.api.tenant_bounds import (
    LOOKUPS_FROM_ADDRESS,
    LOOKUPS_OF_KEY,
    MAX_PAUSE_S,
    KeyedSemaphore,
    RequestRates,
    TenantBounds,
)
from prefixd.server.errors import PrefixdError, RateLimited
from prefixd.server.tenants.key_text import generate
from prefixd.server.tenants.principal import Principal
from prefixd.server.tenants.quotas import Quota
from tests.api.api_world import World, error_of, put_text


def semaphore(capacity: int, *, wait_s: float = 5.0) -> KeyedSemaphore:
    return KeyedSemaphore(capacity, lambda: RateLimited("no place"), wait_s=wait_s)


class Holders:
    """Tasks that hold a semaphore until their event is set, in the order in which they began."""

    def __init__(self, semaphore: KeyedSemaphore) -> None:
        self.semaphore = semaphore
        self.began: list[str] = []
        self.ends: dict[str, asyncio.Event] = {}

    def add(self, name: str, key: str, amount: int = 1) -> asyncio.Task[None]:
        self.ends[name] = asyncio.Event()

        async def hold() -> None:
            async with self.semaphore.hold(key, amount):
                self.began.append(name)
                await self.ends[name].wait()

        return asyncio.create_task(hold())


async def settle() -> None:
    """Let every task run that can."""
    for _ in range(20):
        await asyncio.sleep(0)


def test_a_key_waits_in_order_and_no_other_key_waits_for_it() -> None:
    async def scenario() -> None:
        holders = Holders(semaphore(4))
        tasks = [holders.add("a1", "a", 3), holders.add("a2", "a", 2), holders.add("a3", "a", 1)]
        tasks.append(holders.add("b1", "b", 9))  # more than there is: it gets all
        await settle()
        assert holders.began == ["a1", "b1"]  # a3 would fit, and does not overtake a2
        holders.ends["a1"].set()
        await settle()
        assert holders.began == ["a1", "b1", "a2", "a3"]
        for end in holders.ends.values():
            end.set()
        await asyncio.gather(*tasks)
        assert len(holders.semaphore) == 0

    asyncio.run(scenario())


def test_a_cancelled_wait_leaves_its_place_to_the_next() -> None:
    async def scenario() -> None:
        holders = Holders(semaphore(2))
        tasks = [holders.add("first", "a", 2), holders.add("wide", "a", 2)]
        tasks += [holders.add("small", "a", 1)]
        await settle()
        tasks[1].cancel()
        holders.ends["first"].set()
        await settle()
        assert holders.began == ["first", "small"]
        holders.ends["small"].set()
        await asyncio.wait(tasks)
        assert len(holders.semaphore) == 0

    asyncio.run(scenario())


def test_a_wait_ends_with_the_refusal() -> None:
    async def scenario() -> None:
        places = semaphore(1, wait_s=0.01)
        async with places.hold("a"):
            for waited in (0.0, 9.0):
                with pytest.raises(RateLimited, match="no place"):
                    async with places.hold("a", waited=waited):
                        pass
        assert len(places) == 0

    asyncio.run(scenario())


def test_a_wait_for_the_catalog_ends_with_503_and_one_for_own_uploads_with_429(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("prefixd.server.api.tenant_bounds.CATALOG_WAIT_S", 0.01)
    monkeypatch.setattr("prefixd.server.api.tenant_bounds._WAIT_S", 0.01)
    bounds = TenantBounds(max_uploads=1)

    async def refusal(places: KeyedSemaphore) -> PrefixdError:
        async with places.hold("a", places.capacity):
            with pytest.raises(PrefixdError) as caught:
                async with places.hold("a"):
                    pass
        return caught.value

    for places in (bounds.lookups_of_key, bounds.reads, bounds.changes):
        error = asyncio.run(refusal(places))
        assert (error.status, error.code) == (503, "storage_unavailable")
        assert error.retry_after is not None
    for places in (bounds.uploads, bounds.bodies):
        error = asyncio.run(refusal(places))
        assert (error.status, error.code) == (429, "concurrency_limit_exceeded")
        assert error.retry_after is not None


def test_lookups_of_one_key_and_from_one_address_leave_threads_for_others() -> None:
    """A hundred requests with one key, then as many with other keys from one address."""
    bounds, one_key = TenantBounds(), generate().text

    async def lookup(key: str, host: str, began: list[str], end: asyncio.Event) -> None:
        async with bounds.lookup(key, Address(host, 1)):
            began.append(host)
            await end.wait()

    async def scenario(callers: list[tuple[str, str]]) -> list[str]:
        end, began = asyncio.Event(), list[str]()
        tasks = [asyncio.create_task(lookup(*caller, began, end)) for caller in callers]
        await settle()
        before_end = list(began)
        end.set()
        await asyncio.gather(*tasks)
        assert (len(bounds.lookups_of_key), len(bounds.lookups_from_address)) == (0, 0)
        return before_end

    other = (generate().text, "10.0.0.9")
    began = asyncio.run(scenario([(one_key, f"10.0.1.{n}") for n in range(100)] + [other]))
    assert (len(began), began[-1]) == (LOOKUPS_OF_KEY + 1, "10.0.0.9")
    began = asyncio.run(scenario([(generate().text, "10.0.0.1") for _ in range(100)] + [other]))
    assert (len(began), began[-1]) == (LOOKUPS_FROM_ADDRESS + 1, "10.0.0.9")


def test_a_wait_before_a_lookup_counts_as_a_wait_for_the_catalog() -> None:
    key = generate()
    principal = Principal("acme", key.parsed.key_id, frozenset(), Quota())

    class Calls:
        waited = 0.0

        async def read(self, *_: object, waited: float = 0.0) -> Principal:
            self.waited = waited
            return principal

    async def scenario() -> None:
        bounds, calls = TenantBounds(), Calls()
        parts = SimpleNamespace(
            tenants=SimpleNamespace(authenticate=None),
            bounds=bounds,
            catalog=SimpleNamespace(calls=calls),
        )
        request: Any = SimpleNamespace(
            client=Address("10.0.0.1", 1),
            headers={"Authorization": f"Bearer {key.text}"},
            state=SimpleNamespace(),
            app=SimpleNamespace(state=parts),
        )
        lookup = authenticated(request)
        async with bounds.lookups_of_key.hold(key.parsed.key_id, LOOKUPS_OF_KEY):
            task = asyncio.create_task(lookup)
            await settle()
            begun = time.monotonic()
            await settle()
            waited = time.monotonic() - begun
        assert await task is principal
        assert request.state.catalog_waited >= calls.waited >= waited > 0

    asyncio.run(scenario())


def test_places_that_others_wait_for_are_free_after_a_pause(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        bounds = TenantBounds()
        pauses: list[tuple[float, Callable[[], None]]] = []
        monkeypatch.setattr(
            asyncio.get_running_loop(),
            "call_later",
            lambda delay, call, *arguments: pauses.append((delay, partial(call, *arguments))),
        )
        bounds.requests["acme"] = 1
        async with bounds.changes.hold("acme"):
            pass
        assert (len(bounds.changes), pauses) == (0, [])
        bounds.requests["beta"] = 1
        async with bounds.changes.hold("acme"):
            pass
        holders = Holders(bounds.changes)
        tasks = [holders.add("acme", "acme"), holders.add("beta", "beta")]
        await settle()
        assert holders.began == ["beta"]
        ((delay, end_of_pause),) = pauses
        assert 0 < delay <= MAX_PAUSE_S
        end_of_pause()
        await settle()
        assert holders.began == ["beta", "acme"]
        for end in holders.ends.values():
            end.set()
        await asyncio.wait(tasks)

    asyncio.run(scenario())


def test_a_rate_is_refilled_by_a_clock_that_does_not_go_back() -> None:
    now = [100.0]
    rates = RequestRates(now=lambda: now[0])
    for _ in range(60):
        rates.take("acme", 60)
    with pytest.raises(RateLimited, match="60 requests per minute") as caught:
        rates.take("acme", 60)
    assert caught.value.retry_after == pytest.approx(1.0)
    rates.take("beta", 60)
    now[0] += 1.0
    rates.take("acme", 60)
    with pytest.raises(RateLimited):
        rates.take("acme", 60)


def test_requests_that_do_not_generate_have_a_rate_of_their_own(
    client: TestClient, world: World
) -> None:
    world.tenants.set_quota("acme", {"other_requests_per_minute": 2})
    statuses = [client.get("/v1/models").status_code for _ in range(3)]
    assert statuses == [200, 200, 429]
    refused = client.get("/v1/users")
    assert error_of(refused)["code"] == "rate_limit_exceeded"
    assert "other_requests_per_minute" in error_of(refused)["message"]
    assert int(refused.headers["retry-after"]) >= 1
    assert client.get("/v1/models", headers=world.headers("beta")).status_code == 200
    body = {"model": "tiny", "prompt": "Hi", "max_tokens": 1}
    assert client.post("/v1/completions", json=body).status_code == 200
    put_text(client, "voice", "one", world.headers())


def test_requests_in_progress_are_bounded_streams_included(world: World) -> None:
    bounds = TenantBounds(max_requests=2)
    world.runner.gate.clear()
    body = {"model": "tiny", "prompt": "Hi", "max_tokens": 4, "stream": True}

    with TestClient(world.make_app(bounds=bounds), headers=world.headers()) as client:

        def stream(_: int) -> str:
            return client.post("/v1/completions", json=body).text

        with ThreadPoolExecutor(2) as pool:
            streams = pool.map(stream, range(2))
            pause = threading.Event()
            while bounds.requests["acme"] < 2:
                pause.wait(0.01)
            refused = client.get("/v1/models")
            assert error_of(refused)["code"] == "concurrency_limit_exceeded"
            assert client.get("/v1/models", headers=world.headers("beta")).status_code == 200
            world.runner.gate.set()
            assert all(text.endswith("data: [DONE]\n\n") for text in streams)
        assert client.get("/v1/models").status_code == 200
        assert bounds.requests == {}


def test_bodies_and_uploads_of_one_tenant_wait_for_each_other(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A body that is not complete holds its declared length; another tenant is not affected."""
    held: dict[str, Any] = {}
    original = KeyedSemaphore.hold

    def spy(self: KeyedSemaphore, key: str, amount: int = 1, **waited: float) -> Any:
        held.setdefault(key, []).append((self, amount))
        return original(self, key, amount, **waited)

    monkeypatch.setattr(KeyedSemaphore, "hold", spy)
    bounds = TenantBounds(max_body_bytes=1024, max_uploads=1)
    with TestClient(world.make_app(bounds=bounds), headers=world.headers()) as client:
        put_text(client, "voice", "one", world.headers())
        assert (bounds.uploads, 1) in held["acme"]
        answer = client.put("/v1/users/ann/prefix", json={"prefix": "voice"})
        assert answer.status_code == 200
        assert (bounds.bodies, len(answer.request.content)) in held["acme"]
        assert held["acme"].count((bounds.changes, 1)) == 1
        client.get("/v1/users")
        client.delete("/v1/users/ann/prefix")
        assert held["acme"].count((bounds.reads, 1)) == 1
        assert held["acme"].count((bounds.changes, 1)) == 2
        kind = {"content-type": "application/x-ndjson"}
        client.post("/v1/users/bindings:import", content=b"", headers=kind)
    assert held["acme"].count((bounds.uploads, 1)) == 2
    assert (
        len(bounds.bodies) == len(bounds.uploads) == len(bounds.reads) == len(bounds.changes) == 0
    )


def test_a_principal_without_limits_has_no_rate() -> None:
    bounds = TenantBounds()
    principal = Principal("acme", "K", frozenset(), quota=Quota())
    for _ in range(1000):
        with bounds.request(principal, rated=True):
            pass
    assert bounds.requests == {}
