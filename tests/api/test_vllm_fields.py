"""Fields of vLLM that both endpoints have: truncation, request ids, and neutral values."""

from typing import Any

import pytest
from fastapi.testclient import TestClient

from prefixd.server.api.generate.requests import ChatRequest, CompletionRequest
from tests.api.api_world import error_of, fake_text
from tests.api.test_chat import RENDERED, chat
from tests.api.test_completions import complete
from tests.api.test_placed_prompts import put_soft
from tests.api.test_prompt_embeds import ONE


@pytest.mark.parametrize(
    ("side", "kept"), [({}, "rest"), ({"truncation_side": "left"}, "rest"), (None, "the ")]
)
def test_prompts_are_truncated(client: TestClient, side: dict[str, Any] | None, kept: str) -> None:
    fields = {"truncation_side": "right"} if side is None else side
    body = complete(client, prompt=["the rest", "a"], truncate_prompt_tokens=4, **fields).json()
    assert [c["text"] for c in body["choices"]] == [
        fake_text(None, prompt, 8) for prompt in (kept, "a")
    ]
    assert body["usage"]["prompt_tokens"] == 5
    ids = complete(
        client, prompt=list(b"the rest"), truncate_prompt_tokens=4, return_token_ids=True, **fields
    )
    assert ids.json()["choices"][0]["prompt_token_ids"] == list(kept.encode())


def test_a_chat_and_what_it_echoes_are_truncated(client: TestClient) -> None:
    body = chat(client, truncate_prompt_tokens=6, return_token_ids=True).json()
    assert body["prompt_token_ids"] == list(RENDERED.encode())[-6:]
    echoed = complete(client, prompt="the rest", truncate_prompt_tokens=4, echo=True).json()
    assert echoed["choices"][0]["text"] == "rest" + fake_text(None, "rest", 8)


@pytest.mark.parametrize("fields", [{"prompt_embeds": ONE, "prompt": None}, {"model": "tweet"}])
def test_prompts_with_rows_are_not_truncated(client: TestClient, fields: dict[str, Any]) -> None:
    put_soft(client, "tweet", "a{prefix:0:8}{prompt}")
    error = error_of(complete(client, truncate_prompt_tokens=4, **fields))
    assert error["param"] == "truncate_prompt_tokens"


def test_a_request_id_is_the_end_of_the_response_id(client: TestClient) -> None:
    for _ in range(2):  # the same id again is no conflict
        assert complete(client, request_id="a.b-1").json()["id"] == "cmpl-a.b-1"
    assert chat(client, request_id="a").json()["id"] == "chatcmpl-a"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncation_side": "middle"}, "truncation_side"),
        ({"request_id": "a b"}, "request_id"),
        ({"request_id": "x" * 65}, "request_id"),
    ],
)
def test_other_values_are_named(client: TestClient, fields: dict[str, Any], param: str) -> None:
    for send in (complete, chat):
        error = error_of(send(client, **fields))
        assert (error["code"], error["param"]) == ("invalid_request", param)


@pytest.mark.parametrize(("send", "model"), [(complete, CompletionRequest), (chat, ChatRequest)])
def test_neutral_values_are_accepted_and_others_named(
    client: TestClient, send: Any, model: type[CompletionRequest | ChatRequest]
) -> None:
    for name, values in model.NEUTRAL.items():
        for value in values:
            answer = send(client, **{name: value})
            assert answer.status_code == 200, (name, value, answer.text)
        answer = send(client, **{name: ["no such value"]})
        assert answer.status_code == 400
        error = error_of(answer)
        assert (error["code"], error["param"]) == ("unsupported_field", name)
