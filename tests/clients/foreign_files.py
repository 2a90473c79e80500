"""Files of other tools, written with the tools' own layouts by PyTorch and numpy."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch


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
