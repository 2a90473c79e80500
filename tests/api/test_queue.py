"""Priority, timeout and weight of a request, and requests that the engine does not complete."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from fastapi.testclient import TestClient

from prefixd.server.api.admitted import Admitted
from prefixd.server.api.metrics import Endpoint, TenantClass
from prefixd.server.api.request_record import RequestRecord
from prefixd.server.engine.request import (
    AdmittedRequest,
    Event,
    FinishEvent,
    FinishReason,
    QueueFull,
    SamplingParams,
    StopParams,
    TokenEvent,
)
from prefixd.server.engine.sequence import cost_of
from tests.api.api_world import MAX_POSITIONS, World, error_of
from tests.api.test_completions import complete, events


@dataclass
class Script:
    """Replaces the engine's submit and abort: records requests and runs the test's ``act``."""

    act: Callable[[AdmittedRequest, Callable[[Event], None]], None]
    submitted: list[AdmittedRequest] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)

    def submit(
        self,
        request: AdmittedRequest,
        on_event: Callable[[Event], None],
        *,
        deliver: Callable[[], None],
    ) -> None:
        def on_event_delivered(event: Event) -> None:
            on_event(event)
            deliver()

        self.act(request, on_event_delivered)
        self.submitted.append(request)


@pytest.fixture
def script(world: World, monkeypatch: pytest.MonkeyPatch) -> Script:
    """Runs requests as the engine does, unless a test changes ``act``."""
    engine = world.engine
    one = Script(engine.submit)
    monkeypatch.setattr(engine, "submit", one.submit)
    monkeypatch.setattr(engine, "abort", one.aborted.append)
    return one


def answering(*answers: Event) -> Callable[[AdmittedRequest, Callable[[Event], None]], None]:
    def act(request: AdmittedRequest, on_event: Callable[[Event], None]) -> None:
        for event in answers:
            on_event(event)

    return act


def outcome(world: World, name: str) -> float:
    labels = {"endpoint": "completions", "outcome": name}
    registry = world.metrics.registry
    return registry.get_sample_value("prefixd_generation_requests_total", labels) or 0.0


def test_speculation_can_be_refused_by_a_request(client: TestClient, script: Script) -> None:
    for value in (None, True, False):
        complete(client, speculate=value)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "speculate": False}
    assert client.post("/v1/chat/completions", json=body).status_code == 200
    assert [one.speculate for one in script.submitted] == [True, True, False, False]


def test_priority_timeout_and_kv_reuse_reach_the_engine(client: TestClient, script: Script) -> None:
    complete(client)
    complete(client, priority=-3, timeout=2.5, kv_reuse=False)
    complete(client, priority=None, timeout=None, kv_reuse=None)
    params = [(one.priority, one.timeout_s, one.kv_reuse, one.weight) for one in script.submitted]
    assert params == [(0, None, True, 1.0), (-3, 2.5, False, 1.0), (0, None, True, 1.0)]


@pytest.mark.parametrize(
    ("fields", "counted"),
    [({}, 64), ({"max_tokens": 300}, 300), ({"max_completion_tokens": 7}, 7)],
    ids=["open-ended", "limited", "limited by its new name"],
)
def test_queue_assumes_512_output_tokens_for_a_chat_without_limit(
    client: TestClient,
    script: Script,
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, int],
    counted: int,
) -> None:
    """Counted in full, sixteen such chats filled the queue of an idle server."""
    monkeypatch.setattr("prefixd.server.api.generate.admission._EXPECTED_CHAT_TOKENS", 64)
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}], **fields}
    assert client.post("/v1/chat/completions", json=body).status_code == 200
    (request,) = script.submitted
    assert cost_of(request) - len(request.prompt) == counted
    assert request.stop.max_tokens == (counted if fields else MAX_POSITIONS - len(request.prompt))


def test_weight_and_kv_reuse_of_the_tenant_reach_the_engine(
    client: TestClient, world: World, script: Script
) -> None:
    world.tenants.set_settings("acme", {"weight": 2.5, "kv_reuse": False})
    complete(client, kv_reuse=True)
    assert [(one.weight, one.kv_reuse) for one in script.submitted] == [(2.5, False)]


def test_lower_of_request_timeout_and_server_limit_applies(world: World, script: Script) -> None:
    app = world.make_app(max_request_seconds=10.0)
    with TestClient(app, headers=world.headers()) as client:
        for timeout in (None, 5, 60):
            complete(client, timeout=timeout)
    assert [one.timeout_s for one in script.submitted] == [10.0, 5.0, 10.0]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("timeout", 0),
        ("timeout", -1),
        ("timeout", "5"),
        ("timeout", True),
        ("priority", 1.5),
        ("priority", 2**31),
        ("kv_reuse", 1),
        ("speculate", "ngram"),
    ],
)
def test_invalid_queue_field_is_named_in_the_error(
    client: TestClient, name: str, value: Any
) -> None:
    answer = complete(client, **{name: value})
    assert answer.status_code == 400
    assert error_of(answer)["param"] == name


@pytest.mark.parametrize("stream", [True, False])
def test_full_queue_is_503_with_retry_after(
    client: TestClient, world: World, script: Script, *, stream: bool
) -> None:
    def full(request: AdmittedRequest, on_event: Callable[[Event], None]) -> None:
        raise QueueFull("the queue is full: 9 of 8 tokens", retry_after=3.2)

    script.act = full
    answer = complete(client, stream=stream)
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "4"
    error = error_of(answer)
    assert (error["type"], error["code"]) == ("server_error", "overloaded")
    assert error["message"] == "the queue is full: 9 of 8 tokens"
    assert outcome(world, "unavailable") == 1


def test_full_queue_is_refused_before_tokenizing(
    client: TestClient, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tenant: str, *, weight: float, background: bool) -> None:
        assert not background
        raise QueueFull(f"full for {tenant} of weight {weight:g}", retry_after=3.2)

    def work(*_: object, **__: object) -> None:
        raise AssertionError("a refused request was looked at")

    monkeypatch.setattr(world.engine, "check_room", full)
    monkeypatch.setattr(world.store, "resolve", work)
    monkeypatch.setattr(world.served.tokenizer, "encode", work)
    answer = complete(client)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "4")
    assert error_of(answer)["message"] == "full for acme of weight 1"
    assert error_of(answer)["code"] == "overloaded"


@pytest.mark.parametrize("stream", [True, False])
def test_either_all_prompts_of_a_request_are_queued_or_none(
    client: TestClient, script: Script, *, stream: bool
) -> None:
    def full_at_the_third(request: AdmittedRequest, on_event: Callable[[Event], None]) -> None:
        if len(script.submitted) == 2:
            raise QueueFull("full", retry_after=1)

    script.act = full_at_the_third
    answer = complete(client, prompt=["a", "b", "c", "d"], stream=stream)
    assert answer.status_code == 503
    first, second = (one.request_id for one in script.submitted)
    assert {first, second} <= set(script.aborted)


def test_lease_is_released_when_the_queue_is_full(
    client: TestClient, world: World, script: Script
) -> None:
    runs = script.act

    def full(request: AdmittedRequest, on_event: Callable[[Event], None]) -> None:
        raise QueueFull("full", retry_after=1)

    world.tenants.set_quota("acme", {"max_concurrent_requests": 1})
    script.act = full
    assert complete(client).status_code == 503
    script.act = runs
    assert complete(client).status_code == 200


def test_tokens_are_returned_when_the_server_is_full(
    client: TestClient, world: World, script: Script
) -> None:
    runs = script.act
    world.tenants.set_quota("acme", {"requests_per_minute": 2, "tokens_per_minute": 50})
    script.act = answering(FinishEvent(0, FinishReason.SHED, 0, error="busy", retry_after=1))
    for stream in (True, False, False):
        assert complete(client, stream=stream).status_code == 503
    script.act = runs
    headers = complete(client).headers
    assert headers["x-ratelimit-remaining-requests"] == "1"
    assert headers["x-ratelimit-remaining-tokens"] == "45"
    script.act = answering(
        TokenEvent(0, "a", (97,)), FinishEvent(0, FinishReason.SHED, 1, error="busy")
    )
    complete(client, stream=True)
    script.act = runs
    assert complete(client).status_code == 429  # a partly served request is charged


ENDS = [
    (FinishReason.TIMEOUT, 504, "timeout_error", "deadline_exceeded", "timeout"),
    (FinishReason.SHED, 503, "server_error", "overloaded", "unavailable"),
]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("end", ENDS)
def test_incomplete_finish_reasons_become_errors(
    client: TestClient, world: World, script: Script, *, end: tuple[Any, ...], stream: bool
) -> None:
    reason, status, kind, code, counted = end
    script.act = answering(
        FinishEvent(0, reason, completion_tokens=0, error="so it was", retry_after=7.0)
    )
    answer = complete(client, stream=stream)
    assert answer.status_code == status
    error = error_of(answer)
    assert (error["type"], error["code"], error["message"]) == (kind, code, "so it was")
    assert answer.headers.get("retry-after") == ("7" if status == 503 else None)
    assert outcome(world, counted) == 1


def test_timeout_during_a_stream_is_the_last_event(client: TestClient, script: Script) -> None:
    script.act = answering(
        TokenEvent(0, "he", (104, 101)),
        FinishEvent(0, FinishReason.TIMEOUT, completion_tokens=2, error="too late"),
    )
    answer = complete(client, stream=True)
    assert answer.status_code == 200
    text, last = events(answer.text)
    assert text["choices"][0]["text"] == "he"
    assert last["error"]["code"] == "deadline_exceeded"


def test_cached_tokens_are_counted_once_for_each_prompt(client: TestClient, script: Script) -> None:
    """Of the sequences of a prompt the one with the fewest counts: another computed the rest."""
    cached = iter((0, 16, 48, 32))

    def act(request: AdmittedRequest, on_event: Callable[[Event], None]) -> None:
        for index in range(request.n):
            on_event(
                FinishEvent(
                    index, FinishReason.STOP, completion_tokens=1, cached_tokens=next(cached)
                )
            )

    script.act = act
    usage = complete(client, prompt=["x" * 60, "y" * 60], n=2).json()["usage"]
    assert usage == {
        "prompt_tokens": 120,
        "completion_tokens": 4,
        "total_tokens": 124,
        "prompt_tokens_details": {"cached_tokens": 32},
    }
    cached = iter((64, 16))
    last = events(complete(client, n=2, stream=True, stream_options={"include_usage": True}).text)[
        -1
    ]
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 16}


def test_usage_before_any_sequence_ends_has_no_cached_tokens() -> None:
    request = AdmittedRequest("r", "acme", (1, 2), None, SamplingParams(), StopParams(1), n=2)
    record = RequestRecord(
        endpoint=Endpoint.COMPLETIONS,
        tenant="acme",
        tenant_class=TenantClass.STANDARD,
        served_model="tiny",
        admitted=Admitted(
            id="r",
            model="tiny",
            prefix=None,
            requests=(request,),
            num_choices=2,
            prompt_lengths=(2,),
        ),
    )
    assert record.usage()["prompt_tokens_details"] == {"cached_tokens": 0}


def test_queue_time_is_that_of_the_first_sequence_to_run(
    client: TestClient, world: World, script: Script
) -> None:
    waits = iter((0.75, 0.5, None))

    def finish_all(request: AdmittedRequest, on_event: Callable[[Event], None]) -> None:
        for index in range(request.n):
            on_event(FinishEvent(index, FinishReason.STOP, 1, queue_s=next(waits)))

    script.act = finish_all
    world.tenants.set_settings("acme", {"weight": 2})
    complete(client, n=3)
    name, labels = "prefixd_request_queue_time_seconds", {"tenant_class": "high"}
    registry = world.metrics.registry
    assert registry.get_sample_value(f"{name}_sum", labels) == 0.5
    assert registry.get_sample_value(f"{name}_count", labels) == 1
