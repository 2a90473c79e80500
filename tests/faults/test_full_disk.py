"""A full disk: uploads are refused, deletes and generation go on, and room that comes back is used
without a restart. A small tmpfs holds the whole data folder."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from prefixd.server.cli.demo.child import admin
from prefixd.store.disk import RESERVE_BYTES, RESERVE_FILE
from tests.faults.faults_disk import MIB, SmallDisk, metric, server_on, small_disk
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
PROMPT = [5, 6, 7]
STREAMED = 1500
"""Output tokens of the stream that runs while the disk fills up."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "disk", size=64 * MIB) as disk:
        yield disk


def make_keys(data: Path) -> dict[str, Any]:
    """Keys of a tenant with limits: one for everything, and one to rotate and one to revoke."""
    admin(data, "tenant", "create", "acme")
    admin(data, "tenant", "quota", "acme", "requests_per_minute=6000", "max_concurrent_requests=99")
    scopes = [
        word for scope in ("read", "generate", "write", "admin") for word in ("--scope", scope)
    ]
    created = [
        admin(data, "key", "create", "--tenant", "acme", *(scopes if not i else ()))
        for i in range(3)
    ]
    first, rotated, revoked = (dict(key) for key in created if isinstance(key, dict))
    return {"key": first["key"], "rotate": rotated["key_id"], "revoke": revoked["key_id"]}


class RunningStream(threading.Thread):
    """Reads one stream of greedy tokens; ``begun`` is set at its first event."""

    def __init__(self, http: httpx2.Client) -> None:
        super().__init__(daemon=True)
        self._http = http
        self.begun = threading.Event()
        self.text = ""
        self.complete = False

    def run(self) -> None:
        body = greedy(TINY, PROMPT, STREAMED, stream=True)
        with self._http.stream("POST", "/v1/completions", json=body) as response:
            for line in response.iter_lines():
                if line == "data: [DONE]":
                    self.complete = True
                elif line:
                    event = json.loads(line.removeprefix("data: "))
                    self.text += event["choices"][0]["text"] if event["choices"] else ""
                    self.begun.set()


def generate(http: httpx2.Client, model: str = TINY) -> str:
    response = http.post("/v1/completions", json=greedy(model, PROMPT, 8))
    assert response.status_code == 200, response.text
    text: str = response.json()["choices"][0]["text"]
    return text


def prepare(http: httpx2.Client) -> dict[str, str]:
    """Prefixes, bindings and a default to delete later; what each prefix to keep generates."""
    for name in ("kept", "deleted", "versions"):
        http.put(f"/v1/prefixes/{name}", json=TEXT).raise_for_status()
    http.put("/v1/prefixes/versions", **Content("kv", 16, 1).body()).raise_for_status()
    for path in ("/v1/users/alice/prefix", "/v1/default/prefix"):
        http.put(path, json={"prefix": "deleted"}).raise_for_status()
    http.put("/v1/prefixes/kept/aliases/prod", json={"version": 1}).raise_for_status()
    return {model: generate(http, model) for model in (TINY, "kept", "versions@1")}


def check_way_out(http: httpx2.Client, keys: dict[str, Any]) -> None:
    """Everything that a tenant does to make room, or for its safety, works."""
    for path in (
        "/v1/users/alice/prefix",
        "/v1/default/prefix",
        "/v1/prefixes/deleted",
        "/v1/prefixes/kept/aliases/prod",
    ):
        response = http.delete(path)
        assert response.is_success, f"{path}: {response.text}"
    http.put("/v1/prefixes/versions/aliases/latest", json={"version": 1}).raise_for_status()
    http.delete("/v1/prefixes/versions/versions/2").raise_for_status()
    http.post(
        f"/v1/admin/keys/{keys['rotate']}/rotate", json={"overlap_seconds": 60}
    ).raise_for_status()
    http.delete(f"/v1/admin/keys/{keys['revoke']}").raise_for_status()
    entries = http.get("/v1/admin/audit", params={"limit": 20}).raise_for_status().json()["data"]
    actions = {entry["action"] for entry in entries}
    assert {"prefix.delete", "version.delete", "key.rotate", "key.revoke"} <= actions


def uploads(url: str, headers: dict[str, str]) -> list[Any]:
    """An upload of each kind, and an import."""
    lines = {**headers, "content-type": "application/x-ndjson"}
    line = b'{"user": "bob", "prefix": "kept"}\n'
    return [
        request(url, "PUT", "/v1/prefixes/new", headers, json=TEXT),
        request(url, "PUT", "/v1/prefixes/new", headers, **Content("kv", 37, 2).body()),
        request(url, "POST", "/v1/users/bindings:import", lines, content=line),
    ]


def leftovers(data: Path) -> list[Path]:
    """Files of interrupted uploads."""
    folders = [data / "uploads", data / "blobs" / ".tmp"]
    return [path for folder in folders for path in folder.iterdir()]


def test_a_tenant_deletes_its_way_out_of_a_full_disk(
    disk: SmallDisk, tiny_folder: Path, tmp_path: Path
) -> None:
    data = disk.root / "data"
    keys = make_keys(data)
    headers = {"authorization": f"Bearer {keys['key']}"}
    with server_on(data, tiny_folder, log=tmp_path / "server.log") as server:
        url = server.ready()
        with (
            httpx2.Client(base_url=url, headers=headers, timeout=within(20)) as http,
            HealthProber(url) as health,
        ):
            expected = prepare(http)
            whole = RunningStream(http)
            whole.run()
            reserve = data / RESERVE_FILE
            check_recovers(lambda: check_reserved(reserve, http))
            running = RunningStream(http)
            running.start()
            assert running.begun.wait(within(20))
            disk.fill()
            check_refused(call_all(url, uploads(url, headers)), status=507, code="storage_full")
            check_way_out(http, keys)
            assert not reserve.exists()
            assert metric(http, "prefixd_disk_reserve_bytes") == 0
            collected = admin(data, "gc", "--grace", "0")
            assert isinstance(collected, dict)
            assert collected["blobs"] == 1
            disk.fill()  # and what the reserve was
            check_refused(call_all(url, uploads(url, headers)), status=507, code="storage_full")
            for model, text in expected.items():
                assert generate(http, model) == text
            running.join(within(60))
            assert (running.complete, running.text) == (True, whole.text)
            assert health.ready == [(200, None)]
            disk.free()
            check_recovers(lambda: check_uploads(url, headers))
            check_recovers(lambda: check_reserved(reserve, http))
            for model, text in expected.items():
                assert generate(http, model) == text
            health.check_live()
            names = {prefix["name"] for prefix in http.get("/v1/prefixes").json()["data"]}
            assert names == {"kept", "versions", "new"}
            assert leftovers(data) == []
    log = (tmp_path / "server.log").read_text()
    assert '"request failed"' not in log
    assert "freed the reserve" in log
    check_integrity(data)


def check_reserved(reserve: Path, http: httpx2.Client) -> None:
    """The reserve is allocated, not a sparse file, and the metric shows it."""
    assert reserve.stat().st_blocks * 512 == reserve.stat().st_size == RESERVE_BYTES
    assert metric(http, "prefixd_disk_reserve_bytes") == RESERVE_BYTES


def check_uploads(url: str, headers: dict[str, str]) -> None:
    assert all(call.status in {200, 201} for call in call_all(url, uploads(url, headers)))
