"""Uploads with an Idempotency-Key: the same response again, without a second change."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.api.api_world import World, error_of


def put(client: TestClient, key: str, *, name: str = "voice", **body: Any) -> Any:
    content = {"kind": "text", "text": "hello", **body}
    return client.put(f"/v1/prefixes/{name}", json=content, headers={"Idempotency-Key": key})


def versions(client: TestClient, name: str = "voice") -> int:
    return len(client.get(f"/v1/prefixes/{name}/versions").json()["data"])


def test_a_repeated_upload_gets_the_first_response(client: TestClient) -> None:
    first = put(client, "k1")
    assert first.status_code == 201
    assert "idempotency-replayed" not in first.headers
    again = put(client, "k1")
    assert (again.status_code, again.json()) == (201, first.json())
    assert again.headers["idempotency-replayed"] == "true"
    without = client.put("/v1/prefixes/voice", json={"kind": "text", "text": "hello"})
    assert without.status_code == 200


def test_a_late_repetition_does_not_move_latest_back(client: TestClient) -> None:
    """Without the key, uploading the first bytes again would move `latest` back to them."""
    put(client, "k1")
    put(client, "k2", text="newer")
    assert put(client, "k1").json()["version"] == 1
    assert client.get("/v1/prefixes/voice").json()["version"] == 2
    client.delete("/v1/prefixes/voice")
    assert put(client, "k1").status_code == 201
    assert client.get("/v1/prefixes/voice").status_code == 404


@pytest.mark.parametrize(
    ("name", "body"),
    [("voice", {"text": "other"}), ("else", {}), ("voice", {"metadata": {"a": 1}})],
)
def test_a_key_reused_for_another_upload_is_a_409(
    client: TestClient, name: str, body: dict[str, Any]
) -> None:
    put(client, "k1")
    refused = put(client, "k1", name=name, **body)
    assert refused.status_code == 409
    assert error_of(refused)["code"] == "idempotency_key_reused"
    assert versions(client) == 1


def test_keys_of_two_tenants_are_independent(client: TestClient, world: World) -> None:
    put(client, "k1")
    headers = {**world.headers("beta"), "Idempotency-Key": "k1"}
    body = {"kind": "text", "text": "beta's own"}
    assert client.put("/v1/prefixes/voice", json=body, headers=headers).status_code == 201


def test_an_error_response_is_not_stored(client: TestClient) -> None:
    assert put(client, "k1", text="x" * 200).status_code == 422
    assert put(client, "k1").status_code == 201


@pytest.mark.parametrize("key", ["", "a b", "a" * 256])
def test_malformed_keys_are_rejected(client: TestClient, key: str) -> None:
    refused = put(client, key)
    assert refused.status_code == 400
    assert error_of(refused)["param"] == "Idempotency-Key"


def test_concurrent_repetitions_get_one_response(either_client: TestClient) -> None:
    client = either_client
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: put(client, "k1"), range(32)))
    assert {answer.status_code for answer in answers} == {201}
    assert len({json.dumps(answer.json()) for answer in answers}) == 1
    assert sum("idempotency-replayed" not in answer.headers for answer in answers) == 1
    assert versions(client) == 1
