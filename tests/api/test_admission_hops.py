"""Which requests are admitted on the event loop, and which by a call in a thread of the catalog."""

import asyncio
import threading
from typing import Any

import pytest
from fastapi.testclient import TestClient

from prefixd.server.api.catalog_calls import SharedCall
from prefixd.server.api.generate.prompts import PromptEncoder
from prefixd.server.api.generate.resolver import PrefixResolver
from prefixd.server.api.generate.service import QUICK_BYTES
from prefixd.server.tenants.limiter import Limiter
from prefixd.server.testing import ByteTokenizer
from tests.api.api_world import World, error_of, fake_text, put_text
from tests.api.test_disconnect import Caller, run_with_engine

CALLERS = 3
PORTION = {"requests_per_minute": 10**6, "tokens_per_minute": 10**9, "max_concurrent_requests": 512}
"""Limits of which a process takes portions."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls in threads of the catalog that any request made, by thread."""
    seen: list[str] = []
    run = SharedCall.run

    def counted(self: SharedCall[Any]) -> Any:
        seen.append(threading.current_thread().name)
        return run(self)

    monkeypatch.setattr(SharedCall, "run", counted)
    return seen


def complete(client: TestClient, **fields: Any) -> Any:
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 3, **fields}
    return client.post("/v1/completions", json=body)


def test_a_request_for_the_base_needs_the_catalog_for_its_key_alone(
    client: TestClient, calls: list[str]
) -> None:
    assert complete(client).json()["choices"][0]["text"] == fake_text(None, "hello", 3)
    assert len(calls) == 1
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    assert client.post("/v1/chat/completions", json=chat).is_success
    assert len(calls) == 2


@pytest.mark.parametrize(
    "fields",
    [{"model": "voice"}, {"user": "ann"}, {"prompt": "x" * (QUICK_BYTES // 6), "n": None}],
)
def test_other_requests_are_admitted_in_a_thread(
    client: TestClient,
    world: World,
    calls: list[str],
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
) -> None:
    monkeypatch.setattr("prefixd.server.api.generate.service.QUICK_BYTES", QUICK_BYTES // 6)
    put_text(client, "voice", "a voice", world.headers())
    calls.clear()
    assert complete(client, **fields).is_success
    assert len(calls) == 2


def test_a_body_of_undeclared_length_is_admitted_in_a_thread(
    client: TestClient, calls: list[str]
) -> None:
    body = b'{"model": "tiny", "prompt": "hello", "max_tokens": 3}'
    headers = {"content-type": "application/json"}
    assert client.post("/v1/completions", content=iter([body]), headers=headers).is_success
    assert len(calls) == 2


def test_limits_with_a_portion_are_charged_without_a_call(
    client: TestClient, world: World, calls: list[str]
) -> None:
    world.tenants.set_quota("acme", PORTION)
    assert complete(client).is_success
    assert len(calls) == 2  # it took the portion
    portion = world.limiter._portions._by_tenant["acme"]
    left = portion.requests
    assert "x-ratelimit-remaining-requests" in complete(client).headers
    assert len(calls) == 3
    assert portion.requests == left - 1


def test_a_request_that_needs_a_transaction_is_tokenized_once(
    client: TestClient, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenized: list[str] = []
    completion = PromptEncoder.completion

    def counted(*arguments: Any, **options: Any) -> Any:
        tokenized.append(threading.current_thread().name)
        return completion(*arguments, **options)

    monkeypatch.setattr(PromptEncoder, "completion", counted)
    world.tenants.set_quota("acme", {"requests_per_minute": 5})
    assert complete(client).headers["x-ratelimit-remaining-requests"] == "4"
    assert len(tokenized) == 1


@pytest.mark.parametrize("metered", [False, True])
def test_a_catalog_that_does_not_respond_refuses_them_too(
    client: TestClient, world: World, metered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reads go on while only writes fail, and with them requests that are not counted."""
    if metered:
        world.tenants.set_quota("acme", PORTION)
    assert complete(client).is_success
    health = client.app.state.catalog.health  # type: ignore[attr-defined]
    monkeypatch.setattr(type(health), "writes_refused", True)
    answer = complete(client)
    assert answer.status_code == (503 if metered else 200)
    if metered:
        assert error_of(answer)["code"] == "storage_unavailable"


def test_requests_that_arrive_together_make_one_call_for_their_portion(
    world: World, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    world.tenants.set_quota("acme", PORTION)
    missed: list[None] = []
    all_missed = threading.Event()
    at_once, from_catalog = Limiter.admit_at_once, Limiter._from_catalog

    def noted(self: Limiter, *arguments: Any, **options: Any) -> Any:
        grant = at_once(self, *arguments, **options)
        if grant is None and threading.current_thread() is threading.main_thread():
            missed.append(grant)
            if len(missed) == CALLERS:
                all_missed.set()
        return grant

    def late(self: Limiter, *arguments: Any, **options: Any) -> Any:
        assert all_missed.wait(30)
        return from_catalog(self, *arguments, **options)

    monkeypatch.setattr("prefixd.server.api.generate.charging.TURN_S", 30.0)
    monkeypatch.setattr(Limiter, "admit_at_once", noted)
    monkeypatch.setattr(Limiter, "_from_catalog", late)

    async def scenario() -> None:
        callers = [Caller(world, {"max_tokens": 1}) for _ in range(CALLERS)]
        await asyncio.gather(*(caller.run() for caller in callers))
        for caller in callers:
            assert caller.sent.get_nowait()["status"] == 200

    run_with_engine(world, scenario)
    assert len(calls) == CALLERS + 1  # the keys, and one portion
    assert not world.app.state.generation.charging._taking


def test_a_portion_that_takes_long_is_not_waited_for(
    world: World, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    world.tenants.set_quota("acme", PORTION)
    monkeypatch.setattr("prefixd.server.api.generate.charging.TURN_S", 0.0)
    monkeypatch.setattr("prefixd.server.tenants.portions.TURN_S", 0.0)
    both, from_catalog = threading.Barrier(2, timeout=30), Limiter._from_catalog

    def together(self: Limiter, *arguments: Any, **options: Any) -> Any:
        both.wait()
        return from_catalog(self, *arguments, **options)

    monkeypatch.setattr(Limiter, "_from_catalog", together)

    async def scenario() -> None:
        await asyncio.gather(*(Caller(world, {"max_tokens": 1}).run() for _ in range(2)))

    run_with_engine(world, scenario)
    assert len(calls) == 4


def test_a_slow_admission_in_a_thread_is_not_waited_for(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may use a portion, but takes none before it is done with its prompt."""
    world.tenants.set_quota("acme", PORTION)
    monkeypatch.setattr("prefixd.server.api.generate.charging.TURN_S", 90.0)
    resolves, quick_done = threading.Event(), threading.Event()
    resolve = PrefixResolver.resolve

    def late(self: PrefixResolver, tenant: str, model: str, user: str | None, *others: Any) -> Any:
        if user is not None:
            resolves.set()
            assert quick_done.wait(30)
        return resolve(self, tenant, model, user, *others)

    monkeypatch.setattr(PrefixResolver, "resolve", late)

    async def scenario() -> None:
        slow, quick = (Caller(world, {"max_tokens": 1, **user}) for user in ({"user": "ann"}, {}))
        running = asyncio.create_task(slow.run())
        await asyncio.to_thread(resolves.wait, 30)
        await quick.run()
        quick_done.set()
        await running
        assert slow.sent.get_nowait()["status"] == 200

    run_with_engine(world, scenario)


def test_stop_strings_are_tokenized_once_for_all_prompts(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A small body with many of both would hold up the event loop: each is a call of the
    tokenizer."""
    tokenized: list[str] = []

    def spellings(self: ByteTokenizer, text: str) -> tuple[str, ...]:
        del self
        tokenized.append(text)
        return (text,)

    monkeypatch.setattr(ByteTokenizer, "spellings", spellings)
    assert complete(client, prompt=["a", "b", "c"], stop=["x", "y"]).is_success
    assert tokenized == ["x", "y"]
