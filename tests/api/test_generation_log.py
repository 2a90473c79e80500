"""The log line of each generation."""

import threading
from typing import Any

import pytest
import structlog
from fastapi.testclient import TestClient
from sqlalchemy.exc import OperationalError

from prefixd.server.api.generate.event_stream import DONE
from prefixd.server.engine.step import Step, StepOutput
from prefixd.server.testing import ByteTokenizer
from tests.api.api_world import World, put_text
from tests.api.test_completions import complete
from tests.api.test_disconnect import Caller, run_with_engine


def lines_of(lines: list[Any]) -> list[Any]:
    return [line for line in lines if line["event"] == "generation"]


@pytest.mark.parametrize("stream", [True, False])
def test_generation_is_logged_with_tokens_and_times(
    client: TestClient, world: World, *, stream: bool
) -> None:
    manifest = put_text(client, "voice", "acme's", world.headers())
    with structlog.testing.capture_logs() as lines:
        answer = complete(
            client, model="voice", prompt=["abc", "de"], n=2, max_tokens=4, stream=stream
        )
    (line,) = lines_of(lines)
    for name in ("seconds", "first_token_seconds"):
        assert 0 < line.pop(name) < 10
    assert line.pop("id").startswith("cmpl-")
    assert line.pop("request_id") == answer.headers["x-request-id"]
    line.pop("queue_seconds", None)
    assert line == {
        "event": "generation",
        "log_level": "info",
        "tenant": "acme",
        "endpoint": "completions",
        "stream": stream,
        "outcome": "ok",
        "prefix": manifest["digest"][:12],
        "virtual_tokens": 6,
        "choices": 4,
        "prompt_tokens": 5,
        "cached_tokens": 0,
        "output_tokens": 16,
        "finish_reasons": ["length"] * 4,
    }


def database_unavailable(*_: object, **__: object) -> None:
    raise OperationalError("SELECT 1", {}, Exception("no connection"))


def test_refused_and_failed_generations_are_logged_with_their_outcome(
    client: TestClient, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with structlog.testing.capture_logs() as lines:
        complete(client, model="absent")
        world.runner.fail = True
        complete(client)
        world.tenants.set_quota("acme", {"requests_per_minute": 100})
        monkeypatch.setattr(world.limiter, "admit", lambda *_, **__: 1 / 0)
        assert complete(client).status_code == 500
        monkeypatch.setattr(world.limiter, "admit", database_unavailable)
        assert complete(client).status_code == 503
    refused, failed, broken, waiting = lines_of(lines)
    assert (broken["outcome"], waiting["outcome"]) == ("error", "unavailable")
    assert (refused["outcome"], refused["code"]) == ("refused", "model_not_found")
    assert "id" not in refused
    assert (failed["outcome"], failed["code"]) == ("error", "engine_error")
    assert failed["finish_reasons"] == ["error"]


@pytest.mark.parametrize("stream", [True, False])
def test_internal_error_during_a_response_is_sent_and_logged(
    world: World, monkeypatch: pytest.MonkeyPatch, *, stream: bool
) -> None:
    tokens: list[int] = []

    def show(_: ByteTokenizer, token_id: int, previous: int | None) -> bytes:
        tokens.append(token_id)
        return bytes([1 // (4 - len(tokens))])

    monkeypatch.setattr(ByteTokenizer, "token_bytes", show)
    sent_text, run = threading.Event(), world.runner.run

    def run_after_text(step: Step) -> StepOutput:
        """All steps but the first wait until its text is sent, so that the response has begun."""
        if stream and world.runner.steps:
            assert sent_text.wait(20)
        return run(step)

    class Watched(Caller):
        async def send(self, message: dict[str, Any]) -> None:
            await super().send(message)
            if message.get("body"):
                sent_text.set()

    monkeypatch.setattr(world.runner, "run", run_after_text)
    caller = Watched(world, {"logprobs": 0, "max_tokens": 9, "stream": stream})
    with structlog.testing.capture_logs() as lines:
        run_with_engine(world, caller.run)
    (line,) = lines_of(lines)
    assert line["outcome"] == "error"
    sent = [caller.sent.get_nowait() for _ in range(caller.sent.qsize())]
    assert sent[0]["status"] == (200 if stream else 500)
    last = sent[-1]["body"]
    assert b'"code":"internal_error"' in last
    assert b"division" not in last
    assert not stream or last.endswith(DONE)


def test_disconnect_before_the_first_token_is_logged_as_aborted(world: World) -> None:
    async def scenario() -> None:
        world.runner.gate.clear()
        caller = Caller(world, {"stream": True})
        caller.disconnects.set()
        await caller.run()
        world.runner.gate.set()

    with structlog.testing.capture_logs() as lines:
        run_with_engine(world, scenario)
    (line,) = lines_of(lines)
    assert line["outcome"] == "aborted"


def test_disconnect_at_the_last_event_is_logged_as_ok(world: World) -> None:
    """The client closes when it receives the last event: the response was complete."""

    class Leaving(Caller):
        async def send(self, message: dict[str, Any]) -> None:
            if b"[DONE]" in message.get("body", b""):
                raise OSError

    with structlog.testing.capture_logs() as lines:
        run_with_engine(world, Leaving(world, {"stream": True, "max_tokens": 3}).run)
    (line,) = lines_of(lines)
    assert (line["outcome"], line["output_tokens"]) == ("ok", 3)
