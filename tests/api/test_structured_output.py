"""Structured output on both endpoints: what is asked for, what is refused, and whose time it is."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.api.api_world import World

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"kind": {"enum": ["dog", "cat"]}, "count": {"enum": [1, 2, 3]}},
    "required": ["kind", "count"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA, "strict": True}}
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


def ask(client: TestClient, path: str = CHAT, **fields: Any) -> Any:
    body: dict[str, Any] = {"model": "tiny", "max_tokens": 60, "temperature": 0}
    if path == CHAT:
        body["messages"] = [{"role": "user", "content": "hi"}]
    else:
        body["prompt"] = "hi"
    return client.post(path, json={**body, **fields})


def texts_of(answer: Any) -> list[str]:
    assert answer.status_code == 200, answer.text
    choices = answer.json()["choices"]
    return [c["message"]["content"] if "message" in c else c["text"] for c in choices]


def reasons_of(answer: Any) -> list[str]:
    return [choice["finish_reason"] for choice in answer.json()["choices"]]


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
@pytest.mark.parametrize(
    "asked",
    [
        {"response_format": FORMAT},
        {"response_format": {**FORMAT, "json_schema": {"name": "x", "schema": SCHEMA}}},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA)}},
    ],
)
def test_answer_matches_the_schema(client: TestClient, path: str, asked: dict[str, Any]) -> None:
    answer = ask(client, path, **asked)
    [text] = texts_of(answer)
    value = json.loads(text)
    assert value["kind"] in {"dog", "cat"}
    assert value["count"] in {1, 2, 3}
    assert text == json.dumps(value, separators=(",", ":"))
    assert reasons_of(answer) == ["stop"]


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_kinds_of_vllm(client: TestClient, path: str) -> None:
    def text(**asked: Any) -> str:
        return texts_of(ask(client, path, structured_outputs=asked))[0]

    assert text(choice=["yes", 'n"o\n']) in {"yes", 'n"o\n'}
    assert len(text(regex="[xyz]{5}")) == 5
    assert text(grammar='start: "q" DIGIT\nDIGIT: /[0-9]/') in {f"q{digit}" for digit in range(10)}
    assert text(json_object=True).startswith("{")
    assert texts_of(ask(client, path, response_format={"type": "json_object"}))[0].startswith("{")
    assert texts_of(ask(client, path, response_format={"type": "text"}))
    assert texts_of(ask(client, path, response_format=None, structured_outputs=None))


def test_whitespace_is_allowed_on_request(client: TestClient) -> None:
    """A fake model prefers letters, so the regex shows what may follow."""
    asked = {"json": {"const": {"a": [1, 2]}}}
    assert texts_of(ask(client, structured_outputs=asked)) == ['{"a":[1,2]}']
    free = ask(client, structured_outputs={**asked, "disable_any_whitespace": False})
    assert reasons_of(free) == ["length"], "the fake's first allowed byte is a tab"


def test_every_sequence_follows_its_own_state(client: TestClient, world: World) -> None:
    answer = ask(
        client,
        n=3,
        temperature=1.0,
        seed=1,
        stream=True,
        structured_outputs={"regex": "[a-z]{4}[0-9]"},
        logprobs=True,
        top_logprobs=2,
        stream_options={"include_usage": True},
    )
    texts = ["", "", ""]
    for line in answer.text.splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                texts[choice["index"]] += choice["delta"].get("content") or ""
    assert all(len(text) == 5 and text[:4].isalpha() and text[4].isdigit() for text in texts)


def test_free_requests_get_the_same_answer_in_a_mixed_batch(
    client: TestClient, world: World
) -> None:
    alone = texts_of(ask(client, COMPLETION, prompt=["one", "two"]))
    world.runner.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        free = pool.submit(ask, client, COMPLETION, prompt=["one", "two"])
        bound = pool.submit(ask, client, structured_outputs={"regex": "[a-f]{40}"})
        world.runner.gate.set()
        assert texts_of(free.result()) == alone
        assert len(texts_of(bound.result())[0]) == 40


def test_answer_that_is_cut_says_length(client: TestClient) -> None:
    answer = ask(client, max_tokens=5, response_format=FORMAT)
    assert reasons_of(answer) == ["length"]
    assert answer.json()["usage"]["completion_tokens"] == 5


def test_stop_string_and_stop_token_end_an_answer(client: TestClient) -> None:
    regex = {"regex": "[a-z]{3}XX[a-z]+"}
    answer = ask(client, structured_outputs=regex, stop=["X"])
    assert (len(texts_of(answer)[0]), reasons_of(answer)) == (3, ["stop"])
    answer = ask(client, structured_outputs=regex, stop_token_ids=[ord("X")])
    assert (len(texts_of(answer)[0]), reasons_of(answer)) == (3, ["stop"])


def test_stop_token_may_follow_a_complete_answer_alone(client: TestClient) -> None:
    """The fake prefers letters: the stop token comes where the grammar is at its end."""
    answer = ask(client, structured_outputs={"regex": "[0-9]{2}"}, stop_token_ids=[ord("z")])
    assert len(texts_of(answer)[0]) == 2
    assert reasons_of(answer) == ["stop"]


@pytest.mark.parametrize("fields", [{"ignore_eos": True}, {"min_tokens": 20}])
def test_complete_answer_ends_even_if_it_should_go_on(
    client: TestClient, fields: dict[str, Any]
) -> None:
    answer = ask(client, structured_outputs={"choice": ["done"]}, **fields)
    assert (texts_of(answer), reasons_of(answer)) == (["done"], ["stop"])
    assert answer.json()["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("stream", [False, True])
def test_answer_that_cannot_go_on_fails_alone(client: TestClient, stream: bool) -> None:
    """Its stop token is part of the grammar, and banned by min_tokens."""
    answer = ask(
        client,
        structured_outputs={"regex": "abc"},
        stop_token_ids=[ord("c")],
        min_tokens=10,
        stream=stream,
    )
    error = (
        answer.json()["error"]
        if not stream
        else next(
            json.loads(line.removeprefix("data: "))["error"]
            for line in answer.text.splitlines()
            if "error" in line
        )
    )
    assert error["code"] == "constraint_failed"
    assert "no token of the model can continue" in error["message"]
    assert texts_of(ask(client, response_format=FORMAT))


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"response_format": {"type": "json"}}, "response_format.type", "expected 'text'"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "a schema"),
        (
            {"response_format": {**FORMAT, "type": "json_object"}},
            "response_format.json_schema",
            "expected none",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
            "is required",
        ),
        ({"structured_outputs": {}}, "structured_outputs", "received none"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", ""),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs.json_object", ""),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "a JSON Schema"),
        ({"structured_outputs": {"json": "[]"}}, "structured_outputs.json", "an object"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", ""),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": FORMAT},
            "structured_outputs",
            "received both",
        ),
    ],
)
def test_malformed_fields_are_refused(
    client: TestClient, fields: dict[str, Any], param: str, said: str
) -> None:
    answer = ask(client, **fields)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["param"], said in error["message"]) == (param, True), error


def schema_format(schema: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


NOT_INSIDE = {"type": "object", "properties": {"a": {"items": {"not": {}}}}}
LOOK_AHEAD = {"type": "object", "properties": {"a": {"pattern": "(?=b)c"}}}


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        (NOT_INSIDE, "at $.properties.a.items: the keyword 'not' is not supported"),
        ({"type": "string", "maxLenght": 3}, "at $: the keyword 'maxLenght' is not supported"),
        ({"x-guidance": {"lenient": True}}, "the keyword 'x-guidance' is not supported"),
        (LOOK_AHEAD, "at $.properties.a: look-around"),
        ({"type": "array", "items": {"type": "text"}}, "at $.items: Invalid type: text"),
        ({"$ref": "#/$defs/missing"}, "Pointer '/$defs/missing' does not exist"),
        ({"$ref": "https://example.com/schema"}, "example.com"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum (5) is greater than maximum"),
        ({"anyOf": {"type": "string"}}, "at $.anyOf: expected a list"),
        ({"type": "string", "minLength": -1}, "at $.minLength: expected a whole number"),
        ({"properties": {"a": []}}, "at $.properties.a: expected a schema"),
    ],
)
def test_schema_that_cannot_be_enforced_is_refused_with_its_place(
    client: TestClient, schema: dict[str, Any], said: str
) -> None:
    answer = ask(client, response_format=schema_format(schema))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (
        400,
        "invalid_grammar",
        "response_format",
    )
    assert said in error["message"]
    assert "\n" not in error["message"]


def test_names_in_a_schema_are_shown_in_one_line(client: TestClient) -> None:
    text = '{"properties": {"a\\ud800\\n": {"not": {}}}}'
    answer = ask(client, structured_outputs={"json": text})
    assert answer.status_code == 400
    assert "at $.properties.a\\ud800\\n: the keyword" in answer.json()["error"]["message"]
    long: dict[str, Any] = {"properties": {"x" * 9000: {"not": {}}}}
    answer = ask(client, response_format=schema_format(long))
    assert len(answer.json()["error"]["message"]) < 600


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"regex": "(a"}, "unclosed group"),
        ({"grammar": "start: foo"}, 'unknown name: "foo"'),
        ({"grammar": "start: <|nope|>"}, 'unknown special token: "<|nope|>"'),
        ({"regex": "a" * 5000}, "expected at most 4096 bytes; received 5000"),
        ({"choice": ["é" * 20_000]}, "expected a grammar of at most 65536 bytes; received 120004"),
    ],
)
def test_other_grammars_are_refused_with_a_reason(
    client: TestClient, asked: dict[str, Any], said: str
) -> None:
    answer = ask(client, structured_outputs=asked)
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]
