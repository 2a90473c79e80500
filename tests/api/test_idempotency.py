"""Requests with an Idempotency-Key: the same response again, without a second change."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select

from prefixd.server.tenants.tables import idempotency_keys
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
    with ThreadPoolExecutor(8) as pool:  # max_uploads: more than these wait for a second at most
        answers = list(pool.map(lambda _: put(client, "k1"), range(32)))
    assert {answer.status_code for answer in answers} == {201}
    assert len({json.dumps(answer.json()) for answer in answers}) == 1
    assert sum("idempotency-replayed" not in answer.headers for answer in answers) == 1
    assert versions(client) == 1


IMPORTED = b'{"user": "ann", "prefix": "voice"}\n'
NDJSON = {"content-type": "application/x-ndjson"}
CREATING: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    # method, path, a request, another one under the same key
    "tenant": ("POST", "/v1/admin/tenants", {"json": {"name": "new"}}, {"json": {"name": "else"}}),
    "key": ("POST", "/v1/admin/keys", {"json": {"label": "a"}}, {"json": {"label": "b"}}),
    "alias": (
        "PUT",
        "/v1/prefixes/voice/aliases/prod",
        {"json": {"version": 1}},
        {"json": {"version": 2}},
    ),
    "pin": ("PUT", "/v1/prefixes/voice/pin", {"json": {"version": 1}}, {"json": {"version": 2}}),
    "binding": (
        "PUT",
        "/v1/users/ann/prefix",
        {"json": {"prefix": "voice"}},
        {"json": {"prefix": "voice@2"}},
    ),
    "default": (
        "PUT",
        "/v1/default/prefix",
        {"json": {"prefix": "voice"}},
        {"json": {"prefix": "voice@2"}},
    ),
    "import": (
        "POST",
        "/v1/users/bindings:import",
        {"content": IMPORTED, "headers": NDJSON},
        {"content": IMPORTED * 2, "headers": NDJSON},
    ),
}
creating = pytest.mark.parametrize("kind", CREATING)


@pytest.fixture
def operator(either_world: World, either_client: TestClient) -> TestClient:
    """A client with a key of the operator with every scope; its prefix `voice` has two versions."""
    either_world.add_tenant("operator")
    either_client.headers.update(either_world.headers("operator:all"))
    for text in ("hello", "newer"):
        body = {"kind": "text", "text": text}
        assert either_client.put("/v1/prefixes/voice", json=body).status_code == 201
    return either_client


def create(client: TestClient, kind: str, key: str, *, other: bool = False) -> Any:
    method, path, first, second = CREATING[kind]
    sent = dict(second if other else first)
    headers = {**sent.pop("headers", {}), "Idempotency-Key": key}
    return client.request(method, path, headers=headers, **sent)


def audited(client: TestClient) -> int:
    return len(client.get("/v1/admin/audit?limit=1000").json()["data"])


@creating
def test_every_creation_is_repeated_under_its_key(operator: TestClient, kind: str) -> None:
    first = create(operator, kind, "k1")
    assert first.status_code in {200, 201}, first.text
    assert "idempotency-replayed" not in first.headers
    entries = audited(operator)
    again = create(operator, kind, "k1")
    assert (again.status_code, again.headers.get("etag")) == (
        first.status_code,
        first.headers.get("etag"),
    )
    assert again.headers["idempotency-replayed"] == "true"
    secret = {"key": None} if kind == "key" else {}
    assert again.json() == first.json() | secret
    refused = create(operator, kind, "k1", other=True)
    assert (refused.status_code, error_of(refused)["code"]) == (409, "idempotency_key_reused")
    assert audited(operator) == entries
    assert "idempotency-replayed" not in create(operator, kind, "k2", other=True).headers


@creating
def test_of_concurrent_creations_under_one_key_one_is_executed(
    operator: TestClient, kind: str
) -> None:
    before = audited(operator)
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: create(operator, kind, "k1"), range(6)))
    assert {answer.status_code for answer in answers} <= {200, 201}
    assert sum("idempotency-replayed" not in answer.headers for answer in answers) == 1
    assert audited(operator) == before + 1


def test_a_rotation_is_repeated_without_its_secret(operator: TestClient) -> None:
    key_id = create(operator, "key", "k1").json()["key_id"]
    path, headers = f"/v1/admin/keys/{key_id}/rotate", {"Idempotency-Key": "k2"}
    first = operator.post(path, json={}, headers=headers)
    again = operator.post(path, json={}, headers=headers)
    assert (first.status_code, again.status_code) == (201, 201)
    assert again.json() == first.json() | {"key": None}


def test_no_secret_is_stored(operator: TestClient, either_world: World) -> None:
    secret = create(operator, "key", "k1").json()["key"]
    with either_world.database.connect() as connection:
        rows = connection.execute(select(idempotency_keys.c.body_json)).scalars().all()
    assert len(rows) == 1
    assert secret not in rows[0]


def test_a_key_belongs_to_one_method_and_path(operator: TestClient) -> None:
    assert create(operator, "binding", "k1").status_code == 200
    assert create(operator, "default", "k1").status_code == 409
    other = operator.put(
        "/v1/users/bob/prefix", json={"prefix": "voice"}, headers={"Idempotency-Key": "k1"}
    )
    assert other.status_code == 409


def test_a_repeated_request_is_not_refused_by_its_own_precondition(operator: TestClient) -> None:
    sent = {"Idempotency-Key": "k1", "If-None-Match": "*"}
    body = {"prefix": "voice"}
    for _ in range(2):
        answer = operator.put("/v1/users/ann/prefix", json=body, headers=sent)
        assert answer.status_code == 200
    later = {"If-None-Match": "*"}
    assert operator.put("/v1/users/ann/prefix", json=body, headers=later).status_code == 412


def test_a_generation_ignores_the_key(client: TestClient) -> None:
    """Clients of OpenAI send one with their retries; two requests are two generations."""
    headers = {"Idempotency-Key": "k1"}
    for prompt in ("a", "b"):
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 2}
        answer = client.post("/v1/completions", json=body, headers=headers)
        assert answer.status_code == 200
        assert "idempotency-replayed" not in answer.headers


def test_two_keys_in_one_request_are_rejected(client: TestClient) -> None:
    headers = [("Idempotency-Key", "a"), ("Idempotency-Key", "b")]
    response = client.put("/v1/default/prefix", json={"prefix": "x"}, headers=headers)
    assert (response.status_code, error_of(response)["param"]) == (400, "Idempotency-Key")
