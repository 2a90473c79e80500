"""Values of paths, queries and bodies: numbers, flags, users, keys in the wrong place, JSON."""

import json
import re
from typing import Any
from urllib.parse import quote

import pytest
import structlog
from fastapi.testclient import TestClient

from tests.api.api_world import World, error_of, put_text
from tests.api.test_prefix_routes import files

NOT_NUMBERS = ("1.0", "+1", "1_0", " 1", "1 ", "01", "00", "٣", "1e1", "0x1", "", "-", "--1", "1\n")
HUGE = ("1" + "0" * 400, "1" + "0" * 5000, "-1" + "0" * 5000)
BAD_USERS = {
    "nothing": "",
    "257 characters": "a" * 257,
    "NUL": "a\x00",
    "a line": "a\nb",
    "DEL": "\x7f",
    "a C1 control": "a\x85",
    **{
        f"U+{code:04X}": f"a{chr(code)}b"
        for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
    },
}
GOOD_USERS = (
    "a" * 256,
    "🦊" * 256,
    "e\u0301",
    "\u00e9",
    "\u0646\u200c\u0627",
    "👩\u200d💻",
    "\u202f",
    "\u2065",
    "\u200e",
    "a/b",
    " ",
    "..",
)
KEY = "pfx_4f9c2hT8kQzL_" + "a1B2c3D4e5" * 4 + "xyz" + "abcdef"


def parameters(world: World, kind: str) -> list[tuple[str, str, str, str]]:
    """Method, path, place and name of each parameter whose schema has a type."""
    wanted = []
    for path, operations in world.app.openapi()["paths"].items():
        for method, operation in operations.items():
            for parameter in operation.get("parameters", ()):
                schema = parameter["schema"]
                types = {schema.get("type"), *(one.get("type") for one in schema.get("anyOf", ()))}
                if kind in types:
                    wanted.append((method, path, parameter["in"], parameter["name"]))
    return wanted


def sent(client: TestClient, parameter: tuple[str, str, str, str], value: str) -> Any:
    method, path, place, name = parameter
    encoded = quote(value, safe="")
    if place == "path":
        path = path.replace(f"{{{name}}}", encoded)
    url = re.sub(r"\{[^}]*\}", "x", path)
    return client.request(method, url + (f"?{name}={encoded}" if place == "query" else ""))


def test_numbers_of_paths_and_queries_are_written_in_one_way(world: World) -> None:
    known = parameters(world, "integer")
    assert {place for _, _, place, _ in known} == {"path", "query"}
    assert len(known) >= 8
    world.add_tenant("zeta")
    with TestClient(world.app, headers=world.headers("zeta:all")) as client:
        for parameter in known:
            _, _, place, name = parameter
            for value in (*NOT_NUMBERS, *HUGE):
                if place == "path" and value in {"", "1\n"}:
                    continue
                answer = sent(client, parameter, value)
                assert answer.status_code == 400, (parameter, value)
                assert error_of(answer)["param"] == name
                assert "expected" in error_of(answer)["message"]
        assert client.get("/v1/prefixes?limit=1").status_code == 200
        assert client.get("/v1/prefixes?limit=-0").status_code == 400  # a number, out of range


def test_flags_of_queries_are_true_or_false(client: TestClient, world: World) -> None:
    flags = parameters(world, "boolean")
    parameter = ("put", "/v1/prefixes/{name}", "query", "warm")
    # Every other one is Anthropic's, which is ignored but checked in the same way.
    assert {flag[-1] for flag in flags if flag != parameter} == {"beta"}
    for value in ("1", "0", "yes", "on", "t", "True", "TRUE", "", " true", "2"):
        answer = sent(client, parameter, value)
        assert answer.status_code == 400, value
        assert error_of(answer)["param"] == "warm"
        assert "true or false" in error_of(answer)["message"]
    body = {"kind": "text", "text": "x"}
    for value in ("true", "false"):
        assert client.put(f"/v1/prefixes/x?warm={value}", json=body).status_code in {200, 201}


def test_versions_of_paths_are_written_in_one_way(client: TestClient, world: World) -> None:
    put_text(client, "x", "hello", world.headers())
    assert client.get("/v1/prefixes/x@1").status_code == 200
    for path in ("x@01", "x@%D9%A1", "x/versions/01/content"):
        assert client.get(f"/v1/prefixes/{path}").status_code == 400, path
    assert client.patch("/v1/prefixes/x/versions/01", json={}).status_code == 400
    assert client.post("/v1/prefixes/x@01/warm").status_code == 400
    assert client.put("/v1/prefixes/x@01/pin").status_code == 400
    assert client.get("/v1/models/x@01").status_code == 400


def routes_of(client: TestClient, user: str) -> dict[str, Any]:
    """The answer of every route that takes a user; an empty path segment is no route."""
    answers = {
        "completion": client.post(
            "/v1/completions",
            content=json.dumps({"model": "tiny", "prompt": "x", "max_tokens": 1, "user": user}),
            headers={"content-type": "application/json"},
        ),
        "chat": client.post(
            "/v1/chat/completions",
            content=json.dumps(
                {
                    "model": "tiny",
                    "messages": [{"role": "user", "content": "x"}],
                    "max_tokens": 1,
                    "user": user,
                }
            ),
            headers={"content-type": "application/json"},
        ),
        "import": client.post(
            "/v1/users/bindings:import",
            content=json.dumps({"user": user, "prefix": "x"}),
            headers={"content-type": "application/x-ndjson"},
        ),
        "list": client.get("/v1/users", params={"after": user}),
    }
    if user:
        path = f"/v1/users/{quote(user, safe='')}/prefix".replace("..", "%2E%2E")
        answers["bind"] = client.put(path, json={"prefix": "x"})
        answers["show"] = client.get(path)
        answers["unbind"] = client.delete(path)
    return answers


def test_users_are_refused_on_every_route(client: TestClient, world: World) -> None:
    put_text(client, "x", "hello", world.headers())
    for kind, user in BAD_USERS.items():
        for route, answer in routes_of(client, user).items():
            assert answer.status_code == 400, (kind, route)
            error = error_of(answer)
            in_path = route in {"bind", "show", "unbind"}
            if in_path and (min(user) < " " or user == "\x7f"):
                continue  # refused in any path
            assert "expected a user of 1 to 256 characters" in error["message"]
            if len(user) == 3:
                assert f"one of them U+{ord(user[1]):04X}" in error["message"]
    surrogate = '{"model": "tiny", "prompt": "x", "user": "\\ud800"}'
    headers = {"content-type": "application/json"}
    answer = client.post("/v1/completions", content=surrogate, headers=headers)
    assert (answer.status_code, error_of(answer)["code"]) == (400, "invalid_json")


def test_all_other_users_are_opaque(either_client: TestClient, either_world: World) -> None:
    client, world = either_client, either_world
    put_text(client, "x", "hello", world.headers())
    for user in GOOD_USERS:
        answers = routes_of(client, user)
        statuses = {route: answer.status_code for route, answer in answers.items()}
        assert statuses.pop("unbind") == 204, user
        assert set(statuses.values()) == {200}, (user, statuses)
        assert answers["bind"].json()["user"] == answers["show"].json()["user"] == user
    lines = "\n".join(json.dumps({"user": user, "prefix": "x"}) for user in GOOD_USERS)
    headers = {"content-type": "application/x-ndjson"}
    assert client.post("/v1/users/bindings:import", content=lines, headers=headers).json()[
        "imported"
    ] == len(GOOD_USERS)
    listed = [one["user"] for one in client.get("/v1/users").json()["data"]]
    assert sorted(listed) == sorted(GOOD_USERS)


def test_a_key_in_the_wrong_place_is_not_repeated(client: TestClient, world: World) -> None:
    for key in (world.keys["acme"], KEY, KEY[:-1], KEY[:40], KEY + "z"):
        with structlog.testing.capture_logs() as lines:
            body = {"model": "tiny", "prompt": "x"}
            chat = {"model": "tiny", "messages": [{"role": "user", "content": "x", key: 1}]}
            answers = [
                client.post("/v1/completions", json={**body, key: 1}),
                client.post("/v1/completions", json={**body, "model": key}),
                client.post("/v1/completions", json={**body, "model": f"tiny:{key}"}),
                client.post("/v1/completions", content=f'{{"{key}": 1, "{key}": 2}}'),
                client.post("/v1/chat/completions", json=chat),
                client.get(f"/v1/prefixes?{key}=1"),
                client.get(f"/v1/prefixes?limit={key}"),
                client.get(f"/v1/prefixes?limit=1&{key}=1"),
                client.get(f"/v1/prefixes/{key}"),
                client.get(f"/v1/models/{key}"),
                client.put("/v1/users/ann/prefix", json={"prefix": key}),
                client.put("/v1/prefixes/x", files={key: b"x"}),
                client.put("/v1/prefixes/x", content=b"x", headers={"content-type": key}),
                client.post(f"/v1/{key}"),
            ]
        for number, answer in enumerate(answers):
            assert 400 <= answer.status_code < 500, number
            secret = key.rpartition("_")[2]
            assert secret not in answer.text, number
            error_of(answer)
        assert secret not in repr(lines)
    unknown = error_of(client.post("/v1/completions", json={**body, KEY: 1}))
    assert (unknown["code"], unknown["param"]) == ("unknown_field", "pfx_…")
    named = error_of(client.get("/v1/prefixes/pfx_support"))
    assert "pfx_support" in named["message"]  # a prefix may be named so


DUPLICATES = {
    "at the top": '{"model": "tiny", "model": "tiny", "prompt": "x"}',
    "of another type": '{"model": "tiny", "prompt": "x", "prompt": ["x"]}',
    "escaped": '{"model": "tiny", "prompt": "x", "pr\\u006fmpt": "x"}',
    "deep": '{"model": "tiny", "prompt": "x", "metadata": {"a": [{"b": {"c": 1, "c": 1}}]}}',
    "in an option": '{"model": "tiny", "prompt": "x", "stream": true, "stream_options": '
    '{"include_usage": true, "include_usage": false}}',
}


@pytest.mark.parametrize("kind", DUPLICATES)
def test_a_key_that_comes_twice_is_refused(client: TestClient, kind: str) -> None:
    headers = {"content-type": "application/json"}
    answer = client.post("/v1/completions", content=DUPLICATES[kind], headers=headers)
    assert (answer.status_code, error_of(answer)["code"]) == (400, "invalid_json")
    assert "once" in error_of(answer)["message"]


def test_keys_that_come_twice_are_refused_in_every_body(client: TestClient, world: World) -> None:
    put_text(client, "x", "hello", world.headers())
    twice, json_type = '{"a": 1, "a": 2}', {"content-type": "application/json"}
    text = '{"kind": "text", "text": "y", "metadata": {"labels": {"a": "1", "a": "1"}}}'
    answers = {
        "alias": client.put("/v1/prefixes/x/aliases/a", content=twice, headers=json_type),
        "metadata": client.patch("/v1/prefixes/x/versions/1", content=twice, headers=json_type),
        "text": client.put("/v1/prefixes/x", content=text, headers=json_type),
        "part metadata": client.put("/v1/prefixes/x", files=files() | {"metadata": twice.encode()}),
        "part config": client.put("/v1/prefixes/x", files=files() | {"config": twice.encode()}),
    }
    for body, answer in answers.items():
        assert (answer.status_code, error_of(answer)["code"]) == (400, "invalid_json"), body
    line = '{"user": "ann", "user": "bob", "prefix": "x"}'
    headers = {"content-type": "application/x-ndjson"}
    answer = client.post("/v1/users/bindings:import", content=line, headers=headers)
    assert (answer.status_code, error_of(answer)["code"]) == (400, "invalid_line")
    assert "line 1: expected each key" in error_of(answer)["message"]


@pytest.mark.parametrize(
    "opening", ["[", '{"a":', '{"a":[', '{"model": "tiny", "prompt": "x", "metadata": {"a":' + "["]
)
def test_deeply_nested_json_is_refused(client: TestClient, opening: str) -> None:
    body = opening * (60_000 // len(opening))
    headers = {"content-type": "application/json"}
    for path, method in (("/v1/completions", "POST"), ("/v1/prefixes/x/versions/1", "PATCH")):
        answer = client.request(method, path, content=body, headers=headers)
        assert (answer.status_code, error_of(answer)["code"]) == (400, "invalid_json"), path


def test_numbers_of_bodies_may_be_huge(client: TestClient) -> None:
    headers = {"content-type": "application/json"}
    for digits in (400, 4200, 5000):
        number = "1" + "0" * digits
        for field in ("max_tokens", "n", "seed", "top_k", "min_tokens", "timeout", "logprobs"):
            body = f'{{"model": "tiny", "prompt": "x", "{field}": {number}}}'
            answer = client.post("/v1/completions", content=body, headers=headers)
            assert answer.status_code in {200, 400}, (digits, field, answer.text)
