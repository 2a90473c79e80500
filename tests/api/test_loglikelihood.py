"""POST /v1/loglikelihood: choices after a prompt."""

from typing import Any

import pytest
from fastapi.testclient import TestClient

from prefixd.server.testing import fake_generate, fake_score
from prefixd.store.artifact.kinds import Kind
from tests.api.api_world import POOL_BLOCKS, World, error_of, put_text
from tests.api.test_limits import quota
from tests.api.test_placed_prompts import put_soft

PROMPT = "The quick brown fox jumps over the lazy"
CHOICES = [" dog", " cat and the mouse", " x"]


def ask(client: TestClient, **fields: Any) -> Any:
    body = {"model": "tiny", "prompt": PROMPT, "choices": CHOICES, **fields}
    return client.post("/v1/loglikelihood", json=body)


def values(prompt: str, choice: str, digest: str | None = None) -> list[float]:
    seen = list(prompt.encode())
    scores = []
    for byte in choice.encode():
        scores.append(fake_score(digest, seen, byte))
        seen.append(byte)
    return scores


def test_each_choice_has_its_sum_and_its_tokens(client: TestClient) -> None:
    answer = ask(client).json()
    assert answer["object"] == "loglikelihood"
    for index, (choice, entry) in enumerate(zip(CHOICES, answer["choices"], strict=True)):
        expected = values(PROMPT, choice)
        assert entry == {
            "index": index,
            "logprob": pytest.approx(sum(expected)),
            "num_tokens": len(choice),
            "logprob_per_token": pytest.approx(sum(expected) / len(choice)),
            "is_greedy": False,
            "token_ids": list(choice.encode()),
            "token_logprobs": expected,
        }
    total = len(PROMPT) + sum(map(len, CHOICES))
    assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] == total
    assert answer["usage"]["completion_tokens"] == 0


def test_the_likeliest_choice_is_greedy(client: TestClient) -> None:
    likely = fake_generate(None, list(PROMPT.encode()), 4)
    entries = ask(client, choices=[likely, [*likely[:3], 0]]).json()["choices"]
    assert [entry["is_greedy"] for entry in entries] == [True, False]
    assert entries[0]["logprob"] == -2.0


def test_a_choice_is_scored_under_the_prefix_of_the_request(
    client: TestClient, world: World
) -> None:
    digest = put_text(client, "voice", "terse", world.headers())["digest"]
    client.put("/v1/users/ann/prefix", json={"prefix": "voice"})
    for fields in ({"model": "voice"}, {"user": "ann"}):
        answer = ask(client, **fields).json()
        assert answer["prefix"]["digest"] == digest
        for choice, entry in zip(CHOICES, answer["choices"], strict=True):
            assert entry["token_logprobs"] == values(PROMPT, choice, digest)
    soft = put_soft(client, "soft").json()
    assert soft["kind"] == Kind.SOFT_PROMPT
    entry = ask(client, model="soft").json()["choices"][0]
    assert entry["token_logprobs"] == values(PROMPT, CHOICES[0], soft["digest"])


def test_choices_share_the_blocks_of_their_prompt(client: TestClient, world: World) -> None:
    answer = ask(client).json()
    chunks = [chunk for step in world.runner.steps for chunk in step.chunks]
    computed = sum(len(chunk.tokens) for chunk in chunks)
    shared = len(PROMPT) // 16 * 16
    assert computed == 3 * len(PROMPT) + sum(map(len, CHOICES)) - 2 * shared
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    short = ask(client, prompt="ab").json()
    assert short["choices"][0]["token_logprobs"] == values("ab", CHOICES[0])
    last = world.runner.steps[-1]
    assert len(last.chunks) == 3, "a short prompt and its choices run together"


def test_a_prompt_of_messages_or_token_ids(client: TestClient) -> None:
    messages = [{"role": "user", "content": "hi"}]
    entry = ask(client, prompt=None, messages=messages).json()["choices"][0]
    assert entry["token_logprobs"] == values("user: hi\nassistant: ", CHOICES[0])
    entry = ask(client, prompt=list(PROMPT.encode()), choices=[[32, 33]]).json()["choices"][0]
    assert entry["token_logprobs"] == values(PROMPT, " !")


def test_whitespace_at_the_end_of_a_text_belongs_to_the_choice(client: TestClient) -> None:
    entry = ask(client, prompt=PROMPT + " ", choices=["dog"]).json()["choices"][0]
    assert entry["token_logprobs"] == values(PROMPT, " dog")


def test_quotas_count_the_prompt_once(client: TestClient, world: World) -> None:
    tokens = len(PROMPT) + sum(map(len, CHOICES))
    quota(world, tokens_per_minute=tokens + 1)
    assert ask(client).headers["x-ratelimit-remaining-tokens"] == "1"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"choices": []}, "choices", "at least 1"),
        ({"choices": [""]}, "choices[0]", "not empty"),
        ({"choices": ["a", []]}, "choices[1]", "not empty"),
        ({"choices": [" x"] * 17}, "choices", "at most 16"),
        ({"choices": [[999]]}, "choices[0]", "999"),
        ({"prompt": None}, "prompt", "neither"),
        ({"messages": [{"role": "user", "content": "x"}]}, "prompt", "both"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": "p" * 500}, "prompt", "can never fit"),
        ({"max_tokens": 3}, "max_tokens", "unknown field"),
        ({"model": "missing"}, "model", "does not exist"),
    ],
)
def test_wrong_fields_are_named(
    client: TestClient, world: World, fields: dict[str, Any], param: str, words: str
) -> None:
    answer = ask(client, **fields)
    assert answer.status_code in {400, 404}, answer.text
    assert error_of(answer)["param"] == param
    assert words in error_of(answer)["message"]
    assert world.runner.steps == []


def test_a_failure_of_a_choice_is_that_of_the_request(client: TestClient, world: World) -> None:
    world.runner.fail = True
    assert ask(client).status_code == 500
    world.runner.fail = False
    assert ask(client).status_code == 200
    assert world.engine.stats().blocks_free <= POOL_BLOCKS
