"""Stores on SQLite with files and on PostgreSQL with S3, which a test can open repeatedly."""

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import obstore
import pytest
from obstore.store import S3Store
from sqlalchemy import Engine

from prefixd.store.blobs.blobs import open_blobs
from prefixd.store.db.database import open_database
from prefixd.store.db.migrate import upgrade
from prefixd.store.store import PrefixStore
from tests.migrated import migrated
from tests.real_services import S3_ENVIRONMENT, S3_TIMEOUT_S
from tests.store.store_home import Clock, Home


@pytest.fixture(params=["sqlite-files", "postgres-s3"])
def stack(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str | None]:
    """Database URL and blobs URL of an empty store."""
    if request.param == "sqlite-files":
        return migrated(tmp_path / "data" / "catalog.sqlite"), None
    return request.getfixturevalue("postgres_catalog_url"), request.getfixturevalue("s3_url")


@pytest.fixture
def open_home(stack: tuple[str, str | None], tmp_path: Path) -> Iterator[Callable[[], Home]]:
    """Opens the same store again with every call, as after a restart."""
    database_url, blobs_url = stack
    engines: list[Engine] = []
    clock = Clock()

    def damage(place: str, content: bytes) -> None:
        if blobs_url is None:
            (tmp_path / "data" / "blobs" / place).write_bytes(content)
        else:
            store = S3Store.from_url(blobs_url, client_options={"allow_http": True})
            obstore.put(store, place, content)
            (tmp_path / "data" / "blob-copies" / place).unlink(missing_ok=True)

    def open_it() -> Home:
        engine = open_database(database_url)
        engines.append(engine)
        upgrade(engine)
        blobs = open_blobs(blobs_url, tmp_path / "data", timeout_s=S3_TIMEOUT_S)
        store = PrefixStore(engine, blobs, clock=clock)
        return Home(tmp_path, store, blobs, engine, clock, damage)

    yield open_it
    for engine in engines:
        engine.dispose()


@pytest.fixture
def home(open_home: Callable[[], Home]) -> Home:
    return open_home()


class _Careless(BaseHTTPRequestHandler):
    """An S3 that accepts every request and ignores conditions."""

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.answer(200)

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.answer(200, b"<DeleteResult></DeleteResult>")

    def answer(self, status: int, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("etag", '"0"')
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def careless_s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """The URL of a bucket that ignores If-None-Match."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Careless)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    for variable, value in {**S3_ENVIRONMENT, "AWS_ENDPOINT_URL": endpoint}.items():
        monkeypatch.setenv(variable, value)
    yield lambda: "s3://bucket/prefixes"
    server.shutdown()
    thread.join()
    server.server_close()
