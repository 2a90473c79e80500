"""Attention of unmodified models over the block tables of a step, through transformers' interface.

A step runs as one flat row of tokens, [1, num_tokens]. Each layer writes the new keys and values to
the pool, then every sequence attends over its own block table.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import AttentionInterface

from prefixd.server.model.architecture import Shape

IMPLEMENTATION = "prefixd"
"""The name of this attention in transformers' attention interface."""


class StepAttention(Protocol):
    """Attention of one step over the KV pool."""

    def run(
        self,
        layer: int,
        queries: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Write keys and values [num_tokens, num_kv_heads, head_dim] to the pool and attend with
        ``queries`` [num_tokens, num_heads, head_dim]; returns the shape of ``queries``."""
        ...


@dataclass(slots=True)
class PagedBatch:
    """A step as attention needs it, the same for all layers. ``context`` is the most positions a
    sequence may have. ``layers_seen`` counts the layers that ran, for the self-check."""

    attention: StepAttention
    shape: Shape
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
    _refuse_heads(module, key, value, paged_batch.shape)
    paged_batch.layers_seen += 1
    out = paged_batch.attention.run(
        module.layer_idx,
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        query.shape[3] ** -0.5 if scaling is None else scaling,
    )
    return out[None], None


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


def _refuse_heads(module: Any, key: torch.Tensor, value: torch.Tensor, shape: Shape) -> None:
    heads, width = shape.num_kv_heads, shape.head_dim
    for what, states in (("keys", key), ("values", value)):
        if states.shape[1] != heads or states.shape[3] != width:
            raise NotImplementedError(
                f"{type(module).__name__} has {what} of {states.shape[1]} heads of size "
                f"{states.shape[3]}; expected the config's {heads} KV heads of size {width} for "
                "both keys and values"
            )


AttentionInterface.register(IMPLEMENTATION, paged_attention)
