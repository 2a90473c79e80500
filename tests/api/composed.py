"""Prefixes to compose, and what the fake model answers under a composition of them."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fastapi.testclient import TestClient

from prefixd.store.artifact.composition import composition_digest
from prefixd.store.artifact.kinds import Kind
from tests.api.api_world import BASE, World, fake_text
from tests.api.test_prefix_routes import CONFIG, files, weights

PROMPT = "I like it"


def put_soft(
    client: TestClient,
    name: str,
    metadata: dict[str, Any] | None = None,
    *,
    rows: int = 4,
    fill: float = 0.5,
) -> dict[str, Any]:
    """A soft prompt of ``rows`` equal rows; ``metadata`` of it, if any."""
    parts = files(
        config=("c", json.dumps({**CONFIG, "num_virtual_tokens": rows}).encode()),
        weights=("w", weights(rows=rows, fill=fill)),
    )
    if metadata:
        parts["metadata"] = ("m", json.dumps(metadata).encode())
    return _created(client.put(f"/v1/prefixes/{name}", files=parts))


def put_kv(client: TestClient, name: str, *, rows: int = 5) -> dict[str, Any]:
    """A KV prefix."""
    config = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": rows,
        "token_dim": BASE.num_kv_heads * BASE.head_dim,
        "num_layers": BASE.num_layers,
        "num_attention_heads": BASE.num_kv_heads,
        "prefix_projection": False,
    }
    data = weights(rows=rows, width=BASE.kv_width)
    parts = {"config": ("c", json.dumps(config).encode()), "weights": ("w", data)}
    return _created(client.put(f"/v1/prefixes/{name}", files=parts))


def put_text(client: TestClient, name: str, text: str, **fields: Any) -> dict[str, Any]:
    """A text."""
    body = {"kind": "text", "text": text, **fields}
    return _created(client.put(f"/v1/prefixes/{name}", json=body))


def _created(answer: Any) -> dict[str, Any]:
    assert answer.status_code in {200, 201}, answer.text
    manifest: dict[str, Any] = answer.json()
    return manifest


def complete(client: TestClient, prefix: object = None, **fields: Any) -> Any:
    """A completion under a composition, with the base as model unless ``fields`` say another."""
    composed = {} if prefix is None else {"prefix": prefix}
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 6, **composed, **fields}
    return client.post("/v1/completions", json=body)


def text_of(answer: Any) -> str:
    """The text of a completion."""
    assert answer.status_code == 200, answer.text
    text: str = answer.json()["choices"][0]["text"]
    return text


def answer_under(
    kind: Kind, digests: Sequence[str], weights: Sequence[float] = (), prompt: str = PROMPT
) -> str:
    """What the fake model answers under a composition; digests and weights in the key's order."""
    return fake_text(composition_digest(kind, digests, weights), prompt, 6)


@contextmanager
def acting(client: TestClient, world: World, tenant: str) -> Iterator[TestClient]:
    """The client with another tenant's key."""
    own = client.headers["Authorization"]
    client.headers.update(world.headers(tenant))
    yield client
    client.headers["Authorization"] = own
