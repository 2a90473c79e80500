"""The OpenAPI document: valid, and right for a generated client."""

import re
from typing import Any

import pytest
from fastapi.testclient import TestClient
from openapi_spec_validator import validate

from tests.api.api_world import World


@pytest.fixture
def document(world: World) -> dict[str, Any]:
    return world.app.openapi()


def operations(document: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (method, path): operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


def test_the_document_is_valid_and_its_ids_and_paths_are_unique(document: dict[str, Any]) -> None:
    validate(document)
    known = operations(document)
    ids = [operation["operationId"] for operation in known.values()]
    assert len(set(ids)) == len(ids)
    # Paths that differ only in the names of their parameters are the same path.
    shapes = {re.sub(r"\{[^}]*\}", "{}", path) for path in document["paths"]}
    assert len(shapes) == len(document["paths"])
    assert not {method for method, _ in known} & {"head", "options"}


def test_every_operation_declares_its_errors_and_headers(document: dict[str, Any]) -> None:
    for (method, path), operation in operations(document).items():
        responses = operation["responses"]
        for response in responses.values():
            assert response["headers"]["x-request-id"]["required"]
        assert responses["405"]["headers"]["Allow"]["required"], path
        if path.startswith("/v1"):
            expected = {"400", "401", "403", "404", "429", "431", "500", "501", "503", "507"}
            assert expected <= set(responses), (method, path)
            assert "Retry-After" in responses["503"]["headers"]
            assert "WWW-Authenticate" in responses["401"]["headers"]
    content = document["paths"]["/v1/prefixes/{name}/versions/{version}/content"]["get"][
        "responses"
    ]
    assert set(content["206"]["content"]) == {"application/octet-stream", "multipart/byteranges"}
    assert "Content-Range" in content["206"]["headers"]
    assert "Content-Range" in content["416"]["headers"]


def test_names_users_and_references_have_patterns(document: dict[str, Any]) -> None:
    patterns = {}
    for key, operation in operations(document).items():
        for parameter in operation.get("parameters", ()):
            schema = parameter["schema"]
            if parameter["in"] == "path" and schema["type"] == "string":
                patterns[(*key, parameter["name"])] = schema.get("pattern")
    missing = {key for key, pattern in patterns.items() if pattern is None}
    assert missing == {("get", "/v1/models/{model}", "model")}  # the base has any name
    user = re.compile(patterns["get", "/v1/users/{user}/prefix", "user"])
    assert user.search("a\u200db")
    assert not user.search("a\u202eb")
    assert not user.search("")
    name = re.compile(patterns["put", "/v1/prefixes/{name}", "name"])
    assert name.search("support")
    assert not name.search("support@3")
    assert re.search(patterns["get", "/v1/prefixes/{name}", "name"], "support@3")
    schemas = document["components"]["schemas"]
    assert schemas["BindingTarget"]["properties"]["prefix"]["pattern"]
    completion = schemas["CompletionRequest"]["properties"]["user"]["anyOf"][0]
    assert completion == {
        "type": "string",
        "minLength": 1,
        "maxLength": 256,
        "pattern": patterns["get", "/v1/users/{user}/prefix", "user"],
    }


def test_bounds_labels_and_entity_tags_are_in_the_document(document: dict[str, Any]) -> None:
    found = {}
    for operation in operations(document).values():
        for parameter in operation.get("parameters", ()):
            schema = found[parameter["name"].lower()] = parameter["schema"]
            assert not {"ge", "le", "gt", "lt", "anyOf"} & set(schema)
    assert (found["limit"]["minimum"], found["limit"]["maximum"]) == (1, 1000)
    assert found["before"]["minimum"] == 1
    assert found["label"]["items"]["pattern"] == ":"
    for name in ("if-match", "if-none-match"):
        tags = re.compile(found[name]["pattern"])
        assert all(tags.search(text) for text in ("*", 'W/"7"', '"a", W/"b"'))
        assert not any(tags.search(text) for text in ("", "7", '*, "a"'))


def test_responses_of_generation_are_json_or_events(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"):
        content = paths[path]["post"]["responses"]["200"]["content"]
        assert set(content) == {"application/json", "text/event-stream"}
