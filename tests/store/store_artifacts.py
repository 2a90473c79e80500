"""Crafted adapters: safetensors bytes built by hand, so that tests can make any mistake in them."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

from prefixd.store.artifact.base_spec import BaseSpec

P = 4
HIDDEN = 16
KV_WIDTH = 2 * 2 * 2 * 4  # layers, K and V, KV heads, head size

BASE = BaseSpec(
    name="tiny",
    fingerprint="f" * 64,
    num_layers=2,
    num_kv_heads=2,
    head_dim=4,
    embedding_width=HIDDEN,
    max_virtual_tokens=64,
    dtype="float32",
    max_abs_embedding=1e6,
    max_abs_kv=100.0,
)

_ITEMSIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "BOOL": 1, "F8_E4M3": 1, "C64": 8}


def config_fields(peft_type: object = "PROMPT_TUNING", **changes: Any) -> dict[str, Any]:
    fields = {"peft_type": peft_type, "task_type": "CAUSAL_LM", "num_virtual_tokens": P}
    return fields | changes


def config_bytes(peft_type: object = "PROMPT_TUNING", **changes: Any) -> bytes:
    return json.dumps(config_fields(peft_type, **changes)).encode()


def ramp(*shape: int) -> np.ndarray:
    """Small values, each different: so that a transposed or shifted read is detected."""
    count = int(np.prod(shape))
    return (np.arange(count, dtype=np.float32) / 64 - 1).reshape(shape)


def header_entry(dtype: str, shape: list[int], begin: int) -> dict[str, Any]:
    size = _ITEMSIZE[dtype] * int(np.prod(shape)) if shape else _ITEMSIZE[dtype]
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + size]}


def with_header(header: bytes | dict[str, Any], data: bytes) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + data


def bits(values: np.ndarray, dtype: str) -> bytes:
    if dtype == "F16":
        return values.astype("<f2").tobytes()
    if dtype == "BF16":
        return (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return values.astype("<f4").tobytes()


def tensors(named: dict[str, np.ndarray], dtype: str = "F32") -> bytes:
    """A valid safetensors file."""
    header: dict[str, Any] = {}
    data = b""
    for name, values in named.items():
        header[name] = header_entry(dtype, list(values.shape), len(data))
        data += bits(values, dtype)
    return with_header(header, data)


def soft(values: np.ndarray | None = None, dtype: str = "F32") -> bytes:
    return tensors({"prompt_embeddings": ramp(P, HIDDEN) if values is None else values}, dtype)


def kv(values: np.ndarray | None = None) -> bytes:
    return tensors({"prompt_embeddings": ramp(P, KV_WIDTH) if values is None else values})


def multitask(tasks: int = 3, rank: int = 2) -> bytes:
    return tensors(
        {
            "prefix_task_cols": ramp(tasks, P, rank),
            "prefix_task_rows": ramp(tasks, rank, HIDDEN),
            "prompt_embeddings": ramp(P, HIDDEN),
        }
    )


def spool(directory: Path, weights: bytes) -> Path:
    path = directory / "weights"
    path.write_bytes(weights)
    return path
