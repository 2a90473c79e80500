"""Inputs of batches for tests."""

import json
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from fastapi.testclient import TestClient

from prefixd.server.tenants.batch_state import ENDED

WINDOW = timedelta(hours=24)


def line(
    custom_id: str, body: Mapping[str, Any], *, url: str = "/v1/completions", **changes: Any
) -> bytes:
    """One line of an input file."""
    body = {"model": "tiny", "max_tokens": 4, "temperature": 0, **body}
    request = {"custom_id": custom_id, "method": "POST", "url": url, "body": body, **changes}
    return json.dumps(request).encode() + b"\n"


def upload(
    client: TestClient,
    content: bytes,
    *,
    name: str = "in.jsonl",
    data: Mapping[str, str] | None = None,
    headers: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Upload the input of a batch; the file as shown."""
    answer = client.post(
        "/v1/files",
        data={"purpose": "batch", **(data or {})},
        files={"file": (name, content)},
        headers=dict(headers or {}),
    )
    assert answer.status_code == 200, answer.text
    shown: dict[str, Any] = answer.json()
    return shown


def create(client: TestClient, content: bytes, **changes: Any) -> dict[str, Any]:
    """Upload an input and create a batch; the batch as shown."""
    body = {
        "input_file_id": upload(client, content)["id"],
        "endpoint": "/v1/completions",
        "completion_window": "24h",
        **changes,
    }
    answer = client.post("/v1/batches", json=body)
    assert answer.status_code == 200, answer.text
    shown: dict[str, Any] = answer.json()
    return shown


def ended(client: TestClient, batch_id: str, *, within_s: float = 60.0) -> dict[str, Any]:
    """The batch when it has ended."""
    deadline = time.monotonic() + within_s
    while True:
        shown: dict[str, Any] = client.get(f"/v1/batches/{batch_id}").json()
        if shown["status"] in ENDED:
            return shown
        assert time.monotonic() < deadline, shown


def lines_of(client: TestClient, file_id: str) -> list[dict[str, Any]]:
    """The objects in the lines of a file."""
    content = client.get(f"/v1/files/{file_id}/content")
    assert content.status_code == 200, content.text
    return [json.loads(text) for text in content.text.splitlines()]
