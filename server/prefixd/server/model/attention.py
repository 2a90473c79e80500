"""Attention over the block tables of a ragged batch, through transformers' attention interface.

A step runs as one flat row of tokens, [1, num_tokens]. Each layer writes the new keys and values to
the pool, then every sequence attends over its own block table. Sequences of similar size form a
group, so that one long prefix does not pad all others.

::

    flat tokens   | a a a | b | c | d d |      groups   {a, d}: prefill, queries padded to 4
                                                        {b, c}: decode, one query each

The heads that share a KV head are folded into query rows: on CPU this is four times as fast as
``scaled_dot_product_attention(enable_gqa=True)``.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from prefixd.server.model.kv_cache import KVCache

IMPLEMENTATION = "prefixd"
"""The name of this attention in transformers' attention interface."""


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences attended together: R of them, Q queries each (padded), T positions (padded).

    ``queries`` [R * Q] indexes the flat tokens; ``kv_rows`` [R * num_kv_heads * T] indexes the
    pool by (slot, KV head); ``mask`` [R, 1, Q, T] is True where a query sees a position (None:
    every query sees all); ``real`` [n] indexes the unpadded of the R * Q queries (None: no padding)
    and ``targets`` [n] are their positions in the flat tokens.
    """

    size: int
    num_queries: int
    queries: torch.Tensor
    kv_rows: torch.Tensor
    mask: torch.Tensor | None
    real: torch.Tensor | None
    targets: torch.Tensor


@dataclass(slots=True)
class PagedBatch:
    """A step as attention needs it, the same for all layers. ``slots`` [num_tokens] is where each
    token's KV is written; ``context`` is the most positions a sequence may have. ``layers_seen``
    counts the layers that ran, for the self-check."""

    cache: KVCache
    slots: torch.Tensor
    groups: tuple[Group, ...]
    context: int
    layers_seen: int = 0


_IGNORED = frozenset(
    {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "is_causal"}
)

_WINDOWS = frozenset({"sliding_window"})
"""Options that are the length of a window, counted with the query's own position."""


def paged_attention(  # noqa: PLR0917  # the order of arguments is given by transformers
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    paged_batch: PagedBatch | None = None,
    **extra: Any,
) -> tuple[torch.Tensor, None]:
    """Attend the flat batch. ``query`` is [1, num_heads, num_tokens, head_dim], ``key`` and
    ``value`` [1, num_kv_heads, num_tokens, head_dim]; returns [1, num_tokens, num_heads, head_dim].

    Raises NotImplementedError for options that plain attention does not support (a window, a soft
    cap, sinks) and for heads that the KV pool cannot hold: ignoring one would silently give wrong
    output. An option that is None or False is off.
    """
    del attention_mask, dropout
    if paged_batch is None:
        raise NotImplementedError(
            f"{type(module).__name__} drops the keyword arguments that the model was called with, "
            "and with them the KV blocks; expected them to reach attention"
        )
    _refuse_options(module, extra, paged_batch.context)
    cache = paged_batch.cache
    _refuse_heads(module, key, value, cache)
    _, num_heads, num_tokens, head_dim = query.shape
    num_kv_heads = key.shape[1]
    layer = module.layer_idx
    paged_batch.layers_seen += 1
    cache.write(
        layer,
        paged_batch.slots,
        key[0].transpose(0, 1).reshape(num_tokens, -1),
        value[0].transpose(0, 1).reshape(num_tokens, -1),
    )
    scale = head_dim**-0.5 if scaling is None else scaling
    # [num_tokens, num_kv_heads, heads per KV head, head_dim]
    flat = query[0].transpose(0, 1).reshape(num_tokens, num_kv_heads, -1, head_dim)
    out = torch.empty_like(flat)
    pools = cache.by_head(layer)
    for group in paged_batch.groups:
        attend(group, flat, pools, out, scale)
    return out.view(1, num_tokens, num_heads, head_dim), None


def _refuse_options(module: Any, options: dict[str, Any], context: int) -> None:
    unsupported = sorted(
        name
        for name, value in options.items()
        if value is not None
        and value is not False
        and name not in _IGNORED
        and not (name in _WINDOWS and isinstance(value, int) and value >= context)
    )
    if unsupported:
        raise NotImplementedError(
            f"{type(module).__name__} needs unsupported attention options: {', '.join(unsupported)}"
        )
    if getattr(module, "is_causal", True) is False:
        raise NotImplementedError(
            f"{type(module).__name__} lets tokens see later ones; expected causal attention"
        )


def _refuse_heads(module: Any, key: torch.Tensor, value: torch.Tensor, cache: KVCache) -> None:
    heads, width = cache.shape.num_kv_heads, cache.shape.head_dim
    for what, states in (("keys", key), ("values", value)):
        if states.shape[1] != heads or states.shape[3] != width:
            raise NotImplementedError(
                f"{type(module).__name__} has {what} of {states.shape[1]} heads of size "
                f"{states.shape[3]}; expected the config's {heads} KV heads of size {width} for "
                "both keys and values"
            )


def attend(
    group: Group,
    flat: torch.Tensor,
    pools: tuple[torch.Tensor, torch.Tensor],
    out: torch.Tensor,
    scale: float,
) -> None:
    """Attend one group: queries ``flat`` [num_tokens, num_kv_heads, heads per KV head, head_dim]
    over keys and values [slots * num_kv_heads, head_dim], into ``out`` of the shape of ``flat``."""
    _, num_kv_heads, fold, head_dim = flat.shape
    rows, queries = group.size, group.num_queries
    # [R, num_kv_heads, fold * Q, head_dim]: the heads that share a KV head become adjacent rows
    query = flat.index_select(0, group.queries).view(rows, queries, num_kv_heads, fold, head_dim)
    query = query.permute(0, 2, 3, 1, 4).reshape(rows, num_kv_heads, fold * queries, head_dim)
    # [R, num_kv_heads, T, head_dim]
    key, value = (
        pool.index_select(0, group.kv_rows).view(rows, num_kv_heads, -1, head_dim) for pool in pools
    )
    mask = group.mask
    if queries == 1:
        scores = torch.matmul(query * scale, key.transpose(2, 3)).float()
        if mask is not None:
            scores.masked_fill_(~mask, float("-inf"))
        attended = torch.matmul(scores.softmax(-1).to(value.dtype), value)
    else:
        if mask is not None:
            mask = mask.repeat(1, 1, fold, 1)
        attended = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    attended = attended.view(rows, num_kv_heads, fold, queries, head_dim).permute(0, 3, 1, 2, 4)
    attended = attended.reshape(rows * queries, num_kv_heads, fold, head_dim)
    if group.real is not None:
        attended = attended.index_select(0, group.real)
    out.index_copy_(0, group.targets, attended)


AttentionInterface.register(IMPLEMENTATION, paged_attention)
