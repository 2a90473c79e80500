"""Attention of transformers' modules over the block tables of a step.

A step runs as one flat row of tokens, [1, num_tokens]. A layer gives its new keys and values to the
cache of the pass, which writes them to the pool; then every sequence attends over its own block
table. The pass is found by a context variable: some models do not pass on the keyword arguments
that they were called with.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import AttentionInterface

from prefixd.server.model.layers import Layers
from prefixd.server.model.rows import Row

IMPLEMENTATION = "prefixd"
"""The name of this attention in transformers' attention interface."""


@dataclass(frozen=True, slots=True)
class Options:
    """What one call of attention computes, as of LayerAttention. ``sinks`` is [num_heads], and
    ``alibi`` too, or [num_heads, positions]."""

    scale: float
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    alibi: torch.Tensor | None = None

    @property
    def changes_scores(self) -> bool:
        """Whether scores are more than scaled products."""
        return not (self.softcap is None and self.sinks is None and self.alibi is None)


class StepAttention(Protocol):
    """Attention of one step over the KV pool."""

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write keys and values [num_tokens, heads, width] of a layer to the pool."""
        ...

    def attend(self, layer: int, queries: torch.Tensor, options: Options) -> torch.Tensor:
        """Attend with ``queries`` [num_tokens, num_heads, key width] over what ``layer`` cached.
        Returns [num_tokens, num_heads, value width]."""
        ...

    def cached(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """All that ``layer`` cached for the rows of the step, one row after another: keys and
        values [1, heads, sum of the rows' positions, width]."""
        ...

    def attend_expanded(
        self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, options: Options
    ) -> torch.Tensor:
        """As ``attend``, over keys and values [heads, sum of the rows' positions, width] that the
        model computed from what it cached."""
        ...


class CurrentPass(Protocol):
    """A pass that runs: the model's (Pass), or one that records it (Recorder)."""

    rows: Sequence[Row]
    cache: Any
    """Given to the model as ``past_key_values``."""
    states: Any
    """Runs mixers (``PassStates``)."""

    def attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: Options,
    ) -> torch.Tensor:
        """Attend for ``module``; shapes as of the function ``attend``."""
        ...


@dataclass(slots=True)
class Pass:
    """One pass of a model whose layers are known. ``context`` is the most positions of a sequence.
    ``calls`` counts how often it attended. ``states`` runs mixers, if the model has any."""

    attention: StepAttention
    layers: Layers
    cache: Any
    rows: Sequence[Row] = ()
    states: Any = None
    calls: int = field(default=0, init=False)

    def attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: Options,
    ) -> torch.Tensor:
        """Attend over the pool, or over keys and values that the model computed from it."""
        self.calls += 1
        index = module.layer_idx
        if index in self.layers.shared:
            index = self.cache.last_layer
        layer = self.layers.attention[index]
        queries = query[0].transpose(0, 1)
        if layer.direct:
            return self.attention.attend(layer.cache, queries, options)[None]
        return self.attention.attend_expanded(queries, key[0], value[0], options)[None]


_CURRENT: ContextVar[CurrentPass] = ContextVar("current_pass")


def in_pass() -> bool:
    """Whether a pass runs on this thread."""
    return _CURRENT.get(None) is not None


def current_pass() -> CurrentPass:
    """The pass that runs on this thread. Raises LookupError outside of one."""
    return _CURRENT.get()


@contextmanager
def running(current: CurrentPass) -> Iterator[None]:
    """Make ``current`` the pass that runs on this thread, until the block ends."""
    token = _CURRENT.set(current)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    alibi: torch.Tensor | None = None,
    chunk: int | None = None,
) -> torch.Tensor:
    """Attend the flat batch of the current pass, for the layer ``module.layer_idx``.

    ``query`` is [1, num_heads, num_tokens, width]; ``key`` and ``value`` [1, num_kv_heads, ...] are
    what ``update`` of the pass's cache returned, or was computed from it. ``sinks`` is
    [num_heads]; ``alibi`` [num_heads] are slopes, or [num_heads, positions] what each position
    adds; see LayerAttention. Returns [1, num_tokens, num_heads, value width].
    """
    if getattr(module, "is_causal", True) is False:
        raise NotImplementedError(
            f"{type(module).__name__} lets tokens see later ones; expected causal attention"
        )
    kinds = _kinds(module)
    if sliding_window is None and kinds == "sliding_attention":
        sliding_window = getattr(module.config, "sliding_window", None)
    if chunk is None and kinds == "chunked_attention":
        chunk = getattr(module.config, "attention_chunk_size", None)
    options = Options(
        scale=query.shape[3] ** -0.5 if scaling is None else float(scaling),
        window=sliding_window,
        chunk=chunk,
        softcap=softcap,
        sinks=sinks,
        alibi=alibi,
    )
    return current_pass().attend(module, query, key, value, options)


_WINDOW_IN_MASK = frozenset({"phimoe"})
"""Types of models whose ``sliding_window`` is that of every layer, and an option of none:
transformers puts it in the mask."""


def _kinds(module: Any) -> str | None:
    """What the config says of this layer's attention."""
    config = getattr(module, "config", None)
    if getattr(config, "model_type", None) in _WINDOW_IN_MASK:
        return "sliding_attention"
    kinds = getattr(config, "layer_types", None)
    index = getattr(module, "layer_idx", None)
    if not kinds or index is None or index >= len(kinds):
        return None
    return str(kinds[index])


_IGNORED = frozenset(
    {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "is_causal"}
)


def interface_attention(  # noqa: PLR0917  # the order of arguments is given by transformers
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **extra: Any,
) -> tuple[torch.Tensor, None]:
    """``attend`` as transformers calls it.

    Raises NotImplementedError for options that are not known or have no meaning: ignoring one would
    silently give wrong output. An option that is None or False is off.
    """
    del attention_mask, dropout
    known = {"sliding_window": sliding_window, "softcap": softcap, "s_aux": s_aux}
    _refuse_options(module, {**known, **extra})
    out = attend(
        module,
        query,
        key,
        value,
        scaling=scaling,
        sliding_window=sliding_window or None,
        softcap=softcap or None,
        sinks=s_aux,
    )
    return out, None


def _refuse_options(module: Any, options: Mapping[str, Any]) -> None:
    unsupported = sorted(
        name
        for name, value in options.items()
        if value is not None
        and value is not False
        and name not in _IGNORED
        and not (name in _MEANINGS and _MEANINGS[name](value))
    )
    if unsupported:
        raise NotImplementedError(
            f"{type(module).__name__} needs unsupported attention options: {', '.join(unsupported)}"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


_MEANINGS: dict[str, Callable[[Any], bool]] = {
    "sliding_window": lambda value: _is_number(value) and isinstance(value, int),
    "softcap": _is_number,
    "s_aux": lambda value: isinstance(value, torch.Tensor) and value.dim() == 1,
}
"""Options that are computed, and whether a value is one that they may have."""

AttentionInterface.register(IMPLEMENTATION, interface_attention)
