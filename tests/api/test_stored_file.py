"""PUT of a stored file as application/octet-stream: the content of a version, uploaded as it is."""

import json
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from tests.api.api_world import BASE, BODY_LIMITS, World, error_of, put_text
from tests.store.store_artifacts import ramp, tensors

OCTETS = {"content-type": "application/octet-stream"}
P = 4
EMBEDDINGS = {"prompt_embeddings": ramp(P, BASE.embedding_width)}
KV = {"prompt_embeddings": ramp(P, BASE.kv_width)}
MULTITASK = EMBEDDINGS | {
    "prefix_task_cols": ramp(3, P, 2),
    "prefix_task_rows": ramp(3, 2, BASE.embedding_width),
}
KINDS: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "PROMPT_TUNING": (EMBEDDINGS, "F32"),
    "P_TUNING": (EMBEDDINGS, "F16"),
    "CPT": (EMBEDDINGS, "BF16"),
    "MULTITASK_PROMPT_TUNING": (MULTITASK, "F32"),
    "PREFIX_TUNING": (KV, "BF16"),
    "CARTRIDGE": (KV, "F32"),
}


def put_peft(client: TestClient, name: str, peft_type: str, **changes: Any) -> dict[str, Any]:
    """Upload one of KINDS as PEFT's two files, with metadata."""
    values, dtype = KINDS[peft_type]
    config = {"z": [1, 2.50], "peft_type": peft_type, "num_virtual_tokens": P, "note": "Zoë 🦊"}
    metadata = {"by": "ann"} | ({"task_id": 1} if "TASK" in peft_type else {})
    files = {
        "config": ("c", json.dumps(config, indent=3).encode()),
        "weights": ("w", tensors(values, dtype)),
        "metadata": ("m", json.dumps(metadata).encode()),
    }
    answer = client.put(f"/v1/prefixes/{name}", files=files, **changes)
    assert answer.status_code == 201, answer.text
    manifest: dict[str, Any] = answer.json()
    return manifest


def content(client: TestClient, reference: str) -> bytes:
    name, _, version = reference.partition("@")
    answer = client.get(f"/v1/prefixes/{name}/versions/{version or 'latest'}/content")
    assert answer.status_code == 200
    return answer.content


def put_file(client: TestClient, name: str, data: bytes, **headers: str) -> Any:
    return client.put(f"/v1/prefixes/{name}", content=data, headers={**OCTETS, **headers})


SAME = ("digest", "kind", "peft_type", "num_virtual_tokens", "dtype", "size_bytes", "fingerprint")


@pytest.mark.parametrize("peft_type", KINDS)
def test_the_stored_file_of_a_peft_prefix_gives_the_same_version(
    client: TestClient, world: World, peft_type: str
) -> None:
    manifest = put_peft(client, "voice", peft_type)
    data = content(client, "voice")
    again = put_file(client, "voice", data)
    assert (again.status_code, again.json()) == (200, manifest)
    other = client.put("/v1/prefixes/copy", content=data, headers=OCTETS | world.headers("beta"))
    assert other.status_code == 201, other.text
    assert {key: other.json()[key] for key in SAME} == {key: manifest[key] for key in SAME}
    task = {"task_id": 1} if "TASK" in peft_type else {}
    assert other.json()["metadata"] == task


@pytest.mark.parametrize("text", ["Be brief.", "a\r\nb\n\n", "Grüße 🦊\n{}\x00"])
def test_the_stored_file_of_a_text_gives_the_same_version(client: TestClient, text: str) -> None:
    manifest = put_text(client, "note", text, {})
    data = content(client, "note")
    assert put_file(client, "note", data).json() == {**manifest, "warnings": []}
    copied = put_file(client, "copy", data)
    assert copied.status_code == 201
    assert {key: copied.json()[key] for key in SAME} == {key: manifest[key] for key in SAME}
    under = {"model": "copy", "prompt": "x", "max_tokens": 3, "temperature": 0}
    used = client.post("/v1/completions", json=under).json()["prefix"]
    assert used["digest"] == manifest["digest"]


def envelope(payload: bytes, **changes: Any) -> bytes:
    fields = {
        "config": None,
        "format": 1,
        "kind": "hard_prompt",
        "payload_bytes": len(payload),
        "peft_type": None,
        "task_id": None,
    }
    line = json.dumps(fields | changes, sort_keys=True, separators=(",", ":"))
    return line.encode() + b"\n" + payload


def peft_envelope(
    peft_type: str, *, task_id: Any = None, config: Any = None, **values: Any
) -> bytes:
    config = {"peft_type": peft_type, "num_virtual_tokens": P} | (config or {})
    kind = "kv_prefix" if peft_type == "CARTRIDGE" else "soft_prompt"
    payload = tensors(values or KINDS[peft_type][0])
    return envelope(payload, config=config, kind=kind, peft_type=peft_type, task_id=task_id)


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "malformed_artifact"),
        (b"x", "malformed_artifact"),
        (bytes(1000), "malformed_artifact"),
        (b'{"a": 1}\nrest', "malformed_artifact"),
        (tensors(EMBEDDINGS), "malformed_artifact"),
        (envelope(b"hi")[:-1], "malformed_artifact"),
        (envelope(b"hi") + b"!", "malformed_artifact"),
        (envelope(b"hi", format=2), "malformed_artifact"),
        (envelope(b"hi", task_id=1), "malformed_artifact"),
        (envelope(b"hi", kind="soft_prompt"), "malformed_artifact"),
        (envelope(b"hi").replace(b'"format":1', b'"format": 1'), "malformed_artifact"),
        (envelope(b""), "empty_text"),
        (envelope(b"\xff"), "malformed_text"),
        (envelope(b"x" * 65), "too_many_virtual_tokens"),
        (peft_envelope("LORA", a=ramp(1)), "malformed_artifact"),
        (peft_envelope("CPT", config={"modules_to_save": ["lm_head"]}), "trained_elsewhere"),
        (peft_envelope("CPT", task_id=0), "unexpected_task_id"),
        (peft_envelope("MULTITASK_PROMPT_TUNING"), "task_id_required"),
        (peft_envelope("MULTITASK_PROMPT_TUNING", task_id=3), "task_id_out_of_range"),
        (peft_envelope("CPT", prompt_embeddings=ramp(P, 9)), "wrong_shape"),
        (peft_envelope("CPT", prompt_embeddings=ramp(P, 8) * np.inf), "non_finite"),
        (peft_envelope("CPT", prompt_embeddings=ramp(P, 8) + 1e9), "out_of_range"),
        (peft_envelope("CPT", **EMBEDDINGS, lm_head=ramp(2)), "unknown_tensor"),
        (peft_envelope("CARTRIDGE", **EMBEDDINGS), "wrong_shape"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_stored_file_is_checked_as_strictly_as_any_upload(
    client: TestClient, world: World, data: bytes, code: str
) -> None:
    answer = put_file(client, "voice", data)
    assert (answer.status_code, error_of(answer)["code"]) == (422, code), answer.text
    assert client.get("/v1/prefixes").json()["data"] == []
    assert list(world.body_limits.upload_dir.iterdir()) == []


def test_a_safetensors_file_alone_is_refused_with_advice(client: TestClient) -> None:
    answer = put_file(client, "voice", tensors(EMBEDDINGS))
    assert "multipart/form-data" in error_of(answer)["message"]


@pytest.mark.parametrize("excess", [1, 4 * 1024 * 1024])
def test_a_stored_file_over_the_limit_is_413(client: TestClient, excess: int) -> None:
    payload = bytes(BODY_LIMITS["max_prefix_bytes"] + excess)
    answer = put_file(client, "voice", envelope(payload))
    assert (answer.status_code, error_of(answer)["code"]) == (413, "request_too_large")


def test_the_virtual_tokens_of_a_tenant_limit_a_stored_file(
    client: TestClient, world: World
) -> None:
    put_peft(client, "voice", "CPT")
    world.tenants.set_quota("beta", {"max_virtual_tokens": P - 1})
    headers = OCTETS | world.headers("beta")
    answer = client.put("/v1/prefixes/v", content=content(client, "voice"), headers=headers)
    assert (answer.status_code, error_of(answer)["code"]) == (422, "too_many_virtual_tokens")


def test_an_idempotency_key_holds_for_a_stored_file(client: TestClient) -> None:
    put_peft(client, "voice", "CPT")
    data = content(client, "voice")
    headers = {"idempotency-key": "one"}
    first, again = (put_file(client, "copy", data, **headers) for _ in range(2))
    assert (first.status_code, again.status_code) == (201, 201)
    assert again.headers["idempotency-replayed"] == "true"
    other = put_file(client, "copy", envelope(b"hi"), **headers)
    assert (other.status_code, error_of(other)["code"]) == (409, "idempotency_key_reused")


def test_another_content_type_is_refused_with_the_accepted_ones(client: TestClient) -> None:
    answer = client.put("/v1/prefixes/voice", content=b"x", headers={"content-type": "text/csv"})
    error = error_of(answer)
    assert (answer.status_code, error["code"]) == (400, "unsupported_media_type")
    for accepted in ("multipart/form-data", "application/json", "application/octet-stream"):
        assert accepted in error["message"]
    assert "text/csv" in error["message"]
