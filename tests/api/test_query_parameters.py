"""Query parameters that a route does not take are errors, on every route under /v1."""

import re

import pytest
from fastapi.testclient import TestClient

from tests.api.api_world import World, error_of, put_text


def test_every_route_under_v1_refuses_an_unknown_parameter(world: World) -> None:
    paths = world.app.openapi()["paths"]
    world.add_tenant("zeta")
    with TestClient(world.app, headers=world.headers("zeta:all")) as client:
        tried = 0
        for path, operations in paths.items():
            if not path.startswith("/v1"):
                continue
            for method in operations:
                url = re.sub(r"\{[^}]*\}", "x", path)
                answer = client.request(method, f"{url}?zzlimit=3")
                error = error_of(answer)
                assert answer.status_code == 400, (method, path, answer.text)
                assert (error["code"], error["param"]) == ("unknown_parameter", "zzlimit")
                assert "zzlimit" in error["message"]
                tried += 1
    assert tried > 25


def test_the_message_names_the_accepted_parameters(client: TestClient) -> None:
    message = error_of(client.get("/v1/prefixes?Limit=3&after=a"))["message"]
    assert message.startswith("unknown query parameter 'Limit'; accepted: ")
    assert set(message.partition("accepted: ")[2].split(", ")) >= {"after", "label", "limit"}
    assert "none here" in error_of(client.get("/v1/models?limit=3"))["message"]


def test_a_parameter_comes_once_unless_it_is_a_list(client: TestClient, world: World) -> None:
    answer = client.get("/v1/prefixes?limit=1&limit=2")
    assert answer.status_code == 400
    assert error_of(answer)["code"] == "duplicate_parameter"
    put_text(client, "voice", "hello", world.headers())
    answer = client.get("/v1/prefixes?label=a:b&label=c:d&limit=5")
    assert (answer.status_code, answer.json()["data"]) == (200, [])


def test_a_key_is_checked_before_the_parameters(world: World) -> None:
    with TestClient(world.app) as anonymous:
        assert anonymous.get("/v1/prefixes?zz=1").status_code == 401


@pytest.mark.parametrize("path", ["/health/live?probe=1", "/metrics?name=x"])
def test_routes_outside_v1_ignore_parameters(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 200
