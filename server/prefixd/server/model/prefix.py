"""Prefixes in host memory, ready to compile: what an artifact becomes before it becomes KV."""

from dataclasses import dataclass
from typing import Any

import torch

from prefixd.server.model.load import LoadedBase
from prefixd.store.artifact.artifact import Artifact, Kind


@dataclass(frozen=True)
class StagedEmbeddings:
    """A soft prompt: ``embeddings`` [num_tokens, hidden_size] go where word embeddings would."""

    embeddings: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """Virtual tokens."""
        return self.embeddings.shape[0]


@dataclass(frozen=True)
class StagedTokens:
    """A hard prompt: token ids, run as any tokens are."""

    token_ids: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Virtual tokens."""
        return len(self.token_ids)


@dataclass(frozen=True)
class StagedKV:
    """A KV prefix: ``kv`` [2 * num_layers, num_tokens, num_kv_heads * head_dim], keys of layer i
    at 2i and values at 2i + 1, stored as they are (keys after the rotary embedding)."""

    kv: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """Virtual tokens."""
        return self.kv.shape[1]


Staged = StagedEmbeddings | StagedTokens | StagedKV


def stage(artifact: Artifact, base: LoadedBase, tokenizer: Any) -> Staged:
    """Cast an artifact's values to the serving dtype, in the layout the runner copies from.

    The KV layout is PEFT's: ``w.view(P, 2L, H_kv, hd).permute(1, 2, 0, 3)`` (FACTS section 3).
    """
    if artifact.kind is Kind.HARD_PROMPT:
        assert artifact.text is not None
        return StagedTokens(tuple(tokenizer.encode(artifact.text)))
    assert artifact.values is not None
    values = torch.from_numpy(artifact.values).to(base.dtype)
    if artifact.kind is Kind.SOFT_PROMPT:
        return StagedEmbeddings(values)
    layers = 2 * base.shape.num_layers
    per_layer = values.view(artifact.num_virtual_tokens, layers, -1).transpose(0, 1)
    return StagedKV(per_layer.contiguous())
