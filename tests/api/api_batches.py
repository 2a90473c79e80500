"""Inputs of batches for tests."""

import json
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from fastapi.testclient import TestClient

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
