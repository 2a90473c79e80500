"""The tensors of a step: filled in host memory with numpy, sent to the device in one copy.

All are int32 sections of one buffer, each at a fixed place for as long as a step fits::

    | query_starts | lengths | shared | members | tiles |
    | tokens | positions | slots | sources | outputs |
    | block table of row 0 | of row 1 | ...

A step is copied up to the block table of its last row. A block table is written where it differs
from that of the same row in the step before: in a steady decode step only where a row got a block.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from prefixd.server.engine.step import NULL_BLOCK
from prefixd.server.model.batch import FlatBatch
from prefixd.server.model.kernels import MIN_SHARED, RaggedRows
from prefixd.server.model.rows import Row

_ALIGNED = 32
"""Entries: sections begin at multiples of 128 bytes, which kernels may assume."""


@dataclass(frozen=True, slots=True)
class StepTensors:
    """A pass of T tokens in R rows on the device, all int32.

    ``tokens``, ``positions`` and ``slots`` [T] are of each flat token; ``outputs`` [n] the flat
    tokens whose logits are wanted. ``sources`` [T] is -1, or the place in ``sampled`` of a token
    that the step before samples. A row of padding has one token, which is written to the scratch
    slot. ``max_queries`` and ``max_length`` bound the tokens of a row and ``rows.lengths``.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    sources: torch.Tensor
    sampled: torch.Tensor
    outputs: torch.Tensor
    rows: RaggedRows
    max_queries: int
    max_length: int

    def token_ids(self) -> torch.Tensor:
        """The tokens [T], with those that the step before samples."""
        pending = self.sampled.index_select(0, self.sources.clamp(min=0))
        return torch.where(self.sources < 0, self.tokens, pending)


@dataclass(frozen=True, slots=True)
class StepSizes:
    """The largest step that is expected: its rows and tokens, and the rows of one that only
    decodes. A larger one is served, at the cost of new buffers."""

    rows: int = 1
    tokens: int = 1
    decoding: int = 1


NO_STEP = StepSizes()
"""Nothing is known of the steps to come."""


class StepBuffers:
    """The buffer in host memory, pinned where the device is CUDA, and the one on the device. On a
    CPU both are the same memory. Larger steps than those so far get larger buffers, elsewhere.

    ``entries_written`` counts block-table entries since the start. The arrays of the names of
    StepTensors and RaggedRows are the host's.
    """

    def __init__(
        self,
        *,
        block_size: int,
        scratch_slot: int,
        device: torch.device,
        tile_rows: int = 1,
        sizes: StepSizes = NO_STEP,
        max_blocks: int = 1,
    ) -> None:
        """``tile_rows`` rows may read a shared prefix together; a block table is expected to have
        at most ``max_blocks``."""
        self.block_size = block_size
        self.entries_written = 0
        self._scratch_slot, self._tile_rows, self._device = scratch_slot, tile_rows, device
        self._copied: torch.cuda.Event | None = None
        self._num_rows = self._num_tokens = self._num_outputs = self._num_tiles = 0
        self.max_queries = self.max_length = 1
        self._sampled = torch.zeros(0, dtype=torch.int32, device=device)
        self._allocate(sizes.rows, sizes.tokens, max_blocks)

    def _allocate(self, max_rows: int, max_tokens: int, max_blocks: int) -> None:
        self._sizes = (max_rows, max_tokens, max_blocks)
        sections = {
            "query_starts": max_rows + 1,
            "lengths": max_rows,
            "shared": max_rows,
            "members": max_rows,
            "tiles": 2 * max_rows,
            "tokens": max_tokens,
            "positions": max_tokens,
            "slots": max_tokens,
            "sources": max_tokens,
            "outputs": max_tokens,
        }
        places, end = {}, 0
        for name, size in sections.items():
            places[name] = slice(end, end + size)
            end += -(-size // _ALIGNED) * _ALIGNED
        width = -(-max_blocks // _ALIGNED) * _ALIGNED
        self._tables_at, self._width = end, width
        is_cuda = self._device.type == "cuda"
        self._host = torch.zeros(end + max_rows * width, dtype=torch.int32, pin_memory=is_cuda)
        self._twin = self._host.to(self._device, copy=is_cuda)
        host = self._host.numpy()
        self.tokens, self.positions, self.slots, self.sources, self.outputs = (
            host[places[name]] for name in ("tokens", "positions", "slots", "sources", "outputs")
        )
        self.query_starts, self.lengths, self.shared, self.members = (
            host[places[name]] for name in ("query_starts", "lengths", "shared", "members")
        )
        self.tiles = host[places["tiles"]].reshape(-1, 2)
        self.block_table = host[end:].reshape(max_rows, width)
        self._on_device = {name: self._twin[place] for name, place in places.items()}
        self._table_on_device = self._twin[end:].view(max_rows, width)
        self._held: list[tuple[int, ...]] = []
        sampled, self._sampled = self._sampled, self._twin.new_zeros(max_tokens)
        self._sampled[: len(sampled)] = sampled

    @property
    def memory(self) -> torch.Tensor:
        """The device's buffer: another one after a step that did not fit."""
        return self._twin

    def fill(self, batch: FlatBatch, *, num_rows: int | None = None) -> None:
        """Write a pass to host memory. ``num_rows`` pads one of a token a row with rows of length
        0."""
        rows = batch.rows
        padding = 0 if num_rows is None else num_rows - len(rows)
        num_tokens = len(batch.token_ids)
        self._wait()
        self._reserve(
            len(rows) + padding,
            max(num_tokens + padding, len(batch.outputs) + padding),
            max((len(row.block_table) for row in rows), default=0),
        )
        self._num_rows, self._num_tokens = len(rows), num_tokens
        self._num_outputs = len(batch.outputs)
        self._write_tables(rows)
        count = len(rows)
        counts = np.array([row.length for row in rows], dtype=np.int32)
        starts = np.array([row.start for row in rows], dtype=np.int32)
        self.max_queries = int(counts.max(initial=1))
        np.cumsum(counts, out=self.query_starts[1 : count + 1])
        np.add(starts, counts, out=self.lengths[:count])
        self.max_length = int(self.lengths[:count].max(initial=1))
        self.tokens[:num_tokens] = batch.token_ids
        self.outputs[: len(batch.outputs)] = batch.outputs
        self.sources[: num_tokens + padding] = -1
        for place, source in batch.pending:
            self.sources[place] = source
        row_of = np.repeat(np.arange(count), counts)
        positions = np.arange(num_tokens, dtype=np.int32)
        positions += (starts - self.query_starts[:count])[row_of]
        self.positions[:num_tokens] = positions
        block, offset = np.divmod(positions, self.block_size)
        self.slots[:num_tokens] = self.block_table[row_of, block] * self.block_size + offset
        self._share(rows)
        if num_rows is not None:
            self._pad(padding)

    def _pad(self, padding: int) -> None:
        """Add rows of padding, and as many tiles as there are rows: a graph reads all of them."""
        rows, tokens, outputs = self._num_rows, self._num_tokens, self._num_outputs
        self.query_starts[rows + 1 : rows + padding + 1] = range(tokens + 1, tokens + padding + 1)
        self.lengths[rows : rows + padding] = 0
        self.shared[rows : rows + padding] = 0
        self.tiles[self._num_tiles : rows + padding] = 0
        self.tokens[tokens : tokens + padding] = 0
        self.positions[tokens : tokens + padding] = 0
        self.slots[tokens : tokens + padding] = self._scratch_slot
        self.outputs[outputs : outputs + padding] = range(tokens, tokens + padding)
        self._num_rows, self._num_tokens = rows + padding, tokens + padding
        self._num_outputs, self._num_tiles = outputs + padding, rows + padding

    def _write_tables(self, rows: Sequence[Row]) -> None:
        held = self._held
        held += [()] * (len(rows) - len(held))
        for index, row in enumerate(rows):
            table, before = tuple(row.block_table), held[index]
            if table == before:
                continue
            kept = len(before) if table[: len(before)] == before else 0
            self.block_table[index, kept : len(table)] = table[kept:]
            self.block_table[index, len(table) : len(before)] = NULL_BLOCK
            self.entries_written += len(table) - kept
            held[index] = table

    def _share(self, rows: Sequence[Row]) -> None:
        """Find the rows under the same long prefix: their first blocks are the same."""
        prefixes = np.array([row.num_prefix_tokens for row in rows], dtype=np.int32)
        shared = prefixes - prefixes % self.block_size
        shared[shared < MIN_SHARED] = 0
        self.shared[: len(rows)] = shared
        by_prefix: dict[tuple[int, int], list[int]] = {}
        for index in shared.nonzero()[0].tolist():
            key = (rows[index].block_table[0], int(shared[index]))
            by_prefix.setdefault(key, []).append(index)
        first, num_tiles = 0, 0
        for members in by_prefix.values():
            self.members[first : first + len(members)] = members
            for start in range(0, len(members), self._tile_rows):
                size = min(self._tile_rows, len(members) - start)
                self.tiles[num_tiles] = first + start, size
                num_tiles += 1
            first += len(members)
        self._num_tiles = num_tiles

    def send(self) -> None:
        """Copy what was filled to the device, without waiting for it."""
        if self._twin is self._host:
            return
        end = self._tables_at + self._num_rows * self._width
        self._twin[:end].copy_(self._host[:end], non_blocking=True)
        self._copied = self._copied or torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._copied.record()

    def tensors(self, *, max_length: int | None = None) -> StepTensors:
        """What was filled, on the device. ``max_length`` replaces the bound of ``lengths`` by a
        larger one."""
        rows, tokens = self._num_rows, self._num_tokens
        at = self._on_device
        return StepTensors(
            tokens=at["tokens"][:tokens],
            positions=at["positions"][:tokens],
            slots=at["slots"][:tokens],
            sources=at["sources"][:tokens],
            sampled=self._sampled,
            outputs=at["outputs"][: self._num_outputs],
            rows=RaggedRows(
                query_starts=at["query_starts"][: rows + 1],
                lengths=at["lengths"][:rows],
                block_table=self._table_on_device[:rows],
                shared=at["shared"][:rows],
                members=at["members"][:rows],
                tiles=at["tiles"].view(-1, 2)[: self._num_tiles],
            ),
            max_queries=self.max_queries,
            max_length=max_length or self.max_length,
        )

    def keep_samples(self, tokens: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        """Keep ``tokens`` [n] that this step samples, for the pending tokens of the next: those of
        its outputs ``rows`` [n], or of the first n."""
        if rows is None:
            self._sampled[: len(tokens)] = tokens
        else:
            self._sampled.index_copy_(0, rows, tokens)

    def _wait(self) -> None:
        """The last copy reads host memory until it has ended."""
        if self._copied is not None:
            self._copied.synchronize()

    def _reserve(self, *sizes: int) -> None:
        if any(size > held for size, held in zip(sizes, self._sizes, strict=True)):
            doubled = (
                held if size <= held else max(size, 2 * held)
                for size, held in zip(sizes, self._sizes, strict=True)
            )
            self._allocate(*doubled)
