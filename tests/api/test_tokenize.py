"""POST /tokenize and POST /detokenize."""

from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.api.api_world import MAX_POSITIONS, World, error_of, put_text
from tests.api.test_placed_prompts import put_soft


def ask(client: TestClient, path: str = "tokenize", **fields: Any) -> Any:
    return client.post(f"/{path}", json=fields)


def test_a_prompt_has_the_tokens_of_a_completion(client: TestClient) -> None:
    answer = ask(client, model="tiny", prompt="hi", return_token_strs=True)
    assert answer.json() == {
        "count": 2,
        "max_model_len": MAX_POSITIONS,
        "tokens": [104, 105],
        "token_strs": ["h", "i"],
        "num_virtual_tokens": 0,
    }
    assert ask(client, prompt="hi").json()["token_strs"] is None
    assert ask(client, prompt="").json()["tokens"] == []
    assert ask(client, prompt="hi", add_special_tokens=False).json()["tokens"] == [104, 105]


def test_messages_have_the_tokens_of_a_chat(client: TestClient) -> None:
    messages = [{"role": "user", "content": "hi"}]
    answer = ask(client, model="tiny", messages=messages).json()
    assert bytes(answer["tokens"]) == b"user: hi\nassistant: "
    answer = ask(client, messages=messages, add_generation_prompt=False).json()
    assert bytes(answer["tokens"]) == b"user: hi\n"


def test_a_prefix_counts_its_virtual_tokens_apart(client: TestClient, world: World) -> None:
    put_text(client, "voice", "terse", world.headers())
    put_soft(client, "tweet", "Tweet: {prompt}{prefix:0:8}")
    answer = ask(client, model="voice", prompt="hi").json()
    assert (answer["count"], answer["num_virtual_tokens"]) == (2, 5)
    assert answer["max_model_len"] == MAX_POSITIONS - 5
    answer = ask(client, model="tweet", prompt="hi").json()
    assert bytes(answer["tokens"]) == b"Tweet: hi"
    assert answer["num_virtual_tokens"] == 8


def test_tokens_become_their_text_with_special_ones(client: TestClient) -> None:
    answer = ask(client, "detokenize", model="tiny", tokens=[104, 105, 256])
    assert answer.json() == {"prompt": "hi<end>"}
    assert ask(client, "detokenize", tokens=[]).json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("tokenize", {}, "prompt"),
        ("tokenize", {"prompt": "x", "messages": [{"role": "user", "content": "x"}]}, "prompt"),
        ("tokenize", {"prompt": "x", "add_generation_prompt": True}, "add_generation_prompt"),
        (
            "tokenize",
            {
                "messages": [{"role": "user", "content": "x"}],
                "continue_final_message": True,
            },
            "continue_final_message",
        ),
        ("tokenize", {"prompt": "x", "model": "missing"}, "model"),
        ("detokenize", {"tokens": [999]}, "tokens"),
        ("detokenize", {"tokens": "x"}, "tokens"),
        ("detokenize", {}, "tokens"),
    ],
)
def test_wrong_fields_are_named(
    client: TestClient, path: str, fields: dict[str, Any], param: str
) -> None:
    answer = ask(client, path, **fields)
    assert answer.status_code in {400, 404}, answer.text
    assert error_of(answer)["param"] == param
