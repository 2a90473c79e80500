"""Stacks, blends and ensembles that are saved as versions of prefixes."""

import json
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from prefixd.store.artifact.composition import composition_digest
from prefixd.store.artifact.kinds import Kind
from tests.api.api_world import MAX_POSITIONS, World, error_of
from tests.api.composed import acting, answer_under, complete, put_kv, put_soft, put_text, text_of
from tests.api.test_compositions import resident

STACK: dict[str, Any] = {"stack": ["company", "alice"]}
BLEND: dict[str, Any] = {"blend": {"alice": 0.25, "bob": 0.75}}
ENSEMBLE: dict[str, Any] = {"ensemble": ["alice", "bob", "kv"], "combine": "vote"}
ALL = [STACK, BLEND, ENSEMBLE]


@pytest.fixture
def parts(client: TestClient) -> dict[str, str]:
    """Digests by name."""
    return {
        "company": put_text(client, "company", "Be kind. ")["digest"],
        "alice": put_soft(client, "alice", fill=0.25)["digest"],
        "bob": put_soft(client, "bob", fill=0.75)["digest"],
        "kv": put_kv(client, "kv")["digest"],
    }


def save(client: TestClient, name: str, body: dict[str, Any], **fields: Any) -> Any:
    return client.put(f"/v1/prefixes/{name}", json={**body, **fields})


def kind_of(body: dict[str, Any]) -> str:
    return next(iter(body))


def key_of(body: dict[str, Any], parts: dict[str, str]) -> str:
    """The digest of what a stack or a blend compiles to."""
    if "stack" in body:
        return composition_digest(Kind.STACK, [parts[name] for name in body["stack"]], ())
    pairs = sorted((parts[name], weight) for name, weight in body["blend"].items())
    digests, weights = zip(*pairs, strict=True)
    return composition_digest(Kind.BLEND, digests, weights)


@pytest.mark.parametrize(("body", "tokens"), [(STACK, 13), (BLEND, 4), (ENSEMBLE, 13)], ids=str)
def test_a_composition_is_a_version_with_its_members(
    client: TestClient, parts: dict[str, str], body: dict[str, Any], tokens: int
) -> None:
    answer = save(client, "mix", body, kind=kind_of(body), metadata={"labels": {"team": "care"}})
    assert answer.status_code == 201, answer.text
    manifest = answer.json()
    assert (manifest["kind"], manifest["version"]) == (kind_of(body), 1)
    assert manifest["num_virtual_tokens"] == tokens
    names = list(body[kind_of(body)])
    weights = [body["blend"][name] if "blend" in body else None for name in names]
    assert manifest["members"] == [
        {"reference": f"{name}@1", "digest": parts[name], "weight": weight}
        for name, weight in zip(names, weights, strict=True)
    ]
    assert manifest["combine"] == body.get("combine")
    again = save(client, "mix", body)
    assert (again.status_code, again.json()["version"]) == (200, 1)
    shown = client.get("/v1/prefixes/mix@1").json()
    assert shown["members"] == [{**each, "agreement": None} for each in manifest["members"]]
    (listed,) = [
        each for each in client.get("/v1/prefixes").json()["data"] if each["name"] == "mix"
    ]
    assert listed["members"] == manifest["members"]
    versions = client.get("/v1/prefixes/mix/versions").json()["data"]
    assert [each["kind"] for each in versions] == [kind_of(body)]
    models = client.get("/v1/models").json()["data"]
    assert "mix" in [model["id"] for model in models]


@pytest.mark.parametrize("body", [STACK, BLEND], ids=kind_of)
def test_a_saved_composition_is_the_same_prefix_as_that_of_a_request(
    client: TestClient, world: World, parts: dict[str, str], body: dict[str, Any]
) -> None:
    saved = save(client, "mix", body).json()
    inline, named = complete(client, body), complete(client, model="mix")
    assert text_of(inline) == text_of(named)
    assert resident(world) == [(key_of(body, parts), saved["num_virtual_tokens"])]
    used = named.json()["prefix"]
    assert (used["name"], used["version"], used["digest"]) == ("mix", 1, saved["digest"])
    assert used["members"] == inline.json()["prefix"]["members"]
    assert named.headers["x-prefixd-prefix"] == "mix@1"
    assert client.get("/v1/prefixes/mix").json()["tier"] == "resident"


@pytest.mark.usefixtures("parts")
def test_members_are_resolved_at_the_upload(client: TestClient, parts: dict[str, str]) -> None:
    save(client, "mix", STACK)
    new = put_soft(client, "alice", fill=0.3)["digest"]
    assert text_of(complete(client, model="mix")) == answer_under(
        Kind.STACK, [parts["company"], parts["alice"]]
    )
    again = save(client, "mix", STACK)
    assert (again.status_code, again.json()["version"]) == (201, 2)
    assert text_of(complete(client, model="mix")) == answer_under(
        Kind.STACK, [parts["company"], new]
    )
    other = save(client, "mix", {"stack": ["alice", "company"]})
    assert other.json()["version"] == 3


@pytest.mark.parametrize("body", [STACK, BLEND], ids=kind_of)
def test_it_is_aliased_bound_warmed_and_pinned_as_any_version(
    client: TestClient, world: World, parts: dict[str, str], body: dict[str, Any]
) -> None:
    save(client, "mix", body)
    assert client.put("/v1/prefixes/mix/aliases/prod", json={"version": 1}).status_code == 200
    bound = client.put("/v1/users/ann/prefix", json={"prefix": "mix@prod"})
    assert bound.status_code == 200, bound.text
    unsaved = error_of(client.put("/v1/users/ann/prefix", json={"prefix": body}))
    assert "Save a stack, blend or ensemble as a prefix" in unsaved["message"]
    answer = complete(client, user="ann")
    assert answer.json()["prefix"]["chosen_by"] == "user"
    assert client.post("/v1/prefixes/mix/warm").json()["state"] == "resident"
    pinned = client.put("/v1/prefixes/mix/pin")
    assert pinned.status_code == 200, pinned.text
    pins = world.engine.state()["pins"]
    assert pins == [{"tenant": "acme", "digest": key_of(body, parts)}]


def test_warming_and_pinning_an_ensemble_is_that_of_its_members(
    client: TestClient, world: World, parts: dict[str, str]
) -> None:
    save(client, "inner", STACK)
    save(client, "mix", {"ensemble": ["alice", "inner", "kv"]})
    assert client.post("/v1/prefixes/mix/warm").status_code == 202
    assert client.put("/v1/prefixes/mix/pin").status_code == 200
    digests = {parts["alice"], parts["kv"], key_of(STACK, parts)}
    assert {pin["digest"] for pin in world.engine.state()["pins"]} == digests


@pytest.mark.parametrize("body", ALL, ids=kind_of)
def test_a_deleted_member_makes_every_use_a_conflict_that_names_it(
    client: TestClient, world: World, parts: dict[str, str], body: dict[str, Any]
) -> None:
    save(client, "mix", body)
    assert client.put("/v1/prefixes/mix/pin").status_code == 200
    for name in ("alice", "bob"):
        assert client.delete(f"/v1/prefixes/{name}").status_code == 204
    deleted = [f"{name}@1" for name in ("alice", "bob") if name in body[kind_of(body)]]
    uses = [
        complete(client, model="mix"),
        client.post("/v1/prefixes/mix/warm"),
        client.put("/v1/prefixes/mix/pin"),
    ]
    for use in uses:
        error = error_of(use)
        assert (use.status_code, error["code"]) == (409, "member_deleted")
        assert ", ".join(deleted) in error["message"]
    assert world.engine.state()["pins"] == []
    put_soft(client, "alice", fill=0.25)  # the same bytes are a new version
    assert complete(client, model="mix").status_code == 409
    assert client.get("/v1/prefixes/mix").status_code == 200
    assert client.delete("/v1/prefixes/mix").status_code == 204


@pytest.mark.usefixtures("parts")
def test_a_saved_composition_is_no_member_of_a_stack_or_a_blend(client: TestClient) -> None:
    save(client, "mix", STACK)
    save(client, "vote", ENSEMBLE)
    bodies: list[dict[str, Any]] = [
        {"stack": ["mix", "alice"]},
        {"blend": {"mix": 0.5, "alice": 0.5}},
    ]
    for body in bodies:
        error = error_of(refused := save(client, "more", body))
        assert (refused.status_code, error["code"]) == (422, "unsupported_member")
        assert "mix@1" in error["message"]
        assert error_of(complete(client, body))["code"] == "unsupported_member"
    error = error_of(save(client, "more", {"ensemble": ["vote", "alice"]}))
    models = {model["id"]: model for model in client.get("/v1/models").json()["data"]}
    assert models["vote"]["max_model_len"] == MAX_POSITIONS - 5  # the longest of its members
    assert "vote@1: expected no ensemble in an ensemble" in error["message"]
    assert save(client, "more", {"ensemble": ["mix", "alice"]}).status_code == 201


@pytest.mark.usefixtures("parts")
def test_a_recipe_is_that_of_the_composition_and_not_of_its_members(client: TestClient) -> None:
    put_soft(client, "alice", {"recipe": {"max_tokens": 2}}, fill=0.4)
    save(client, "mix", BLEND, recipe={"max_tokens": 3})
    chat = {"model": "mix", "messages": [{"role": "user", "content": "hi"}]}
    body = client.post("/v1/chat/completions", json=chat).json()
    assert body["usage"]["completion_tokens"] == 3
    patched = client.patch("/v1/prefixes/mix/versions/1", json={"description": "a mix"})
    assert patched.json()["description"] == "a mix"


@pytest.mark.usefixtures("parts")
def test_the_stored_file_can_be_uploaded_again(client: TestClient) -> None:
    for body in ALL:
        saved = save(client, "mix", body).json()
        content = client.get(f"/v1/prefixes/mix/versions/{saved['version']}/content").content
        headers = {"Content-Type": "application/octet-stream"}
        copy = client.put("/v1/prefixes/copy", content=content, headers=headers)
        assert copy.status_code == 201, copy.text
        assert copy.json()["digest"] == saved["digest"]
        assert copy.json()["members"] == saved["members"]
        changed = content.replace(b'"reference":"alice@1"', b'"reference":"bob@1"  ')
        refused = client.put("/v1/prefixes/copy", content=changed, headers=headers)
        assert error_of(refused)["code"] == "malformed_artifact"
    client.delete("/v1/prefixes/alice")
    gone = client.put("/v1/prefixes/copy", content=content, headers=headers)
    assert error_of(gone)["code"] == "prefix_not_found"


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"kind": "stack"}, 400, "exactly one of"),
        ({"kind": "blend", "stack": ["alice"]}, 400, "'kind': expected 'stack'"),
        ({"blend": {"alice": 0.5, "bob": 0.4}}, 400, "the sum 0.9"),
        ({"stack": ["company", "kv"]}, 422, "kv@1: expected a KV prefix only in front"),
        ({"stack": ["alice", "missing"]}, 404, "no prefix missing"),
        ({"stack": ["alice"], "text": "x"}, 400, "unknown field"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("parts")
def test_what_cannot_be_saved_is_refused(
    client: TestClient, body: dict[str, Any], status: int, said: str
) -> None:
    error = error_of(refused := save(client, "mix", body))
    assert refused.status_code == status
    assert said in error["message"]
    assert client.get("/v1/prefixes/mix").status_code == 404


@pytest.mark.parametrize("body", ALL, ids=kind_of)
def test_a_saved_composition_and_its_members_are_those_of_one_tenant(
    client: TestClient, world: World, body: dict[str, Any]
) -> None:
    with acting(client, world, "beta") as beta:
        missing = save(beta, "mix", body)
    put_soft(client, "alice")
    put_soft(client, "bob", fill=0.1)
    put_text(client, "company", "Be kind.")
    put_kv(client, "kv")
    assert save(client, "mix", body).status_code == 201
    with acting(client, world, "beta") as beta:
        foreign = save(beta, "mix", body)
        routes = [
            beta.get("/v1/prefixes/mix"),
            beta.post("/v1/prefixes/mix/warm"),
            beta.put("/v1/prefixes/mix/pin"),
            beta.get("/v1/prefixes/mix/versions/1/content"),
            complete(beta, model="mix"),
        ]
    assert [answer.status_code for answer in routes] == [404] * len(routes)
    one, other = (error_of(answer) | {"request_id": ""} for answer in (missing, foreign))
    assert foreign.status_code == 404
    assert one == other


@pytest.mark.usefixtures("parts")
def test_a_repeated_upload_is_answered_with_the_first_response(client: TestClient) -> None:
    headers = {"Idempotency-Key": "once"}
    first = client.put("/v1/prefixes/mix", json=STACK, headers=headers)
    again = client.put("/v1/prefixes/mix", json=STACK, headers=headers)
    assert (first.status_code, again.status_code) == (201, 201)
    assert json.loads(first.content) == json.loads(again.content)
    other = client.put("/v1/prefixes/mix", json=BLEND, headers=headers)
    assert error_of(other)["code"] == "idempotency_key_reused"


def test_a_member_that_fails_to_load_is_named(
    client: TestClient, parts: dict[str, str], tmp_path: Path
) -> None:
    for path in (tmp_path / "blobs").rglob(parts["bob"]):
        path.unlink()
    for prefix in (BLEND, {"stack": ["alice", "bob"]}):
        error = error_of(failed := complete(client, prefix))
        assert failed.status_code == 500
        assert "bob@1" in error["message"]
    messages = [{"role": "user", "content": [{"type": "prefix", "from": 0, "to": 1}]}]
    messages[0]["content"].insert(0, {"type": "text", "text": "x"})  # type: ignore[attr-defined]
    chat = {"model": "tiny", "prefix": BLEND, "messages": messages}
    assert "bob@1" in error_of(client.post("/v1/chat/completions", json=chat))["message"]
