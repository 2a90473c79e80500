"""Gated prefixes (adaption prompts, LLaMA-Adapter): compiled to rows of keys and values, and added
to attention.

As PEFT's AdaptedAttention: in the last layers, a query q (after its rotation) attends to the rows
of its prefix with a softmax of their own, and the result is added before the output projection::

    attention(q) + softmax(q K^T / sqrt(head_dim)) V     K = k_proj(prompt), not rotated
                                                         V = gate * v_proj(prompt)

GPT-2's is added after the output projection: PEFT does not project it.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
import torch

from prefixd.server.engine.step import NULL_BLOCK
from prefixd.server.model.attention import Options, StepAttention, current_pass
from prefixd.server.model.gathered import attended_by
from prefixd.server.model.kv_cache import KVCache
from prefixd.server.model.prefix import AdaptionPrompt
from prefixd.server.model.row_groups import Group
from prefixd.server.model.rows import Row
from prefixd.server.model.transfer import on_device

Project = Callable[[int, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Keys and values [n, num_kv_heads * head_dim] that the products of a layer make of inputs
[n, width]."""


def gated_kv(
    prompt: AdaptionPrompt, start: int, stop: int, *, num_layers: int, project: Project
) -> torch.Tensor:
    """KV [2 * num_layers, stop - start, num_kv_heads * head_dim] of some rows of an adaption
    prompt, in its dtype; zeros in the layers below it."""
    first = prompt.gated_from
    projected = []
    for index, gate in enumerate(prompt.gates.tolist()):
        keys, values = project(first + index, prompt.prompts[index, start:stop])
        projected += [keys, values.float() * gate]
    dtype, device = prompt.prompts.dtype, projected[0].device
    kv = torch.zeros(
        2 * num_layers, stop - start, projected[0].shape[1], dtype=dtype, device=device
    )
    kv[2 * first :] = torch.stack([part.to(dtype) for part in projected])
    return kv


class GatedAttention:
    """What gated prefixes add in one pass, for the rows that have one."""

    def __init__(self, cache: KVCache, rows: Sequence[Row], *, scale: float) -> None:
        """Some of ``rows`` are under a gated prefix."""
        self._cache = cache
        self._options = Options(scale)
        gated = [row for row in rows if row.gated is not None]
        self._first_layer = min(row.gated.first_layer for row in gated if row.gated is not None)
        by_size: dict[int, list[Row]] = defaultdict(list)
        for row in gated:
            by_size[row.length.bit_length()].append(row)
        self._groups = [self._group(members) for members in by_size.values()]

    def add(self, layer: int, queries: torch.Tensor, out: torch.Tensor) -> None:
        """Add what ``queries`` [num_tokens, num_heads, head_dim] (rotated) attend to, to ``out`` of
        that shape."""
        if layer < self._first_layer:
            return
        heads = self._cache.layers.caches[layer].num_heads
        flat = queries.reshape(len(queries), heads, -1, queries.shape[2])
        target = out.view(flat.shape)
        states = self._cache.by_head(layer)
        for group in self._groups:
            added = attended_by(group, flat, states, self._options)
            target.index_add_(0, group.targets, added.to(target.dtype))

    def _group(self, rows: Sequence[Row]) -> Group:
        """Rows that are attended together, with the rows of their prefixes as positions."""
        size, device = self._cache.block_size, self._cache.device
        num_kv_heads = next(iter(self._cache.layers.caches.values())).num_heads
        lengths = np.array([row.length for row in rows])
        counts = np.array([row.gated.num_tokens for row in rows if row.gated is not None])
        slots = np.full((len(rows), int(counts.max())), NULL_BLOCK * size)
        for index, row in enumerate(rows):
            assert row.gated is not None
            places = np.arange(row.gated.num_tokens)
            blocks = np.asarray(row.gated.block_table)[places // size]
            slots[index, : len(places)] = blocks * size + places % size
        kv_rows = slots[:, None] * num_kv_heads + np.arange(num_kv_heads)[:, None]
        query = np.arange(int(lengths.max()))
        is_real = query < lengths[:, None]  # [R, Q]
        offsets = np.array([row.offset for row in rows])
        queries = (offsets[:, None] + np.where(is_real, query, 0)).reshape(-1)
        (real,) = is_real.reshape(-1).nonzero()
        mask = None
        if int(counts.min()) < slots.shape[1]:
            positions = torch.arange(slots.shape[1], device=device)
            mask = (positions < on_device(counts, device)[:, None])[:, None, None]
            mask = mask.expand(-1, 1, len(query), -1)
        return Group(
            size=len(rows),
            num_queries=len(query),
            queries=on_device(queries, device),
            kv_rows=on_device(kv_rows.reshape(-1), device),
            mask=mask,
            real=on_device(real, device) if len(real) < is_real.size else None,
            targets=on_device(queries[real], device),
        )


class WithGated:
    """A StepAttention, with what gated prefixes add in each layer: in the result of attention, or
    ``after`` the output projection, which asks for it with ``take``."""

    def __init__(self, inner: StepAttention, gated: GatedAttention, *, after: bool) -> None:
        self._inner, self._gated, self._after = inner, gated, after
        self._added: dict[int, torch.Tensor] = {}

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """As of a StepAttention."""
        self._inner.write(layer, keys, values)

    def attend(self, layer: int, queries: torch.Tensor, options: Options) -> torch.Tensor:
        """As of a StepAttention."""
        out = self._inner.attend(layer, queries, options)
        target = torch.zeros_like(out) if self._after else out
        self._gated.add(layer, queries, target)
        if self._after:
            self._added[layer] = target.flatten(1)
        return out

    def cached(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """As of a StepAttention."""
        return self._inner.cached(layer)

    def attend_expanded(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, options: Options
    ) -> torch.Tensor:
        """As of a StepAttention."""
        return self._inner.attend_expanded(queries, keys, values, options)

    def take(self, layer: int) -> torch.Tensor | None:
        """What is added after the output projection of ``layer``, [num_tokens, width]."""
        return self._added.pop(layer, None)


def take_added(layer: int) -> torch.Tensor | None:
    """What the pass of this thread adds after the output projection of ``layer``."""
    try:
        attention = getattr(current_pass(), "attention", None)
    except LookupError:
        return None
    return attention.take(layer) if isinstance(attention, WithGated) else None
