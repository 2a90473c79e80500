"""``return_token_ids``, ``stop_reason`` and the counts in the chunks of a stream."""

from typing import Any

import pytest
from fastapi.testclient import TestClient

from prefixd.server.api.generate.answer_options import answer_options
from prefixd.server.api.generate.requests import CompletionRequest
from prefixd.server.engine.request import FinishEvent, FinishReason
from prefixd.server.testing import EOS
from tests.api.api_world import World, fake_text, put_text
from tests.api.test_chat import RENDERED, chat
from tests.api.test_completions import complete, events

IDS = list(b"hello")
OUTPUT = list(fake_text(None, "hello", 8).encode())
ANSWER = list(fake_text(None, RENDERED, 6).encode())


def test_completion_has_the_token_ids_of_each_choice(client: TestClient) -> None:
    body = complete(client, prompt=["hello", "bye"], n=2, return_token_ids=True).json()
    assert [choice["prompt_token_ids"] for choice in body["choices"]] == [
        *[IDS, IDS],
        *[list(b"bye"), list(b"bye")],
    ]
    assert body["choices"][0]["token_ids"] == OUTPUT
    assert "prompt_token_ids" not in body
    plain = complete(client, return_token_ids=False).json()["choices"][0]
    assert plain["token_ids"] is plain["prompt_token_ids"] is None


def test_chat_has_the_ids_of_its_prompt_once(client: TestClient) -> None:
    body = chat(client, n=2, return_token_ids=True).json()
    assert body["prompt_token_ids"] == list(RENDERED.encode())
    assert [choice["token_ids"] for choice in body["choices"]] == [ANSWER] * 2
    assert chat(client).json()["prompt_token_ids"] is None


def test_stream_has_the_prompt_once_and_the_ids_of_each_chunk(client: TestClient) -> None:
    chunks = events(complete(client, n=2, stream=True, return_token_ids=True).text)
    for index in range(2):
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        assert [c.get("prompt_token_ids") for c in mine] == [IDS] + [None] * 7
        assert [token for c in mine for token in c["token_ids"]] == OUTPUT
    first, *others = events(chat(client, stream=True, return_token_ids=True).text)
    assert first["prompt_token_ids"] == list(RENDERED.encode())
    assert not any("prompt_token_ids" in chunk for chunk in others)
    streamed = [c["choices"][0].get("token_ids", []) for c in (first, *others)]
    assert [token for ids in streamed for token in ids] == ANSWER


def test_a_token_without_text_has_a_chunk_with_its_id(client: TestClient) -> None:
    fields = {"stop": fake_text(None, "hello", 8)[3:5], "stream": True}
    chunks = events(complete(client, **fields, return_token_ids=True).text)
    ids = [token for chunk in chunks for c in chunk["choices"] for token in c["token_ids"]]
    assert ids == OUTPUT[:5]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_stream_without_output_has_the_prompt(client: TestClient) -> None:
    fields = {"max_tokens": 0, "stream": True, "return_token_ids": True, "n": 2}
    chunks = events(complete(client, **fields).text)
    assert [chunk["choices"][0].get("prompt_token_ids") for chunk in chunks] == [IDS, IDS]


def test_a_prefix_has_no_token_ids(client: TestClient, world: World) -> None:
    put_text(client, "voice", "Be kind.", world.headers())
    choice = complete(client, model="voice", return_token_ids=True).json()["choices"][0]
    assert choice["prompt_token_ids"] == IDS


@pytest.mark.parametrize("send", [complete, chat])
def test_tokens_of_logprobs_are_named_by_id(client: TestClient, send: Any) -> None:
    wanted = {"logprobs": 1} if send is complete else {"logprobs": True, "top_logprobs": 1}
    fields = {**wanted, "return_tokens_as_token_ids": True, "return_token_ids": True}
    choice = send(client, **fields).json()["choices"][0]
    logprobs = choice["logprobs"]
    if send is complete:
        names, tables = logprobs["tokens"], [list(table) for table in logprobs["top_logprobs"]]
    else:
        names = [entry["token"] for entry in logprobs["content"]]
        tables = [[top["token"] for top in entry["top_logprobs"]] for entry in logprobs["content"]]
    assert names == [f"token_id:{token}" for token in choice["token_ids"]]
    assert [table[0] for table in tables] == names


def test_stop_reason_is_the_string_or_the_token_that_ended_the_text(client: TestClient) -> None:
    text = fake_text(None, "hello", 8)
    assert complete(client, stop=text[3]).json()["choices"][0]["stop_reason"] == text[3]
    by_id = complete(client, stop_token_ids=[OUTPUT[3]]).json()["choices"][0]
    assert (by_id["finish_reason"], by_id["stop_reason"]) == ("stop", OUTPUT[3])
    last = events(complete(client, stop=text[3], stream=True).text)[-1]["choices"][0]
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", text[3])


@pytest.mark.parametrize(("ignore_eos", "reason"), [(None, None), (True, EOS)])
def test_end_of_text_is_a_stop_reason_only_where_it_was_asked_for(
    world: World, ignore_eos: bool | None, reason: int | None
) -> None:
    body = CompletionRequest(model="tiny", prompt="x", ignore_eos=ignore_eos)
    options = answer_options(body, world.served, top_logprobs=None)
    end = FinishEvent(0, FinishReason.STOP, completion_tokens=1, stop=EOS)
    assert options.ending(end) == {"finish_reason": "stop", "stop_reason": reason}


@pytest.mark.parametrize("send", [complete, chat])
def test_the_finish_reason_comes_with_the_last_text(client: TestClient, send: Any) -> None:
    last = events(send(client, stream=True).text)[-1]["choices"][0]
    assert last["finish_reason"] == "length"
    assert last.get("text") or last["delta"]["content"]


@pytest.mark.parametrize("send", [complete, chat])
def test_continuous_usage_counts_up_in_each_chunk(client: TestClient, send: Any) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = events(send(client, stream=True, stream_options=options).text)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    whole = 8 if send is complete else 6
    assert counts == list(range(0 if send is chat else 1, whole + 1))
    for chunk in (*chunks, last):
        usage = chunk["usage"]
        assert usage["prompt_tokens"] == (5 if send is complete else len(RENDERED))
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], whole)


def test_continuous_usage_counts_each_choice_by_itself(client: TestClient) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    fields = {"prompt": ["hello", "bye"], "n": 2, "stream": True, "stream_options": options}
    *chunks, last = events(complete(client, **fields).text)
    for index, length in enumerate([5, 5, 3, 3]):
        mine = [chunk["usage"] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert [usage["completion_tokens"] for usage in mine] == list(range(1, 9))
        assert {usage["prompt_tokens"] for usage in mine} == {length}
    assert last["usage"]["total_tokens"] == 8 + 32


def test_continuous_usage_needs_include_usage(client: TestClient) -> None:
    for options in ({"continuous_usage_stats": True}, {"include_usage": False}):
        chunks = events(complete(client, stream=True, stream_options=options).text)
        assert not any(chunk.get("usage") for chunk in chunks)
