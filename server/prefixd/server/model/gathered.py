"""Attention in torch over gathered KV: the rows of a step in groups of similar size.

One long prefix does not pad all others::

    flat tokens   | a a a | b | c | d d |      groups   {a, d}: prefill, queries padded to 4
                                                        {b, c}: decode, one query each

Layers that see the same positions share their groups; with a window or a chunk only the positions
that some query of the row sees are gathered. The heads that share a KV head are folded into query
rows: on CPU this is four times as fast as ``scaled_dot_product_attention(enable_gqa=True)``.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from prefixd.server.engine.step import NULL_BLOCK
from prefixd.server.model.attention import Options
from prefixd.server.model.buffers import StepBuffers
from prefixd.server.model.kv_cache import KVCache
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


class GatheredAttention:
    """Attention of one step, whose KV is gathered for each layer, on any device."""

    def __init__(self, cache: KVCache, buffers: StepBuffers, rows: Sequence[Row]) -> None:
        """``buffers`` holds the step of ``rows``."""
        self._cache, self._buffers, self._rows = cache, buffers, rows
        num_tokens = int(buffers.query_starts[len(rows)])
        self._slots = _on(cache.device, buffers.slots[:num_tokens].astype(np.int64))
        self._groups: dict[tuple[Visibility, int, bool, bool], tuple[Group, ...]] = {}
        self._all_slots: torch.Tensor | None = None

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write keys and values [num_tokens, heads, width] of a layer to the pool."""
        self._cache.write(layer, self._slots, keys.flatten(1), values.flatten(1))

    def attend(self, layer: int, queries: torch.Tensor, options: Options) -> torch.Tensor:
        """Attend with ``queries`` [num_tokens, num_heads, key width] over what ``layer`` cached.
        Returns [num_tokens, num_heads, value width]."""
        heads = self._cache.layers.caches[layer].num_heads
        pools = self._cache.by_head(layer)
        return self._attended(self._grouped(options, heads), queries, pools, heads, options)

    def cached(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All that ``layer`` cached for the rows of the step, one row after another: keys and
        values [1, heads, sum of the rows' positions, width]."""
        if self._all_slots is None:
            self._all_slots = _on(self._cache.device, _slots_of(self._rows, self._buffers))
        heads = self._cache.layers.caches[layer].num_heads
        keys, values = (
            plane.index_select(0, self._all_slots).view(len(self._all_slots), heads, -1)
            for plane in self._cache.rows(layer)
        )
        return keys.transpose(0, 1)[None], values.transpose(0, 1)[None]

    def attend_expanded(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, options: Options
    ) -> torch.Tensor:
        """As ``attend``, over keys and values [heads, sum of the rows' positions, width]."""
        heads = len(keys)
        states = keys.reshape(-1, keys.shape[2]), values.reshape(-1, values.shape[2])
        groups = self._grouped(options, heads, expanded=True)
        return self._attended(groups, queries, states, heads, options)

    def _grouped(
        self, options: Options, num_kv_heads: int, *, expanded: bool = False
    ) -> tuple[Group, ...]:
        longest = self._buffers.max_length
        seen = Visibility(_effective(options.window, longest), _effective(options.chunk, longest))
        key = (seen, num_kv_heads, expanded, options.alibi is not None)
        if key not in self._groups:
            self._groups[key] = group_rows(
                self._rows,
                self._buffers,
                num_kv_heads=num_kv_heads,
                device=self._cache.device,
                visibility=seen,
                expanded=expanded,
                with_places=options.alibi is not None,
            )
        return self._groups[key]

    @staticmethod
    def _attended(
        groups: Sequence[Group],
        queries: torch.Tensor,
        states: tuple[torch.Tensor, torch.Tensor],
        num_kv_heads: int,
        options: Options,
    ) -> torch.Tensor:
        # [num_tokens, num_kv_heads, heads per KV head, width]
        flat = queries.reshape(len(queries), num_kv_heads, -1, queries.shape[2])
        out = flat.new_empty(*flat.shape[:3], states[1].shape[1])
        for group in groups:
            out.index_copy_(0, group.targets, attended_by(group, flat, states, options))
        return out.view(len(queries), -1, out.shape[3])


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


def _effective(length: int | None, longest: int) -> int | None:
    """A window or chunk that hides positions from some query of a step."""
    return None if length is None or length >= longest else length


def _row_starts(rows: Sequence[Row]) -> np.ndarray:
    """Where each row's positions begin, one row after another, and their sum [R + 1]."""
    return np.concatenate([[0], np.cumsum([row.end for row in rows])])


def _slots_of(rows: Sequence[Row], buffers: StepBuffers) -> np.ndarray:
    """The slots of all positions of all rows, one row after another."""
    size = buffers.block_size
    parts = []
    for index, row in enumerate(rows):
        positions = np.arange(row.end)
        blocks = buffers.block_table[index, positions // size].astype(np.int64)
        parts.append(blocks * size + positions % size)
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)


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


def attended_by(
    group: Group,
    flat: torch.Tensor,
    states: tuple[torch.Tensor, torch.Tensor],
    options: Options,
) -> torch.Tensor:
    """Attend one group: queries ``flat`` [num_tokens, num_kv_heads, heads per KV head, key width]
    over keys and values [positions * num_kv_heads, width]. Returns [targets, num_kv_heads, heads
    per KV head, value width]."""
    _, num_kv_heads, fold, head_dim = flat.shape
    rows, queries = group.size, group.num_queries
    # [R, num_kv_heads, fold * Q, key width]: heads that share a KV head become adjacent rows
    query = flat.index_select(0, group.queries).view(rows, queries, num_kv_heads, fold, head_dim)
    query = query.permute(0, 2, 3, 1, 4).reshape(rows, num_kv_heads, fold * queries, head_dim)
    # [R, num_kv_heads, T, width]
    key, value = (
        state.index_select(0, group.kv_rows).view(rows, num_kv_heads, -1, state.shape[1])
        for state in states
    )
    mask, scale = group.mask, options.scale
    if mask is not None and queries > 1:
        mask = mask.repeat(1, 1, fold, 1)
    if queries == 1 or options.changes_scores:
        scores = torch.matmul(query * scale, key.transpose(2, 3)).float()
        attended = torch.matmul(_weights(scores, mask, group, options).to(value.dtype), value)
    else:
        attended = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    attended = attended.view(rows, num_kv_heads, fold, queries, -1).permute(0, 3, 1, 2, 4)
    attended = attended.reshape(rows * queries, num_kv_heads, fold, -1)
    if group.real is not None:
        attended = attended.index_select(0, group.real)
    return attended


def _weights(
    scores: torch.Tensor, mask: torch.Tensor | None, group: Group, options: Options
) -> torch.Tensor:
    """Weights of the positions from scores [R, num_kv_heads, fold * Q, T], both float32."""
    rows, kv_heads, queries, _ = scores.shape

    def of_heads(values: torch.Tensor) -> torch.Tensor:  # [num_heads] -> [1, kv heads, fold * Q, 1]
        folded = values.float().view(1, kv_heads, -1, 1)
        return folded.repeat_interleave(group.num_queries, 2)

    if options.softcap is not None:
        scores = (scores / options.softcap).tanh_().mul_(options.softcap)
    if options.alibi is not None:
        assert group.places is not None
        bias = _bias(options.alibi, group.places)  # [num_heads, R, T]
        bias = bias.view(kv_heads, -1, *group.places.shape).permute(2, 0, 1, 3)
        scores = scores + bias.repeat_interleave(group.num_queries, 2)
    if mask is not None:
        scores = scores.masked_fill_(~mask, float("-inf"))
    if options.sinks is None:
        return scores.softmax(-1)
    sinks = of_heads(options.sinks).expand(rows, kv_heads, queries, 1)
    return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]


def _bias(alibi: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """What is added to scores of positions ``places`` [R, T]: [num_heads, R, T]."""
    if alibi.dim() > 1:
        return alibi.float()[:, places]
    # Counted from the row's last position, which changes no weight: far from 0 a product rounds.
    return alibi.float()[:, None, None] * (places - places[:, -1:])
