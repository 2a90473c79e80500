"""The bucket or the database is away for a while: a 503 that says so, and not where it is."""

from collections.abc import Callable
from typing import Any

import pytest
from api_world import World, error_of, put_text
from fastapi.testclient import TestClient
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from prefix_store.errors import BlobsUnavailable
from server.tenants.registry import Tenants

SECRET = "db.internal:5432"


def failing(error: Exception) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail


def assert_away(answer: Any, words: str) -> None:
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "5"
    error = error_of(answer)
    assert (error["type"], error["code"]) == ("server_error", "storage_unavailable")
    assert words in error["message"]
    assert SECRET not in answer.text


def test_no_bucket(client: TestClient, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    put_text(client, "voice", "hello", world.headers())
    blobs = world.services.store._blobs
    with monkeypatch.context() as patch:
        for method in ("put", "fetch"):
            patch.setattr(blobs, method, failing(BlobsUnavailable("the store cannot be reached")))
        upload = client.put("/v1/prefixes/other", json={"kind": "text", "text": "x"})
        assert_away(upload, "the store cannot be reached")
        assert_away(client.get("/v1/prefixes/voice/versions/1/content"), "cannot be reached")
    assert client.get("/v1/prefixes/other").status_code == 404
    assert client.put("/v1/prefixes/other", json={"kind": "text", "text": "x"}).status_code == 201


@pytest.mark.parametrize(
    "error",
    [
        OperationalError("SELECT", {}, Exception(f"connection to {SECRET} refused")),
        InterfaceError("SELECT", {}, Exception(f"connection to {SECRET} lost")),
        PoolTimeout(f"QueuePool limit of {SECRET} reached"),
    ],
)
def test_no_catalog(client: TestClient, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    monkeypatch.setattr(Tenants, "authenticate", failing(error))
    for method, path in (("GET", "models"), ("PUT", "prefixes/a"), ("POST", "completions")):
        assert_away(client.request(method, f"/v1/{path}"), "the catalog cannot be reached")
    assert client.get("/health/live").status_code == 200
