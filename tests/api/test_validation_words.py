"""Every schema of the OpenAPI document, with every kind of violation: the message says what was
expected and what was received, has the place as its ``param``, and none of pydantic's sentences."""

import itertools
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic_core._pydantic_core import list_all_errors

from prefixd.server.tenants.principal import OPERATOR_TENANT, Scope
from tests.api.api_world import World, error_of, put_text

JSON = "application/json"
OTHERS: list[Any] = [None, True, -7, 3.5, 10**30, "", "x", "y" * 5000, "a b\u202e", [], [None], {}]
OTHERS += [{"x": 1}, [[{}]], ["", 1], {"": {}}]
"""Values of every type, some of them too long, too large or empty."""
IN_URLS = ["", "x", "-1", "0", "1.5", "+1", "9" * 30, "y" * 600, "a%20b", "true1"]
FIXED = {
    "model": "tiny",
    "prompt": "hi",
    "messages": [{"role": "user", "content": "hi"}],
    "max_tokens": 1,
    "kind": "text",
    "text": "hello",
    "prefix": "voice",
    "scopes": ["read"],
    "version": 1,
}
"""Values that make a request valid, where a field of that name is required."""


def sentences() -> re.Pattern[str]:
    """The words of pydantic's own messages, without the values in them."""
    words = {
        part.strip(" ,:'.")
        for error in list_all_errors()
        for part in re.split(r"\{[^}]*\}", error["message_template_python"])
    }
    long = sorted((word for word in words if len(word) > 9), key=len, reverse=True)
    own = [
        "[Ii]nput should",
        "String should",
        "[Ss]hould (be|have|match)",
        "Value error",
        "Extra inp",
    ]
    return re.compile("|".join([*own, *map(re.escape, long)]))


THEIRS = sentences()


@pytest.fixture
def document(client: TestClient) -> dict[str, Any]:
    document: dict[str, Any] = client.get("/openapi.json").json()
    return document


@pytest.fixture
def operator(world: World, client: TestClient) -> dict[str, str]:
    put_text(client, "voice", "Be kind.", world.headers())
    world.tenants.create_tenant(OPERATOR_TENANT)
    key = world.tenants.create_key(tenant=OPERATOR_TENANT, scopes=list(Scope))
    return {"Authorization": f"Bearer {key.text}"}


class Bodies:
    """Bodies of the schemas of a document, with one violation each."""

    def __init__(self, document: dict[str, Any]) -> None:
        self._schemas = document["components"]["schemas"]

    def of(self, schema: dict[str, Any]) -> Iterator[Any]:
        for model in self._objects(schema):
            properties = self._schemas[model].get("properties", {})
            required = self._schemas[model].get("required", [])
            valid = {name: FIXED.get(name, "x") for name in required}
            valid |= {name: FIXED[name] for name in ("prompt", "max_tokens") if name in properties}
            yield from ({**valid, "no_such_field": 1}, [valid], None, "x")
            for name in required:
                yield {other: value for other, value in valid.items() if other != name}
            for name, value in itertools.product(properties, OTHERS):
                yield {**valid, name: value}
            for name, inner in properties.items():
                for value in self._inside(inner):
                    yield {**valid, name: value}

    def _objects(self, schema: dict[str, Any]) -> Iterator[str]:
        if "$ref" in schema:
            yield schema["$ref"].rpartition("/")[2]
        for member in schema.get("anyOf", []) + schema.get("oneOf", []):
            yield from self._objects(member)

    def _inside(self, schema: dict[str, Any]) -> Iterator[Any]:
        """Values of a field with one violation inside."""
        for model in self._objects(schema):
            for name in self._schemas[model].get("properties", {}):
                yield from ({name: value} for value in OTHERS)
            yield {"no_such_field": 1}
        if "items" in schema:
            yield from ([value] for value in (*OTHERS, *self._inside(schema["items"])))
        if "additionalProperties" in schema:
            yield from ({"1": value} for value in OTHERS)
        for member in schema.get("anyOf", []):
            yield from self._inside(member)


def paths(document: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            yield method, path, operation


def filled(path: str, operation: dict[str, Any]) -> str:
    names = {
        "name": "voice",
        "reference": "voice",
        "model": "voice",
        "user": "ann",
        "tenant": "acme",
    }
    for parameter in operation.get("parameters", []):
        if parameter["in"] == "path":
            name = parameter["name"]
            path = path.replace(f"{{{name}}}", str(names.get(name, 1)))
    return path


def check(answer: Any, sent: object) -> str | None:
    """The message of an error, if any, is in our words."""
    assert answer.status_code < 500, (sent, answer.text)
    if answer.status_code < 400:
        return None
    error = error_of(answer)
    message: str = error["message"]
    assert not THEIRS.search(message), (sent, message)
    if error["code"] in {"invalid_request", "unknown_field", "unknown_parameter"}:
        explained = ("expected", "unknown", "is required", "not supported")
        assert any(words in message for words in explained), (sent, message)
        assert "expected" not in message or "received" in message, (sent, message)
    return message


@pytest.mark.slow
def test_no_body_gets_a_message_of_the_library(
    document: dict[str, Any], client: TestClient, operator: dict[str, str]
) -> None:
    bodies, statuses = Bodies(document), Counter[int]()
    for method, path, operation in paths(document):
        content = operation.get("requestBody", {}).get("content", {})
        if JSON not in content or path.startswith("/v1/admin/tenants/{tenant}/quota"):
            continue
        url = filled(path, operation)
        for body in bodies.of(content[JSON]["schema"]):
            answer = client.request(method, url, json=body, headers=operator)
            check(answer, (method, path, body))
            statuses[answer.status_code] += 1
    assert statuses[400] > 1500, statuses


@pytest.mark.slow
def test_no_parameter_or_header_gets_a_message_of_the_library(
    document: dict[str, Any], client: TestClient, operator: dict[str, str]
) -> None:
    for method, path, operation in paths(document):
        for parameter in operation.get("parameters", []):
            name, place = parameter["name"], parameter["in"]
            for value in IN_URLS:
                url, headers = filled(path, operation), dict(operator)
                if place == "path":
                    if not value:
                        continue
                    url = filled(path.replace(f"{{{name}}}", value), operation)
                elif place == "query":
                    url += f"?{name}={value}"
                else:
                    headers[name] = value.replace("%20", " ")
                check(client.request(method, url, headers=headers), (method, url, place, name))
        url = filled(path, operation)
        check(client.request(method, f"{url}?no_such=1", headers=operator), (method, url))


@pytest.mark.parametrize(
    "files",
    [
        {"config": ("c", b"{")},
        {"config": ("c", b"{}"), "weights": ("w", b"x")},
        {"config": ("c", b"[]"), "weights": ("w", b"")},
        {"other": ("o", b"x")},
        {"config": ("c", b"{}"), "metadata": ("m", b'{"a": NaN}')},
    ],
)
def test_no_part_gets_a_message_of_the_library(
    client: TestClient, operator: dict[str, str], files: Any
) -> None:
    answer = client.put("/v1/prefixes/new", files=files, headers=operator)
    assert answer.status_code in {400, 422}
    assert not THEIRS.search(error_of(answer)["message"])


@pytest.mark.parametrize("raw", [b"", b"{", b'{"a":}', b"\xff", b'{"a": 1,}'])
def test_broken_json_has_its_place(client: TestClient, raw: bytes) -> None:
    headers = {"content-type": JSON}
    error = error_of(client.post("/v1/completions", content=raw, headers=headers))
    assert (error["code"], error["param"]) == ("invalid_json", None)
    assert re.search(r"at line 1, column \d+$", error["message"]), error["message"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n": 0}, "'n': expected at least 1; received 0"),
        ({"n": 129}, "'n': expected at most 128; received 129"),
        ({"n": "2"}, "'n': expected an integer; received a string of 1 characters"),
        ({"top_p": 0}, "'top_p': expected more than 0; received 0"),
        ({"stream": "yes"}, "'stream': expected true or false; received a string of 3 characters"),
        (
            {"model": ""},
            "'model': expected at least 1 character; received a string of 0 characters",
        ),
        ({"model": None}, "'model': expected a text; received null"),
        ({"logit_bias": []}, "'logit_bias': expected an object; received a list of 0"),
        ({"logit_bias": {"1": 101}}, "'logit_bias.1': expected at most 100; received 101"),
        (
            {"logit_bias": {"x": 1, "yy": 2}},
            (
                "'logit_bias': expected token ids as keys, each a text of 1 to 9 digits; "
                "received 2 of another form, the first of 1 characters"
            ),
        ),
        (
            {"stop_token_ids": [1, -1]},
            "'stop_token_ids[1]': expected at least 0; received -1",
        ),
        (
            {"stream_options": {}},
            "'stream_options': expected it only with 'stream': true; received it without",
        ),
    ],
)
def test_messages_say_what_was_expected_and_received(
    client: TestClient, fields: dict[str, Any], message: str
) -> None:
    answer = client.post("/v1/completions", json={"model": "tiny", "prompt": "x", **fields})
    assert error_of(answer)["message"] == message
