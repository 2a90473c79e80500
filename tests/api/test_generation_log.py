"""The line that the log has of each generation."""

from typing import Any

import pytest
import structlog
from fastapi.testclient import TestClient
from sqlalchemy.exc import OperationalError

from prefixd.server.api.generate.event_stream import DONE
from prefixd.server.testing import ByteTokenizer
from tests.api.api_world import World, put_text
from tests.api.test_completions import complete
from tests.api.test_disconnect import Caller, run_with_engine


def lines_of(lines: list[Any]) -> list[Any]:
    return [line for line in lines if line["event"] == "generation"]


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer(client: TestClient, world: World, *, stream: bool) -> None:
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


def away(*_: object, **__: object) -> None:
    raise OperationalError("SELECT 1", {}, Exception("no connection"))


def test_refusals_and_failures(
    client: TestClient, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with structlog.testing.capture_logs() as lines:
        complete(client, model="absent")
        world.runner.fail = True
        complete(client)
        monkeypatch.setattr(world.limiter, "admit", lambda *_, **__: 1 / 0)
        assert complete(client).status_code == 500
        monkeypatch.setattr(world.limiter, "admit", away)
        assert complete(client).status_code == 503
    refused, failed, broken, waiting = lines_of(lines)
    assert (broken["outcome"], waiting["outcome"]) == ("error", "unavailable")
    assert (refused["outcome"], refused["code"]) == ("refused", "model_not_found")
    assert "id" not in refused
    assert (failed["outcome"], failed["code"]) == ("error", "engine_error")
    assert failed["finish_reasons"] == ["error"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_fault_of_ours_in_mid_answer_is_told_and_counted_as_one(
    world: World, monkeypatch: pytest.MonkeyPatch, *, stream: bool
) -> None:
    shown: list[int] = []

    def show(_: ByteTokenizer, token_id: int) -> str:
        shown.append(token_id)
        return str(1 // (4 - len(shown)))

    monkeypatch.setattr(ByteTokenizer, "token_text", show)
    caller = Caller(world, {"logprobs": 0, "max_tokens": 9, "stream": stream})
    with structlog.testing.capture_logs() as lines:
        run_with_engine(world, caller.run)
    (line,) = lines_of(lines)
    assert line["outcome"] == "error"
    sent = [caller.sent.get_nowait() for _ in range(caller.sent.qsize())]
    assert sent[0]["status"] == (200 if stream else 500)
    *_, told, done = [message.get("body", b"") for message in sent]
    assert b'"code":"internal_error"' in (told if stream else done)
    assert b"division" not in told + done
    assert not stream or done == DONE


def test_who_leaves_before_the_first_token(world: World) -> None:
    async def scenario() -> None:
        world.runner.gate.clear()
        caller = Caller(world, {"stream": True})
        caller.leaves.set()
        await caller.run()
        world.runner.gate.set()

    with structlog.testing.capture_logs() as lines:
        run_with_engine(world, scenario)
    (line,) = lines_of(lines)
    assert line["outcome"] == "aborted"


def test_who_leaves_at_the_end_has_had_it_all(world: World) -> None:
    """The client closes with the last frame in its hands: that is no abort."""

    class Leaving(Caller):
        async def send(self, message: dict[str, Any]) -> None:
            if b"[DONE]" in message.get("body", b""):
                raise OSError

    with structlog.testing.capture_logs() as lines:
        run_with_engine(world, Leaving(world, {"stream": True, "max_tokens": 3}).run)
    (line,) = lines_of(lines)
    assert (line["outcome"], line["output_tokens"]) == ("ok", 3)
