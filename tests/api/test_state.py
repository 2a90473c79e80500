"""What an operator sees of a running server: the scheduler's state, readiness, metrics."""

import asyncio
import json
from typing import Any

import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from tests.api.api_world import World, error_of, put_text
from tests.api.test_completions import complete
from tests.api.test_disconnect import Caller, run_with_engine

CANARY = "canary-4711"


def state(client: TestClient, world: World) -> Any:
    answer = client.get("/v1/admin/state", headers=world.headers("operator:all"))
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_state_of_an_idle_server(client: TestClient, world: World) -> None:
    world.add_tenant("operator")
    report = state(client, world)
    assert report["object"] == "engine_state"
    assert (report["ready"], report["trouble"]) == (True, None)
    assert report["running"] == {"count": 0, "sequences": []}
    assert report["waiting"]["count"] == 0
    assert report["pool"]["free"] == report["pool"]["blocks"]


def test_state_lists_running_sequences_and_resident_prefixes(world: World) -> None:
    world.add_tenant("operator")
    world.runner.hold_after = 4

    async def scenario() -> None:
        caller = Caller(world, {"stream": True, "max_tokens": 300, "prompt": CANARY})
        request = asyncio.create_task(caller.run())
        assert await asyncio.to_thread(world.runner.held.wait, 20)
        debug_state = asyncio.create_task(asyncio.to_thread(world.engine.state))
        while not world.engine._inbox:  # noqa: ASYNC110 - the inbox has no events
            await asyncio.sleep(0.001)
        world.runner.gate.set()
        report = await debug_state
        caller.disconnects.set()
        await request
        (sequence,) = report["running"]["sequences"]
        assert sequence["tenant"] == "acme"
        assert sequence["prompt_tokens"] == len(CANARY)
        assert sequence["output_tokens"] >= 1
        assert CANARY not in json.dumps(report)

    run_with_engine(world, scenario)


@pytest.mark.parametrize("key", ["acme", "acme:all", "operator:read"])
def test_state_requires_an_admin_key_of_the_operator(
    client: TestClient, world: World, key: str
) -> None:
    world.add_tenant("acme")
    world.add_tenant("operator")
    put_text(client, "voice", "acme's", world.headers())
    complete(client, model="voice")
    answer = client.get("/v1/admin/state", headers=world.headers(key))
    assert answer.status_code == 403
    assert "tenants" not in answer.text
    report = state(client, world)
    assert [entry["tenant"] for entry in report["prefixes"]["entries"]] == ["acme"]
    assert "voice" not in json.dumps(report)


def test_state_of_an_unresponsive_engine_is_503(
    client: TestClient, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.add_tenant("operator")

    def late() -> None:
        raise TimeoutError

    monkeypatch.setattr(world.engine, "state", late)
    answer = client.get("/v1/admin/state", headers=world.headers("operator:all"))
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    assert "long step" in error_of(answer)["message"]


def test_hanging_step_makes_the_server_not_ready(world: World) -> None:
    """New requests are refused at once; when the step ends the server is ready again."""
    engine = world.engine
    engine._watchdog_s = 0.05

    async def scenario() -> None:
        world.runner.gate.clear()
        caller = Caller(world, {"max_tokens": 3})
        request = asyncio.create_task(caller.run())
        assert await asyncio.to_thread(world.runner.entered.wait, 20)
        while engine.ready:  # noqa: ASYNC110 - the watchdog has no events
            await asyncio.sleep(0.01)
        second = Caller(world, {})
        await second.run()
        assert (await second.sent.get())["status"] == 503
        assert b"no step has ended" in (await second.sent.get())["body"]
        ready = Caller(world, {}, path="/health/ready", method="GET")
        await ready.run()
        assert (await ready.sent.get())["status"] == 503
        assert b"no step has ended" in (await ready.sent.get())["body"]
        world.runner.gate.set()
        await request
        assert (await caller.sent.get())["status"] == 200
        await asyncio.to_thread(engine.state)  # answered after the step of the last token
        assert engine.ready

    run_with_engine(world, scenario)


def test_request_timeout_applies_while_the_engine_hangs(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefixd.server.api.generate.generation._TIMEOUT_SLACK_S", 0.05)

    async def scenario() -> None:
        world.runner.gate.clear()
        caller = Caller(world, {"max_tokens": 3, "timeout": 0.05})
        await caller.run()
        assert (await caller.sent.get())["status"] == 504
        world.runner.gate.set()

    run_with_engine(world, scenario)


def samples(client: TestClient) -> dict[str, float]:
    values = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))
            values[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return values


def test_kv_reuse_is_reported_in_usage_and_metrics(client: TestClient) -> None:
    prompt = "a prompt of more than two whole blocks, said twice"
    assert len(prompt) > 3 * 16
    first, second, off = (
        complete(client, prompt=prompt, kv_reuse=reuse).json() for reuse in (True, True, False)
    )
    cached = [
        answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in (first, second, off)
    ]
    assert cached == [0, 48, 0]
    assert first["choices"] == second["choices"] == off["choices"]
    metrics = samples(client)
    assert metrics["prefixd_kv_reuse_hits_total"] == 48
    assert metrics["prefixd_kv_reuse_queries_total"] >= 2 * 48
    assert metrics["prefixd_kv_blocks{holds=reusable}"] >= 3
    assert metrics["prefixd_request_queue_time_seconds_count{tenant_class=standard}"] == 3
    assert metrics["prefixd_step_duration_seconds_count"] == metrics["prefixd_steps_total"]
    assert metrics["prefixd_iteration_tokens_total_count"] == metrics["prefixd_steps_total"]


def test_server_setting_disables_kv_reuse(world: World) -> None:
    app = world.make_app(kv_reuse=False)
    with TestClient(app, headers=world.headers()) as client:
        for _ in range(2):
            usage = complete(client, prompt="x" * 60, kv_reuse=True).json()["usage"]
            assert usage["prompt_tokens_details"] == {"cached_tokens": 0}
