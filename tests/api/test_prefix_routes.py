"""/v1/prefixes over HTTP."""

import hashlib
import json
import struct
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from tests.api.api_world import BASE, BODY_LIMITS, World, error_of, put_text

CONFIG = {
    "peft_type": "PROMPT_TUNING",
    "task_type": "CAUSAL_LM",
    "num_virtual_tokens": 3,
    "token_dim": BASE.embedding_width,
    "base_model_name_or_path": "somewhere/tiny",
}


def weights(rows: int = 3, width: int = BASE.embedding_width, fill: float = 0.5) -> bytes:
    data = np.full((rows, width), fill, dtype="<f4").tobytes()
    header = json.dumps(
        {
            "prompt_embeddings": {
                "dtype": "F32",
                "shape": [rows, width],
                "data_offsets": [0, len(data)],
            }
        }
    ).encode()
    return struct.pack("<Q", len(header)) + header + data


def files(**changes: Any) -> dict[str, Any]:
    parts: dict[str, Any] = {
        "config": ("adapter_config.json", json.dumps(CONFIG).encode(), "application/json"),
        "weights": ("adapter_model.safetensors", weights(), "application/octet-stream"),
        **changes,
    }
    return {name: part for name, part in parts.items() if part is not None}


def test_an_upload_is_answered_with_what_its_length_means_on_the_base(world: World) -> None:
    world.served = replace(world.served, prefix_warnings=lambda count: [f"{count} tokens"])
    with TestClient(world.make_app(), headers=world.headers()) as client:
        for _ in range(2):
            answer = client.put(
                "/v1/prefixes/voice", files=files(), headers={"Idempotency-Key": "once"}
            )
            assert answer.json()["warnings"] == ["3 tokens"]
        assert "warnings" not in client.get("/v1/prefixes/voice").json()


def test_equal_bytes_keep_their_version_and_other_bytes_make_a_new_one(client: TestClient) -> None:
    first = client.put("/v1/prefixes/voice", files=files())
    assert first.status_code == 201, first.text
    manifest = first.json()
    assert manifest["object"] == "prefix"
    assert (manifest["name"], manifest["version"]) == ("voice", 1)
    assert manifest["kind"] == "soft_prompt"
    assert manifest["num_virtual_tokens"] == 3
    assert manifest["peft_type"] == "PROMPT_TUNING"
    assert manifest["fingerprint"] == BASE.fingerprint
    assert manifest["aliases"] == ["latest"]
    again = client.put("/v1/prefixes/voice", files=files())
    assert again.status_code == 200
    assert again.json() == manifest
    other = client.put("/v1/prefixes/voice", files=files(weights=("w", weights(fill=0.25))))
    assert other.status_code == 201
    assert other.json()["version"] == 2
    used = client.post("/v1/completions", json={"model": "voice@1", "prompt": "x"})
    assert used.json()["prefix"]["digest"] == manifest["digest"]


def test_metadata_is_returned_in_the_manifest(client: TestClient) -> None:
    metadata = {"owner": "ann", "nested": {"n": 1}}
    sent = files(metadata=("m.json", json.dumps(metadata).encode(), "application/json"))
    assert client.put("/v1/prefixes/voice", files=sent).json()["metadata"] == metadata
    body = {"kind": "text", "text": "hi", "metadata": metadata}
    assert client.put("/v1/prefixes/note", json=body).json()["metadata"] == metadata


def test_the_upload_folder_is_empty_after_an_upload(client: TestClient, world: World) -> None:
    client.put("/v1/prefixes/voice", files=files())
    client.put("/v1/prefixes/voice", files=files(weights=("w", b"rubbish")))
    client.put(
        "/v1/prefixes/voice", files=files(weights=("w", bytes(BODY_LIMITS["max_prefix_bytes"] + 1)))
    )
    assert list(world.body_limits.upload_dir.iterdir()) == []


def test_the_content_matches_the_digest(client: TestClient) -> None:
    digest = client.put("/v1/prefixes/voice", files=files()).json()["digest"]
    answer = client.get("/v1/prefixes/voice/versions/1/content")
    assert answer.headers["content-type"] == "application/octet-stream"
    assert hashlib.sha256(answer.content).hexdigest() == digest
    assert answer.headers["x-prefixd-prefix-digest"] == digest


@pytest.mark.parametrize(
    ("asked", "status", "code"),
    [
        ("bytes=9-1", 400, "invalid_range"),
        ("rubbish", 400, "invalid_range"),
        ("bytes=999999-", 416, "range_not_satisfiable"),
    ],
)
def test_an_invalid_range_gives_a_standard_error(
    client: TestClient, asked: str, status: int, code: str
) -> None:
    client.put("/v1/prefixes/voice", files=files())
    where = "/v1/prefixes/voice/versions/1/content"
    size = len(client.get(where).content)
    answer = client.get(where, headers={"Range": asked})
    assert answer.status_code == status
    assert error_of(answer)["code"] == code
    assert answer.headers.get("content-range") == (f"bytes */{size}" if status == 416 else None)
    assert "etag" not in answer.headers


def test_a_range_of_the_content_is_returned(client: TestClient) -> None:
    client.put("/v1/prefixes/voice", files=files())
    where = "/v1/prefixes/voice/versions/1/content"
    whole, part = client.get(where), client.get(where, headers={"Range": "bytes=4-9"})
    assert part.status_code == 206
    assert part.content == whole.content[4:10]


def test_prefixes_are_read_and_listed_in_pages(client: TestClient, world: World) -> None:
    for name in ("a", "b", "c"):
        put_text(client, name, f"text {name}", world.headers())
    put_text(client, "b", "second", world.headers())
    first = client.get("/v1/prefixes", params={"limit": 2}).json()
    assert first["object"] == "list"
    assert [(m["name"], m["version"]) for m in first["data"]] == [("a", 1), ("b", 2)]
    rest = client.get("/v1/prefixes", params={"after": first["next_after"]}).json()
    assert [m["name"] for m in rest["data"]] == ["c"]
    assert rest["next_after"] is None
    versions = client.get("/v1/prefixes/b/versions").json()
    assert [m["version"] for m in versions["data"]] == [2, 1]
    for reference, version in (("b", 2), ("b@1", 1), ("b@latest", 2)):
        assert client.get(f"/v1/prefixes/{reference}").json()["version"] == version


def test_versions_are_listed_in_pages(client: TestClient, world: World) -> None:
    for number in range(5):
        put_text(client, "voice", f"text {number}", world.headers())
    seen: list[int] = []
    before: dict[str, int] = {}
    while True:
        page = client.get("/v1/prefixes/voice/versions", params={"limit": 2, **before}).json()
        seen += [one["version"] for one in page["data"]]
        if page["next_before"] is None:
            break
        assert len(page["data"]) == 2
        before = {"before": page["next_before"]}
    assert seen == [5, 4, 3, 2, 1]
    past = client.get("/v1/prefixes/voice/versions?before=1")
    assert (past.status_code, past.json()["data"]) == (200, [])
    assert client.get("/v1/prefixes/other/versions?before=1").status_code == 404
    for bad in ("limit=0", "limit=1001", "before=0", "before=x", "before=99999999999"):
        assert client.get(f"/v1/prefixes/voice/versions?{bad}").status_code == 400
    large = client.get("/v1/prefixes/voice/versions?limit=1001").json()["error"]["message"]
    assert large == "'limit': expected at most 1000; received '1001'"


def test_an_alias_can_be_moved_and_deleted(client: TestClient, world: World) -> None:
    put_text(client, "voice", "one", world.headers())
    put_text(client, "voice", "two", world.headers())
    for version in (1, 2):
        answer = client.put("/v1/prefixes/voice/aliases/prod", json={"version": version})
        assert answer.status_code == 200
        assert answer.json()["version"] == version
        assert "prod" in answer.json()["aliases"]
        assert client.get("/v1/prefixes/voice@prod").json()["version"] == version
    assert client.delete("/v1/prefixes/voice/aliases/prod").status_code == 204
    assert client.get("/v1/prefixes/voice@prod").status_code == 404


def test_an_alias_from_another_one_keeps_the_version_it_had(
    client: TestClient, world: World
) -> None:
    put_text(client, "voice", "one", world.headers())
    put_text(client, "voice", "two", world.headers())
    client.put("/v1/prefixes/voice/aliases/staging", json={"version": 1})
    for source, version in (("latest", 2), ("staging", 1), ("prod", 1)):
        answer = client.put("/v1/prefixes/voice/aliases/prod", json={"version": source})
        assert (answer.status_code, answer.json()["version"]) == (200, version), source
    client.put("/v1/prefixes/voice/aliases/prod", json={"version": "latest"})
    newest, *_ = world.audit.page(tenant="acme", limit=1)[0]
    assert newest.detail == {"alias": "prod", "version": 2}
    back = client.put("/v1/prefixes/voice/aliases/latest", json={"version": "staging"})
    assert (back.status_code, back.json()["version"]) == (200, 1)
    assert client.get("/v1/prefixes/voice").json()["version"] == 1
    put_text(client, "voice", "three", world.headers())
    assert client.get("/v1/prefixes/voice@prod").json()["version"] == 2


@pytest.mark.parametrize(
    ("version", "status", "code"),
    [
        ("nightly", 404, "prefix_not_found"),
        ("a b", 400, "invalid_reference"),
        ("", 400, "invalid_reference"),
        ("3", 400, "invalid_request"),
        (0, 400, "invalid_request"),
        (2**31, 400, "invalid_request"),
        (True, 400, "invalid_request"),
        (1.0, 400, "invalid_request"),
        (None, 400, "invalid_request"),
    ],
)
def test_an_alias_of_an_unknown_or_malformed_version_is_refused(
    client: TestClient, world: World, version: object, status: int, code: str
) -> None:
    put_text(client, "voice", "one", world.headers())
    answer = client.put("/v1/prefixes/voice/aliases/prod", json={"version": version})
    assert (answer.status_code, error_of(answer)["code"]) == (status, code)
    if code == "invalid_request":
        assert "expected a version number from 1, or an alias" in error_of(answer)["message"]
        assert "; received " in error_of(answer)["message"]
    assert client.get("/v1/prefixes/voice@prod").status_code == 404


def test_the_content_is_read_by_alias(client: TestClient, world: World) -> None:
    digests = [put_text(client, "voice", text, world.headers())["digest"] for text in ("a", "b")]
    client.put("/v1/prefixes/voice/aliases/prod", json={"version": 1})
    for version, digest in (("1", 0), ("2", 1), ("latest", 1), ("prod", 0)):
        answer = client.get(f"/v1/prefixes/voice/versions/{version}/content")
        assert hashlib.sha256(answer.content).hexdigest() == digests[digest]
    for version, status in (
        ("3", 404),
        ("0", 404),
        ("nightly", 404),
        ("a b", 400),
        ("9" * 30, 404),
    ):
        answer = client.get(f"/v1/prefixes/voice/versions/{version}/content")
        assert answer.status_code == status, version


def test_version_numbers_continue_after_a_delete(client: TestClient, world: World) -> None:
    put_text(client, "voice", "one", world.headers())
    answer = client.delete("/v1/prefixes/voice")
    assert (answer.status_code, answer.content) == (204, b"")
    assert client.get("/v1/prefixes/voice").status_code == 404
    assert client.delete("/v1/prefixes/voice").status_code == 404
    assert put_text(client, "voice", "one", world.headers())["version"] == 2


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        ({"weights": ("w", weights(width=16))}, None, ["8", "16"]),
        ({"weights": ("w", weights(rows=4))}, None, ["3", "4"]),
        ({"weights": ("w", weights(fill=float("nan")))}, None, ["finite"]),
        ({"weights": ("w", b"\x80\x04pickle")}, None, []),
        ({"weights": ("w", b"PK\x03\x04zip")}, None, []),
        ({"weights": ("w", b"")}, None, []),
        ({"config": ("c", b"{")}, None, []),
        ({"metadata": ("m", b"[1]")}, "malformed_metadata", ["object"]),
        ({"metadata": ("m", b'{"task_id": "x"}')}, "malformed_metadata", ["task_id"]),
    ],
)
def test_malformed_artifacts_are_422(
    client: TestClient, changes: dict[str, Any], code: str | None, words: list[str]
) -> None:
    answer = client.put("/v1/prefixes/voice", files=files(**changes))
    assert answer.status_code == 422, answer.text
    error = error_of(answer)
    assert code is None or error["code"] == code
    for word in words:
        assert word in error["message"]
    assert client.get("/v1/prefixes").json()["data"] == []


@pytest.mark.parametrize(
    ("changes", "status", "code"),
    [
        ({"weights": None}, 400, "missing_part"),
        ({"config": None}, 400, "missing_part"),
        ({"weights": ("w", bytes(BODY_LIMITS["max_prefix_bytes"] + 1))}, 413, "request_too_large"),
        ({"weights": ("w", bytes(400_000))}, 413, "request_too_large"),
        ({"config": ("c", bytes(256 * 1024 + 1))}, 413, "request_too_large"),
        ({"model": ("m", b"x")}, 400, "unknown_part"),
    ],
)
def test_uploads_with_invalid_parts_are_rejected(
    client: TestClient, changes: dict[str, Any], status: int, code: str
) -> None:
    answer = client.put("/v1/prefixes/voice", files=files(**changes))
    assert answer.status_code == status, answer.text
    assert error_of(answer)["code"] == code


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=", b"x"),
        ("multipart/form-data; boundary=b", b"rubbish"),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\ncontent-disposition: form-data; name="config"\r\n\r\n{}',
        ),
        ("text/plain", b"x"),
        ("application/json", b"{}"),
        ("application/json", b'{"kind": "soft", "text": "x"}'),
        ("application/json", b'{"kind": "text", "text": ""}'),
    ],
)
def test_malformed_upload_bodies_are_400(
    client: TestClient, content_type: str, body: bytes
) -> None:
    answer = client.put("/v1/prefixes/voice", content=body, headers={"content-type": content_type})
    assert answer.status_code == 400, answer.text
    error_of(answer)


def test_a_duplicate_part_is_rejected(client: TestClient) -> None:
    parts = [*files().items(), ("config", ("c", b"{}"))]
    answer = client.put("/v1/prefixes/voice", files=parts)
    assert answer.status_code == 400
    assert error_of(answer)["code"] == "duplicate_part"


def test_a_part_with_an_endless_header_is_rejected_early(client: TestClient) -> None:
    """The parser stops reading a header after 4 KiB; python-multipart before 0.0.27 did not."""
    part = ("adapter_config.json", json.dumps(CONFIG).encode(), "application/json")
    endless = files(config=(*part, {"x-filler": "x" * 100_000}))
    answer = client.put("/v1/prefixes/voice", files=endless)
    assert answer.status_code == 400
    assert "malformed" in error_of(answer)["message"]


def test_a_json_body_over_the_limit_is_rejected(client: TestClient) -> None:
    answer = client.put("/v1/prefixes/n", json={"kind": "text", "text": "x" * 70_000})
    assert answer.status_code == 413
    assert str(BODY_LIMITS["max_body_bytes"]) in error_of(answer)["message"]


def test_a_body_without_length_over_the_limit_is_rejected(client: TestClient) -> None:
    def chunks() -> Any:
        for _ in range(100):
            yield b" " * 1024

    answer = client.post(
        "/v1/completions", content=chunks(), headers={"content-type": "application/json"}
    )
    assert answer.status_code == 413


@pytest.mark.parametrize("name", ["-x", "a b", "a@b", "%2e%2e", "a" * 129])
def test_malformed_names_are_400(client: TestClient, name: str) -> None:
    answer = client.put(f"/v1/prefixes/{name}", json={"kind": "text", "text": "x"})
    assert answer.status_code == 400
    assert error_of(answer)["code"] == "invalid_reference"


def test_a_prefix_uploaded_for_another_base_is_a_409(client: TestClient, world: World) -> None:
    put_text(client, "voice", "one", world.headers())
    moved = type(BASE)(**{**{f: getattr(BASE, f) for f in BASE.__slots__}, "fingerprint": "e" * 64})
    object.__setattr__(world.served, "base", moved)
    answer = client.post("/v1/completions", json={"model": "voice", "prompt": "x"})
    assert answer.status_code == 409
    assert "e" * 64 in error_of(answer)["message"]
