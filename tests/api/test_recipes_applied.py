"""Recipes applied to requests: the tokens that the model sees, and what the response says."""

import json
import threading
from dataclasses import replace
from typing import Any

import pytest
from fastapi.testclient import TestClient

from prefixd.server.engine.request import PrefixKey
from tests.api.api_world import World, error_of, fake_text
from tests.api.test_prefix_routes import files

URL = "/v1/prefixes/mood/versions/1"
JINJA = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<answer>{% endif %}"
)
HELLO = {"role": "user", "content": "hi {prompt}"}


def upload(client: TestClient, recipe: dict[str, Any] | None, *, kind: str = "soft") -> str:
    """Upload ``mood`` with a recipe; its digest."""
    if kind == "soft":
        parts = {} if recipe is None else {"recipe": ("r", json.dumps(recipe))}
        answer = client.put("/v1/prefixes/mood", files={**files(), **parts})
    else:
        body = {"kind": "text", "text": "be kind", "recipe": recipe}
        answer = client.put("/v1/prefixes/mood", json=body)
    assert answer.status_code == 201, answer.text
    digest: str = answer.json()["digest"]
    return digest


def chat(client: TestClient, *messages: dict[str, Any], **fields: Any) -> Any:
    body = {"model": "mood", "messages": messages or [HELLO], **fields}
    return client.post("/v1/chat/completions", json=body)


def complete(client: TestClient, prompt: Any = "hi {prompt}", **fields: Any) -> Any:
    body = {"model": "mood", "prompt": prompt, **fields}
    return client.post("/v1/completions", json=body)


def content(answer: Any) -> str:
    assert answer.status_code == 200, answer.text
    choice = answer.json()["choices"][0]
    text: str = choice["text"] if "text" in choice else choice["message"]["content"]
    return text


@pytest.mark.parametrize("kind", ["soft", "text"])
@pytest.mark.parametrize(
    ("recipe", "seen"),
    [
        ({}, "user: hi {prompt}\nassistant: "),
        ({"prompt_template": "Q: {prompt} A:"}, "Q: hi {prompt} A:"),
        ({"prompt_template": "{{prompt} {x} {prompt}"}, "{prompt} {x} hi {prompt}"),
        (
            {"prompt_template": "Q: {prompt} A:", "input": "chat"},
            "Q: user: hi {prompt}\nassistant:  A:",
        ),
        ({"prompt_template": JINJA}, "<user>hi {prompt}<answer>"),
    ],
)
def test_a_chat_is_rendered_by_the_recipe(
    client: TestClient, recipe: dict[str, Any], seen: str, kind: str
) -> None:
    digest = upload(client, recipe, kind=kind)
    answer = chat(client, max_tokens=8)
    assert content(answer) == fake_text(digest, seen, 8)
    assert answer.json()["usage"]["prompt_tokens"] == len(seen)
    assert answer.json()["prefix"]["recipe_revision"] == 1
    assert "warnings" not in answer.json()
    parts = {"role": "user", "content": [{"type": "text", "text": "hi {prompt}"}]}
    assert content(chat(client, parts, max_tokens=8)) == fake_text(digest, seen, 8)


@pytest.mark.parametrize(
    ("recipe", "seen"),
    [
        ({}, "hi {prompt}"),
        ({"prompt_template": "Q: {prompt} A:"}, "Q: hi {prompt} A:"),
        ({"prompt_template": "Q: {prompt} A:", "input": "chat"}, "Q: hi {prompt} A:"),
        ({"prompt_template": JINJA}, "<user>hi {prompt}<answer>"),
    ],
)
def test_a_completion_is_placed_by_the_recipe_on_request(
    client: TestClient, recipe: dict[str, Any], seen: str
) -> None:
    digest = upload(client, recipe)
    assert content(complete(client, apply_recipe=True)) == fake_text(digest, seen, 16)
    for without in ({}, {"apply_recipe": False}):
        assert content(complete(client, **without)) == fake_text(digest, "hi {prompt}", 16)
    assert content(complete(client, model="tiny", apply_recipe=True)) == fake_text(
        None, "hi {prompt}", 16
    )


def test_markers_with_input_text_take_the_message_itself(client: TestClient) -> None:
    digest = upload(client, {"prompt_template": "{prefix:0:3}Q: {prompt} A:", "input": "text"})
    assert content(chat(client, max_tokens=8)) == fake_text(digest, "Q: hi {prompt} A:", 8)


def test_token_ids_are_placed_between_the_texts_of_a_template(client: TestClient) -> None:
    digest = upload(client, {"prompt_template": "Q: {prompt} A:"})
    answer = complete(client, list(b"abc"), apply_recipe=True)
    assert content(answer) == fake_text(digest, "Q: abc A:", 16)
    client.patch(URL, json={"prompt_template": JINJA})
    refused = complete(client, list(b"abc"), apply_recipe=True)
    assert (refused.status_code, error_of(refused)["param"]) == (400, "prompt")


def test_the_request_wins_field_by_field(client: TestClient) -> None:
    digest = upload(client, {"max_tokens": 5, "stop": ["zz"], "temperature": 0, "top_p": 0.5})
    seen = "user: hi {prompt}\nassistant: "
    assert content(chat(client)) == fake_text(digest, seen, 5)
    assert content(chat(client, max_tokens=7)) == fake_text(digest, seen, 7)
    assert content(chat(client, max_completion_tokens=9)) == fake_text(digest, seen, 9)
    assert content(complete(client)) == fake_text(digest, "hi {prompt}", 16)
    assert content(complete(client, apply_recipe=True)) == fake_text(digest, "hi {prompt}", 5)
    whole = fake_text(digest, seen, 12)
    client.patch(URL, json={"recipe": {"stop": [whole[3]], "max_tokens": 12}})
    assert content(chat(client)) == whole[: whole.index(whole[3])]
    assert content(chat(client, stop=[])) == whole


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_sampling_of_the_recipe_reaches_the_sampler(
    client: TestClient, world: World, path: str
) -> None:
    upload(client, {"temperature": 0.25, "top_p": 0.5})
    prompt = {"messages": [HELLO]} if "chat" in path else {"prompt": "a", "apply_recipe": True}
    for fields in ({}, {"temperature": 1.5}, {"top_p": 0.75, "temperature": None}):
        body = {"model": "mood", "max_tokens": 1, **prompt, **fields}
        assert client.post(path, json=body).status_code == 200
    sampled = [chunk.sampling for step in world.runner.steps for chunk in step.chunks]
    used = [(sampling.temperature, sampling.top_p) for sampling in sampled if sampling]
    assert used == [(0.25, 0.5), (1.5, 0.5), (0.25, 0.75)]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_defaults_of_the_model_hold_where_neither_request_nor_recipe_says(
    world: World, path: str
) -> None:
    stated = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2}
    world.served = replace(world.served, sampling_defaults=stated)
    prompt = {"messages": [HELLO]} if "chat" in path else {"prompt": "a", "apply_recipe": True}
    with TestClient(world.make_app(), headers=world.headers()) as client:
        upload(client, {"temperature": 0.25})
        for fields in ({"model": "tiny"}, {}, {"top_k": 0, "min_p": 0, "temperature": 2}):
            body = {"model": "mood", "max_tokens": 1, **prompt, **fields}
            assert client.post(path, json=body).status_code == 200
    sampled = [chunk.sampling for step in world.runner.steps for chunk in step.chunks]
    used = [(s.temperature, s.top_p, s.top_k, s.min_p, s.repetition_penalty) for s in sampled if s]
    assert used == [(0.5, 0.9, 7, 0.1, 1.2), (0.25, 0.9, 7, 0.1, 1.2), (2.0, 0.9, 0, 0.0, 1.2)]


def test_a_limit_of_the_recipe_is_capped_at_the_room(client: TestClient) -> None:
    upload(client, {"max_tokens": 100_000})
    answer = chat(client)
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] < 400


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "be brief"}, HELLO],
        [HELLO, {"role": "assistant", "content": "yes"}, HELLO],
        [{"role": "assistant", "content": "yes"}],
    ],
)
def test_a_version_that_takes_a_text_refuses_other_conversations(
    client: TestClient, messages: list[dict[str, Any]]
) -> None:
    upload(client, {"prompt_template": "Q: {prompt} A:"})
    refused = chat(client, *messages)
    assert refused.status_code == 400
    error = error_of(refused)
    assert (error["code"], error["param"]) == ("text_recipe", "messages")
    assert f"received {len(messages)} messages" in error["message"]
    parts = {"role": "user", "content": [{"type": "prefix", "from": 0, "to": 1}]}
    assert error_of(chat(client, parts))["code"] == "misplaced_prefix"


def warnings_of(stream: str) -> list[Any]:
    chunks = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    return [chunk.get("warnings") for chunk in chunks]


def test_a_chat_to_a_text_trained_version_without_a_template_is_answered_with_a_warning(
    client: TestClient,
) -> None:
    digest = upload(client, {"input": "text"})
    answer = chat(client, max_tokens=8)
    assert content(answer) == fake_text(digest, "user: hi {prompt}\nassistant: ", 8)
    [warning] = answer.json()["warnings"]
    assert "mood@1 was trained on plain texts and has no prompt_template" in warning
    first, *others = warnings_of(chat(client, max_tokens=8, stream=True).text)
    assert first == [warning]
    assert len(others) > 2
    assert set(others) == {None}
    assert "warnings" not in complete(client).json()


def test_a_template_that_says_nothing_is_named_in_a_warning(
    client: TestClient, world: World
) -> None:
    digest = upload(client, {})
    with world.store.change("acme") as tx:  # as earlier servers stored it
        tx.connection.exec_driver_sql(
            'UPDATE versions SET metadata_json = \'{"prompt_template": "no place"}\''
        )
    assert content(chat(client, max_tokens=8)) == fake_text(
        digest, "user: hi {prompt}\nassistant: ", 8
    )
    [warning] = chat(client, max_tokens=1).json()["warnings"]
    assert "it is not applied" in warning
    stream = complete(client, max_tokens=8, apply_recipe=True, stream=True).text
    first, *others = warnings_of(stream)
    assert first == [warning]
    assert set(others) == {None}


def test_continue_final_message_ends_with_it_under_a_template_of_the_version(
    client: TestClient,
) -> None:
    digest = upload(client, {"prompt_template": JINJA + "{{ '<end>' }}"})
    messages = [HELLO, {"role": "assistant", "content": "It is "}]
    answer = chat(client, *messages, continue_final_message=True, max_tokens=8)
    assert content(answer) == fake_text(digest, "<user>hi {prompt}<assistant>It is", 8)
    client.patch(URL, json={"prompt_template": "{{ messages[0].content }}"})
    refused = chat(client, *messages, continue_final_message=True)
    assert error_of(refused)["code"] == "chat_template"


def test_a_change_under_load_holds_for_new_requests_alone_and_compiles_nothing(
    client: TestClient, world: World
) -> None:
    digest = upload(client, {"prompt_template": "A: {prompt}", "max_tokens": 40})
    world.runner.hold_after = 4
    answers: list[Any] = []
    running = threading.Thread(target=lambda: answers.append(chat(client)))
    running.start()
    assert world.runner.held.wait(20)
    world.runner.hold_after = None
    assert world.engine.held_prefixes() == {PrefixKey("acme", digest)}
    patched = client.patch(
        URL, json={"recipe": {"prompt_template": "B: {prompt}", "max_tokens": 3}}
    )
    assert (patched.status_code, patched.json()["recipe_revision"]) == (200, 2)
    newer = threading.Thread(target=lambda: answers.append(chat(client)))
    newer.start()
    world.runner.gate.set()
    running.join(20)
    newer.join(20)
    by_revision = {a.json()["prefix"]["recipe_revision"]: content(a) for a in answers}
    assert by_revision == {
        1: fake_text(digest, "A: hi {prompt}", 40),
        2: fake_text(digest, "B: hi {prompt}", 3),
    }
    assert sum(bool(step.compiles) for step in world.runner.steps) == 1
    assert {a.json()["prefix"]["digest"] for a in answers} == {digest}


def test_a_version_that_takes_a_text_refuses_tools(client: TestClient) -> None:
    upload(client, {"prompt_template": "Q: {prompt} A:"})
    function = {"name": "look", "parameters": {"type": "object", "properties": {}}}
    tools = [{"type": "function", "function": function}]
    refused = chat(client, tools=tools, tool_choice="required")
    assert (refused.status_code, error_of(refused)["code"]) == (400, "text_recipe")
    assert error_of(refused)["param"] == "tools"


def test_a_stop_of_the_recipe_cuts_neither_json_nor_calls(client: TestClient) -> None:
    upload(client, {"stop": ["o", "name"]}, kind="text")
    schema = {"enum": ["dog"]}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    asked = {"response_format": form}
    answer = chat(client, max_tokens=20, **asked)
    assert content(answer) == '"dog"'
    assert content(chat(client, max_tokens=20, stop="o", **asked)) == '"d'
    tools = [{"type": "function", "function": {"name": "f"}}]
    called = chat(client, max_tokens=20, tools=tools, tool_choice="required").json()
    assert called["choices"][0]["finish_reason"] == "length"
    placed = {"structured_outputs": {"json": schema}, "apply_recipe": True, "max_tokens": 20}
    assert content(complete(client, **placed)) == '"dog"'
