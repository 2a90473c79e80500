"""POST /v1/completions, whole and streamed."""

import json
from typing import Any

import pytest
from fastapi.testclient import TestClient

from prefixd.server.testing import ByteTokenizer
from tests.api.api_world import MAX_POSITIONS, POOL_BLOCKS, World, error_of, fake_text, put_text


def complete(client: TestClient, **fields: Any) -> Any:
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 8, **fields}
    return client.post("/v1/completions", json=body)


def usage(prompt: int, completion: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def events(text: str) -> list[Any]:
    frames = [frame for frame in text.split("\n\n") if frame]
    assert all(frame.startswith("data: ") for frame in frames)
    assert frames[-1] == "data: [DONE]"
    return [json.loads(frame.removeprefix("data: ")) for frame in frames[:-1]]


def test_completion_of_the_base_model(client: TestClient) -> None:
    answer = complete(client)
    assert answer.status_code == 200
    body = answer.json()
    assert body["object"] == "text_completion"
    assert body["model"] == "tiny"
    assert body["prefix"] is None
    assert body["choices"] == [
        {
            "index": 0,
            "text": fake_text(None, "hello", 8),
            "logprobs": None,
            "finish_reason": "length",
            "stop_reason": None,
            "token_ids": None,
            "prompt_token_ids": None,
            "prompt_logprobs": None,
        }
    ]
    assert body["usage"] == usage(5, 8)
    assert "x-prefixd-prefix" not in answer.headers


@pytest.mark.parametrize("model", ["support", "support@1", "tiny:support", "tiny:support@1"])
def test_completion_names_the_prefix_it_used(client: TestClient, world: World, model: str) -> None:
    manifest = put_text(client, "support", "You are terse.", world.headers())
    answer = complete(client, model=model)
    used = {
        "name": "support",
        "version": 1,
        "digest": manifest["digest"],
        "chosen_by": "model",
        "recipe_revision": 1,
    }
    assert answer.json()["prefix"] == used
    assert answer.json()["model"] == model
    assert answer.json()["choices"][0]["text"] == fake_text(manifest["digest"], "hello", 8)
    assert answer.headers["x-prefixd-prefix"] == "support@1"
    assert answer.headers["x-prefixd-prefix-digest"] == manifest["digest"]


def test_each_version_of_a_prefix_generates_its_own_text(client: TestClient, world: World) -> None:
    first = put_text(client, "voice", "one", world.headers())
    second = put_text(client, "voice", "two", world.headers())
    client.put("/v1/prefixes/voice/aliases/prod", json={"version": 1})
    for model, manifest in (("voice", second), ("voice@1", first), ("voice@prod", first)):
        assert complete(client, model=model).json()["choices"][0]["text"] == fake_text(
            manifest["digest"], "hello", 8
        )


def test_prefix_of_another_tenant_is_not_found(client: TestClient, world: World) -> None:
    put_text(client, "secret", "acme only", world.headers())
    answers = []
    for name in ("secret", "absent"):
        answer = client.post(
            "/v1/completions",
            json={"model": name, "prompt": "x"},
            headers={**world.headers("beta"), "x-request-id": "same"},
        )
        assert answer.status_code == 404
        assert error_of(answer)["code"] == "model_not_found"
        answers.append(answer.text.replace(name, "NAME"))
    assert answers[0] == answers[1]


def test_all_prompt_forms_and_n(client: TestClient) -> None:
    ids = list(b"hello")
    for prompt, texts in (
        ("hello", ["hello"]),
        (ids, ["hello"]),
        (["hello", "bye"], ["hello", "bye"]),
        ([ids, list(b"bye")], ["hello", "bye"]),
    ):
        body = complete(client, prompt=prompt, n=2).json()
        assert [choice["index"] for choice in body["choices"]] == list(range(2 * len(texts)))
        expected = [fake_text(None, text, 8) for text in texts for _ in range(2)]
        assert [choice["text"] for choice in body["choices"]] == expected
        assert body["usage"]["prompt_tokens"] == sum(len(text) for text in texts)
        assert body["usage"]["completion_tokens"] == 8 * 2 * len(texts)


def test_default_max_tokens_is_sixteen(client: TestClient) -> None:
    assert complete(client, max_tokens=None).json()["usage"]["completion_tokens"] == 16


def test_stop_string_ends_the_text_and_is_left_out(client: TestClient) -> None:
    full = fake_text(None, "hello", 8)
    body = complete(client, stop=["never this", full[3:5]]).json()
    assert body["choices"][0]["text"] == full[: full.index(full[3:5])]
    assert body["choices"][0]["finish_reason"] == "stop"
    body = complete(client, stop=full[3:5], include_stop_str_in_output=True).json()
    assert body["choices"][0]["text"].endswith(full[3:5])


def test_stop_token_id_ends_the_text(client: TestClient) -> None:
    full = fake_text(None, "hello", 8)
    body = complete(client, stop_token_ids=[ord(full[2])]).json()
    assert body["choices"][0]["finish_reason"] == "stop"
    assert body["usage"]["completion_tokens"] == full.index(full[2]) + 1


def test_completion_logprobs_are_parallel_lists(client: TestClient) -> None:
    text = fake_text(None, "hello", 4)
    logprobs = complete(client, max_tokens=4, logprobs=2).json()["choices"][0]["logprobs"]
    assert logprobs["tokens"] == list(text)
    assert logprobs["token_logprobs"] == [-0.5] * 4
    assert logprobs["text_offset"] == [0, 1, 2, 3]
    assert [len(table) for table in logprobs["top_logprobs"]] == [2] * 4
    assert logprobs["top_logprobs"][0][text[0]] == -0.5
    sampled = complete(client, max_tokens=4, logprobs=0).json()["choices"][0]["logprobs"]
    assert sampled["top_logprobs"] == [{character: -0.5} for character in text]
    assert len(sampled["token_logprobs"]) == 4


def test_stream_chunks_join_to_the_whole_text(client: TestClient, world: World) -> None:
    manifest = put_text(client, "support", "You are terse.", world.headers())
    answer = complete(
        client,
        model="support",
        n=2,
        stream=True,
        stream_options={"include_usage": True},
        logprobs=1,
    )
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-prefixd-prefix"] == "support@1"
    chunks = events(answer.text)
    used = {
        "name": "support",
        "version": 1,
        "digest": manifest["digest"],
        "chosen_by": "model",
        "recipe_revision": 1,
    }
    assert all(chunk["prefix"] == used for chunk in chunks)
    assert len({chunk["id"] for chunk in chunks}) == 1
    *pieces, last = chunks
    assert last["choices"] == []
    assert last["usage"] == usage(5, 16)
    assert all(chunk["usage"] is None for chunk in pieces)
    for index in range(2):
        mine = [c for chunk in pieces for c in chunk["choices"] if c["index"] == index]
        assert "".join(c["text"] for c in mine) == fake_text(manifest["digest"], "hello", 8)
        assert [c["finish_reason"] for c in mine] == [None] * 7 + ["length"]
        offsets = [c["logprobs"]["text_offset"][0] for c in mine]
        assert offsets == list(range(8))


def test_stream_without_stream_options_has_no_usage(client: TestClient) -> None:
    chunks = events(complete(client, stream=True).text)
    assert all("usage" not in chunk for chunk in chunks)


def test_request_beyond_max_positions_is_refused_with_token_counts(
    client: TestClient, world: World
) -> None:
    put_text(client, "long", "v" * 64, world.headers())
    answer = complete(client, model="long", prompt="p" * 300, max_tokens=100)
    assert answer.status_code == 400
    error = error_of(answer)
    assert error["code"] == "context_length_exceeded"
    for number in ("64", "300", "100", str(MAX_POSITIONS)):
        assert number in error["message"]
    assert complete(client, model="long", prompt="p" * 300, max_tokens=36).status_code == 200
    assert not any(
        chunk.prefix is not None and len(chunk.tokens) > 300
        for step in world.runner.steps
        for chunk in step.chunks
    )


def test_request_beyond_the_kv_pool_is_refused(client: TestClient, world: World) -> None:
    served = world.served
    object.__setattr__(served, "max_positions", 10_000)
    room = POOL_BLOCKS * 16 + 1
    assert complete(client, prompt="p" * (room - 1), max_tokens=1).status_code == 200
    answer = complete(client, prompt="p" * room, max_tokens=1)
    assert answer.status_code == 400
    assert "KV pool" in error_of(answer)["message"]
    assert error_of(answer)["param"] == "prompt"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": []}, "prompt", "empty"),
        ({"prompt": [[]]}, "prompt", "empty"),
        ({"prompt": 7}, "prompt", "received 7"),
        ({"prompt": [1, "a"]}, "prompt", "a list of 2"),
        ({"prompt": [257]}, "prompt", "received 257"),
        ({"prompt": [-1]}, "prompt", "received -1"),
        ({"prompt": ["a"] * 17}, "n", "at most 16"),
        ({"n": 17}, "n", "at most 16"),
        ({"n": 0}, "n", "received 0"),
        ({"max_tokens": -1}, "max_tokens", "received -1"),
        ({"max_tokens": "8"}, "max_tokens", "a string of 1 characters"),
        ({"max_tokens": 8.0}, "max_tokens", "integer"),
        ({"temperature": -1}, "temperature", "received -1"),
        ({"temperature": True}, "temperature", "received true"),
        ({"top_p": 0}, "top_p", "received 0"),
        ({"repetition_penalty": 1e-40}, "repetition_penalty", "0.01"),
        ({"repetition_penalty": 11}, "repetition_penalty", "received 11"),
        ({"logit_bias": {"257": 1}}, "logit_bias", "257"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "expected"),
        ({"stop": ""}, "stop", "1 to 1024"),
        ({"stop_token_ids": [999]}, "stop_token_ids", "999"),
        ({"min_tokens": 9}, "min_tokens", "received 9"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "'stream': true"),
        ({"best_of": 2}, "best_of", "not supported"),
        ({"suffix": "x"}, "suffix", "not supported"),
        ({"guided_json": {}}, "guided_json", "unknown field"),
        ({"model": ""}, "model", "at least 1"),
    ],
)
def test_invalid_completion_field_is_named_in_the_error(
    client: TestClient, world: World, fields: dict[str, Any], param: str | None, words: str
) -> None:
    answer = complete(client, **fields)
    assert answer.status_code == 400, answer.text
    error = error_of(answer)
    assert error["param"] == param
    assert words in error["message"]
    assert world.runner.steps == []


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b'{"model": "tiny"}', b'{"prompt": NaN}', b"\xff"]
)
def test_malformed_json_body_is_a_bad_request(client: TestClient, body: bytes) -> None:
    answer = client.post(
        "/v1/completions", content=body, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400
    error_of(answer)


def test_other_content_type_is_refused(client: TestClient) -> None:
    answer = client.post("/v1/completions", data={"model": "tiny"})
    assert answer.status_code == 400
    assert error_of(answer)["code"] == "unsupported_media_type"


def test_ignored_fields_and_neutral_values_are_accepted(client: TestClient) -> None:
    answer = complete(
        client,
        user="alice",
        metadata={"a": "b"},
        store=False,
        service_tier="auto",
        best_of=1,
        echo=False,
        suffix=None,
    )
    assert answer.status_code == 200


def test_engine_failure_is_a_500_without_details(client: TestClient, world: World) -> None:
    world.runner.fail = True
    for stream in (False, True):
        answer = complete(client, stream=stream)
        assert answer.status_code == 500
        assert error_of(answer)["code"] == "engine_error"
        assert "secret" not in answer.text
    world.runner.fail = False
    assert complete(client).status_code == 200


def test_errors_never_repeat_the_prompt(client: TestClient) -> None:
    for fields in (
        {"prompt": {"canary": "canary"}},
        {"temperature": "canary"},
        {"stop": [["canary"]]},
    ):
        answer = complete(client, **fields)
        assert answer.status_code == 400
        assert "canary" not in answer.text


def test_opening_token_is_added_once_at_the_start(
    client: TestClient, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below a text prefix the prompt continues the sequence; otherwise it begins it."""
    plain = ByteTokenizer.encode

    def with_opening(
        self: ByteTokenizer, text: str, *, add_special_tokens: bool = True
    ) -> list[int]:
        return [1] * add_special_tokens + plain(self, text)

    monkeypatch.setattr(ByteTokenizer, "encode", with_opening)
    put_text(client, "support", "You are terse.", world.headers())
    assert complete(client).json()["usage"]["prompt_tokens"] == len("hello") + 1
    assert complete(client, model="support").json()["usage"]["prompt_tokens"] == len("hello")
