"""The only code that runs on the device: takes a step, returns sampled tokens."""

from collections.abc import Sequence
from typing import Any

import torch

from prefixd.server.engine.request import PrefixKey
from prefixd.server.engine.step import (
    Chunk,
    CompileChunk,
    OutOfMemory,
    Save,
    StagedPrefix,
    Step,
    StepOutput,
)
from prefixd.server.model.attention import PagedBatch
from prefixd.server.model.batch import Row, group_rows, slots_of
from prefixd.server.model.kv_cache import KVCache
from prefixd.server.model.load import LoadedBase
from prefixd.server.model.prefix import HardPrompt, KVPrefix, SoftPrompt
from prefixd.server.model.sampler import sample
from prefixd.server.model.threads import use_threads

_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "error: out of memory",  # the CUDA runtime and driver; newer torch raises AcceleratorError
    "CUBLAS_STATUS_ALLOC_FAILED",
)


class TorchRunner:
    """Runs steps on an unmodified transformers model and owns the KV pool. Not thread-safe."""

    def __init__(
        self, base: LoadedBase, *, num_blocks: int, block_size: int, threads: int | None = None
    ) -> None:
        """``num_blocks`` counts the null block. ``threads``: how many the thread that calls ``run``
        uses (None: what it has been told)."""
        self.base = base
        self.cache = KVCache(
            base.shape,
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=base.dtype,
            device=base.device,
        )
        self._embed: Any = base.module.get_input_embeddings()
        self._num_ids = base.num_embeddings
        self._threads = threads

    def run(self, step: Step) -> StepOutput:
        """Run one forward pass over the step's chunks and compiles. Raises OutOfMemory."""
        if self._threads is not None:
            use_threads(self._threads)
            self._threads = None
        try:
            return self._run(step)
        except (RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            if self.base.device.type == "cuda":
                torch.cuda.empty_cache()
            raise OutOfMemory(str(error).partition("\n")[0]) from error

    @torch.inference_mode()
    def _run(self, step: Step) -> StepOutput:
        saved: dict[PrefixKey, StagedPrefix] = {
            save.key: self._read_kv(save) for save in step.saves
        }
        self.cache.zero(step.fresh)
        self.cache.copy(step.copies)
        for part in step.compiles:
            if isinstance(part.payload, KVPrefix):
                self._write_kv(part, part.payload)
        forwarded = [part for part in step.compiles if not isinstance(part.payload, KVPrefix)]
        if not step.chunks and not forwarded:
            return StepOutput({}, saved)
        sampled = [chunk for chunk in step.chunks if chunk.sampling is not None]
        logits = self.forward(step.chunks, forwarded)
        if not sampled:
            return StepOutput({}, saved)
        tokens = sample(logits, sampled)
        by_id = {c.seq_id: token for c, token in zip(sampled, tokens, strict=True)}
        return StepOutput(by_id, saved)

    @torch.inference_mode()
    def forward(
        self,
        chunks: Sequence[Chunk],
        compiles: list[CompileChunk] | None = None,
        *,
        keep: list[int] | None = None,
    ) -> torch.Tensor:
        """Run chunks and compiles as one flat row.

        Returns the logits [n, vocab] of the last token of each of the n chunks with ``sampling``,
        or of the tokens at the flat positions ``keep``.
        """
        compiles = compiles or []
        rows = _lay_out(chunks, compiles)
        device, block_size = self.base.device, self.cache.block_size
        slots = [slot for r in rows for slot in slots_of(r.block_table, r.start, r.end, block_size)]
        batch = PagedBatch(
            cache=self.cache,
            slots=torch.tensor(slots, device=device),
            groups=group_rows(
                rows,
                block_size=block_size,
                num_kv_heads=self.base.shape.num_kv_heads,
                device=device,
            ),
            context=self.base.context,
        )
        positions = [position for row in rows for position in range(row.start, row.end)]
        if keep is None:
            keep = [
                row.offset + row.length - 1
                for row, chunk in zip(rows, chunks, strict=False)
                if chunk.sampling is not None
            ]
        output = self.base.module(
            inputs_embeds=self._embeddings(chunks, compiles)[None],
            position_ids=torch.tensor([positions], device=device),
            use_cache=False,
            logits_to_keep=torch.tensor(keep, dtype=torch.long, device=device),
            paged_batch=batch,
        )
        self.layers_seen = batch.layers_seen
        # An id without an embedding could be sampled, but not be fed in afterwards.
        logits: torch.Tensor = output.logits[0, :, : self._num_ids]
        return logits

    def _embeddings(self, chunks: Sequence[Chunk], compiles: list[CompileChunk]) -> torch.Tensor:
        """Input embeddings [num_tokens, embedding_width]: looked up, or those of a soft prompt."""
        token_ids: list[int] = [token for chunk in chunks for token in chunk.tokens]
        soft: list[tuple[int, torch.Tensor]] = []
        for part in compiles:
            if isinstance(part.payload, HardPrompt):
                token_ids += part.payload.token_ids[part.start : part.stop]
            else:
                assert isinstance(part.payload, SoftPrompt)
                soft.append((len(token_ids), part.payload.embeddings[part.start : part.stop]))
                token_ids += [0] * (part.stop - part.start)
        looked_up = self._embed(torch.tensor(token_ids, device=self.base.device))
        embeddings: torch.Tensor = looked_up.to(self.base.dtype)
        for offset, values in soft:
            embeddings[offset : offset + len(values)] = values.to(self.base.device)
        return embeddings

    def _read_kv(self, save: Save) -> KVPrefix:
        """The KV of a compiled prefix, in host memory and in the layout of a KV prefix."""
        slots = torch.tensor(
            slots_of(save.block_table, 0, save.num_tokens, self.cache.block_size),
            device=self.base.device,
        )
        return KVPrefix(self.cache.read(slots).cpu())

    def _write_kv(self, part: CompileChunk, payload: KVPrefix) -> None:
        """Copy the trained rows of a KV prefix into its blocks; no forward pass is needed."""
        slots = torch.tensor(
            slots_of(part.block_table, part.start, part.stop, self.cache.block_size),
            device=self.base.device,
        )
        kv = payload.kv[:, part.start : part.stop].to(self.base.device)
        for layer in range(self.base.shape.num_layers):
            self.cache.write(layer, slots, kv[2 * layer], kv[2 * layer + 1])


def _lay_out(chunks: Sequence[Chunk], compiles: list[CompileChunk]) -> list[Row]:
    """Rows of a flat pass, chunks first, then compiles."""
    rows: list[Row] = []
    offset = 0
    for chunk in chunks:
        rows.append(Row(offset, chunk.start, len(chunk.tokens), chunk.block_table))
        offset += len(chunk.tokens)
    for part in compiles:
        rows.append(Row(offset, part.start, part.stop - part.start, part.block_table))
        offset += part.stop - part.start
    return rows


def _is_out_of_memory(error: Exception) -> bool:
    """Only torch's device allocator raises a class of its own; other errors differ by message."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(message in str(error) for message in _OUT_OF_MEMORY)
