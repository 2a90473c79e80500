"""A disk that fails while a server runs: 503 storage_unavailable, and no restart afterwards.

The data folder becomes read-only under a new mount, and then no file of the process may be written
(RLIMIT_FSIZE): SQLite reports that as an I/O error, as it does EIO.
"""

import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from prefixd.server.cli.demo.child import admin
from tests.faults.faults_disk import mount, server_on
from tests.faults.faults_model import TINY, Content
from tests.faults.faults_outage import (
    HealthProber,
    call_all,
    check_integrity,
    check_recovers,
    check_refused,
    request,
    within,
)
from tests.faults.faults_traffic import greedy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

TEXT = {"kind": "text", "text": "w5 w6 w7"}
UNAVAILABLE = "storage_unavailable"


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Mount ``folder`` over itself, read-only. Files that are open stay writable, as SQLite's."""
    mounted = mount("--bind", str(folder), str(folder))
    if mounted.returncode != 0:
        pytest.skip(f"needs to mount, which takes root: {mounted.stderr.strip()}")
    try:
        changed = mount("-o", "remount,bind,ro", str(folder))
        assert changed.returncode == 0, changed.stderr
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def unwritable_files(pid: int) -> Iterator[None]:
    """No file of the process can be written."""
    soft, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))


def make_key(data: Path) -> str:
    """A key of a tenant without limits, whose requests need no write to the catalog."""
    admin(data, "tenant", "create", "acme")
    limits = ("requests_per_minute", "tokens_per_minute", "max_concurrent_requests")
    admin(data, "tenant", "quota", "acme", *(f"{limit}=none" for limit in limits))
    issued = admin(data, "key", "create", "--tenant", "acme")
    assert isinstance(issued, dict)
    return str(issued["key"])


def uploads(url: str, headers: dict[str, str]) -> list[Any]:
    return [
        request(url, "PUT", "/v1/prefixes/new", headers, json=TEXT),
        request(url, "PUT", "/v1/prefixes/new", headers, **Content("kv", 37, 2).body()),
    ]


def changes(url: str, headers: dict[str, str]) -> list[Any]:
    return [
        request(url, "DELETE", "/v1/prefixes/kept", headers),
        request(url, "PUT", "/v1/users/bob/prefix", headers, json={"prefix": "kept"}),
    ]


def generate(http: httpx2.Client, model: str) -> str:
    response = http.post("/v1/completions", json=greedy(model, [5, 6, 7], 8))
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["text"]
    return text


def test_a_disk_that_fails_while_a_server_runs(tiny_folder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    headers = {"authorization": f"Bearer {make_key(data)}"}
    with server_on(data, tiny_folder, log=tmp_path / "server.log") as server:
        url = server.ready()
        with (
            httpx2.Client(base_url=url, headers=headers, timeout=within(20)) as http,
            HealthProber(url) as health,
        ):
            http.put("/v1/prefixes/kept", json={"kind": "text", "text": "w9"}).raise_for_status()
            expected = {model: generate(http, model) for model in (TINY, "kept")}

            def check_works() -> None:
                calls = call_all(url, [*uploads(url, headers), *changes(url, headers)[1:]])
                assert [call for call in calls if call.status not in {200, 201}] == []
                assert {model: generate(http, model) for model in expected} == expected

            for fault, failing in (
                (read_only(data), uploads),
                (unwritable_files(server.pid), lambda *to: [*uploads(*to), *changes(*to)]),
            ):
                with fault:
                    check_refused(
                        call_all(url, failing(url, headers)), status=503, code=UNAVAILABLE
                    )
                    assert {model: generate(http, model) for model in expected} == expected
                check_recovers(check_works)
            health.check_live()
            assert health.ready == [(200, None)]
            names = {prefix["name"] for prefix in http.get("/v1/prefixes").json()["data"]}
            assert names == {"kept", "new"}
    assert '"request failed"' not in (tmp_path / "server.log").read_text()
    check_integrity(data)
