"""Recipes over HTTP: uploaded in three ways, shown, changed and counted."""

import json
from typing import Any

import pytest
from fastapi.testclient import TestClient

from tests.api.api_world import World, error_of
from tests.api.test_prefix_routes import files

RECIPE: dict[str, Any] = {"prompt_template": "Q: {prompt} A:", "temperature": 0, "max_tokens": 4}
REST = ("temperature", "max_tokens")
SHOWN: dict[str, Any] = {
    "prompt_template": "Q: {prompt} A:",
    "input": None,
    "takes": "text",
    "temperature": 0.0,
    "top_p": None,
    "max_tokens": 4,
    "stop": None,
    "examples": [],
}


def text(**fields: Any) -> dict[str, Any]:
    return {"json": {"kind": "text", "text": "hi", **fields}}


def peft(**parts: Any) -> dict[str, Any]:
    encoded = {name: (name, json.dumps(value)) for name, value in parts.items()}
    return {"files": {**files(), **encoded}}


@pytest.mark.parametrize(
    "upload",
    [
        peft(recipe=RECIPE),
        peft(metadata={"recipe": RECIPE, "owner": "ann"}),
        peft(metadata={"owner": "ann"}, recipe=RECIPE),
        text(recipe=RECIPE),
        text(
            metadata={"prompt_template": RECIPE["prompt_template"]},
            recipe={"max_tokens": 4, "temperature": 0},
        ),
    ],
)
def test_a_recipe_is_uploaded_and_shown(client: TestClient, upload: dict[str, Any]) -> None:
    answer = client.put("/v1/prefixes/mood", **upload)
    assert answer.status_code == 201, answer.text
    shown = client.get("/v1/models/mood@1").json()
    assert answer.json()["recipe"] == shown["recipe"] == SHOWN
    assert answer.json()["recipe_revision"] == shown["recipe_revision"] == 1
    assert client.get("/v1/prefixes/mood").json()["recipe"] == SHOWN
    assert client.get("/v1/models/tiny").json()["recipe"] is None


@pytest.mark.parametrize(
    ("upload", "param"),
    [
        (peft(recipe=[1]), "recipe"),
        (peft(recipe=RECIPE, metadata={"recipe": RECIPE}), "recipe"),
        (text(recipe=RECIPE, metadata={"recipe": {}}), "recipe"),
        (text(recipe={"top_p": 2}), "metadata.recipe.top_p"),
        (peft(recipe={"stop": 1}), "metadata.recipe.stop"),
    ],
)
def test_a_wrong_recipe_is_refused_and_nothing_is_stored(
    client: TestClient, upload: dict[str, Any], param: str
) -> None:
    answer = client.put("/v1/prefixes/mood", **upload)
    assert answer.status_code == 422
    assert (error_of(answer)["code"], error_of(answer)["param"]) == ("malformed_recipe", param)
    assert client.get("/v1/prefixes/mood").status_code == 404


def test_a_change_is_counted_audited_and_leaves_the_digest(
    client: TestClient, world: World
) -> None:
    before = client.put("/v1/prefixes/mood", **peft(recipe=RECIPE)).json()
    url = "/v1/prefixes/mood/versions/1"
    after = client.patch(url, json={"recipe": {"max_tokens": 9, "temperature": None}}).json()
    assert after["recipe"] == SHOWN | {"max_tokens": 9, "temperature": None}
    assert (after["recipe_revision"], after["digest"]) == (2, before["digest"])
    assert client.patch(url, json={"owner": "ann"}).json()["recipe_revision"] == 2
    entries, _ = world.audit.page(tenant="acme", limit=2)
    assert [entry.detail["recipe_revision"] for entry in entries] == [2, 2]
    assert entries[1].detail["fields"] == ["recipe"]
    refused = client.patch(url, json={"recipe": {"max_tokens": -1}})
    assert (refused.status_code, error_of(refused)["code"]) == (422, "malformed_recipe")
