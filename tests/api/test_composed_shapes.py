"""Compositions, and prefixes of other tenants, through responses and messages."""

from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.api.api_world import World, error_of, put_text

SHAPES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8},
    "/v1/responses": {"input": "hi", "max_output_tokens": 8},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8},
}
NEW = [path for path in SHAPES if path != "/v1/chat/completions"]
COUNT = "/v1/messages/count_tokens"


def post(client: TestClient, path: str, **fields: Any) -> Any:
    return client.post(path, json={"model": "tiny", "temperature": 0, **SHAPES[path], **fields})


def text_of(answer: Any) -> str:
    assert answer.status_code == 200, answer.text
    body = answer.json()
    if "choices" in body:
        return str(body["choices"][0]["message"]["content"])
    [block] = body["output"][0]["content"] if "output" in body else body["content"]
    return str(block["text"])


@pytest.mark.parametrize("path", NEW)
def test_a_stack_of_the_request_is_used_and_named(
    client: TestClient, world: World, path: str
) -> None:
    for name in ("company", "team"):
        put_text(client, name, f"Be kind to the {name}.", world.headers())
    stack = {"stack": ["company@1", "team"]}
    answer = post(client, path, prefix=stack)
    expected = post(client, "/v1/chat/completions", prefix=stack)
    assert text_of(answer) == text_of(expected) != text_of(post(client, path))
    assert answer.json()["prefix"] == expected.json()["prefix"]
    for name in ("x-prefixd-prefix", "x-prefixd-prefix-digest"):
        assert answer.headers[name] == expected.headers[name]
    wrong = post(client, path, prefix=stack, model="team")
    assert (wrong.status_code, error_of(wrong)["param"]) == (400, "model")


@pytest.mark.parametrize("path", [*NEW, COUNT])
@pytest.mark.parametrize(
    "fields", [{"model": "theirs@1"}, {"prefix": {"stack": ["mine", "theirs@1"]}}, {"user": "ann"}]
)
def test_a_prefix_of_another_tenant_is_the_same_as_a_missing_one(
    client: TestClient, world: World, path: str, fields: dict[str, Any]
) -> None:
    put_text(client, "mine", "Mine.", world.headers())
    body = {"model": "tiny", **SHAPES[path.removesuffix("/count_tokens")], **fields}
    if path == COUNT:
        del body["max_tokens"]
    headers = {**world.headers(), "x-request-id": "same"}
    answers = [client.post(path, json=body, headers=headers)]
    put_text(client, "theirs", "Their secret.", world.headers("beta"))
    client.put("/v1/users/ann/prefix", json={"prefix": "theirs"}, headers=world.headers("beta"))
    answers.append(client.post(path, json=body, headers=headers))
    if "user" in fields:  # unbound for this tenant: the base answers
        assert [answer.status_code for answer in answers] == [200, 200]
        assert all(answer.json().get("prefix") is None for answer in answers)
        return
    assert answers[0].status_code == 404
    assert answers[0].content == answers[1].content
    assert dict(answers[0].headers) == dict(answers[1].headers)


def test_tokens_behind_a_stack_are_counted(client: TestClient, world: World) -> None:
    put_text(client, "company", "Be kind.", world.headers())
    messages = SHAPES["/v1/messages"]["messages"]
    body = {"model": "tiny", "messages": messages, "prefix": {"stack": ["company"]}}
    counted = client.post(COUNT, json=body).json()["input_tokens"]
    usage = post(client, "/v1/messages", prefix=body["prefix"], kv_reuse=False).json()["usage"]
    assert counted == usage["input_tokens"]
