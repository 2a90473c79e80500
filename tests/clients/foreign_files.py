"""Files of other tools, written with the tools' own layouts by PyTorch and numpy, and how they are
read."""

import json
import tracemalloc
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load

from prefixd.client.convert.sources import Source, read_source
from prefixd.client.folders import PeftContent


def read(path: Path, *, task_id: int | None = None) -> Source:
    """The prefix of a path that holds one."""
    prefix = read_source(str(path), task_id=task_id)
    assert prefix is not None, f"{path} was taken for a text"
    return prefix


def tensors(prefix: Source) -> dict[str, torch.Tensor]:
    """The converted tensors, as safetensors' own reader sees them."""
    assert isinstance(prefix.content, PeftContent)
    assert isinstance(prefix.content.weights, bytes)
    loaded: dict[str, torch.Tensor] = load(prefix.content.weights)
    return loaded


def embeddings(prefix: Source) -> torch.Tensor:
    """The only converted tensor."""
    (tensor,) = tensors(prefix).values()
    return tensor


def parameters(layers: torch.Tensor) -> torch.nn.ParameterList:
    """[layers, KV heads, tokens, head_dim] as Cartridges keeps it: [1, heads, tokens, dim] each."""
    return torch.nn.ParameterList(torch.nn.Parameter(layer[None].clone()) for layer in layers)


def save_cartridge(
    path: Path, keys: torch.Tensor, values: torch.Tensor, *, frozen: int, word: str = "frozen"
) -> None:
    """Cartridges' ``TrainableCache.save``; ``frozen`` tokens come first.

    keys, values: [layers, KV heads, tokens, head_dim].
    """
    parts = {
        "trainable_keys": parameters(keys[:, :, frozen:]),
        "trainable_values": parameters(values[:, :, frozen:]),
        f"{word}_keys": parameters(keys[:, :, :frozen] if frozen else keys[:0]),
        f"{word}_values": parameters(values[:, :, :frozen] if frozen else values[:0]),
    }
    torch.save(parts, path)


class PrefixEncoder(torch.nn.Module):
    """The module of P-tuning v2, which ChatGLM's fine-tuning shares."""

    def __init__(self, *, tokens: int, width: int, hidden: int | None) -> None:
        super().__init__()
        if hidden is None:
            self.embedding = torch.nn.Embedding(tokens, width)
            return
        self.embedding = torch.nn.Embedding(tokens, hidden)
        self.trans = torch.nn.Sequential(
            torch.nn.Linear(hidden, hidden * 2), torch.nn.Tanh(), torch.nn.Linear(hidden * 2, width)
        )

    def forward(self) -> torch.Tensor:
        """[tokens, width]."""
        embedded = self.embedding.weight
        return self.trans(embedded) if hasattr(self, "trans") else embedded


def save_encoder(path: Path, encoder: torch.nn.Module, *, lead: str, others: Any = ()) -> None:
    """A state dict as ``Trainer`` writes it."""
    state = {f"{lead}{name}": value for name, value in encoder.state_dict().items()}
    torch.save(state | dict(others), path)


def words(values: torch.Tensor) -> np.ndarray:
    """bfloat16 as numpy holds it without a package for it: raw 16-bit words."""
    return values.bfloat16().view(torch.int16).numpy().view("V2")


def save_kobold(path: Path, values: np.ndarray, meta: Any = None) -> None:
    """A soft prompt as KoboldAI's tuner exports it."""
    with (
        zipfile.ZipFile(path, "w", compression=zipfile.ZIP_LZMA) as archive,
        archive.open("tensor.npy", "w") as file,
    ):
        np.save(file, values, allow_pickle=False)
    with zipfile.ZipFile(path, "a", compression=zipfile.ZIP_STORED) as archive:
        archive.writestr("meta.json", json.dumps(meta or {}, indent=2))


@contextmanager
def memory_below(limit: int) -> Iterator[None]:
    """Fail when the block allocates more than ``limit`` bytes at once."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()
