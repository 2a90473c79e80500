"""Two servers of different bases over one catalog: each shows and runs what belongs to its base."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import text

from tests.api.api_world import BASE, MAX_POSITIONS, World, error_of, fake_text, make_world

OTHER = replace(BASE, name="other", fingerprint="e" * 64)


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[tuple[TestClient, TestClient, World]]:
    """A client of the base tiny, one of the base other, and the world of the first."""
    with (
        make_world(tmp_path) as tiny,
        make_world(tmp_path, base=OTHER) as other,
        TestClient(tiny.app, headers=tiny.headers()) as here,
        TestClient(other.app, headers=other.headers()) as there,
    ):
        yield here, there, tiny


def put(client: TestClient, name: str, content: str) -> dict[str, Any]:
    answer = client.put(f"/v1/prefixes/{name}", json={"kind": "text", "text": content})
    assert answer.status_code in {200, 201}, answer.text
    manifest: dict[str, Any] = answer.json()
    return manifest


def complete(client: TestClient, model: str, **fields: Any) -> Any:
    body = {"model": model, "prompt": "hi", "max_tokens": 3, **fields}
    return client.post("/v1/completions", json=body)


def shown(client: TestClient, path: str) -> list[tuple[str, int, str, list[str]]]:
    data = client.get(path).json()["data"]
    return [(one["name"], one["version"], one["base"], one["aliases"]) for one in data]


def assert_mismatch(answer: Any) -> str:
    """A 409 whose message names both models by name."""
    error = error_of(answer)
    assert (answer.status_code, error["code"]) == (409, "base_mismatch")
    assert "'tiny'" in error["message"]
    assert "'other'" in error["message"]
    message: str = error["message"]
    return message


def test_latest_and_the_lists_are_those_of_the_served_base(
    servers: tuple[TestClient, TestClient, World],
) -> None:
    here, there, _ = servers
    first = put(here, "voice", "one")
    assert first["base"] == "tiny"
    second = put(there, "voice", "two")
    assert (second["version"], second["base"], second["aliases"]) == (2, "other", ["latest"])
    put(there, "only-there", "three")
    for client, manifest in ((here, first), (there, second)):
        assert client.get("/v1/prefixes/voice").json()["version"] == manifest["version"]
        answer = complete(client, "voice").json()
        assert answer["prefix"]["version"] == manifest["version"]
        assert answer["choices"][0]["text"] == fake_text(manifest["digest"], "hi", 3)
    assert shown(here, "/v1/prefixes") == [("voice", 1, "tiny", ["latest"])]
    everything = [
        ("only-there", 1, "other", ["latest"]),
        ("voice", 2, "other", ["latest"]),
        ("voice", 1, "tiny", ["latest"]),
    ]
    assert shown(here, "/v1/prefixes?base=all") == shown(there, "/v1/prefixes?base=all")
    assert shown(here, "/v1/prefixes?base=all") == everything
    assert shown(here, "/v1/prefixes/voice/versions") == [("voice", 1, "tiny", ["latest"])]
    assert shown(here, "/v1/prefixes/voice/versions?base=all") == everything[1:]
    ids = [model["id"] for model in here.get("/v1/models").json()["data"]]
    assert ids == ["tiny", "voice"]
    page = here.get("/v1/prefixes?base=all&limit=1").json()
    assert page["next_after"] == "only-there"
    assert shown(here, "/v1/prefixes?base=all&limit=1&after=only-there") == everything[1:]
    assert here.get("/v1/prefixes?base=some").status_code == 400


def test_a_version_of_another_base_is_a_409_that_names_both_models(
    servers: tuple[TestClient, TestClient, World],
) -> None:
    here, there, _ = servers
    put(there, "voice", "two")
    put(there, "prompt", "three")
    put(here, "prompt", "four")
    here.put("/v1/prefixes/prompt/aliases/prod", json={"version": 1})
    here.put("/v1/users/ann/prefix", json={"prefix": "prompt"})
    for reference in ("voice", "voice@latest", "voice@1", "prompt@1", "prompt@prod"):
        assert_mismatch(complete(here, reference))
        assert_mismatch(complete(here, f"tiny:{reference}"))
        assert_mismatch(here.get(f"/v1/models/{reference}"))
        assert_mismatch(here.post(f"/v1/prefixes/{reference}/warm"))
        assert_mismatch(here.put(f"/v1/prefixes/{reference}/pin"))
        assert_mismatch(here.put("/v1/users/ann/prefix", json={"prefix": reference}))
        assert_mismatch(here.put("/v1/default/prefix", json={"prefix": reference}))
        line = f'{{"user": "bob", "prefix": "{reference}"}}\n'
        answer = here.post(
            "/v1/users/bindings:import",
            content=line,
            headers={"content-type": "application/x-ndjson"},
        )
        assert (answer.status_code, error_of(answer)["code"]) == (400, "invalid_line")
    assert_mismatch(here.get("/v1/prefixes/voice"))
    assert_mismatch(here.get("/v1/prefixes/voice/versions"))
    # A number or an alias shows the version that it means, of any base.
    assert here.get("/v1/prefixes/voice@1").json()["base"] == "other"
    assert here.get("/v1/prefixes/prompt@prod").json()["base"] == "other"
    # The user that was bound before follows the bare name, on each server to its own version.
    for client, version in ((here, 2), (there, 1)):
        base = client.get("/v1/models").json()["data"][0]["id"]
        assert complete(client, base, user="ann").json()["prefix"]["version"] == version
    assert complete(here, "missing").status_code == 404


def test_a_version_without_a_recorded_base_shows_its_fingerprint(
    servers: tuple[TestClient, TestClient, World],
) -> None:
    here, there, world = servers
    put(there, "voice", "two")
    with world.database.begin() as connection:
        connection.execute(text("UPDATE versions SET base = NULL"))
    assert here.get("/v1/prefixes/voice@1").json()["base"] == "e" * 12
    message = error_of(complete(here, "voice"))["message"]
    assert f"'{'e' * 12}'" in message
    assert "'tiny'" in message
    assert put(there, "voice", "two")["base"] == "other"


def test_the_same_bytes_for_two_bases_stay_resident_while_either_latest_has_them(
    servers: tuple[TestClient, TestClient, World],
) -> None:
    here, there, world = servers
    same = put(here, "voice", "one")
    assert put(there, "voice", "one")["digest"] == same["digest"]
    told: list[Any] = []
    world.store.watch(told.append)
    put(here, "voice", "two")
    assert told == []
    put(there, "voice", "three")
    put(here, "voice", "one")
    put(here, "voice", "four")
    assert [[key.digest for key in change.orphans] for change in told[-1:]] == [[same["digest"]]]


def test_quotas_count_the_prefixes_of_all_bases(
    servers: tuple[TestClient, TestClient, World],
) -> None:
    here, there, world = servers
    world.tenants.set_quota("acme", {"max_prefixes": 1})
    put(there, "voice", "two")
    answer = here.put("/v1/prefixes/another", json={"kind": "text", "text": "x"})
    assert error_of(answer)["code"] == "insufficient_quota"
    put(here, "voice", "one")
    assert here.delete("/v1/prefixes/voice").status_code == 204
    put(here, "another", "x")


def test_models_list_only_what_leaves_room_for_a_token(
    servers: tuple[TestClient, TestClient, World],
) -> None:
    here, _, world = servers
    put(here, "long", "x" * 60)
    put(here, "short", "x" * 59)
    object.__setattr__(world.served, "max_positions", 60)
    models = here.get("/v1/models").json()["data"]
    assert [(one["id"], one["max_model_len"]) for one in models] == [("tiny", 60), ("short", 1)]
    answer = here.get("/v1/models/long")
    assert (answer.status_code, error_of(answer)["code"]) == (400, "context_length_exceeded")
    assert MAX_POSITIONS > 60
