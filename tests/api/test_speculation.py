"""Answers of a server whose steps give several tokens of a sequence."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from prefixd.server import testing
from prefixd.server.engine.row_costs import RowCosts
from tests.api.api_world import World, make_world

LETTERS, PROMPT = "abcde", "abcdeabcde"


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """The model writes the alphabet's first five letters, again and again."""
    monkeypatch.setattr(
        testing, "fake_next_token", lambda _, tokens: ord(LETTERS[len(tokens) % len(LETTERS)])
    )
    # Measured times would decide otherwise how many tokens are proposed.
    monkeypatch.setattr(RowCosts, "needs_plain", lambda *_: False)
    monkeypatch.setattr(RowCosts, "slowdown", lambda *_: 1.0)
    with make_world(tmp_path, speculate=True) as world:
        yield world


@pytest.fixture
def client(world: World) -> Iterator[TestClient]:
    with TestClient(world.app, headers=world.headers()) as client:
        yield client


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 40, **fields}


def complete(client: TestClient, **fields: Any) -> Any:
    answer = client.post("/v1/completions", json=body(**fields))
    assert answer.status_code == 200, answer.text
    return answer.json()


def stream(client: TestClient, **fields: Any) -> list[Any]:
    options = {"stream": True, "stream_options": {"include_usage": True}}
    answer = client.post("/v1/completions", json=body(**options, **fields))
    frames = [frame.removeprefix("data: ") for frame in answer.text.split("\n\n") if frame]
    assert frames[-1] == "[DONE]"
    return [json.loads(frame) for frame in frames[:-1]]


def counter(world: World, name: str) -> float:
    return world.metrics.registry.get_sample_value(f"prefixd_{name}_total") or 0.0


@pytest.mark.parametrize("speculate", [True, False])
def test_a_stream_has_every_token_once(
    world: World, client: TestClient, *, speculate: bool
) -> None:
    steps_before = len(world.runner.steps)
    *events, usage = stream(client, logprobs=1, speculate=speculate)
    num_steps = len(world.runner.steps) - steps_before
    choices = [event["choices"][0] for event in events]
    assert "".join(choice["text"] for choice in choices) == 8 * LETTERS
    tokens = [token for c in choices if c["logprobs"] for token in c["logprobs"]["tokens"]]
    offsets = [at for c in choices if c["logprobs"] for at in c["logprobs"]["text_offset"]]
    assert "".join(tokens) == 8 * LETTERS
    assert offsets == list(range(40))
    assert choices[-1]["finish_reason"] == "length"
    assert usage["usage"]["completion_tokens"] == 40
    assert (num_steps < 15) is speculate


def test_a_stop_string_among_accepted_tokens_ends_the_answer_there(
    world: World, client: TestClient
) -> None:
    expected = complete(client, stop="eab", speculate=False)
    steps_before = len(world.runner.steps)
    generated = counter(world, "generation_tokens")
    answer = complete(client, stop="cdeab", min_tokens=12)
    assert answer["choices"][0]["text"] == 2 * LETTERS + "ab"
    assert answer["choices"][0]["finish_reason"] == "stop"
    # Twelve tokens before the string may match, and the five of the string itself.
    assert answer["usage"]["completion_tokens"] == 17
    assert counter(world, "generation_tokens") - generated == 17
    assert len(world.runner.steps) - steps_before < 10
    assert complete(client, stop="eab")["choices"] == expected["choices"]


def test_proposed_and_accepted_tokens_are_counted(
    world: World, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    repeat = testing.fake_next_token
    monkeypatch.setattr(  # proposals for the 21st letter are wrong
        testing, "fake_next_token", lambda _, t: ord("z") if len(t) == 30 else repeat(None, t)
    )
    complete(client, speculate=False)
    assert counter(world, "spec_decode_num_draft_tokens") == 0
    steps_before = len(world.runner.steps)
    complete(client)
    num_steps = len(world.runner.steps) - steps_before
    drafted = sum(step.num_drafts for step in world.runner.steps)
    assert counter(world, "spec_decode_num_draft_tokens") == drafted
    assert counter(world, "spec_decode_num_accepted_tokens") == 40 - num_steps < drafted


def test_time_per_token_counts_each_gap(world: World, client: TestClient) -> None:
    complete(client)
    labels = {"endpoint": "completions"}
    name = "prefixd_time_per_output_token_seconds_count"
    assert world.metrics.registry.get_sample_value(name, labels) == 39
