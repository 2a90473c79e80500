"""Paths and methods that no route takes, and HEAD."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.api.api_batches import create, line
from tests.api.api_world import World, error_of, put_text

UNKNOWN = (
    "/v1",
    "/v1/",
    "/v1/models/",
    "/v1/models/a/",
    "/v1/prefixes/",
    "/v1/prefixes/a/",
    "/v1/users/",
    "/v1/users/alice/prefix/",
    "/v1/users//prefix",
    "/v1//models",
    "//v1/models",
    "/v1/absent",
    "/v1%2Fmodels",
    "/v1%2fmodels",
    "/%2Fv1/models",
    "/v1/prefixes/a%2Fversions",
    "/v1/users/a%2Fprefix",
)


@pytest.fixture
def anonymous(world: World) -> Iterator[TestClient]:
    with TestClient(world.app, follow_redirects=False) as client:
        yield client


def raw(client: TestClient, method: str, target: str, headers: dict[str, str]) -> Any:
    """A request whose target is sent as it is: httpx would normalize its path."""
    request = client.build_request(method, "/", headers=headers)
    request.url = request.url.copy_with(raw_path=target.encode())
    return client.send(request)


def test_an_unknown_path_under_v1_is_401_without_a_key_and_404_with_one(
    anonymous: TestClient, world: World
) -> None:
    for path in UNKNOWN:
        for method in ("GET", "PUT"):
            refused = raw(anonymous, method, path, {})
            assert refused.status_code == 401, (method, path)
            assert error_of(refused)["code"] == "missing_api_key"
            missing = raw(anonymous, method, path, world.headers())
            assert missing.status_code == 404, (method, path)
            assert error_of(missing)["code"] == "unknown_route"
            assert "location" not in missing.headers


def test_an_unknown_path_elsewhere_is_404_without_a_key(anonymous: TestClient) -> None:
    for path in ("/", "/favicon.ico", "/health/live/", "/docs/", "/metrics/", "/v10"):
        answer = anonymous.get(path)
        assert (answer.status_code, error_of(answer)["code"]) == (404, "unknown_route"), path


def operations(world: World) -> dict[str, set[str]]:
    paths = world.app.openapi()["paths"]
    return {path: {method.upper() for method in methods} for path, methods in paths.items()}


def test_405_lists_every_method_of_the_path_after_authentication(
    anonymous: TestClient, world: World
) -> None:
    tried = 0
    for path, methods in operations(world).items():
        url = re.sub(r"\{[^}]*\}", "x", path)
        allowed = methods | ({"HEAD"} if "GET" in methods else set())
        for method in {"GET", "PUT", "POST", "PATCH", "DELETE", "OPTIONS", "BREW"} - allowed:
            if path.startswith("/v1"):
                assert anonymous.request(method, url).status_code == 401, (method, url)
            answer = anonymous.request(method, url, headers=world.headers())
            assert answer.status_code == 405, (method, url)
            assert error_of(answer)["code"] == "method_not_allowed"
            assert set(answer.headers["allow"].split(", ")) == allowed, (method, url)
            tried += 1
    assert tried > 100
    assert anonymous.post("/docs").headers["allow"] == "GET, HEAD"
    assert anonymous.head("/v1/completions", headers=world.headers()).headers["allow"] == "POST"


def test_the_methods_of_a_prefix_are_those_of_three_routers(client: TestClient) -> None:
    answer = client.post("/v1/prefixes/support")
    assert answer.headers["allow"] == "DELETE, GET, HEAD, PUT"


def test_head_is_get_without_a_body_on_every_route(client: TestClient, world: World) -> None:
    put_text(client, "x", "hello", world.headers())
    client.put("/v1/prefixes/x/aliases/x", json={"version": 1})
    client.put("/v1/users/x/prefix", json={"prefix": "x"})
    client.put("/v1/default/prefix", json={"prefix": "x"})
    batch = create(client, line("x", {"prompt": "x"}))
    world.add_tenant("acme")
    headers = world.headers("acme:all")
    succeeded = set()
    targets = {path for path, methods in operations(world).items() if "GET" in methods}
    for path in targets | {"/docs", "/openapi.json"}:
        url = re.sub(r"\{version\}", "1", path)
        url = re.sub(r"\{tenant\}", "acme", url)
        url = re.sub(r"\{file_id\}", batch["input_file_id"], url)
        url = re.sub(r"\{batch_id\}", batch["id"], url)
        url = re.sub(r"\{[^}]*\}", "x", url)
        got, head = client.get(url, headers=headers), client.head(url, headers=headers)
        assert head.status_code == got.status_code, url
        assert head.content == b""
        ignored = {"x-request-id", "content-length" if path == "/metrics" else ""}
        assert drop(head.headers, ignored) == drop(got.headers, ignored), url
        assert head.headers.get("content-length") or path == "/metrics"
        if got.status_code == 200:
            succeeded.add(path)
    assert targets - succeeded <= {"/v1/admin/state"}  # the operator's
    assert client.head("/v1/models/absent").status_code == 404
    assert client.head("/v1/prefixes/x", headers={"authorization": ""}).status_code == 401


def drop(headers: Any, names: set[str]) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name not in names}


def test_head_of_a_stored_file_does_not_read_it(client: TestClient, world: World) -> None:
    put_text(client, "x", "hello", world.headers())
    url = "/v1/prefixes/x/versions/1/content"
    got = client.get(url)

    def unread(**_: Any) -> None:
        raise AssertionError("the blob was read")

    world.store.fetch = unread  # type: ignore[assignment,method-assign]
    head = client.head(url)
    assert head.status_code == 200
    assert drop(head.headers, {"x-request-id"}) == drop(got.headers, {"x-request-id"})
    assert int(head.headers["content-length"]) == len(got.content)
    # RFC 9110, section 14.2: a range is for GET only.
    whole = client.head(url, headers={"range": "bytes=0-3"})
    assert whole.status_code == 200
    assert "content-range" not in whole.headers


def test_encoded_slashes_stay_data_where_a_parameter_may_have_them(
    client: TestClient, world: World
) -> None:
    put_text(client, "x", "hello", world.headers())
    for user in ("a%2Fb", "%2Fa", "a%2F", "a%2Fprefix", "%2E%2E", "a%20b", "a/b"):
        bound = raw(client, "GET", f"/v1/users/{user}/prefix", world.headers())
        assert error_of(bound)["code"] == "binding_not_found", user
    model = raw(client, "GET", "/v1/models/org/name", world.headers())
    assert error_of(model)["code"] == "model_not_found"


def test_bytes_that_are_not_utf8_are_refused(client: TestClient, world: World) -> None:
    for target in (
        "/v1/users/%FF/prefix",
        "/v1/users/%ED%A0%80/prefix",
        "/v1/prefixes?after=%C0%80",
    ):
        answer = raw(client, "GET", target, world.headers())
        assert answer.status_code == 400, target
        assert "UTF-8" in error_of(answer)["message"]


def test_control_characters_in_paths_are_refused(anonymous: TestClient, world: World) -> None:
    for target in ("/v1/models%0A", "/v1/prefixes/a%0Ab", "/v1/users/a%0Ab/prefix", "/v1/%00"):
        assert raw(anonymous, "GET", target, {}).status_code == 401, target
        answer = raw(anonymous, "GET", target, world.headers())
        assert answer.status_code == 400, target
        assert "control character" in error_of(answer)["message"]
