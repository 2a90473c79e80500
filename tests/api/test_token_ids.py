"""Token ids that the model lacks are refused at admission, from every source."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from fastapi.testclient import TestClient

from prefixd.server.engine.prefix_source import PREFIX_NOT_FOUND, PREFIX_REFUSED, PrefixUnavailable
from prefixd.server.testing import EOS
from tests.api.api_world import World, error_of, put_text
from tests.api.test_chat import chat
from tests.api.test_completions import complete

LIMIT, LOGITS = 0x7B, 0x79
"""Embeddings end with ``z``, logits with ``x``."""


@pytest.fixture
def narrow(world: World) -> Iterator[TestClient]:
    """A client of a model with fewer embeddings than its tokenizer has tokens, and fewer logits."""
    world.served = replace(
        world.served, vocab_size=LIMIT, logits_size=LOGITS, eos_token_ids=frozenset()
    )
    world.runner.vocab_size = LIMIT
    with TestClient(world.make_app(), headers=world.headers()) as client:
        yield client


def refused(answer: Any, status: int, param: str, *, limit: int = LIMIT) -> None:
    assert answer.status_code == status, answer.text
    error = error_of(answer)
    assert error["param"] == param
    assert f"from 0 to {limit - 1}" in error["message"]


@pytest.mark.parametrize("prompt", ["a~", [97, 126], ["a", "~"], [[97], [126]]])
def test_prompt_beyond_the_embeddings_is_refused(narrow: TestClient, prompt: Any) -> None:
    assert complete(narrow, prompt="z").status_code == 200
    refused(complete(narrow, prompt=prompt), 400, "prompt")


def test_rendered_chat_beyond_the_embeddings_is_refused(narrow: TestClient) -> None:
    assert chat(narrow).status_code == 200
    refused(chat(narrow, messages=[{"role": "user", "content": "a~"}]), 400, "messages")


def test_text_prefix_beyond_the_embeddings_is_refused_at_upload(narrow: TestClient) -> None:
    answer = narrow.put("/v1/prefixes/padded", json={"kind": "text", "text": "a~"})
    refused(answer, 422, "text")
    assert error_of(answer)["code"] == "unknown_token"
    assert narrow.get("/v1/prefixes/padded").status_code == 404


@pytest.mark.parametrize(
    "fields", [{"stop_token_ids": [LOGITS]}, {"logit_bias": {str(LOGITS): 1.0}}]
)
def test_ids_beyond_the_logits_are_refused(narrow: TestClient, fields: dict[str, Any]) -> None:
    refused(complete(narrow, **fields), 400, next(iter(fields)), limit=LOGITS)
    assert complete(narrow, stop_token_ids=[LOGITS - 1], min_tokens=2).status_code == 200


@pytest.mark.parametrize(
    ("code", "status"), [(PREFIX_REFUSED, 422), (PREFIX_NOT_FOUND, 404), (None, 500)]
)
@pytest.mark.parametrize("stream", [False, True])
def test_stored_prefix_that_fails_to_load_is_the_tenants_error(
    world: World, monkeypatch: pytest.MonkeyPatch, code: str | None, status: int, *, stream: bool
) -> None:
    def refuse(_: object) -> object:
        raise PrefixUnavailable("the prefix is refused", code=code)

    with TestClient(world.app, headers=world.headers()) as client:
        put_text(client, "old", "a text", world.headers())
        monkeypatch.setattr(world.engine.core._fetcher._source, "fetch", refuse)
        answer = complete(client, model="old", stream=stream)
        assert answer.status_code == status
        error = error_of(answer)
        assert (error["message"], error["code"]) == (
            "the prefix is refused",
            code or "engine_error",
        )
        assert client.get("/health/ready").status_code == 200


SEEDS = "a whole number from -9223372036854775808 to 9223372036854775807"


@pytest.mark.parametrize("seed", [2**63, 2**64, 2**64 - 1, -(2**63) - 1, 10**30, 1.5, "7", True])
@pytest.mark.parametrize("send", [complete, chat])
def test_seed_beyond_64_bits_is_refused(client: TestClient, send: Any, seed: Any) -> None:
    answer = send(client, seed=seed)
    assert answer.status_code == 400
    assert error_of(answer)["param"] == "seed"
    assert SEEDS in error_of(answer)["message"]


@pytest.mark.parametrize("seed", [None, 0, -1, 2**63 - 1, -(2**63)])
def test_seed_of_64_bits_is_accepted(client: TestClient, seed: int | None) -> None:
    assert complete(client, seed=seed, n=2, temperature=1.0).status_code == 200


def test_a_runner_that_always_fails_makes_the_server_not_ready(
    client: TestClient, world: World
) -> None:
    world.runner.fail = True
    statuses = [complete(client).status_code for _ in range(4)]
    assert statuses == [500, 500, 500, 503]
    ready = client.get("/health/ready")
    assert (ready.status_code, ready.json()["reason"]) == (503, "the last 3 steps failed")


def test_a_poisoned_request_a_hundred_times_leaves_the_server_ready(
    client: TestClient, world: World
) -> None:
    world.runner.vocab_size = EOS  # an end-of-text id that admission believes in
    for _ in range(100):
        assert complete(client, min_tokens=1).status_code == 500
    assert client.get("/health/ready").status_code == 200
    assert complete(client, ignore_eos=True).status_code == 200
