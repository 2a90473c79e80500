"""Bindings and the default over HTTP, and the prefix that each response names."""

import json
import threading
from typing import Any
from urllib.parse import quote

import pytest
from fastapi.testclient import TestClient

from tests.api.api_world import World, error_of, fake_text, put_text

NDJSON = {"content-type": "application/x-ndjson"}


def complete(client: TestClient, **fields: Any) -> Any:
    body = {"model": "tiny", "prompt": "hi", "max_tokens": 4, **fields}
    return client.post("/v1/completions", json=body)


def bind(client: TestClient, user: str, prefix: str) -> Any:
    return client.put(f"/v1/users/{user}/prefix", json={"prefix": prefix})


def test_the_response_names_the_prefix_and_why_it_was_chosen(
    client: TestClient, world: World
) -> None:
    digests = {
        name: put_text(client, name, f"I am {name}.", world.headers())["digest"]
        for name in ("anns", "house", "named")
    }
    assert bind(client, "ann", "anns@1").status_code == 200

    def check(fields: dict[str, Any], name: str | None, why: str | None) -> None:
        answer = complete(client, **fields)
        body, digest = answer.json(), digests.get(name or "")
        assert body["choices"][0]["text"] == fake_text(digest, "hi", 4)
        assert body["model"] == fields.get("model", "tiny")
        headers = answer.headers
        if name is None:
            assert body["prefix"] is None
            assert "x-prefixd-prefix" not in headers
            assert "x-prefixd-prefix-chosen-by" not in headers
            return
        used = {
            "name": name,
            "version": 1,
            "digest": digest,
            "chosen_by": why,
            "recipe_revision": 1,
        }
        assert body["prefix"] == used
        assert headers["x-prefixd-prefix"] == f"{name}@1"
        assert headers["x-prefixd-prefix-chosen-by"] == why

    check({"user": "ann"}, "anns", "user")
    check({"user": "bob"}, None, None)
    assert client.put("/v1/default/prefix", json={"prefix": "house"}).status_code == 200
    check({"user": "ann"}, "anns", "user")
    check({"user": "bob"}, "house", "default")
    check({}, None, None)  # the bare base still works
    check({"user": "ann", "model": "named"}, "named", "model")
    assert client.delete("/v1/users/ann/prefix").status_code == 204
    check({"user": "ann"}, "house", "default")
    assert client.delete("/v1/default/prefix").status_code == 204
    check({"user": "ann"}, None, None)


def test_every_chunk_of_a_stream_has_chosen_by(client: TestClient, world: World) -> None:
    put_text(client, "voice", "Be kind.", world.headers())
    bind(client, "ann", "voice")
    answer = complete(client, user="ann", stream=True)
    chunks = [json.loads(line[6:]) for line in answer.text.split("\n\n") if line[6:7] == "{"]
    assert {chunk["prefix"]["chosen_by"] for chunk in chunks} == {"user"}
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "user": "ann"}
    assert client.post("/v1/chat/completions", json=chat).json()["prefix"]["chosen_by"] == "user"


def test_a_binding_to_an_alias_follows_it(client: TestClient, world: World) -> None:
    put_text(client, "voice", "one", world.headers())
    put_text(client, "voice", "two", world.headers())
    client.put("/v1/prefixes/voice/aliases/prod", json={"version": 1})
    bind(client, "ann", "voice@prod")
    assert complete(client, user="ann").json()["prefix"]["version"] == 1
    client.put("/v1/prefixes/voice/aliases/prod", json={"version": 2})
    assert complete(client, user="ann").json()["prefix"]["version"] == 2


def test_a_deleted_bound_prefix_is_a_404_and_not_the_base(client: TestClient, world: World) -> None:
    put_text(client, "voice", "one", world.headers())
    bind(client, "ann", "voice")
    client.put("/v1/default/prefix", json={"prefix": "voice"})
    client.delete("/v1/prefixes/voice")
    for user in ("ann", "bob"):
        answer = complete(client, user=user)
        assert answer.status_code == 404
        error = error_of(answer)
        assert (error["code"], error["param"]) == ("bound_prefix_not_found", "user")


@pytest.mark.parametrize("user", ["ann", "ann@example.org", "a/b", "é ü", "%"])
def test_users_with_any_characters_can_be_bound(
    client: TestClient, world: World, user: str
) -> None:
    put_text(client, "voice", "one", world.headers())
    shown = bind(client, quote(user, safe=""), "voice@latest").json()
    assert (shown["object"], shown["user"], shown["prefix"]) == ("binding", user, "voice@latest")
    assert client.get(f"/v1/users/{quote(user, safe='')}/prefix").json() == shown
    assert complete(client, user=user).json()["prefix"]["name"] == "voice"


def test_invalid_users_and_unknown_prefixes_cannot_be_bound(
    client: TestClient, world: World
) -> None:
    put_text(client, "voice", "one", world.headers())
    assert error_of(bind(client, "ann", "else"))["code"] == "prefix_not_found"
    assert error_of(bind(client, "ann", "voice@9"))["code"] == "prefix_not_found"
    assert error_of(bind(client, "ann", "a b"))["code"] == "invalid_reference"
    assert bind(client, "a" * 257, "voice").status_code == 400
    assert bind(client, "a%7Fb", "voice").status_code == 400
    assert client.get("/v1/users/ann/prefix").status_code == 404


def test_bindings_are_listed_in_pages(client: TestClient, world: World) -> None:
    put_text(client, "voice", "one", world.headers())
    for number in range(5):
        bind(client, f"user-{number}", "voice")
    first = client.get("/v1/users?limit=3").json()
    assert [one["user"] for one in first["data"]] == ["user-0", "user-1", "user-2"]
    rest = client.get("/v1/users", params={"limit": 3, "after": first["next_after"]}).json()
    assert [one["user"] for one in rest["data"]] == ["user-3", "user-4"]
    assert rest["next_after"] is None


def test_an_import_binds_many_users(
    client: TestClient, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefixd.server.api.users.importing.BATCH", 10)
    put_text(client, "voice", "one", world.headers())
    lines = [json.dumps({"user": f"user-{n:03}", "prefix": "voice@1"}) for n in range(35)]
    answer = client.post(
        "/v1/users/bindings:import", content="\n".join([*lines, ""]), headers=NDJSON
    )
    assert answer.json() == {"object": "import", "imported": 35}
    assert len(client.get("/v1/users").json()["data"]) == 35
    lines[14] = json.dumps({"user": "x", "prefix": "else"})
    answer = client.post("/v1/users/bindings:import", content="\n".join(lines), headers=NDJSON)
    error = error_of(answer)
    assert error["code"] == "invalid_line"
    assert error["message"].startswith("line 15: ")
    assert "10 bindings before it" in error["message"]
    assert client.get("/v1/users/x/prefix").status_code == 404


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[]",
        '{"user": 1, "prefix": "voice"}',
        '{"user": "x"}',
        '{"user": "a\\u0000", "prefix": "voice"}',
        "x" * 9000,
    ],
)
def test_malformed_import_lines_are_rejected_by_number(
    client: TestClient, world: World, line: str
) -> None:
    put_text(client, "voice", "one", world.headers())
    answer = client.post("/v1/users/bindings:import", content=line, headers=NDJSON)
    assert answer.status_code == 400
    assert error_of(answer)["code"] == "invalid_line"
    assert client.post("/v1/users/bindings:import", content=line).status_code == 400


def test_an_import_line_that_is_too_long_is_rejected_by_number(
    client: TestClient, world: World
) -> None:
    put_text(client, "voice", "one", world.headers())
    line = json.dumps({"user": "x", "prefix": "voice"})
    body = "\n".join([line] * 3 + ["x" * 9000, line])
    answer = client.post("/v1/users/bindings:import", content=body, headers=NDJSON)
    assert error_of(answer)["message"].startswith("line 4: expected at most 8192 bytes")


def test_an_import_over_the_size_limit_is_rejected(client: TestClient) -> None:
    body = b"\n" * (1024 * 1024 + 1)
    answer = client.post("/v1/users/bindings:import", content=body, headers=NDJSON)
    assert answer.status_code == 413


def test_an_alias_moved_during_a_stream_does_not_affect_it(
    client: TestClient, world: World
) -> None:
    """The stream keeps the version it was admitted with; the next request gets the new one."""
    digests = [put_text(client, "voice", word, world.headers())["digest"] for word in "ab"]
    client.put("/v1/prefixes/voice/aliases/prod", json={"version": 1})
    bind(client, "ann", "voice@prod")
    world.runner.hold_after = len(world.runner.steps) + 4  # compile, prefill, and two tokens more
    found: dict[str, Any] = {}

    def stream() -> None:
        found["answer"] = complete(
            TestClient(world.app, headers=world.headers()),
            model="tiny",
            user="ann",
            stream=True,
            max_tokens=12,
        )

    thread = threading.Thread(target=stream)
    thread.start()
    assert world.runner.held.wait(20)
    assert client.put("/v1/prefixes/voice/aliases/prod", json={"version": 2}).status_code == 200
    world.runner.hold_after = None
    world.runner.gate.set()
    thread.join()
    answer = found["answer"]
    chunks = [json.loads(line[6:]) for line in answer.text.split("\n\n") if line[6:7] == "{"]
    text = "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert text == fake_text(digests[0], "hi", 12)
    assert {chunk["prefix"]["digest"] for chunk in chunks} == {digests[0]}
    assert answer.headers["x-prefixd-prefix-digest"] == digests[0]
    after = complete(client, user="ann").json()
    assert after["prefix"]["digest"] == digests[1]
    assert after["choices"][0]["text"] == fake_text(digests[1], "hi", 4)
