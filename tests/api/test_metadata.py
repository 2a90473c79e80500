"""Metadata of a version: replaced by an upload, merged by PATCH, and filtered by label."""

import json
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.api.api_world import BASE, World, error_of, put_text
from tests.api.test_prefix_routes import files

URL = "/v1/prefixes/voice/versions/1"
MERGE = {"content-type": "application/merge-patch+json"}


def upload(client: TestClient, metadata: Any = None) -> Any:
    part = None if metadata is None else ("m.json", json.dumps(metadata), "application/json")
    return client.put("/v1/prefixes/voice", files=files(metadata=part))


def patch(client: TestClient, body: Any, url: str = URL) -> Any:
    content = body if isinstance(body, str) else json.dumps(body)
    return client.patch(url, content=content, headers=MERGE)


def test_an_upload_with_metadata_replaces_it_and_one_without_leaves_it(client: TestClient) -> None:
    assert upload(client, {"labels": {"team": "care"}, "owner": "ann"}).status_code == 201
    again = upload(client)
    assert (again.status_code, again.json()["labels"]) == (200, {"team": "care"})
    replaced = upload(client, {"description": "new"})
    assert replaced.status_code == 200
    assert (replaced.json()["version"], replaced.json()["description"]) == (1, "new")
    assert (replaced.json()["labels"], replaced.json()["metadata"]) == ({}, {})
    assert client.get("/v1/prefixes/voice").json()["description"] == "new"
    assert upload(client, {}).json()["description"] is None


def test_a_text_upload_replaces_metadata_too(client: TestClient) -> None:
    body: dict[str, Any] = {"kind": "text", "text": "hi", "metadata": {"n": 1}}
    client.put("/v1/prefixes/note", json=body)
    body["metadata"] = {"n": 2}
    assert client.put("/v1/prefixes/note", json=body).json()["metadata"] == {"n": 2}
    body["metadata"] = None
    assert client.put("/v1/prefixes/note", json=body).json()["metadata"] == {"n": 2}


@pytest.mark.parametrize(
    ("before", "change", "after"),
    [
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": None}, {}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        ({"a": "foo"}, {"a": {"b": {"c": None}}}, {"a": {"b": {}}}),
        ({"e": 1}, {"a": [None]}, {"e": 1, "a": [None]}),
        ({"e": 1}, {}, {"e": 1}),
    ],
)
def test_a_patch_merges_by_rfc_7396(
    client: TestClient, before: dict[str, Any], change: dict[str, Any], after: dict[str, Any]
) -> None:
    upload(client, before)
    answer = patch(client, change)
    assert answer.status_code == 200, answer.text
    assert answer.json()["metadata"] == after
    assert client.get("/v1/prefixes/voice").json()["metadata"] == after


def test_a_patch_reaches_known_fields_and_a_version_by_alias(client: TestClient) -> None:
    upload(client, {"labels": {"team": "care", "tier": "1"}, "description": "old"})
    url = "/v1/prefixes/voice/versions/latest"
    answer = patch(client, {"labels": {"tier": None, "lang": "de"}, "description": None}, url)
    assert answer.json()["labels"] == {"team": "care", "lang": "de"}
    assert answer.json()["description"] is None
    plain = client.patch(url, json={"prompt_template": "Q: {prompt}"})
    assert plain.json()["prompt_template"] == "Q: {prompt}"
    assert plain.json()["labels"] == {"team": "care", "lang": "de"}


@pytest.mark.parametrize(
    ("stored", "change"),
    [
        ({}, {"task_id": 1}),
        ({}, {"base_fingerprint": "e" * 64}),
        ({"base_fingerprint": BASE.fingerprint}, {"base_fingerprint": None}),
        ({"base_fingerprint": BASE.fingerprint}, {"base_fingerprint": "e" * 64}),
    ],
)
def test_identity_fields_cannot_change(
    client: TestClient, stored: dict[str, Any], change: dict[str, Any]
) -> None:
    upload(client, stored)
    answer = patch(client, {**change, "owner": "ann"})
    assert answer.status_code == 422
    error = error_of(answer)
    assert error["code"] == "immutable_metadata"
    assert error["param"] == f"metadata.{next(iter(change))}"
    assert client.get("/v1/prefixes/voice").json()["metadata"] == {}


def test_the_task_of_a_text_stays_also_in_an_upload(client: TestClient) -> None:
    body: dict[str, Any] = {"kind": "text", "text": "hi", "metadata": {"task_id": 1}}
    client.put("/v1/prefixes/note", json=body)
    url = "/v1/prefixes/note/versions/1"
    for change in ({"task_id": 2}, {"task_id": None}, {"task_id": True}):
        assert patch(client, change, url).status_code == 422
    assert patch(client, {"task_id": 1, "n": 2}, url).json()["metadata"] == {"task_id": 1, "n": 2}
    body["metadata"] = {"task_id": 2}
    assert client.put("/v1/prefixes/note", json=body).status_code == 422
    body["metadata"] = {"m": 3}
    assert client.put("/v1/prefixes/note", json=body).json()["metadata"] == {"m": 3, "task_id": 1}


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ("[1]", 422, "malformed_metadata"),
        ("null", 422, "malformed_metadata"),
        ("{", 422, "malformed_metadata"),
        ('{"a": 1, "a": 2}', 400, "invalid_json"),
        ('{"a": NaN}', 422, "malformed_metadata"),
        ({"labels": {"team": 1}}, 422, "malformed_metadata"),
        ({"labels": "team"}, 422, "malformed_metadata"),
        ({"description": 1}, 422, "malformed_metadata"),
        ({"big": "x" * 16_400}, 422, "malformed_metadata"),
        ("x" * 70_000, 413, "request_too_large"),
    ],
)
def test_a_patch_has_the_limits_of_an_upload(
    client: TestClient, body: Any, status: int, code: str
) -> None:
    upload(client, {"owner": "ann"})
    answer = patch(client, body)
    assert answer.status_code == status, answer.text
    assert error_of(answer)["code"] == code
    assert client.get("/v1/prefixes/voice").json()["metadata"] == {"owner": "ann"}


def test_a_patch_is_short_where_other_bodies_may_be_long(client: TestClient, world: World) -> None:
    object.__setattr__(world.body_limits, "max_body_bytes", 2**20)
    upload(client, {})
    assert patch(client, dict.fromkeys(map(str, range(3_000)))).status_code == 200
    answer = patch(client, dict.fromkeys(map(str, range(10_000))))
    assert (answer.status_code, error_of(answer)["code"]) == (413, "request_too_large")


def test_a_patch_needs_the_content_type_the_scope_and_a_version(
    client: TestClient, world: World
) -> None:
    upload(client, {})
    refused = client.patch(URL, content="{}", headers={"content-type": "text/plain"})
    assert (refused.status_code, error_of(refused)["code"]) == (400, "unsupported_media_type")
    assert patch(client, {}, "/v1/prefixes/voice/versions/9").status_code == 404
    assert patch(client, {}, "/v1/prefixes/nosuch/versions/1").status_code == 404
    for key, status in (("acme:read", 403), ("acme:generate", 403), ("beta", 404)):
        answer = client.patch(URL, json={"n": 1}, headers=world.headers(key))
        assert answer.status_code == status


def test_changes_of_metadata_are_audited(client: TestClient, world: World) -> None:
    upload(client, {"a": 1})
    upload(client, {"a": 2})
    upload(client, {"a": 2})
    patch(client, {"secret": "s3cret", "a": None})
    entries, _ = world.audit.page(tenant="acme", limit=4)
    assert [(entry.action, entry.subject) for entry in entries] == [
        ("prefix.metadata", "voice"),
        *[("prefix.publish", "voice")] * 3,
    ]
    assert entries[0].detail == {"version": 1, "fields": ["a", "secret"], "recipe_revision": 1}
    assert [entry.detail.get("metadata") for entry in entries[1:]] == [None, "replaced", None]


def names(client: TestClient, query: str) -> list[str]:
    answer = client.get(f"/v1/prefixes?{query}")
    assert answer.status_code == 200, answer.text
    return [entry["name"] for entry in answer.json()["data"]]


def labelled(client: TestClient, name: str, **metadata: Any) -> None:
    body = {"kind": "text", "text": name, "metadata": metadata}
    assert client.put(f"/v1/prefixes/{name}", json=body).status_code in {200, 201}


def test_prefixes_are_filtered_by_label(either_client: TestClient) -> None:
    client = either_client
    labelled(client, "a", labels={"team": "care", "lang": "de"})
    labelled(client, "b", labels={"team": "care", 'odd "key"': "x:y"})
    labelled(client, "c", labels={"team": "Care"})
    labelled(client, "d", team="care", note='"team":"care"')
    labelled(client, "e", labels={"team": "care"}, note="a \0 in it")
    labelled(client, "f")
    labelled(client, "g", free={"team": "care"}, note="a \0 in it", labels={"a:b": "c"})
    assert names(client, "label=team:care") == ["a", "b", "e"]
    assert names(client, "label=team:care&label=lang:de") == ["a"]
    assert names(client, "label=team:care&label=team:Care") == []
    assert names(client, "label=odd%20%22key%22:x:y") == ["b"]
    assert names(client, "label=a:b:c") == ["g"]
    assert names(client, "label=note:a") == names(client, "label=team:") == []
    assert names(client, "label=team:care&base=all") == ["a", "b", "e"]
    first = client.get("/v1/prefixes?label=team:care&limit=2").json()
    assert [entry["name"] for entry in first["data"]] == ["a", "b"]
    assert names(client, f"label=team:care&limit=2&after={first['next_after']}") == ["e"]
    patched = client.patch("/v1/prefixes/f/versions/1", json={"labels": {"team": "care"}})
    assert patched.json()["labels"] == {"team": "care"}
    assert names(client, "label=team:care") == ["a", "b", "e", "f"]


def test_the_label_of_the_latest_version_counts(client: TestClient, world: World) -> None:
    labelled(client, "a", labels={"team": "care"})
    put_text(client, "a", "another text", world.headers())
    assert names(client, "label=team:care") == []


def test_a_label_without_a_value_is_an_error(client: TestClient) -> None:
    answer = client.get("/v1/prefixes?label=team")
    assert answer.status_code == 400
    assert error_of(answer)["param"] == "label"
    assert "NAME:VALUE" in error_of(answer)["message"]
