"""A full, failing or read-only disk: each error of the operating system and of the databases is
507 storage_full or 503 storage_unavailable, on every route that meets it."""

import errno
import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg.errors
import pytest
from fastapi.testclient import TestClient
from sqlalchemy.exc import DBAPIError, InternalError, OperationalError, ProgrammingError

from prefixd.server.tenants.limiter import Limiter
from prefixd.store.blobs.blobs import LocalBlobs
from prefixd.store.disk import DiskGuard
from prefixd.store.faults import StorageFault, storage_fault
from prefixd.store.store import PrefixStore
from tests.api.api_world import World, error_of, fake_text, put_text

SECRET = "/var/lib/secret"  # a folder that no response may name
TEXT = {"kind": "text", "text": "hello"}


def os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number), SECRET)


def sqlite_error(name: str) -> sqlite3.OperationalError:
    error = sqlite3.OperationalError(SECRET)
    error.sqlite_errorcode = getattr(sqlite3, name)
    error.sqlite_errorname = name
    return error


def wrapped(kind: type[DBAPIError], error: BaseException) -> DBAPIError:
    return kind("UPDATE", {}, error)


FULL: list[tuple[str, Exception]] = [
    ("ENOSPC", os_error(errno.ENOSPC)),
    ("EDQUOT", os_error(errno.EDQUOT)),
    ("SQLITE_FULL", wrapped(OperationalError, sqlite_error("SQLITE_FULL"))),
    ("53100", wrapped(OperationalError, psycopg.errors.DiskFull(SECRET))),
]
FAILED: list[tuple[str, Exception]] = [
    ("EIO", os_error(errno.EIO)),
    ("EROFS", os_error(errno.EROFS)),
    ("EACCES", os_error(errno.EACCES)),
    ("ENOENT", os_error(errno.ENOENT)),
    ("SQLITE_IOERR", wrapped(OperationalError, sqlite_error("SQLITE_IOERR"))),
    ("SQLITE_IOERR_FSYNC", wrapped(OperationalError, sqlite_error("SQLITE_IOERR_FSYNC"))),
    ("SQLITE_READONLY", wrapped(OperationalError, sqlite_error("SQLITE_READONLY"))),
    ("SQLITE_CANTOPEN", wrapped(OperationalError, sqlite_error("SQLITE_CANTOPEN"))),
    ("58030", wrapped(OperationalError, psycopg.errors.IoError(SECRET))),
    ("25006", wrapped(InternalError, psycopg.errors.ReadOnlySqlTransaction(SECRET))),
    ("42501", wrapped(ProgrammingError, psycopg.errors.InsufficientPrivilege(SECRET))),
]
Fault = tuple[str, Exception, int, str]
FAULTS: list[Fault] = [(name, error, 507, "storage_full") for name, error in FULL]
FAULTS += [(name, error, 503, "storage_unavailable") for name, error in FAILED]
each_fault = pytest.mark.parametrize("fault", FAULTS, ids=[fault[0] for fault in FAULTS])


@pytest.fixture
def client(world: World) -> Iterator[TestClient]:
    with TestClient(world.app, headers=world.headers(), raise_server_exceptions=False) as http:
        yield http


def failing(error: Exception) -> Callable[..., Any]:
    def fail(*_args: object, **_named: object) -> Any:
        raise error

    return fail


def check_refused(response: Any, status: int, code: str) -> None:
    assert response.status_code == status, response.text
    error = error_of(response)
    assert (error["type"], error["code"]) == ("server_error", code)
    assert SECRET not in response.text
    assert ("retry-after" in response.headers) == (status == 503)


@each_fault
def test_faults_of_a_blob_write_are_reported_and_leave_nothing(
    client: TestClient, world: World, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    _, error, status, code = fault
    with monkeypatch.context() as patch:
        patch.setattr(LocalBlobs, "put", failing(error))
        check_refused(client.put("/v1/prefixes/voice", json=TEXT), status, code)
    assert leftovers(world) == []
    assert client.get("/v1/prefixes").json()["data"] == []
    assert client.put("/v1/prefixes/voice", json=TEXT).status_code == 201


@each_fault
def test_faults_of_the_catalog_are_reported_by_reads_and_changes(
    client: TestClient, world: World, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    _, error, status, code = fault
    put_text(client, "voice", "hello", world.headers())
    with monkeypatch.context() as patch:
        patch.setattr(PrefixStore, "change", failing(error))
        patch.setattr(PrefixStore, "list", failing(error))
        check_refused(client.delete("/v1/prefixes/voice"), status, code)
        check_refused(client.get("/v1/prefixes"), status, code)
    assert client.delete("/v1/prefixes/voice").status_code < 300


@pytest.mark.parametrize("call", ["write", "fsync", "link"])
def test_a_full_disk_in_each_system_call_of_an_upload_is_storage_full(
    client: TestClient, world: World, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    full = failing(os_error(errno.ENOSPC))
    with monkeypatch.context() as patch:
        if call == "write":
            patch.setattr("prefixd.store.publisher.pack_text", full)
        else:
            patch.setattr(os, call, full)
        check_refused(client.put("/v1/prefixes/voice", json=TEXT), 507, "storage_full")
    assert leftovers(world) == []


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"x" * 2000, "application/octet-stream"),
        (
            b'--b\r\nContent-Disposition: form-data; name="weights"\r\n\r\nxx\r\n--b--\r\n',
            "multipart/form-data; boundary=b",
        ),
    ],
    ids=["stored file", "multipart"],
)
def test_a_body_that_does_not_fit_on_the_disk_is_storage_full_and_removed(
    client: TestClient,
    world: World,
    monkeypatch: pytest.MonkeyPatch,
    content: bytes,
    kind: str,
) -> None:
    headers = {"content-type": kind}
    monkeypatch.setattr(DiskGuard, "check", failing_after(1, os_error(errno.ENOSPC)))
    response = client.put("/v1/prefixes/voice", content=content, headers=headers)
    check_refused(response, 507, "storage_full")
    assert leftovers(world) == []


def failing_after(calls: int, error: Exception) -> Callable[..., None]:
    count = iter(range(calls + 1))

    def fail(*_args: object) -> None:
        if next(count) == calls:
            raise error

    return fail


def test_below_the_floor_uploads_and_imports_are_refused_and_deletes_are_not(
    client: TestClient, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_text(client, "voice", "hello", world.headers())
    client.put("/v1/users/alice/prefix", json={"prefix": "voice"}).raise_for_status()
    line = b'{"user": "bob", "prefix": "voice"}\n'
    lines = {"content-type": "application/x-ndjson"}
    with monkeypatch.context() as patch:
        patch.setattr(world.disk, "_min_free", 2**62)
        check_refused(client.put("/v1/prefixes/new", json=TEXT), 507, "storage_full")
        check_refused(
            client.post("/v1/users/bindings:import", content=line, headers=lines),
            507,
            "storage_full",
        )
        assert client.get("/v1/users").json()["data"][0]["user"] == "alice"
        assert client.put("/v1/users/carol/prefix", json={"prefix": "voice"}).is_success
        for path in ("/v1/users/alice/prefix", "/v1/users/carol/prefix", "/v1/prefixes/voice"):
            assert client.delete(path).is_success, path
    assert client.put("/v1/prefixes/new", json=TEXT).status_code == 201
    assert world.disk.refusals["floor"] == 2


def test_a_declared_length_counts_twice_against_the_floor(
    client: TestClient, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = iter([(20_000, 10_000), (20_000, 10_000), (1 << 40, 0), (1 << 40, 0), (1 << 40, 0)])
    monkeypatch.setattr(world.disk, "_room", lambda _folder: next(room))
    headers = {"content-type": "application/octet-stream"}
    refused = client.put("/v1/prefixes/a", content=b"x" * 5001, headers=headers)
    check_refused(refused, 507, "storage_full")
    fits = client.put("/v1/prefixes/a", content=b"x" * 5000, headers=headers)
    assert fits.status_code == 422  # no artifact, but received


def test_generation_goes_on_when_a_full_disk_cannot_count_it(
    client: TestClient, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.tenants.set_quota("acme", {"requests_per_minute": 2, "max_concurrent_requests": 1})
    body = {"model": "tiny", "prompt": "hi", "max_tokens": 3}
    expected = fake_text(None, "hi", 3)
    attempts = Counter[str]()
    with monkeypatch.context() as patch:
        full = failing(wrapped(OperationalError, sqlite_error("SQLITE_FULL")))

        def admit(*args: object, **named: object) -> Any:
            attempts["admit"] += 1
            return full(*args, **named)

        patch.setattr(Limiter, "admit", admit)
        for _ in range(4):  # more than the limit
            response = client.post("/v1/completions", json=body)
            assert response.status_code == 200, response.text
            assert response.json()["choices"][0]["text"] == expected
        broken = wrapped(OperationalError, sqlite_error("SQLITE_READONLY"))
        patch.setattr(Limiter, "admit", failing(broken))
        check_refused(client.post("/v1/completions", json=body), 503, "storage_unavailable")
    assert attempts["admit"] == 8  # the reserve was freed, and each tried again
    for status in (200, 200, 429):
        assert client.post("/v1/completions", json=body).status_code == status


def test_metrics_and_readiness_on_a_full_disk(
    client: TestClient, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalBlobs, "put", failing(os_error(errno.ENOSPC)))
    client.put("/v1/prefixes/voice", json=TEXT)
    world.disk.sample()
    page = client.get("/metrics").text
    assert 'prefixd_storage_refusals_total{reason="full"} 1.0' in page
    assert 'prefixd_storage_refusals_total{reason="floor"} 0.0' in page
    assert 'prefixd_disk_free_bytes{folder="data"}' in page
    assert "prefixd_disk_reserve_bytes 0.0" in page
    assert client.get("/health/ready").status_code == 200
    assert client.get("/health/live").status_code == 200


def test_an_unrelated_error_stays_an_internal_error(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (
        ConnectionResetError(errno.ECONNRESET, "x"),
        ProgrammingError("x", {}, Exception()),
    ):
        monkeypatch.setattr(PrefixStore, "list", failing(error))
        response = client.get("/v1/prefixes")
        assert response.status_code == 500
        assert error_of(response)["code"] == "internal_error"


def test_an_io_error_of_sqlite_that_hides_a_full_disk_is_storage_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite reports EDQUOT as SQLITE_IOERR_WRITE."""
    hidden = wrapped(OperationalError, sqlite_error("SQLITE_IOERR_WRITE"))
    assert storage_fault(hidden) is StorageFault.FAILED
    guard = DiskGuard({"data": tmp_path}, reserve=tmp_path)
    assert guard.fault_of(hidden) is StorageFault.FAILED
    monkeypatch.setattr(os, "write", failing(os_error(errno.EDQUOT)))
    assert guard.fault_of(hidden) is StorageFault.FULL
    assert list(tmp_path.iterdir()) == []


def leftovers(world: World) -> list[str]:
    """Names of files that are neither the catalog nor a blob of a version."""
    folders = [world.body_limits.upload_dir, world.body_limits.upload_dir.parent / "blobs"]
    return [str(path) for folder in folders for path in folder.rglob("*") if path.is_file()]
