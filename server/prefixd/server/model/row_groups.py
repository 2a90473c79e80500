"""The rows of a step in groups of similar size, and the positions that each group gathers.

One long prefix does not pad all others::

    flat tokens   | a a a | b | c | d d |      groups   {a, d}: prefill, queries padded to 4
                                                        {b, c}: decode, one query each

With a window or a chunk only the positions that some query of the row sees are gathered.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from prefixd.server.engine.step import NULL_BLOCK
from prefixd.server.model.buffers import StepBuffers
from prefixd.server.model.rows import Row


@dataclass(frozen=True, slots=True)
class Visibility:
    """Which positions a query sees besides that none is later than its own: see LayerAttention."""

    window: int | None = None
    chunk: int | None = None

    def first(self, positions: np.ndarray) -> np.ndarray:
        """The first position that queries at ``positions`` see."""
        first = np.zeros_like(positions)
        if self.window is not None:
            np.maximum(first, positions + 1 - self.window, out=first)
        if self.chunk is not None:
            np.maximum(first, positions // self.chunk * self.chunk, out=first)
        return first


ALL = Visibility()


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences attended together: R of them, Q queries each (padded), T positions (padded).

    ``queries`` [R * Q] indexes the flat tokens; ``kv_rows`` [R * num_kv_heads * T] indexes keys and
    values by position and KV head; ``mask`` [R, 1, Q, T] is True where a query sees a position
    (None: every query sees all); ``real`` [n] indexes the unpadded of the R * Q queries (None: no
    padding) and ``targets`` [n] are their positions in the flat tokens; ``places`` [R, T] are the
    positions in the sequence, where scores depend on them; padding has the row's last one.
    """

    size: int
    num_queries: int
    queries: torch.Tensor
    kv_rows: torch.Tensor
    mask: torch.Tensor | None
    real: torch.Tensor | None
    targets: torch.Tensor
    places: torch.Tensor | None = None


def group_rows(
    rows: Sequence[Row],
    buffers: StepBuffers,
    *,
    num_kv_heads: int,
    device: torch.device,
    visibility: Visibility = ALL,
    expanded: bool = False,
    with_places: bool = False,
) -> tuple[Group, ...]:
    """Group rows of similar size, so that padding at most doubles the work. ``expanded``: keys and
    values are of the rows alone, one row after another, and not those of the pool."""
    starts = np.array([row.start for row in rows], dtype=np.int32)
    layout = _Layout(
        buffers,
        firsts=visibility.first(starts),
        row_starts=_row_starts(rows) if expanded else None,
        num_kv_heads=num_kv_heads,
        device=device,
        visibility=visibility,
        with_places=with_places,
    )
    by_size: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, (row, first) in enumerate(zip(rows, layout.firsts.tolist(), strict=True)):
        by_size[row.length.bit_length(), (row.end - first).bit_length()].append(index)
    return tuple(layout.group(np.array(members)) for members in by_size.values())


def slots_of(rows: Sequence[Row], buffers: StepBuffers) -> np.ndarray:
    """The slots of all positions of all rows, one row after another."""
    size = buffers.block_size
    parts = []
    for index, row in enumerate(rows):
        positions = np.arange(row.end)
        blocks = buffers.block_table[index, positions // size].astype(np.int64)
        parts.append(blocks * size + positions % size)
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


def _row_starts(rows: Sequence[Row]) -> np.ndarray:
    """Where each row's positions begin, one row after another, and their sum [R + 1]."""
    return np.concatenate([[0], np.cumsum([row.end for row in rows])])


@dataclass(frozen=True, slots=True)
class _Layout:
    """What all groups of a step have in common. ``firsts`` [R] are the first positions that any
    query of a row sees; ``row_starts`` as of _row_starts, None for the pool."""

    buffers: StepBuffers
    firsts: np.ndarray
    row_starts: np.ndarray | None
    num_kv_heads: int
    device: torch.device
    visibility: Visibility
    with_places: bool

    def group(self, members: np.ndarray) -> Group:
        buffers, device = self.buffers, self.device
        offsets, ends = buffers.query_starts[members], buffers.lengths[members]
        lengths = buffers.query_starts[members + 1] - offsets
        firsts = self.firsts[members]
        num_queries, num_positions = int(lengths.max()), int((ends - firsts).max())
        places = firsts[:, None] + np.arange(num_positions, dtype=np.int32)  # [R, T]
        heads = np.arange(self.num_kv_heads, dtype=np.int32)[:, None]
        if self.row_starts is None:
            slots = self._slots(members, places, ends)
            kv_rows = slots[:, None] * self.num_kv_heads + heads  # [R, num_kv_heads, T]
        else:
            # Padding repeats the row's last position: NaN of another row would spread.
            own = self.row_starts[members, None] + np.minimum(places, ends[:, None] - 1)
            kv_rows = own[:, None] + heads * self.row_starts[-1]
        query = np.arange(num_queries)
        is_real = query < lengths[:, None]  # [R, Q]
        queries = (offsets[:, None] + np.where(is_real, query, 0)).reshape(-1)
        (real,) = is_real.reshape(-1).nonzero()
        return Group(
            size=len(members),
            num_queries=num_queries,
            queries=_on(device, queries),
            kv_rows=_on(device, kv_rows.reshape(-1)),
            mask=self._visible(places, ends - lengths, ends, num_queries),
            places=_on(device, np.minimum(places, ends[:, None] - 1)) if self.with_places else None,
            real=_on(device, real) if len(real) < is_real.size else None,
            targets=_on(device, queries[real]),
        )

    def _slots(self, members: np.ndarray, places: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Slots of the pool [R, T]: those of the null block, which is zero, after a row's end."""
        size = self.buffers.block_size
        if not self.firsts[members].any():
            blocks = self.buffers.block_table[members, : -(-places.shape[1] // size)]
            slots = blocks[:, :, None] * size + np.arange(size, dtype=np.int32)
            slots = slots.reshape(len(members), -1)[:, : places.shape[1]]
        else:
            within = np.minimum(places, ends[:, None] - 1)
            block, offset = np.divmod(within, size)
            slots = self.buffers.block_table[members[:, None], block] * size + offset
        slots[places >= ends[:, None]] = NULL_BLOCK * size
        return slots

    def _visible(
        self, places: np.ndarray, starts: np.ndarray, ends: np.ndarray, num_queries: int
    ) -> torch.Tensor | None:
        """The mask [R, 1, Q, T]: True where a query sees a position, its own and earlier ones.

        A padding query sees what the last real query of its row sees; its output is dropped.
        """
        num_positions = places.shape[1]
        if num_queries == 1 and int((ends - places[:, 0]).min()) == num_positions:
            return None
        own = np.minimum(starts[:, None] + np.arange(num_queries), ends[:, None] - 1)  # [R, Q]
        sees = places[:, None, :] <= own[:, :, None]
        if self.visibility != ALL:
            sees &= places[:, None, :] >= self.visibility.first(own)[:, :, None]
        return _on(self.device, sees[:, None])


def _on(device: torch.device, array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array).to(device)
