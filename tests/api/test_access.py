"""Who may do what: generated from the application's own table of routes."""

from collections.abc import Iterator
from typing import Any

import pytest
from api_world import World, error_of, put_text
from fastapi import APIRouter
from fastapi.testclient import TestClient

import server.app
from server.app import KEYED, PUBLIC
from server.tenants import keys
from server.tenants.registry import Scope

EXAMPLES = {
    "name": "voice",
    "reference": "voice",
    "alias": "prod",
    "version": "1",
    "model:path": "voice",
}
BODIES: dict[str, Any] = {
    "/v1/completions": {"model": "voice", "prompt": "x"},
    "/v1/chat/completions": {"model": "voice", "messages": [{"role": "user", "content": "x"}]},
    "/v1/prefixes/{name}/aliases/{alias}": {"version": 1},
    "/v1/prefixes/{name}": {"kind": "text", "text": "theirs"},
}
PUBLIC_PATHS = {"/health/live", "/health/ready", "/metrics"}


def keyed_routes() -> Iterator[tuple[str, str]]:
    for router in KEYED:
        for route in router.routes:
            for method in route.methods:  # type: ignore[attr-defined]
                yield method, route.path  # type: ignore[attr-defined]


ROUTES = sorted(keyed_routes())


def url(path: str) -> str:
    for name, value in EXAMPLES.items():
        path = path.replace(f"{{{name}}}", value)
    assert "{" not in path
    return path


def test_the_table_is_the_whole_application(world: World) -> None:
    documented = {
        (method.upper(), path)
        for path, operations in world.app.openapi()["paths"].items()
        for method in operations
    }
    keyed = {(method, path.replace(":path", "")) for method, path in ROUTES}
    assert documented == keyed | {("GET", path) for path in PUBLIC_PATHS}
    assert {route.path for router in PUBLIC for route in router.routes} == PUBLIC_PATHS  # type: ignore[attr-defined]


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize(
    "authorization",
    [None, "Bearer ", "Bearer nonsense", f"Bearer {keys.generate().text}", "Basic eDp5"],
)
def test_without_a_good_key_every_route_is_401(
    client: TestClient, method: str, path: str, authorization: str | None
) -> None:
    del client.headers["authorization"]
    headers = {"authorization": authorization} if authorization else {}
    # A body that is malformed too: it must not be looked at before the key.
    answer = client.request(method, url(path), content=b"{", headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    error = error_of(answer)
    assert error["type"] == "authentication_error"
    assert "nonsense" not in answer.text


def test_a_route_that_forgets_to_ask_is_still_closed(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgetful = APIRouter()
    forgetful.add_api_route("/v1/forgotten", lambda: "open", methods=["GET"])
    monkeypatch.setattr(server.app, "KEYED", (forgetful,))
    client = TestClient(server.app.create_app(world.services))
    assert client.get("/v1/forgotten").status_code == 401
    assert client.get("/v1/forgotten", headers=world.headers()).status_code == 200


def test_a_revoked_key_stops_at_once(client: TestClient, world: World) -> None:
    issued = world.services.tenants.create_key(tenant="acme")
    headers = {"authorization": f"Bearer {issued.text}"}
    assert client.get("/v1/models", headers=headers).status_code == 200
    world.services.tenants.revoke_key(issued.record.key_id)
    assert client.get("/v1/models", headers=headers).status_code == 401


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_wants_one_scope(
    client: TestClient, world: World, method: str, path: str
) -> None:
    put_text(client, "voice", "acme's", world.headers())
    client.put("/v1/prefixes/voice/aliases/prod", json={"version": 1})
    wanted = Scope.GENERATE if "completions" in path else Scope.WRITE
    if method == "GET":
        wanted = Scope.READ
    for scope in Scope:
        answer = client.request(
            method, url(path), json=BODIES.get(path), headers=world.headers(f"acme:{scope}")
        )
        if scope is wanted:
            assert answer.status_code < 300, answer.text
        else:
            assert answer.status_code == 403
            assert error_of(answer)["code"] == "insufficient_scope"


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_anothers_prefix_and_no_prefix_are_the_same(
    client: TestClient, world: World, method: str, path: str
) -> None:
    """What beta sees of a name is the same bytes whether acme has it or nobody has."""
    if path in {"/v1/models", "/v1/prefixes"} or (method, path) == ("PUT", "/v1/prefixes/{name}"):
        pytest.skip("no name to ask for, or it makes one")
    seen = []
    for present in (False, True):
        if present:
            put_text(client, "voice", "acme's", world.headers())
            client.put("/v1/prefixes/voice/aliases/prod", json={"version": 1})
        headers = {**world.headers("beta"), "x-request-id": "same"}
        answer = client.request(method, url(path), json=BODIES.get(path), headers=headers)
        assert answer.status_code == 404
        error_of(answer)
        dated = {name: v for name, v in answer.headers.items() if name != "date"}
        seen.append((answer.status_code, answer.content, dated))
    assert seen[0] == seen[1]


def test_listings_hold_only_ones_own(client: TestClient, world: World) -> None:
    put_text(client, "voice", "acme's", world.headers())
    put_text(client, "tone", "beta's", world.headers("beta"))
    for tenant, name in (("acme", "voice"), ("beta", "tone")):
        headers = world.headers(tenant)
        models = client.get("/v1/models", headers=headers).json()["data"]
        assert [(m["id"], m["parent"]) for m in models] == [("tiny", None), (name, "tiny")]
        prefixes = client.get("/v1/prefixes", headers=headers).json()["data"]
        assert [p["name"] for p in prefixes] == [name]


@pytest.mark.parametrize("model", ["tiny", "voice", "voice@1", "tiny:voice@1", "voice@latest"])
def test_one_model(client: TestClient, world: World, model: str) -> None:
    put_text(client, "voice", "acme's", world.headers())
    body = client.get(f"/v1/models/{model}").json()
    assert body["id"] == model
    assert body["parent"] == (None if model == "tiny" else "tiny")
    assert client.get("/v1/models/else").status_code == 404


def test_public_routes_need_no_key(client: TestClient) -> None:
    del client.headers["authorization"]
    for path in (*PUBLIC_PATHS, "/docs", "/openapi.json"):
        assert client.get(path).status_code == 200, path


def test_not_ready_without_an_engine(world: World) -> None:
    client = TestClient(world.app, headers=world.headers())  # its lifespan never starts
    assert client.get("/health/live").status_code == 200
    assert client.get("/health/ready").status_code == 503
    answer = client.post("/v1/completions", json={"model": "tiny", "prompt": "x"})
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    error_of(answer)


def test_unknown_routes_and_methods_have_the_error_shape(client: TestClient) -> None:
    for method, path, status in (
        ("GET", "/nowhere", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/v1/prefixes", 405),
        ("GET", "/v1/prefixes/a/versions/0/content", 400),
        ("GET", "/v1/prefixes/a/versions/x/content", 400),
        ("GET", "/v1/prefixes?limit=0", 400),
    ):
        answer = client.request(method, path)
        assert answer.status_code == status, path
        error_of(answer)
