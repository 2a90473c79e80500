"""Find what a model's layers cache and how they attend, by one pass of a few tokens.

A config does not tell it: DeepSeek caches latents of two widths, Gemma 4 has layers of several
sizes and some that attend over what an earlier one cached, DiffLlama attends twice in each layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Cache

from prefixd.server.model.architecture import FAILURES, UnsupportedModel
from prefixd.server.model.attention import Options, running
from prefixd.server.model.layers import LayerAttention, LayerCache, Layers
from prefixd.server.model.mixers import MixerRecord, wrap_mixers
from prefixd.server.model.per_layer import PerLayerInputs
from prefixd.server.model.rows import Row
from prefixd.server.model.step_cache import cache_argument, cache_of

_TOKENS = 4


@torch.no_grad()
def probe(module: Any, *, name: str, num_layers: int, context: int) -> Layers:
    """The layers of a transformers causal LM that uses our attention. Windows and chunks of at
    least ``context`` positions are none.

    Raises UnsupportedModel for a layer that neither caches nor attends as others do.
    """
    device = module.get_input_embeddings().weight.device
    count = min(_TOKENS, context)
    mixers = MixerRecord()
    recorder = Recorder([Row(0, 0, count, ())], cache_of(module, _RecordedCache)(mixers))
    token_ids = torch.zeros(1, count, dtype=torch.long, device=device)
    try:
        with running(recorder), mixers.watch(module):
            module(
                inputs_embeds=module.get_input_embeddings()(token_ids),
                position_ids=torch.arange(count, device=device)[None],
                use_cache=True,
                **{cache_argument(module): recorder.cache},
                logits_to_keep=torch.arange(count, device=device),
                **PerLayerInputs(module)(token_ids[0]),
            )
    except FAILURES as failure:
        raise UnsupportedModel(f"{name} cannot be run over KV blocks: {failure}") from failure
    caches = {
        layer: LayerCache(layer, key.shape[1], key.shape[3], value.shape[3])
        for layer, (key, value) in sorted(recorder.cache.states.items())
    }
    shared = _shared(recorder.calls)
    attention = {
        layer: _described(layer, calls, caches, context)
        for layer, calls in sorted(_by_layer(recorder.calls, shared).items())
    }
    states = wrap_mixers(mixers, dtype=module.get_input_embeddings().weight.dtype)
    # A model with mixers may have layers that neither attend nor keep a state (Nemotron-H).
    if len(attention) != num_layers and not states:
        raise UnsupportedModel(
            f"{name} cannot be run over KV blocks: {_lacking(module, num_layers, len(attention))}"
        )
    return Layers(caches, attention, states, shared)


@dataclass(frozen=True, slots=True)
class _Call:
    """One call of attention by ``module``, which says that it is that of ``layer``. ``cache``: the
    layer whose cached keys and values it was given as they are, if any."""

    module: int
    layer: int | None
    attention: str
    heads: int
    cache: int | None
    options: Options


class _RecordedCache(Cache):  # type: ignore[misc]  # of transformers, which has no types
    """Keeps what layers cache, and returns it as if nothing had been cached before."""

    def __init__(self, mixers: MixerRecord) -> None:
        Cache.__init__(self, layers=mixers)
        self._mixers = mixers
        self.states: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.states[layer_idx] = key_states, value_states
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002 - of transformers
        return 0

    def get_linear_cache(self, layer_idx: int) -> None:
        """None: nothing was cached before."""

    def set_linear_cache(self, layer_idx: int, linear_cache: torch.Tensor) -> None:
        self._mixers.cache().set_linear_cache(layer_idx, linear_cache)


@dataclass(slots=True)
class Recorder:
    """A pass that records the calls of attention, and answers with zeros."""

    rows: Sequence[Row]
    cache: _RecordedCache
    states: None = None
    calls: list[_Call] = field(default_factory=list)

    def attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: Options,
    ) -> torch.Tensor:
        """Record a call; shapes as of the function ``attend``."""
        given = [
            layer
            for layer, (cached_key, cached_value) in self.cache.states.items()
            if _same(key, cached_key) and _same(value, cached_value)
        ]
        kind = type(module).__name__
        cache = given[0] if given else None
        call = _Call(id(module), module.layer_idx, kind, query.shape[1], cache, options)
        self.calls.append(call)
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])


def _shared(calls: Sequence[_Call]) -> frozenset[int | None]:
    """What modules that several layers share name as their layer: None in Zamba, -1 in Zamba 2."""
    caches: dict[int, set[int]] = {}
    for call in calls:
        caches.setdefault(call.module, set()).update([] if call.cache is None else [call.cache])
    return frozenset(
        call.layer
        for call in calls
        if call.layer is None or call.layer < 0 or len(caches[call.module]) > 1
    )


def _by_layer(calls: Sequence[_Call], shared: frozenset[int | None]) -> dict[int, list[_Call]]:
    """Calls by layer: of a shared module, by the layer that gave it keys and values."""
    layers: dict[int, list[_Call]] = {}
    for call in calls:
        layer = call.cache if call.layer in shared else call.layer
        if layer is None:
            raise UnsupportedModel(
                f"{call.attention}, which several layers share, attends over keys and values that "
                "are not cached"
            )
        layers.setdefault(layer, []).append(call)
    return layers


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are the same memory in the same shape."""
    return (
        one.data_ptr() == other.data_ptr()
        and one.shape == other.shape
        and one.stride() == other.stride()
    )


def _described(
    layer: int, calls: list[_Call], caches: dict[int, LayerCache], context: int
) -> LayerAttention:
    first = calls[0]
    cache = layer if first.cache is None else first.cache
    if cache not in caches:
        raise UnsupportedModel(
            f"{first.attention} of layer {layer} attends over keys and values that are not cached"
        )
    options = first.options
    return LayerAttention(
        layer=layer,
        cache=cache,
        direct=all(call.cache == cache for call in calls),
        heads=first.heads,
        scale=options.scale,
        window=_effective(options.window, context),
        chunk=_effective(options.chunk, context),
        softcap=options.softcap,
        sinks=options.sinks is not None,
        alibi=options.alibi is not None,
        calls=len(calls),
    )


def _effective(length: int | None, context: int) -> int | None:
    """A window or chunk that hides positions from some token."""
    return None if length is None or length >= context else length


def _lacking(module: Any, layers: int, attending: int) -> str:
    """Why fewer layers than all attend through transformers' interface."""
    if attending:
        attends = f"{attending} of its {layers} layers use transformers' attention interface"
        return f"{attends}; expected all"
    names = [type(part).__name__ for part in module.modules()]
    kinds = dict.fromkeys(name for name in names if name.endswith("Attention"))
    attention = list(kinds)[-1] if kinds else "its attention"
    return (
        f"{attention} computes attention in code of its own, which cannot read KV blocks; expected "
        "a model that uses transformers' attention interface"
    )
