"""Quotas over HTTP: what each counts, and what is never refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import event

from prefixd.server.tenants.quotas import DEFAULT_QUOTA
from tests.api.api_world import World, error_of, put_text


def quota(world: World, **limits: int | None) -> None:
    world.tenants.set_quota("acme", limits)


def refused_by(answer: Any) -> str:
    """The quota that refused the request."""
    assert answer.status_code == 429, answer.text
    error = error_of(answer)
    assert (error["type"], error["code"]) == ("insufficient_quota", "insufficient_quota")
    assert "more were requested; " in error["message"]
    return str(error["param"])


def put_alias(client: TestClient, alias: str, version: int = 1) -> Any:
    return client.put(f"/v1/prefixes/voice/aliases/{alias}", json={"version": version})


def test_versions_count_and_equal_bytes_are_no_new_version(
    either_client: TestClient, either_world: World
) -> None:
    client, world = either_client, either_world
    quota(world, max_versions=2)
    put_text(client, "voice", "one", world.headers())
    put_text(client, "voice", "two", world.headers())
    more = {"kind": "text", "text": "three"}
    assert refused_by(client.put("/v1/prefixes/other", json=more)) == "max_versions"
    put_text(client, "voice", "one", world.headers())
    assert client.delete("/v1/prefixes/voice/versions/2").status_code == 204
    put_text(client, "other", "three", world.headers())


def test_aliases_count_and_move_freely(either_client: TestClient, either_world: World) -> None:
    client, world = either_client, either_world
    put_text(client, "voice", "one", world.headers())
    put_text(client, "voice", "two", world.headers())
    quota(world, max_aliases=1)
    assert put_alias(client, "prod").status_code == 200
    assert refused_by(put_alias(client, "test")) == "max_aliases"
    quota(world, max_aliases=0)
    for version in (2, 1):
        assert put_alias(client, "prod", version).status_code == 200
        assert put_alias(client, "latest", version).status_code == 200
    assert client.delete("/v1/prefixes/voice/aliases/prod").status_code == 204
    assert refused_by(put_alias(client, "prod")) == "max_aliases"


def test_users_count_and_get_other_prefixes(client: TestClient, world: World) -> None:
    put_text(client, "voice", "one", world.headers())
    quota(world, max_users=1)
    body = {"prefix": "voice"}
    assert client.put("/v1/users/ann/prefix", json=body).status_code == 200
    assert refused_by(client.put("/v1/users/bob/prefix", json=body)) == "max_users"
    assert client.put("/v1/users/ann/prefix", json={"prefix": "voice@1"}).status_code == 200
    assert client.delete("/v1/users/ann/prefix").status_code == 204


def test_an_import_over_the_quota_says_what_was_imported(
    client: TestClient, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefixd.server.api.users.importing.BATCH", 3)
    put_text(client, "voice", "one", world.headers())
    quota(world, max_users=4)
    lines = "".join(json.dumps({"user": f"u{n}", "prefix": "voice"}) + "\n" for n in range(9))
    kind = {"content-type": "application/x-ndjson"}
    refused = client.post("/v1/users/bindings:import", content=lines, headers=kind)
    assert refused_by(refused) == "max_users"
    message = error_of(refused)["message"]
    assert message.startswith("lines 4 to 6: the tenant may have 4 bound users (max_users): ")
    assert message.endswith("(3 bindings before them were imported)")
    bound = client.get("/v1/users").json()["data"]
    assert [binding["user"] for binding in bound] == ["u0", "u1", "u2"]


def test_an_upload_over_the_quota_of_idempotency_keys_publishes_nothing(
    client: TestClient, world: World
) -> None:
    quota(world, max_idempotency_keys=1)

    def put(key: str, text: str) -> Any:
        body = {"kind": "text", "text": text}
        headers = {"idempotency-key": key}
        return client.put("/v1/prefixes/voice", json=body, headers=headers)

    first = put("a", "one")
    assert first.status_code == 201
    assert refused_by(put("b", "two")) == "max_idempotency_keys"
    assert len(client.get("/v1/prefixes/voice/versions").json()["data"]) == 1
    assert put("a", "one").json() == first.json()


def test_keys_count_and_rotation_works_at_the_quota(client: TestClient, world: World) -> None:
    admin = world.headers("acme:admin")
    quota(world, max_keys=world.tenants.used("acme").used["max_keys"] + 1)
    issued = client.post("/v1/admin/keys", json={}, headers=admin).json()
    assert refused_by(client.post("/v1/admin/keys", json={}, headers=admin)) == "max_keys"
    path = f"/v1/admin/keys/{issued['key_id']}"
    rotated = client.post(f"{path}/rotate", json={"overlap_seconds": 0}, headers=admin)
    assert rotated.status_code == 201
    assert client.delete(f"/v1/admin/keys/{rotated.json()['key_id']}", headers=admin).is_success
    assert client.post("/v1/admin/keys", json={}, headers=admin).status_code == 201


def test_a_rotation_under_an_idempotency_key_works_at_the_quota_of_such_keys(
    client: TestClient, world: World
) -> None:
    admin = world.headers("acme:admin")
    issued = client.post("/v1/admin/keys", json={}, headers=admin).json()
    quota(world, max_idempotency_keys=0)
    keyed = {**admin, "idempotency-key": "a"}
    refused = client.post("/v1/admin/keys", json={}, headers=keyed)
    assert refused_by(refused) == "max_idempotency_keys"
    path = f"/v1/admin/keys/{issued['key_id']}/rotate"
    rotated = client.post(path, json={}, headers=keyed)
    again = client.post(path, json={}, headers=keyed)
    assert (rotated.status_code, again.status_code) == (201, 201)
    assert again.json()["key_id"] == rotated.json()["key_id"]


def test_blobs_of_deleted_versions_and_refused_uploads_are_bounded(
    client: TestClient, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefixd.server.tenants.usage.LEAST_KEPT_BYTES", 0)
    size = put_text(client, "voice", "x" * 60, world.headers())["size_bytes"]
    quota(world, max_bytes=size)
    answers = []
    for number in range(6):
        body = {"kind": "text", "text": f"{number}" * 60}
        answers.append(error_of(client.put("/v1/prefixes/voice", json=body))["message"])
    assert answers[0].startswith(f"the tenant may have {size} stored bytes (max_bytes): it has ")
    assert "kept until they are collected" in answers[-1]
    files = (tmp_path / "blobs").rglob("*")
    assert sum(file.stat().st_size for file in files if file.is_file()) <= 3 * size


def test_a_tenant_shows_its_limits_and_what_it_has(client: TestClient, world: World) -> None:
    world.add_tenant("operator")
    operator = world.headers("operator:all")
    put_text(client, "voice", "four", world.headers())
    client.put("/v1/users/ann/prefix", json={"prefix": "voice"})
    client.put("/v1/prefixes/voice/pin")
    shown = client.get("/v1/admin/tenants/acme", headers=operator).json()
    assert set(shown["unlimited"]) == set(shown["quota"])
    expected = {"max_prefixes": 1, "max_versions": 1, "max_users": 1, "max_aliases": 0}
    assert expected.items() <= shown["used"].items()
    assert shown["used"]["max_virtual_tokens"] == shown["used"]["max_resident_tokens"] == 4
    assert shown["keys"] == len(world.tenants.list_keys("acme"))
    world.tenants._default_quota = DEFAULT_QUOTA
    body = {"name": "new", "quota": {"max_keys": None}}
    made = client.post("/v1/admin/tenants", json=body, headers=operator).json()
    assert made["unlimited"] == ["max_keys"]
    assert made["quota"]["max_users"] == DEFAULT_QUOTA.max_users
    assert client.get("/v1/admin/tenants/other", headers=operator).status_code == 404


def test_deleted_prefixes_make_room_at_once(either_client: TestClient, either_world: World) -> None:
    # Their names and blobs are still there, so the cheap counts are above the quota.
    size = put_text(either_client, "a", "x" * 60, either_world.headers())["size_bytes"]
    quota(either_world, max_prefixes=1, max_bytes=size)
    for name, text in (("b", "y"), ("c", "z")):
        either_client.delete("/v1/prefixes/a")
        either_client.delete("/v1/prefixes/b")
        put_text(either_client, name, text * 60, either_world.headers())
    refused = either_client.put("/v1/prefixes/d", json={"kind": "text", "text": "w" * 60})
    assert refused_by(refused) == "max_prefixes"


def test_the_quotas_of_an_upload_are_counted_in_indexes(client: TestClient, world: World) -> None:
    quota(world, max_prefixes=10, max_versions=10, max_bytes=10**6)
    statements: list[tuple[str, Any]] = []

    def record(_c: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if "count(" in statement or "sum(" in statement:
            statements.append((statement, parameters))

    event.listen(world.database, "before_cursor_execute", record)
    try:
        put_text(client, "a", "x" * 60, world.headers())
    finally:
        event.remove(world.database, "before_cursor_execute", record)
    summed = [text for text, _ in statements if "sum(" in text]
    assert len(summed) == 2  # before the upload and at its end
    assert not [text for text, _ in statements if "GROUP BY" in text or "EXISTS" in text]
    with world.database.connect() as connection:
        for text in summed:
            plan = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}", (0, "acme")).all()
            assert [row[3] for row in plan] == [
                "SEARCH blobs USING COVERING INDEX ix_blobs_tenant_size_bytes (tenant=?)"
            ]
