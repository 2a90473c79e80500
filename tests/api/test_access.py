"""Authentication, scopes and isolation of tenants, for every route of the application."""

import re
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import fastapi.dependencies.utils
import httpx2
import pytest
from fastapi import APIRouter
from fastapi.testclient import TestClient
from sqlalchemy import update

from prefixd.server.api.app import KEYED, PUBLIC
from prefixd.server.tenants import key_text as keys
from prefixd.server.tenants.registry import Scope
from prefixd.server.tenants.tables import api_keys, batches
from prefixd.store.catalog.tables import files
from prefixd.store.db.database import writing
from tests.api.api_world import World, error_of, make_world, put_text

EXAMPLES = {
    "name": "voice",
    "reference": "voice",
    "alias": "prod",
    "version": "1",
    "model:path": "voice",
    "user:path": "ann",
    "key_id": "KKKKKKKKKKKK",
    "tenant": "gamma",
    "file_id": "file-" + "f" * 32,
    "batch_id": "batch_" + "f" * 32,
}
MESSAGES = [{"role": "user", "content": "x"}]
BODIES: dict[str, Any] = {
    "/v1/completions": {"model": "voice", "prompt": "x"},
    "/v1/chat/completions": {"model": "voice", "messages": [{"role": "user", "content": "x"}]},
    "/v1/batches": {
        "input_file_id": "file-" + "f" * 32,
        "endpoint": "/v1/completions",
        "completion_window": "24h",
    },
    "/v1/responses": {"model": "voice", "input": "x"},
    "/v1/messages": {"model": "voice", "max_tokens": 4, "messages": MESSAGES},
    "/v1/messages/count_tokens": {"model": "voice", "messages": MESSAGES},
    "/tokenize": {"model": "voice", "prompt": "x"},
    "/detokenize": {"model": "voice", "tokens": [120]},
    "/v1/loglikelihood": {"model": "voice", "prompt": "x", "choices": ["y", "z"]},
    "/v1/prefixes/{name}/aliases/{alias}": {"version": 1},
    "/v1/prefixes/{name}/versions/{version}": {"note": "x"},
    "/v1/prefixes/{name}": {"kind": "text", "text": "theirs"},
    "/v1/users/{user:path}/prefix": {"prefix": "voice"},
    "/v1/default/prefix": {"prefix": "voice@prod"},
    "/v1/admin/tenants": {"name": "delta"},
    "/v1/admin/tenants/{tenant}": {"weight": 2.0},
    "/v1/admin/tenants/{tenant}/quota": {"max_prefixes": 5},
    "/v1/admin/keys": {"tenant": "gamma"},
    "/v1/admin/keys/{key_id}/rotate": {"overlap_seconds": 60},
}
GENERATES = (
    "completions",
    "/responses",
    "/messages",
    "/count_tokens",
    "/embeddings",
    "/loglikelihood",
    "tokenize",
    "/warm",
)
REFUSED = {"/v1/embeddings"}
LINES = b'{"user": "ann", "prefix": "voice"}\n'
# Lists with a parameter for another tenant.
QUERIES = {("GET", "/v1/admin/keys"), ("GET", "/v1/admin/audit")}
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


def test_scope_table_covers_every_route(world: World) -> None:
    documented = {
        (method.upper(), path)
        for path, operations in world.app.openapi()["paths"].items()
        for method in operations
    }
    keyed = {(method, path.replace(":path", "")) for method, path in ROUTES}
    assert documented == keyed | {("GET", path) for path in PUBLIC_PATHS}
    assert {route.path for router in PUBLIC for route in router.routes} == PUBLIC_PATHS  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "authorization",
    [None, "Bearer ", "Bearer nonsense", f"Bearer {keys.generate().text}", "Basic eDp5"],
    ids=["none", "empty", "malformed", "unknown key", "basic"],
)
def test_every_keyed_route_without_a_valid_key_is_401(
    client: TestClient, authorization: str | None
) -> None:
    del client.headers["authorization"]
    headers = {"authorization": authorization} if authorization else {}
    for method, path in ROUTES:
        # The body is malformed too: the key must be checked first.
        answer = client.request(method, url(path), content=b"{", headers=headers)
        assert answer.status_code == 401, (method, path)
        assert answer.headers["www-authenticate"] == "Bearer"
        error = error_of(answer)
        assert error["type"] == "authentication_error"
        assert "nonsense" not in answer.text


def test_route_without_a_scope_still_requires_a_key(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    forgetful = APIRouter()
    forgetful.add_api_route("/v1/forgotten", lambda: "open", methods=["GET"])
    monkeypatch.setattr("prefixd.server.api.app.KEYED", (forgetful,))
    client = TestClient(world.make_app())
    assert client.get("/v1/forgotten").status_code == 401
    assert client.get("/v1/forgotten", headers=world.headers()).status_code == 200


def test_revoked_key_is_rejected_at_once(client: TestClient, world: World) -> None:
    issued = world.tenants.create_key(tenant="acme")
    headers = {"authorization": f"Bearer {issued.text}"}
    assert client.get("/v1/models", headers=headers).status_code == 200
    world.tenants.revoke_key(issued.record.key_id)
    assert client.get("/v1/models", headers=headers).status_code == 401


def ask(client: TestClient, method: str, path: str, headers: dict[str, str]) -> httpx2.Response:
    """A valid request to a route, for the resources of EXAMPLES."""
    where = url(path) + ("?tenant=gamma" if (method, path) in QUERIES else "")
    if (method, path) == ("POST", "/v1/files"):
        return client.post(where, data={"purpose": "batch"}, files={"file": LINES}, headers=headers)
    if path.endswith(":import"):
        headers = {**headers, "content-type": "application/x-ndjson"}
        return client.request(method, where, content=LINES, headers=headers)
    body = BODIES.get(path) if method in {"PUT", "POST", "PATCH"} else None
    return client.request(method, where, json=body, headers=headers)


def create_examples(client: TestClient, world: World, tenant: str) -> None:
    """Create the resources of EXAMPLES for ``tenant``."""
    headers = world.headers(tenant)
    put_text(client, "voice", f"{tenant}'s first", headers)  # nothing refers to it
    put_text(client, "voice", f"{tenant}'s", headers)
    client.put("/v1/prefixes/voice/aliases/prod", json={"version": 2}, headers=headers)
    client.put("/v1/prefixes/voice/pin", headers=headers)
    client.put("/v1/users/ann/prefix", json={"prefix": "voice"}, headers=headers)
    client.put("/v1/default/prefix", json={"prefix": "voice"}, headers=headers)
    issued = world.tenants.create_key(tenant=tenant, label="theirs")
    with writing(world.database) as connection:
        mine = api_keys.c.key_id == issued.record.key_id
        connection.execute(update(api_keys).where(mine).values(key_id=EXAMPLES["key_id"]))
    client.post("/v1/files", data={"purpose": "batch"}, files={"file": LINES}, headers=headers)
    with writing(world.database) as connection:
        connection.execute(update(files).values(id=EXAMPLES["file_id"]))
    client.post("/v1/batches", json=BODIES["/v1/batches"], headers=headers)
    with writing(world.database) as connection:
        spare = {"input_file_id": "file-spare"}  # so that the file can be deleted
        connection.execute(update(batches).values(id=EXAMPLES["batch_id"], **spare))


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_each_route_requires_exactly_one_scope(
    client: TestClient, world: World, method: str, path: str
) -> None:
    world.add_tenant("gamma")
    world.add_tenant("operator")
    create_examples(client, world, "operator")
    generates = path.endswith(GENERATES)
    wanted = Scope.READ if method == "GET" else Scope.WRITE
    if generates or path.startswith(("/v1/files", "/v1/batches")):
        wanted = Scope.GENERATE
    if path.startswith("/v1/admin/"):
        wanted = Scope.ADMIN
    for scope in Scope:
        answer = ask(client, method, path, world.headers(f"operator:{scope}"))
        if scope is wanted:
            assert answer.status_code == 400 if path in REFUSED else answer.status_code < 300
        else:
            assert answer.status_code == 403
            assert error_of(answer)["code"] == "insufficient_scope"


def masked(answer: httpx2.Response, world: World) -> tuple[int, str, dict[str, str]]:
    """A response without what differs between any two responses: times and new keys."""
    text = re.sub(r"\d{4}-\d\d-\d\dT[\d:.]+Z", "TIME", answer.text)
    for name, key in world.keys.items():
        text = text.replace(key.split("_")[1], f"ID-{name}")
    text = re.sub(r"(file-|batch_)[0-9a-e][0-9a-f]*", r"\1NEW", text)
    text = re.sub(r'"(created_at|expires_at)":\d+', r'"\1":TIME', text)
    text = re.sub(r'"(key|key_id)":"[^"]*"', r'"\1":"NEW"', text)
    headers = {name: value for name, value in answer.headers.items() if name != "date"}
    if '"NEW"' in text:
        del headers["content-length"]
    return answer.status_code, text, headers


Shared = tuple[World, TestClient]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[bool, Shared]]:
    """A server where gamma has the resources of EXAMPLES, under True, and one without a gamma.

    Each test asks as a tenant of its own, see ``add_caller``.
    """
    with ExitStack() as stack:
        servers = {}
        for present in (False, True):
            folder = tmp_path_factory.mktemp(f"gamma-{present}")
            world = stack.enter_context(make_world(folder))
            client = stack.enter_context(TestClient(world.app))
            if present:
                world.add_tenant("gamma")
                create_examples(client, world, "gamma")
            servers[present] = world, client
        yield servers


def add_caller(world: World, method: str, path: str) -> dict[str, str]:
    """Headers with a key of all scopes, of a tenant that no other route was asked with."""
    name = f"caller-{ROUTES.index((method, path))}"
    world.tenants.create_tenant(name)
    key = world.tenants.create_key(tenant=name, scopes=list(Scope))
    world.keys[name] = key.text
    return {**world.headers(name), "x-request-id": "same"}


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_resource_of_another_tenant_looks_like_a_missing_one(
    shared: dict[bool, Shared], method: str, path: str
) -> None:
    """A tenant receives the same bytes whether gamma has the resource or no tenant has, and
    changes nothing of gamma's."""
    before = resources(*shared[True])
    responses = []
    for world, client in shared.values():
        answer = ask(client, method, path, add_caller(world, method, path))
        assert answer.status_code < 500
        assert "gamma's" not in answer.text
        responses.append(masked(answer, world))
    assert responses[0] == responses[1]
    named = "{" in path and path != "/v1/prefixes/{name}/aliases" and method == "GET"
    assert responses[0][0] == 404 or not named
    assert resources(*shared[True]) == before


def resources(world: World, client: TestClient) -> list[Any]:
    """What gamma has."""
    headers = world.headers("gamma")
    paths = ("prefixes/voice@prod", "users/ann/prefix", "default/prefix", "models", "users")
    bodies: list[Any] = [client.get(f"/v1/{path}", headers=headers).json() for path in paths]
    bodies[0].pop("tier")  # changes while the engine loads gamma's pinned prefix
    bodies += world.store.files.page(tenant="gamma", limit=9)
    bodies += world.batches.page(tenant="gamma", limit=9)
    return [*bodies, world.tenants.tenant("gamma"), world.tenants.list_keys("gamma")]


def test_lists_contain_only_resources_of_the_caller(client: TestClient, world: World) -> None:
    put_text(client, "voice", "acme's", world.headers())
    put_text(client, "tone", "beta's", world.headers("beta"))
    for tenant, name in (("acme", "voice"), ("beta", "tone")):
        headers = world.headers(tenant)
        models = client.get("/v1/models", headers=headers).json()["data"]
        assert [(m["id"], m["parent"]) for m in models] == [("tiny", None), (name, "tiny")]
        prefixes = client.get("/v1/prefixes", headers=headers).json()["data"]
        assert [p["name"] for p in prefixes] == [name]


@pytest.mark.parametrize("model", ["tiny", "voice", "voice@1", "tiny:voice@1", "voice@latest"])
def test_model_is_found_by_each_form_of_its_name(
    client: TestClient, world: World, model: str
) -> None:
    put_text(client, "voice", "acme's", world.headers())
    body = client.get(f"/v1/models/{model}").json()
    assert body["id"] == model
    assert body["parent"] == (None if model == "tiny" else "tiny")
    assert client.get("/v1/models/else").status_code == 404


def test_public_routes_need_no_key(client: TestClient) -> None:
    del client.headers["authorization"]
    for path in (*PUBLIC_PATHS, "/docs", "/openapi.json"):
        assert client.get(path).status_code == 200, path


def test_server_without_a_running_engine_is_not_ready(world: World) -> None:
    client = TestClient(
        world.app, headers=world.headers()
    )  # without its lifespan: the engine does not start
    assert client.get("/health/live").status_code == 200
    assert client.get("/health/ready").status_code == 503
    answer = client.post("/v1/completions", json={"model": "tiny", "prompt": "x"})
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    error_of(answer)


def test_unknown_routes_and_methods_return_the_error_object(client: TestClient) -> None:
    for method, path, status in (
        ("GET", "/nowhere", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/v1/prefixes", 405),
        ("GET", "/v1/prefixes/a/versions/0/content", 404),
        ("GET", "/v1/prefixes/a/versions/-/content", 400),
        ("GET", "/v1/prefixes?limit=0", 400),
    ):
        answer = client.request(method, path)
        assert answer.status_code == status, path
        error_of(answer)


def test_a_generation_solves_few_dependencies(
    client: TestClient, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    # FastAPI solves what a dependency needs wherever it is named, before it looks into its cache.
    solve, solved = fastapi.dependencies.utils.solve_dependencies, []

    async def counted(**values: Any) -> Any:
        solved.append(values["dependant"].call)
        return await solve(**values)

    monkeypatch.setattr(fastapi.dependencies.utils, "solve_dependencies", counted)
    body = {"model": world.served.name, "prompt": "a", "max_tokens": 1}
    assert client.post("/v1/completions", json=body, headers=world.headers()).is_success
    assert 0 < len(solved) <= 5
