"""/v1/files: upload, list, read and delete, of one tenant."""

from datetime import timedelta
from typing import Any

import pytest
from fastapi.testclient import TestClient

from prefixd.server.tenants.audit import AuditEntry
from prefixd.server.tenants.batches import NewBatch
from prefixd.server.tenants.principal import Actor
from prefixd.server.tenants.retention import Expired, remove_expired
from prefixd.store.db.database import utc_now
from tests.api.api_batches import WINDOW, line, upload
from tests.api.api_world import BODY_LIMITS, World, error_of

CONTENT = line("a", {"prompt": "x"}) + line("b", {"prompt": "y"})


def test_an_uploaded_file_is_listed_read_and_deleted(client: TestClient, world: World) -> None:
    shown = upload(client, CONTENT, name="work/input.jsonl")
    assert shown["id"].startswith("file-")
    assert shown["expires_at"] is None
    expected = {
        "object": "file",
        "bytes": len(CONTENT),
        "filename": "input.jsonl",
        "purpose": "batch",
        "status": "processed",
        "status_details": None,
    }
    assert expected.items() <= shown.items()
    path = f"/v1/files/{shown['id']}"
    assert client.get(path).json() == shown
    content = client.get(f"{path}/content")
    assert content.content == CONTENT
    assert 'filename="input.jsonl"' in content.headers["content-disposition"]
    part = client.get(f"{path}/content", headers={"range": "bytes=1-3"})
    assert (part.status_code, part.content) == (206, CONTENT[1:4])
    tag = {"if-none-match": content.headers["etag"]}
    assert client.get(f"{path}/content", headers=tag).status_code == 304
    assert client.head(f"{path}/content").headers["content-length"] == str(len(CONTENT))
    assert client.delete(path).json() == {"id": shown["id"], "object": "file", "deleted": True}
    assert error_of(client.get(path))["code"] == "file_not_found"
    assert client.get("/v1/files").json()["data"] == []
    assert [entry.action for entry in audited(world)] == ["file.delete", "file.create"]
    assert audited(world)[1].detail == {
        "filename": "input.jsonl",
        "bytes": len(CONTENT),
        "purpose": "batch",
    }


def audited(world: World) -> list[AuditEntry]:
    page, _ = world.audit.page(tenant="acme", limit=100)
    return [entry for entry in page if entry.action.startswith(("file.", "batch."))]


def test_pages_follow_one_another_in_either_order(client: TestClient) -> None:
    ids = [upload(client, CONTENT)["id"] for _ in range(5)]
    for order, expected in (("asc", ids), ("desc", ids[::-1])):
        seen: list[str] = []
        after: dict[str, str] = {}
        while True:
            page = client.get("/v1/files", params={"limit": 2, "order": order, **after}).json()
            seen += [file["id"] for file in page["data"]]
            assert page["last_id"] == seen[-1]
            if not page["has_more"]:
                break
            after = {"after": page["last_id"]}
        assert seen == expected
    assert client.get("/v1/files", params={"purpose": "batch_output"}).json()["data"] == []
    assert error_of(client.get("/v1/files", params={"after": "x"}))["code"] == "file_not_found"


def test_equal_bytes_are_kept_until_the_last_file_is_deleted(
    client: TestClient, world: World
) -> None:
    first, second = (upload(client, CONTENT)["id"] for _ in range(2))
    client.delete(f"/v1/files/{first}")
    collect(world)
    assert client.get(f"/v1/files/{second}/content").content == CONTENT
    client.delete(f"/v1/files/{second}")
    assert collect(world) == 1


def collect(world: World) -> int:
    return world.store.collect(grace=timedelta(seconds=-1)).blobs


@pytest.mark.parametrize(
    ("data", "files", "code", "param"),
    [
        ({"purpose": "batch"}, {"x": b"1"}, "unknown_part", None),
        ({}, {"file": CONTENT}, "missing_part", "purpose"),
        ({"purpose": "fine-tune"}, {"file": CONTENT}, "invalid_request", "purpose"),
        (
            {"purpose": "batch", "expires_after[seconds]": "3600"},
            {"file": CONTENT},
            "invalid_request",
            "expires_after.anchor",
        ),
        (
            {
                "purpose": "batch",
                "expires_after[anchor]": "created_at",
                "expires_after[seconds]": "60",
            },
            {"file": CONTENT},
            "invalid_request",
            "expires_after.seconds",
        ),
        (
            {"purpose": "batch"},
            {"file": b"x" * (BODY_LIMITS["max_input_bytes"] + 1)},
            "request_too_large",
            "file",
        ),
    ],
)
def test_other_uploads_are_refused(
    client: TestClient, data: dict[str, str], files: dict[str, bytes], code: str, param: str | None
) -> None:
    error = error_of(client.post("/v1/files", data=data, files=files))
    assert (error["code"], error["param"]) == (code, param)
    assert client.get("/v1/files").json()["data"] == []


def test_a_body_of_another_type_is_refused(client: TestClient) -> None:
    assert error_of(client.post("/v1/files", json={}))["code"] == "unsupported_media_type"


def test_a_repeated_upload_under_an_idempotency_key_is_one_file(client: TestClient) -> None:
    first = upload(client, CONTENT, headers={"idempotency-key": "k"})
    assert upload(client, CONTENT, headers={"idempotency-key": "k"}) == first
    assert len(client.get("/v1/files").json()["data"]) == 1


@pytest.mark.parametrize(
    ("quota", "allowed"), [({"max_files": 1}, 1), ({"max_file_bytes": len(CONTENT) * 2 - 1}, 1)]
)
def test_quotas_of_files(
    client: TestClient, world: World, quota: dict[str, int | None], allowed: int
) -> None:
    world.tenants.set_quota("acme", quota)
    for _ in range(allowed):
        upload(client, CONTENT)
    error = error_of(client.post("/v1/files", data={"purpose": "batch"}, files={"file": CONTENT}))
    assert (error["code"], error["param"]) == ("insufficient_quota", next(iter(quota)))
    assert world.tenants.used("acme").used["max_files"] == allowed


def test_a_file_expires_but_not_while_a_batch_needs_it(either_world: World) -> None:
    world = either_world
    with TestClient(world.app, headers=world.headers()) as client:
        expires = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
        used, unused = (upload(client, CONTENT, data=expires) for _ in range(2))
    assert used["expires_at"] == used["created_at"] + 3600
    new = NewBatch("/v1/completions", used["id"], "24h", WINDOW, {})
    batch = world.batches.create(new, actor=Actor("acme", "k"))

    def swept() -> Expired:
        later = utc_now() + WINDOW
        return remove_expired(world.database, audit_kept=None, store=world.store.files, now=later)

    assert swept() == Expired(files=1)
    assert [file.id for file in world.store.files.page(tenant="acme", limit=9)] == [used["id"]]
    world.batches.cancel(batch.id, tenant="acme", actor=Actor("acme", "k"))
    assert swept() == Expired()  # until it has ended
    del unused


def test_another_tenants_file_looks_like_a_missing_one(client: TestClient, world: World) -> None:
    file_id = upload(client, CONTENT)["id"]

    def answers(shown: str) -> list[Any]:
        path, headers = f"/v1/files/{shown}", world.headers("beta")
        replies = [
            client.get(path, headers=headers),
            client.get(f"{path}/content", headers=headers),
            client.delete(path, headers=headers),
            client.get("/v1/files", params={"after": shown}, headers=headers),
        ]
        errors = [error_of(reply) for reply in replies]
        for error in errors:
            error["message"] = error["message"].replace(shown, "ID")
            del error["request_id"]
        return [(reply.status_code, error) for reply, error in zip(replies, errors, strict=True)]

    assert answers(file_id) == answers("file-" + "0" * 32)
    assert client.get("/v1/files", headers=world.headers("beta")).json()["data"] == []
    assert client.get(f"/v1/files/{file_id}").status_code == 200


def test_files_need_the_scope_generate(client: TestClient, world: World) -> None:
    file_id = upload(client, CONTENT)["id"]
    headers = world.headers("acme:read")
    for path in ("/v1/files", f"/v1/files/{file_id}", f"/v1/files/{file_id}/content"):
        assert error_of(client.get(path, headers=headers))["code"] == "insufficient_scope"
        answer = client.get(path, headers=world.headers("acme:generate"))
        assert answer.status_code == 200
