"""POST /v1/chat/completions, whole and streamed."""

import json
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.api.api_world import MAX_POSITIONS, World, error_of, fake_text, put_text

USER = {"role": "user", "content": "hi"}
RENDERED = "user: hi\nassistant: "


def chat(client: TestClient, **fields: Any) -> Any:
    body = {"model": "tiny", "messages": [USER], "max_tokens": 6, **fields}
    return client.post("/v1/chat/completions", json=body)


def test_chat_response_has_openai_fields_and_the_prefix(client: TestClient, world: World) -> None:
    manifest = put_text(client, "voice", "Be kind.", world.headers())
    body = chat(client, model="voice").json()
    assert body["object"] == "chat.completion"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": fake_text(manifest["digest"], RENDERED, 6),
                "refusal": None,
            },
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
            "token_ids": None,
        }
    ]
    assert body["prefix"]["version"] == 1
    assert body["usage"]["prompt_tokens"] == len(RENDERED)


def test_developer_role_and_text_parts_are_rendered(client: TestClient) -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "assistant", "content": "ok", "refusal": None, "tool_calls": None, "audio": None},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    text = "system: be brief\nassistant: ok\nuser: a\nb\nassistant: "
    body = chat(client, messages=messages).json()
    assert body["choices"][0]["message"]["content"] == fake_text(None, text, 6)


def test_chat_without_max_tokens_may_fill_the_context(client: TestClient) -> None:
    body = chat(client, max_tokens=None).json()
    assert body["usage"]["total_tokens"] == MAX_POSITIONS
    assert chat(client, max_completion_tokens=3).json()["usage"]["completion_tokens"] == 3


def test_chat_logprobs_list_each_token(client: TestClient) -> None:
    logprobs = chat(client, logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]
    assert logprobs["refusal"] is None
    text = fake_text(None, RENDERED, 6)
    assert "".join(entry["token"] for entry in logprobs["content"]) == text
    first = logprobs["content"][0]
    assert first["bytes"] == list(text[0].encode())
    assert first["logprob"] == -0.5
    assert [len(entry["top_logprobs"]) for entry in logprobs["content"]] == [2] * 6
    plain = chat(client, logprobs=True).json()["choices"][0]["logprobs"]["content"]
    assert [entry["top_logprobs"] for entry in plain] == [[]] * 6


def test_chat_stream_begins_with_the_role(client: TestClient, world: World) -> None:
    manifest = put_text(client, "voice", "Be kind.", world.headers())
    answer = chat(client, model="voice", n=2, stream=True, stream_options={"include_usage": True})
    frames = answer.text.strip().split("\n\n")
    assert frames[-1] == "data: [DONE]"
    chunks = [json.loads(frame.removeprefix("data: ")) for frame in frames[:-1]]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    for index in range(2):
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(c["delta"].get("content", "") for c in mine) == fake_text(
            manifest["digest"], RENDERED, 6
        )
        assert mine[-1]["finish_reason"] == "length"
        assert mine[-1]["delta"]["content"]
    assert chunks[-1]["usage"]["completion_tokens"] == 12


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"audio": {"voice": "x"}}, "audio", "not supported"),
        ({"modalities": ["audio"]}, "modalities", "not supported"),
        ({"prediction": {"type": "content"}}, "prediction", "not supported"),
        ({"top_logprobs": 2}, "top_logprobs", "'logprobs': true"),
        ({"messages": []}, "messages", "at least 1"),
    ],
)
def test_invalid_chat_field_is_named_in_the_error(
    client: TestClient, fields: dict[str, Any], param: str | None, words: str
) -> None:
    answer = chat(client, **fields)
    assert answer.status_code == 400, answer.text
    error = error_of(answer)
    assert error["param"] == param
    assert words in error["message"]


def test_neutral_values_of_unsupported_chat_fields_are_accepted(client: TestClient) -> None:
    answer = chat(
        client,
        tools=[],
        tool_choice="none",
        reasoning_effort="none",
        response_format={"type": "text"},
        parallel_tool_calls=True,
        modalities=["text"],
        audio=None,
        verbosity="medium",
    )
    assert answer.status_code == 200


def test_chat_template_error_is_a_bad_request(client: TestClient, world: World) -> None:
    def refuse(messages: object, **_options: object) -> str:
        raise ValueError("this model has no chat template")

    world.served.tokenizer.render_chat = refuse  # type: ignore[method-assign]
    answer = chat(client)
    assert answer.status_code == 400
    assert error_of(answer)["code"] == "chat_template"
