"""An unavailable bucket or database gives a 503 that does not reveal its address."""

import errno
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from sqlalchemy import create_engine
from sqlalchemy.exc import InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from prefixd.server.api.error_responses import CATALOG_UNAVAILABLE, DISK_FAILED, DISK_FULL
from prefixd.server.engine.prefix_source import STORAGE_FULL, STORAGE_UNAVAILABLE, PrefixUnavailable
from prefixd.server.engine.request import PrefixKey
from prefixd.server.tenants.registry import Tenants
from prefixd.store.errors import BLOBS_UNAVAILABLE, BlobsUnavailable
from tests.api.api_world import StoreBackedSource, World, error_of, put_text

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


def test_an_unavailable_bucket_is_a_503(
    client: TestClient, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_text(client, "voice", "hello", world.headers())
    blobs = world.store._blobs
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
def test_an_unavailable_catalog_is_a_503(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(Tenants, "authenticate", failing(error))
    for method, path in (("GET", "models"), ("PUT", "prefixes/a"), ("POST", "completions")):
        assert_away(client.request(method, f"/v1/{path}"), "the catalog cannot be reached")
    assert client.get("/health/live").status_code == 200


@pytest.mark.parametrize(
    "error",
    [
        OperationalError("SELECT", {}, Exception(SECRET)),
        BlobsUnavailable(BLOBS_UNAVAILABLE),
    ],
)
def test_a_durable_upload_succeeds_although_its_warm_up_fails(
    client: TestClient, world: World, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(world.store, "resolve", failing(error))
    body = {"kind": "text", "text": "hello"}
    assert client.put("/v1/prefixes/voice?warm=true", json=body).status_code == 201


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("message", [BLOBS_UNAVAILABLE, CATALOG_UNAVAILABLE])
def test_a_prefix_in_unavailable_storage_is_a_503(
    client: TestClient,
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    *,
    message: str,
    stream: bool,
) -> None:
    put_text(client, "voice", "hello", world.headers())
    body = {"model": "voice", "prompt": "x", "max_tokens": 1, "stream": stream}
    with monkeypatch.context() as patch:
        error = PrefixUnavailable(message, code=STORAGE_UNAVAILABLE)
        patch.setattr(StoreBackedSource, "fetch", failing(error))
        assert_away(client.post("/v1/completions", json=body), message)
        # The failure is remembered for a while, with its code.
        assert_away(client.post("/v1/completions", json=body), message)
    with monkeypatch.context() as patch:
        patch.setattr(
            StoreBackedSource, "fetch", failing(PrefixUnavailable("the artifact is corrupt"))
        )
        put_text(client, "voice", "another", world.headers())
        assert client.post("/v1/completions", json=body).status_code == 500


def test_unavailable_storage_is_reported_to_the_engine_as_prefix_unavailable(
    client: TestClient, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefixd.server.serve.artifacts import Artifacts  # with torch, which this alone needs

    manifest = put_text(client, "voice", "hello", world.headers())
    key = PrefixKey("acme", manifest["digest"])
    store = world.store
    opened = Artifacts(store, world.served, world.disk)
    assert opened(key).text == "hello"
    for error, message, code in (
        (BlobsUnavailable(BLOBS_UNAVAILABLE), BLOBS_UNAVAILABLE, STORAGE_UNAVAILABLE),
        (
            OperationalError("SELECT", {}, Exception(SECRET)),
            CATALOG_UNAVAILABLE,
            STORAGE_UNAVAILABLE,
        ),
        # The local copy of an object in a bucket, or the blob itself.
        (OSError(errno.ENOSPC, SECRET), DISK_FULL, STORAGE_FULL),
        (OSError(errno.EIO, SECRET), DISK_FAILED, STORAGE_UNAVAILABLE),
    ):
        monkeypatch.setattr(store, "fetch", failing(error))
        with pytest.raises(PrefixUnavailable) as away:
            opened(key)
        assert str(away.value) == message
        assert away.value.code == code


def test_a_locked_database_is_unavailable_and_a_missing_table_is_an_internal_error(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "else.sqlite3"

    def ask(statement: str) -> Callable[..., None]:
        def run(*_: object, **__: object) -> None:
            with create_engine(f"sqlite:///{file}", connect_args={"timeout": 0}).begin() as other:
                other.exec_driver_sql(statement)

        return run

    with TestClient(world.app, headers=world.headers(), raise_server_exceptions=False) as client:
        monkeypatch.setattr(Tenants, "authenticate", ask("SELECT * FROM nothing"))
        assert client.get("/v1/models").status_code == 500
        with closing(sqlite3.connect(file, isolation_level=None)) as holder:
            holder.execute("BEGIN EXCLUSIVE")
            monkeypatch.setattr(Tenants, "authenticate", ask("CREATE TABLE it (id INTEGER)"))
            assert_away(client.get("/v1/models"), "the catalog cannot be reached")
