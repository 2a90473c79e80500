"""Tokens that the tokenizer has and the embeddings lack, on the real runner: an error for their
sender, and nothing for other tenants."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from prefixd.store.artifact.artifact import inspect_text
from prefixd.store.errors import UnknownPrefix
from prefixd.store.store import PrefixStore
from tests.faults.faults_model import VOCAB
from tests.faults.faults_server import RunningServer, running
from tests.faults.faults_traffic import greedy

BEYOND = f"w5 w{VOCAB} w6"
GOOD = "w5 w7 w6"


@pytest.fixture(scope="module")
def server(
    padded_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    with running(padded_folder, tmp_path_factory.mktemp("data"), kv_tokens=1024) as server:
        yield server


@pytest.fixture
def http(server: RunningServer) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=server.url, headers=server.headers("acme"), timeout=60) as http:
        yield http


def chat(text: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": "tiny", "messages": messages, "max_tokens": 2, "temperature": 0}


def test_nine_bad_chats_leave_the_server_ready_for_another_tenant(
    server: RunningServer, http: httpx2.Client
) -> None:
    assert http.post("/v1/chat/completions", json=chat(GOOD)).status_code == 200
    for _ in range(9):
        assert http.post("/v1/chat/completions", json=chat(BEYOND)).status_code == 400
    assert http.get("/health/ready").status_code == 200
    other = httpx2.post(
        f"{server.url}/v1/completions",
        json=greedy("tiny", [5, 7], 2),
        headers=server.headers("beta"),
        timeout=60,
    )
    assert other.status_code == 200
    assert server.engine.stats().step_failures == 0


def test_completions_and_text_prefixes_are_refused(http: httpx2.Client) -> None:
    body = {"model": "tiny", "prompt": BEYOND, "max_tokens": 2}
    assert http.post("/v1/completions", json=body).status_code == 400
    upload = http.put("/v1/prefixes/padded", json={"kind": "text", "text": BEYOND})
    assert (upload.status_code, upload.json()["error"]["code"]) == (422, "unknown_token")


def test_text_prefix_stored_before_it_was_checked_is_the_tenants_error(
    http: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unchecked(text: str, **options: Any) -> Any:
        options["count_tokens"] = lambda text: len(text.split())
        return inspect_text(text, **options)

    with monkeypatch.context() as patch:
        patch.setattr("prefixd.store.publisher.inspect_text", unchecked)
        upload = http.put("/v1/prefixes/old", json={"kind": "text", "text": BEYOND})
        assert upload.status_code == 201
    for _ in range(4):
        answer = http.post("/v1/completions", json=greedy("old", [5, 7], 2))
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "prefix_refused")
        assert http.get("/health/ready").status_code == 200


def test_prefix_deleted_while_a_request_waits_for_it_is_not_found(
    http: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object, **key: object) -> Path:
        raise UnknownPrefix(f"the artifact {key['digest']} is gone")

    upload = http.put("/v1/prefixes/short-lived", json={"kind": "text", "text": GOOD})
    assert upload.status_code == 201
    monkeypatch.setattr(PrefixStore, "fetch", gone)
    answer = http.post("/v1/completions", json=greedy("short-lived", [5, 7], 2))
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "prefix_not_found")


def test_end_of_text_beyond_the_logits_is_never_masked(
    server: RunningServer, http: httpx2.Client
) -> None:
    assert server.loaded.served.eos_token_ids == {2}
    body = {"model": "tiny", "prompt": [5, 7], "max_tokens": 4, "min_tokens": 3}
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] >= 3
    assert server.engine.stats().step_failures == 0
