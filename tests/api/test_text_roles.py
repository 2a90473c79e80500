"""Texts with the role ``system``: the system turn of each chat under them."""

from typing import Any

import pytest
from fastapi.testclient import TestClient

from prefixd.server.engine.request import PrefixKey
from tests.api.api_world import World, error_of, fake_text

TEXT = "You are kind."
HELLO = {"role": "user", "content": "hi"}
JINJA = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"


def put(client: TestClient, **fields: Any) -> dict[str, Any]:
    body = {"kind": "text", "text": TEXT, "role": "system", **fields}
    answer = client.put("/v1/prefixes/kind", json=body)
    assert answer.status_code in {200, 201}, answer.text
    manifest: dict[str, Any] = answer.json()
    return manifest


def chat(client: TestClient, *messages: dict[str, Any], **fields: Any) -> Any:
    body = {"model": "kind", "messages": messages or [HELLO], "max_tokens": 8, **fields}
    return client.post("/v1/chat/completions", json=body)


def content(answer: Any) -> str:
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


@pytest.mark.parametrize(
    ("messages", "rest"),
    [
        ([HELLO], "\nuser: hi\nassistant: "),
        (
            [{"role": "system", "content": "Be brief."}, HELLO],
            "\n\nBe brief.\nuser: hi\nassistant: ",
        ),
        (
            [{"role": "developer", "content": [{"type": "text", "text": "a"}] * 2}, HELLO],
            "\n\na\na\nuser: hi\nassistant: ",
        ),
        (
            [HELLO, {"role": "system", "content": "Be brief."}, HELLO],
            "\nuser: hi\nsystem: Be brief.\nuser: hi\nassistant: ",
        ),
    ],
)
def test_the_tokens_are_those_of_the_whole_conversation_and_its_head_is_shared(
    client: TestClient, world: World, messages: list[dict[str, Any]], rest: str
) -> None:
    manifest = put(client)
    head = len(f"system: {TEXT}")
    assert (manifest["role"], manifest["num_virtual_tokens"]) == ("system", head)
    answer = chat(client, *messages)
    assert content(answer) == fake_text(manifest["digest"], rest, 8)
    assert answer.json()["usage"]["prompt_tokens"] == len(rest)
    assert world.engine.held_prefixes() == {PrefixKey("acme", manifest["digest"])}


def test_a_conversation_that_begins_otherwise_is_the_prompt_as_a_whole(
    client: TestClient, world: World
) -> None:
    put(client, recipe={"prompt_template": JINJA})
    answer = chat(client)
    whole = f"[system]{TEXT}[user]hi"
    assert content(answer) == fake_text(None, whole, 8)
    assert answer.json()["usage"]["prompt_tokens"] == len(whole)
    assert answer.json()["prefix"]["name"] == "kind"
    assert not world.engine.held_prefixes()


def test_the_text_is_never_cut_from_a_conversation(client: TestClient) -> None:
    for recipe in ({}, {"prompt_template": JINJA}):
        put(client, recipe=recipe)
        refused = chat(client, truncate_prompt_tokens=3)
        assert (refused.status_code, error_of(refused)["param"]) == (400, "truncate_prompt_tokens")


def test_a_text_without_common_tokens_keeps_nothing_resident(
    client: TestClient, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(world.served.tokenizer), "encode_system", lambda *_: [])
    assert put(client)["num_virtual_tokens"] == 0
    assert content(chat(client)) == fake_text(None, f"system: {TEXT}\nuser: hi\nassistant: ", 8)
    refused = client.put("/v1/prefixes/kind/pin", json={})
    assert (refused.status_code, error_of(refused)["code"]) == (409, "nothing_resident")


def test_a_role_makes_another_version_and_a_completion_is_refused(client: TestClient) -> None:
    first, second = put(client), put(client, role="raw")
    assert (first["version"], second["version"], second["role"]) == (1, 2, "raw")
    assert first["digest"] != second["digest"]
    refused = client.post("/v1/completions", json={"model": "kind@1", "prompt": "hi"})
    assert (refused.status_code, error_of(refused)["code"]) == (400, "chat_prefix")
    assert "expected a chat completion" in error_of(refused)["message"]
    assert client.post("/v1/completions", json={"model": "kind", "prompt": "hi"}).status_code == 200


@pytest.mark.parametrize(
    "fields", [{"role": "user"}, {"recipe": {"prompt_template": "Q: {prompt}"}}]
)
def test_what_no_system_turn_can_be_is_refused(client: TestClient, fields: dict[str, Any]) -> None:
    body = {"kind": "text", "text": TEXT, "role": "system", **fields}
    refused = client.put("/v1/prefixes/kind", json=body)
    assert refused.status_code == (400 if "role" in fields else 422)
    put(client)
    url = "/v1/prefixes/kind/versions/1"
    patched = client.patch(url, json={"prompt_template": "Q: {prompt}"})
    assert (patched.status_code, error_of(patched)["code"]) == (422, "malformed_template")


def test_a_base_without_a_system_turn_refuses_the_role(
    client: TestClient, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> list[int]:
        raise ValueError("this model has no chat template")

    monkeypatch.setattr(type(world.served.tokenizer), "encode_system", refuse)
    body = {"kind": "text", "text": TEXT, "role": "system"}
    refused = client.put("/v1/prefixes/kind", json=body)
    assert refused.status_code == 422
    assert (error_of(refused)["code"], error_of(refused)["param"]) == ("unsupported_role", "role")
    assert "this model has no chat template" in error_of(refused)["message"]


def test_a_stored_file_keeps_its_role(client: TestClient) -> None:
    manifest = put(client)
    file = client.get("/v1/prefixes/kind/versions/1/content").content
    octets = {"content-type": "application/octet-stream"}
    copy = client.put("/v1/prefixes/copy", content=file, headers=octets).json()
    assert (copy["role"], copy["digest"]) == ("system", manifest["digest"])
    assert content(chat(client, model="copy")) == content(chat(client))
