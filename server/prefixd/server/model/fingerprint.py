"""What identifies a base: its config, its weights and its tokenizer."""

import hashlib
import json
from typing import Any

import torch

from prefixd.server.model.tensors import unwrapped, whole

SAMPLES = 4096
"""Elements of each weight in a fingerprint."""

_VOLATILE = (
    "_name_or_path",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "_attn_implementation_autoset",
    "distributed_config",
)
"""Keys of a config that depend on how and where it was loaded."""


def fingerprint_of(module: Any, tokenizer: Any) -> str:
    """The SHA-256 of the base's config, weights and tokenizer.

    Each weight contributes its name, its shape and evenly spaced elements: all of a small one,
    4096 of a large one. Hashing every byte of a large model would take longer than loading it.
    The same with sharded weights, which are gathered one at a time. A quantized weight contributes
    the tensors that it is stored in.
    """
    digest = hashlib.sha256()
    config = module.config.to_dict()
    for volatile in _VOLATILE:
        config.pop(volatile, None)
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in sorted(module.state_dict().items()):
        for part, tensor in unwrapped(name, weight.detach()):
            digest.update(f"{part}{tuple(tensor.shape)}".encode())
            digest.update(sample(tensor).numpy().tobytes())
    if tokenizer is not None:
        digest.update(tokenizer.backend_tokenizer.to_str().encode())
    return digest.hexdigest()


def sample(tensor: torch.Tensor) -> torch.Tensor:
    """Evenly spaced elements of a tensor that may be sharded, in float32 on the CPU."""
    flat = whole(tensor).reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLES)].float().cpu()
