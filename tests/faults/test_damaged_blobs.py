"""Damaged blobs, and other things than files in their place: the first request gets
`corrupt_prefix`, and an upload of the same content repairs them at once."""

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import httpx2
import pytest

from prefixd.server.serve.catalog import open_integrity
from prefixd.server.serve.settings import Settings
from tests.faults.faults_server import RunningServer, running

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged") / "data"


@pytest.fixture(scope="module")
def server(tiny_folder: Path, data: Path) -> Iterator[RunningServer]:
    with running(tiny_folder, data) as server:
        yield server


@pytest.fixture
def http(server: RunningServer) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=server.url, headers=server.headers("acme"), timeout=60) as client:
        yield client


def changed(path: Path) -> None:
    path.write_bytes(b"changed")


def missing(path: Path) -> None:
    path.unlink()


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def listening_socket(path: Path) -> None:
    path.unlink()
    folder = os.open(path.parent, os.O_RDONLY)
    try:  # its path is too long for an address
        with closing(socket.socket(socket.AF_UNIX)) as listener:
            listener.bind(f"/proc/self/fd/{folder}/{path.name}")
    finally:
        os.close(folder)


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "kept").write_bytes(b"of an operator")


def link(path: Path) -> None:
    """To the same bytes: still not the blob."""
    target = path.with_name("elsewhere")
    path.rename(target)
    path.symlink_to(target)


def dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.with_name("nowhere"))


def device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


DAMAGES = (changed, missing, pipe, listening_socket, folder, link, dangling_link, device)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("damage", DAMAGES)
def test_upload_repairs_a_damaged_blob_at_once(
    server: RunningServer,
    http: httpx2.Client,
    data: Path,
    damage: Callable[[Path], None],
    stream: bool,
) -> None:
    name = f"{damage.__name__}-{stream}".replace("_", "-")
    body = {"model": name, "prompt": [5, 6], "max_tokens": 3, "temperature": 0, "stream": stream}
    upload = {"kind": "text", "text": f"a b {name}"}
    digest = http.put(f"/v1/prefixes/{name}", json=upload).json()["digest"]
    blob = data / "blobs" / "acme" / digest[:2] / digest
    damage(blob)
    for _ in range(2):
        failure = http.post("/v1/completions", json=body)
        assert (failure.status_code, failure.json()["error"]["code"]) == (500, "corrupt_prefix")
        assert str(data) not in failure.text
    content = http.get(f"/v1/prefixes/{name}/versions/1/content")
    assert (content.status_code, content.json()["error"]["code"]) == (500, "corrupt_prefix")
    repaired = http.put(f"/v1/prefixes/{name}", json=upload)
    assert (repaired.status_code, repaired.json()["version"]) == (200, 1)
    assert http.post("/v1/completions", json=body).status_code == 200
    assert blob.is_file()
    assert not blob.is_symlink()
    if damage is folder:
        (kept,) = blob.parent.glob(f"{digest}.*/kept")
        assert kept.read_bytes() == b"of an operator"
    with open_integrity(Settings(data_dir=data)) as integrity:
        assert list(integrity.findings()) == []
