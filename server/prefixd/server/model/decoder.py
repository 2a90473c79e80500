"""What runs a forward pass: the seam between the runner and the ways of computing a model.

A decoder owns the KV pool, whose layout nothing else knows: the scheduler sees blocks, and a KV
prefix goes in and out as rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from prefixd.server.engine.step import BlockCopy, ThreadUse
from prefixd.server.model.batch import FlatBatch


@dataclass(frozen=True, slots=True)
class Logits:
    """Logits of n tokens: ``values`` [n, ids], where ids are those that may be sampled.

    ``best`` is None, or the largest logit of each row, NaN where the row holds one, and its first
    id: ([n] float32, [n] int64).
    """

    values: torch.Tensor
    best: tuple[torch.Tensor, torch.Tensor] | None = None

    def first(self, count: int) -> "Logits":
        """Those of the first ``count`` tokens."""
        best = self.best and (self.best[0][:count], self.best[1][:count])
        return Logits(self.values[:count], best)


class Decoder(Protocol):
    """A model with its KV pool. Not thread-safe."""

    name: str
    """Which decoder it is, for people: ``module``, ``torch``, or the set of kernels."""
    block_size: int
    device: torch.device
    num_layers: int
    state_blocks: int
    """Side blocks of a sequence that hold its state; 0 where all layers have KV."""

    def forward(self, batch: FlatBatch) -> Logits:
        """Run a pass: write the KV of its tokens and return the logits of its outputs."""
        ...

    def zero(self, blocks: Sequence[int]) -> None:
        """Zero blocks before anything can read them: a mask does not stop NaN from spreading."""
        ...

    def copy(self, copies: Sequence[BlockCopy]) -> None:
        """Copy whole blocks."""
        ...

    def read_kv(self, block_table: Sequence[int], num_tokens: int) -> torch.Tensor:
        """KV of the first positions of a block table, in host memory:
        [2 * num_layers, num_tokens, num_kv_heads * head_dim], keys of layer i at 2i and values at
        2i + 1."""
        ...

    def write_kv(self, block_table: Sequence[int], start: int, kv: torch.Tensor) -> None:
        """Store ``kv`` [2 * num_layers, n, num_kv_heads * head_dim] from position ``start`` on."""
        ...

    def project(self, layer: int, inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [n, num_kv_heads * head_dim] that the products of a layer, with their
        biases, make of ``inputs`` [n, width]: neither normalised nor rotated."""
        ...

    def set_threads(self, threads: int) -> None:
        """Let the passes that the calling thread runs use this many threads, itself included."""
        ...

    def thread_use(self) -> ThreadUse | None:
        """Of the passes so far, where the decoder itself leaves out threads whose cores other
        processes need; None where every pass uses all that were set."""
        ...
