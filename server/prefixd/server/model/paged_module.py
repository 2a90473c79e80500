"""The unmodified transformers model on a GPU: its own layers, and attention by our kernels."""

from collections.abc import Sequence

import torch

from prefixd.server.model.attention import Options, StepAttention
from prefixd.server.model.batch import FlatBatch
from prefixd.server.model.buffers import NO_STEP, StepSizes, StepTensors
from prefixd.server.model.kernels import write_kv
from prefixd.server.model.kv_cache import KVCache
from prefixd.server.model.load import LoadedBase
from prefixd.server.model.module_decoder import ModuleDecoder
from prefixd.server.model.paged import attend_step, require_kernels


class PagedModuleDecoder(ModuleDecoder):
    """Runs any model that can be served and has heads that the kernels compute."""

    name = "paged_module"

    def __init__(
        self, base: LoadedBase, *, num_blocks: int, block_size: int, sizes: StepSizes = NO_STEP
    ) -> None:
        """``num_blocks`` counts the null block. Raises NotExact."""
        require_kernels(base)
        super().__init__(base, num_blocks=num_blocks, block_size=block_size, sizes=sizes)

    def zero(self, blocks: Sequence[int]) -> None:
        """Nothing: the kernels read no position that was not written."""

    def _attention(self, batch: FlatBatch) -> StepAttention:  # noqa: ARG002 - the buffers hold it
        self.buffers.send()
        return KernelAttention(self.cache, self.buffers.tensors())

    def _flat(
        self,
        batch: FlatBatch,  # noqa: ARG002 - the buffers hold it
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        step = self.buffers.tensors()
        return step.token_ids().long(), step.positions.long(), step.outputs.long()


class KernelAttention:
    """Attention of one step."""

    def __init__(self, cache: KVCache, step: StepTensors) -> None:
        self._cache, self._step = cache, step

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write keys and values [num_tokens, num_kv_heads, head_dim] of a layer to the pool."""
        kv = self._cache.layer(layer)
        write_kv(kv, keys.contiguous(), values.contiguous(), self._step.slots)

    def attend(self, layer: int, queries: torch.Tensor, options: Options) -> torch.Tensor:
        """Attend with ``queries`` [num_tokens, num_heads, head_dim]; returns their shape."""
        kv = self._cache.layer(layer)
        return attend_step(queries.contiguous(), kv, self._step, options.scale)

    def cached(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Not called: such layers are refused."""
        raise NotImplementedError(layer)

    def attend_expanded(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, options: Options
    ) -> torch.Tensor:
        """Not called: such layers are refused."""
        raise NotImplementedError(options)
