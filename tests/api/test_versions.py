"""Setting ``latest`` back, and deleting single versions."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import select
from sqlalchemy.exc import OperationalError

from prefixd.server.tenants.bindings import Bindings
from prefixd.store.catalog.tables import prefixes
from prefixd.store.names import BlobKey
from tests.api.api_world import BASE, World, error_of, fake_text, put_text


def complete(client: TestClient, model: str, **fields: Any) -> Any:
    body = {"model": model, "prompt": "x", "max_tokens": 4, **fields}
    return client.post("/v1/completions", json=body)


def put(client: TestClient, world: World, *texts: str, name: str = "voice") -> list[dict[str, Any]]:
    return [put_text(client, name, text, world.headers()) for text in texts]


def rollback(client: TestClient, version: Any, name: str = "voice") -> Any:
    return client.put(f"/v1/prefixes/{name}/aliases/latest", json={"version": version})


def remove(client: TestClient, version: Any, name: str = "voice") -> Any:
    return client.delete(f"/v1/prefixes/{name}/versions/{version}")


def latest(client: TestClient, name: str = "voice") -> int:
    version: int = client.get(f"/v1/prefixes/{name}").json()["version"]
    return version


def actions(world: World) -> list[tuple[str, str, dict[str, Any]]]:
    entries, _ = world.audit.page(tenant="acme", limit=100)
    return [(entry.action, entry.subject, dict(entry.detail)) for entry in entries]


def test_rollback_sets_the_bare_name_until_the_next_upload(
    client: TestClient, world: World
) -> None:
    one, two, three = put(client, world, "one", "two", "three")
    answer = rollback(client, 1)
    assert answer.status_code == 200
    assert (answer.json()["version"], answer.json()["aliases"]) == (1, ["latest"])
    assert actions(world)[0] == ("alias.set", "voice", {"alias": "latest", "version": 1})
    used = complete(client, "voice").json()
    assert used["prefix"]["version"] == 1
    assert used["choices"][0]["text"] == fake_text(one["digest"], "x", 4)
    assert rollback(client, 1).json() == answer.json()
    assert client.get("/v1/prefixes").json()["data"][0]["version"] == 1
    assert put(client, world, "two")[0]["version"] == two["version"] == latest(client)
    assert rollback(client, 3).json()["digest"] == three["digest"]
    assert put(client, world, "four")[0]["version"] == 4 == latest(client)


def test_rollback_refuses_unknown_versions_and_those_of_another_base(
    client: TestClient, world: World
) -> None:
    put(client, world, "one")
    for version, code in ((2, "prefix_not_found"), (2**31 - 1, "prefix_not_found")):
        answer = rollback(client, version)
        assert (answer.status_code, error_of(answer)["code"]) == (404, code)
    assert rollback(client, 0).status_code == 400
    assert rollback(client, 1, name="missing").status_code == 404
    deleted = client.delete("/v1/prefixes/voice/aliases/latest")
    assert (deleted.status_code, error_of(deleted)["code"]) == (400, "invalid_reference")
    served = world.served.base
    object.__setattr__(world.served, "base", replace(BASE, name="other", fingerprint="e" * 64))
    put(client, world, "two")
    answer = rollback(client, 1)
    assert (answer.status_code, error_of(answer)["code"]) == (409, "base_mismatch")
    assert latest(client) == 2
    object.__setattr__(world.served, "base", served)
    assert latest(client) == 1
    answer = client.put(
        "/v1/prefixes/voice/aliases/latest",
        json={"version": 1},
        headers=world.headers("acme:generate"),
    )
    assert answer.status_code == 403


def test_a_version_that_rollback_replaces_is_evicted(client: TestClient, world: World) -> None:
    put(client, world, "one")
    two = put(client, world, "two")[0]
    orphans: list[str] = []
    world.store.watch(lambda change: orphans.extend(key.digest for key in change.orphans))
    rollback(client, 1)
    assert orphans == [two["digest"]]
    rollback(client, 1)
    assert orphans == [two["digest"]]


def test_a_deleted_latest_is_replaced_by_the_highest_version_left(
    client: TestClient, world: World
) -> None:
    _, two, _ = put(client, world, "one", "two", "three")
    assert remove(client, 3).status_code == 204
    action, subject, detail = actions(world)[0]
    assert (action, subject, detail["version"]) == ("version.delete", "voice", 3)
    assert latest(client) == 2
    assert complete(client, "voice").json()["choices"][0]["text"] == fake_text(
        two["digest"], "x", 4
    )
    assert complete(client, "voice@3").status_code == 404
    assert remove(client, 3).status_code == 404
    assert put(client, world, "three")[0]["version"] == 4
    rollback(client, 1)
    assert remove(client, 2).status_code == 204  # not the latest, which stays
    assert latest(client) == 1
    for version in ("0", "latest", str(2**31), "+1", "1.0", "%201", "²", "1_0"):
        assert remove(client, version).status_code == 400
    answer = client.delete("/v1/prefixes/voice/versions/1", headers=world.headers("acme:read"))
    assert answer.status_code == 403
    assert remove(client, 1, name="missing").status_code == 404
    assert (
        client.delete("/v1/prefixes/voice/versions/1", headers=world.headers("beta")).json()[
            "error"
        ]["code"]
        == "prefix_not_found"
    )


def test_deleting_the_last_version_deletes_the_name(client: TestClient, world: World) -> None:
    put(client, world, "one")
    assert remove(client, 1).status_code == 204
    for path in ("voice", "voice/versions", "voice@1"):
        assert client.get(f"/v1/prefixes/{path}").status_code == 404
    assert client.get("/v1/prefixes?base=all").json()["data"] == []
    assert complete(client, "voice").status_code == 404
    assert put(client, world, "one")[0]["version"] == 2


@pytest.mark.parametrize(
    ("use", "named"),
    [
        (("PUT", "/v1/prefixes/voice/aliases/prod", {"version": 1}), "the alias 'prod'"),
        (("PUT", "/v1/prefixes/voice@1/pin", None), "unpin voice"),
        (("PUT", "/v1/users/ann/prefix", {"prefix": "voice@1"}), "the user 'ann' is bound"),
        (("PUT", "/v1/users/ann/prefix", {"prefix": "voice@01"}), "voice@01"),
        (("PUT", "/v1/default/prefix", {"prefix": "voice@1"}), "default prefix is voice@1"),
    ],
)
def test_a_version_in_use_is_not_deleted(
    client: TestClient, world: World, use: tuple[str, str, Any], named: str
) -> None:
    put(client, world, "one", "two")
    method, path, body = use
    assert client.request(method, path, json=body).status_code == 200
    before = actions(world)
    answer = remove(client, 1)
    assert (answer.status_code, error_of(answer)["code"]) == (409, "version_in_use")
    assert named in error_of(answer)["message"]
    assert "voice@1" in error_of(answer)["message"]
    assert client.get("/v1/prefixes/voice@1").status_code == 200
    assert actions(world) == before
    assert remove(client, 2).status_code == 204
    path = path.replace("@1", "")
    assert client.delete(path).status_code == 204
    assert remove(client, 1).status_code == 204


def test_a_bare_name_in_use_keeps_its_last_version(client: TestClient, world: World) -> None:
    put(client, world, "one", "two")
    for user, reference in (("ann", "voice"), ("bob", "voice"), ("eve", "voice@latest")):
        client.put(f"/v1/users/{user}/prefix", json={"prefix": reference})
    assert remove(client, 2).status_code == 204  # the name still means something: version 1
    assert complete(client, "tiny", user="ann").json()["prefix"]["version"] == 1
    answer = remove(client, 1)
    assert (answer.status_code, error_of(answer)["code"]) == (409, "version_in_use")
    assert "2 users, such as 'ann', are bound to voice" in error_of(answer)["message"]
    for user in ("ann", "bob"):
        client.delete(f"/v1/users/{user}/prefix")
    assert "voice@latest" in error_of(remove(client, 1))["message"]
    client.delete("/v1/users/eve/prefix")
    client.put("/v1/users/ann/prefix", json={"prefix": "voice-over"})
    put(client, world, "x", name="voice-over")
    client.put("/v1/users/ann/prefix", json={"prefix": "voice-over"})
    assert remove(client, 1).status_code == 204


def test_a_running_request_keeps_the_version_that_is_deleted(world: World) -> None:
    with TestClient(world.app, headers=world.headers()) as client:
        one, _ = put(client, world, "one", "two")
        rollback(client, 1)
        world.runner.hold_after = len(world.runner.steps) + 3
        answers: list[Any] = []
        running = threading.Thread(
            target=lambda: answers.append(complete(client, "voice", max_tokens=40))
        )
        running.start()
        assert world.runner.held.wait(30)
        assert remove(client, 1).status_code == 204
        world.runner.hold_after = None
        world.runner.gate.set()
        running.join(30)
        assert answers[0].json()["choices"][0]["text"] == fake_text(one["digest"], "x", 40)
        key = BlobKey("acme", one["digest"])
        assert world.store.deleted([key]) == (key,)  # what other servers evict it by


@pytest.mark.parametrize("kind", ["user", "default", "import"])
def test_concurrent_binding_and_delete_leave_no_dangling_binding(
    either_client: TestClient,
    either_world: World,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """The delete comes after the reference was resolved and before the binding is written, or while
    it is being written; then it waits, and sees the binding."""
    client, world = either_client, either_world
    client.app.state.bounds.changes.capacity = 2  # type: ignore[attr-defined]  # as of two servers
    put(client, world, "one", "two")
    method = {"user": "bind", "default": "set_default", "import": "bind_many"}[kind]
    write = getattr(Bindings, method)

    def send(version: int) -> Any:
        reference = f"voice@{version}"
        if kind == "import":
            return client.post(
                "/v1/users/bindings:import",
                content=f'{{"user": "ann", "prefix": "{reference}"}}\n',
                headers={"content-type": "application/x-ndjson"},
            )
        path = "/v1/users/ann/prefix" if kind == "user" else "/v1/default/prefix"
        return client.put(path, json={"prefix": reference})

    def after_a_delete(*arguments: Any, **options: Any) -> Any:
        assert remove(client, 1).status_code == 204
        return write(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Bindings, method, after_a_delete)
        answer = send(1)
    assert answer.status_code == (400 if kind == "import" else 404)
    assert "no prefix voice@1" in error_of(answer)["message"]
    put(client, world, "three")
    with ThreadPoolExecutor(1) as pool:

        def during_a_delete(*arguments: Any, check: Any, **options: Any) -> Any:
            def check_and_delete(connection: Any) -> None:
                check(connection)
                if connection.dialect.name == "postgresql":  # SQLite has one writer
                    row = select(prefixes).with_for_update(nowait=True)
                    with world.database.connect() as other, pytest.raises(OperationalError):
                        other.execute(row)
                deletes.append(pool.submit(remove, client, 2))

            return write(*arguments, check=check_and_delete, **options)

        deletes: list[Any] = []
        with monkeypatch.context() as patch:
            patch.setattr(Bindings, method, during_a_delete)
            assert send(2).status_code == 200
        deleted = deletes[0].result(30)
    assert (deleted.status_code, error_of(deleted)["code"]) == (409, "version_in_use")
