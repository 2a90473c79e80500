"""/v1/admin: tenants, keys and the audit log, for a tenant's admin and for the operator."""

from typing import Any

import pytest
from fastapi.testclient import TestClient

from prefixd.server.tenants import key_text as keys
from tests.api.api_world import World, error_of, put_text


@pytest.fixture
def operator(world: World) -> dict[str, str]:
    world.add_tenant("operator")
    return world.headers("operator:all")


@pytest.fixture
def admin(world: World) -> dict[str, str]:
    return world.headers("acme:admin")


def bearer(text: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {text}"}


def test_the_operator_creates_a_tenant_and_its_first_key(
    client: TestClient, operator: dict[str, str]
) -> None:
    made = client.post(
        "/v1/admin/tenants",
        json={"name": "new", "quota": {"max_prefixes": 1, "requests_per_minute": 60}},
        headers=operator,
    )
    assert made.status_code == 201
    assert made.json()["quota"]["max_prefixes"] == 1
    assert made.json()["quota"]["max_bytes"] is None
    issued = client.post(
        "/v1/admin/keys", json={"tenant": "new", "scopes": ["read"]}, headers=operator
    ).json()
    assert keys.parse(issued["key"]) is not None
    assert client.get("/v1/models", headers=bearer(issued["key"])).status_code == 200
    again = client.post("/v1/admin/tenants", json={"name": "new"}, headers=operator)
    assert again.status_code == 409


def test_an_empty_tenant_is_not_that_of_the_key(
    client: TestClient, operator: dict[str, str]
) -> None:
    answer = client.post("/v1/admin/keys", json={"tenant": ""}, headers=operator)
    assert (answer.status_code, error_of(answer)["param"]) == (404, "tenant")


def test_quotas_are_changed_by_name(client: TestClient, operator: dict[str, str]) -> None:
    path = "/v1/admin/tenants/acme"
    for change, shown in (
        ({"max_prefixes": 3}, {"max_prefixes": 3, "max_bytes": None}),
        ({"max_bytes": 0}, {"max_prefixes": 3, "max_bytes": 0}),
        ({"max_prefixes": None}, {"max_prefixes": None, "max_bytes": 0}),
    ):
        answer = client.patch(f"{path}/quota", json=change, headers=operator)
        assert shown.items() <= answer.json()["quota"].items()
    assert client.get(path, headers=operator).json()["quota"]["max_bytes"] == 0
    for bad in ({"max_prefixes": -1}, {"requests_per_minute": 0}, {"else": 1}, {"max_bytes": "1"}):
        assert client.patch(f"{path}/quota", json=bad, headers=operator).status_code == 400
    missing = "/v1/admin/tenants/missing/quota"
    assert client.patch(missing, json={"max_bytes": 1}, headers=operator).status_code == 404


def test_settings_are_changed_by_name(client: TestClient, operator: dict[str, str]) -> None:
    path = "/v1/admin/tenants/acme"
    assert client.get(path, headers=operator).json()["weight"] == 1.0
    for change, shown in (
        ({"weight": 3}, {"weight": 3.0, "kv_reuse": True}),
        ({"kv_reuse": False}, {"weight": 3.0, "kv_reuse": False}),
        ({}, {"weight": 3.0, "kv_reuse": False}),
        ({"kv_reuse": True, "weight": 0.01}, {"weight": 0.01, "kv_reuse": True}),
    ):
        answer = client.patch(path, json=change, headers=operator)
        assert answer.status_code == 200
        assert shown.items() <= answer.json().items()
    for bad in ({"weight": 0}, {"weight": 101}, {"weight": None}, {"kv_reuse": 0}, {"else": 1}):
        assert client.patch(path, json=bad, headers=operator).status_code == 400
    missing = client.patch("/v1/admin/tenants/missing", json={"weight": 2}, headers=operator)
    assert missing.status_code == 404
    body = {"name": "new", "weight": 2.5, "kv_reuse": False}
    made = client.post("/v1/admin/tenants", json=body, headers=operator).json()
    assert (made["weight"], made["kv_reuse"]) == (2.5, False)
    log = client.get("/v1/admin/audit?tenant=acme&limit=1", headers=operator).json()["data"]
    assert log[0]["detail"] == {"kv_reuse": True, "weight": 0.01}


def test_an_admin_key_administers_only_its_own_tenant(
    client: TestClient, world: World, admin: dict[str, str]
) -> None:
    world.add_tenant("beta")
    listed = client.get("/v1/admin/tenants", headers=admin).json()["data"]
    assert [one["name"] for one in listed] == ["acme"]
    for method, path, body in (
        ("POST", "/v1/admin/tenants", {"name": "mine"}),
        ("PATCH", "/v1/admin/tenants/acme/quota", {"max_prefixes": 1000}),
        ("PATCH", "/v1/admin/tenants/acme", {"weight": 100.0}),
    ):
        answer = client.request(method, path, json=body, headers=admin)
        assert answer.status_code == 403
        assert error_of(answer)["code"] == "operator_only"
    found = client.get("/v1/admin/keys", headers=admin).json()["data"]
    assert {one["tenant"] for one in found} == {"acme"}
    assert "key" not in found[0]


def test_the_operator_reads_all_tenants(client: TestClient, operator: dict[str, str]) -> None:
    tenants = client.get("/v1/admin/tenants?limit=2", headers=operator).json()
    rest = client.get(
        "/v1/admin/tenants", params={"after": tenants["next_after"]}, headers=operator
    ).json()
    names = [one["name"] for one in (*tenants["data"], *rest["data"])]
    assert names == ["acme", "beta", "operator"]
    everyones = client.get("/v1/admin/keys", headers=operator).json()["data"]
    assert {one["tenant"] for one in everyones} == set(names)
    acmes = client.get("/v1/admin/keys?tenant=acme", headers=operator).json()["data"]
    assert {one["tenant"] for one in acmes} == {"acme"}


def test_a_key_is_created_listed_rotated_and_revoked(
    client: TestClient, admin: dict[str, str]
) -> None:
    made = client.post(
        "/v1/admin/keys", json={"label": "ci", "expires_in_seconds": 3600.0}, headers=admin
    )
    assert made.status_code == 201
    old = made.json()
    assert (old["state"], old["scopes"]) == ("active", ["read", "generate", "write"])
    assert old["expires_at"]
    rotated = client.post(
        f"/v1/admin/keys/{old['key_id']}/rotate", json={"overlap_seconds": 60}, headers=admin
    ).json()
    assert rotated["label"] == "ci"
    for text in (old["key"], rotated["key"]):
        assert client.get("/v1/models", headers=bearer(text)).status_code == 200
    by_id = {
        one["key_id"]: one for one in client.get("/v1/admin/keys", headers=admin).json()["data"]
    }
    assert by_id[old["key_id"]]["state"] == "replaced"
    assert by_id[old["key_id"]]["replaced_by"] == rotated["key_id"]
    again = client.post(f"/v1/admin/keys/{old['key_id']}/rotate", json={}, headers=admin)
    assert again.status_code == 409
    ended = client.delete(f"/v1/admin/keys/{old['key_id']}", headers=admin).json()
    assert ended["state"] == "revoked"
    assert client.get("/v1/models", headers=bearer(old["key"])).status_code == 401
    assert client.get("/v1/models", headers=bearer(rotated["key"])).status_code == 200


def test_a_rotation_without_overlap_ends_the_old_key_immediately(
    client: TestClient, admin: dict[str, str]
) -> None:
    old = client.post("/v1/admin/keys", json={}, headers=admin).json()
    client.post(
        f"/v1/admin/keys/{old['key_id']}/rotate", json={"overlap_seconds": 0}, headers=admin
    )
    assert client.get("/v1/models", headers=bearer(old["key"])).status_code == 401


def test_a_key_cannot_revoke_itself(
    client: TestClient, world: World, admin: dict[str, str]
) -> None:
    own = world.keys["acme:admin"].split("_")[1]
    assert client.delete(f"/v1/admin/keys/{own}", headers=admin).status_code == 400


@pytest.mark.parametrize(
    "body",
    [
        {"scopes": []},
        {"scopes": ["root"]},
        {"label": "a\nb"},
        {"expires_in_seconds": 0.0},
        {"expires_in_seconds": 1e300},
        {"else": 1},
    ],
)
def test_invalid_key_requests_are_rejected(
    client: TestClient, admin: dict[str, str], body: dict[str, Any]
) -> None:
    assert client.post("/v1/admin/keys", json=body, headers=admin).status_code == 400


def test_the_audit_log_has_actor_and_change(
    client: TestClient, world: World, admin: dict[str, str], operator: dict[str, str]
) -> None:
    writer = {**world.headers("acme:write"), "x-request-id": "r-7"}
    manifest = put_text(client, "voice", "hello", writer)
    put_text(client, "voice", "hello", writer)
    client.put("/v1/prefixes/voice/aliases/prod", json={"version": 1}, headers=writer)
    client.delete("/v1/prefixes/voice/aliases/prod", headers=writer)
    client.put("/v1/users/ann/prefix", json={"prefix": "voice"}, headers=writer)
    client.delete("/v1/prefixes/voice", headers=writer)
    client.put("/v1/prefixes/bad name", json={"kind": "text", "text": "x"}, headers=writer)
    put_text(client, "theirs", "x", world.headers("beta"))
    log = client.get("/v1/admin/audit?limit=6", headers=admin).json()
    assert [(one["action"], one["subject"]) for one in reversed(log["data"])] == [
        ("prefix.publish", "voice"),
        ("prefix.publish", "voice"),
        ("alias.set", "voice"),
        ("alias.remove", "voice"),
        ("binding.set", "ann"),
        ("prefix.delete", "voice"),
    ]
    key_id = world.keys["acme:write"].split("_")[1]
    assert {one["actor_key"] for one in log["data"]} == {key_id}
    assert {one["request_id"] for one in log["data"]} == {"r-7"}
    first = log["data"][-1]
    assert first["detail"] == {"version": 1, "digest": manifest["digest"], "created": True}
    older = client.get(
        "/v1/admin/audit", params={"before": log["next_before"]}, headers=admin
    ).json()
    assert older["data"][-1]["action"] == "tenant.create"
    assert older["data"][-1]["actor_key"] is None
    everyones = client.get("/v1/admin/audit", headers=operator).json()["data"]
    assert {one["tenant"] for one in everyones} == {"acme", "beta", "operator"}
    betas = client.get("/v1/admin/audit?tenant=beta", headers=operator).json()["data"]
    assert {one["tenant"] for one in betas} == {"beta"}


NUL = [
    ("GET", "/v1/prefixes?after=%00", None),
    ("GET", "/v1/users?after=%00", None),
    ("GET", "/v1/admin/tenants?after=%00", None),
    ("GET", "/v1/admin/tenants/%00", None),
    ("PATCH", "/v1/admin/tenants/%00", {"weight": 1}),
    ("PATCH", "/v1/admin/tenants/%00/quota", {"max_prefixes": 1}),
    ("GET", "/v1/admin/keys?after=%00", None),
    ("GET", "/v1/admin/keys?tenant=%00", None),
    ("POST", "/v1/admin/keys", {"tenant": "\0"}),
    ("POST", "/v1/admin/keys/%00/rotate", {}),
    ("DELETE", "/v1/admin/keys/%00", None),
    ("GET", "/v1/admin/audit?tenant=%00", None),
]


def test_a_text_with_nul_is_a_400(either_world: World) -> None:
    """PostgreSQL rejects NUL in texts, and SQLite has no such name."""
    either_world.add_tenant("operator")
    headers = either_world.headers("operator:all")
    with TestClient(either_world.app, headers=headers, raise_server_exceptions=False) as client:
        for method, path, body in NUL:
            answer = client.request(method, path, json=body)
            assert answer.status_code in {200, 400, 404}, (path, answer.text)
            if either_world.database.dialect.name == "postgresql":
                assert answer.status_code == 400, path
                assert error_of(answer)["code"] == "invalid_request"
                message = error_of(answer)["message"]
                assert "NUL" in message or "control character" in message, path


@pytest.mark.parametrize("path", ["keys", "audit"])
def test_a_filter_by_an_unknown_tenant_is_404(client: TestClient, world: World, path: str) -> None:
    world.add_tenant("operator")
    headers = world.headers("operator:all")
    assert client.get(f"/v1/admin/{path}?tenant=acme", headers=headers).status_code == 200
    answer = client.get(f"/v1/admin/{path}?tenant=nosuch", headers=headers)
    assert answer.status_code == 404
    assert "nosuch" in error_of(answer)["message"]
