"""The cache that a model is given for a pass: what it caches goes to the KV pool."""

import inspect
import sys
from typing import Any, TypeVar

import torch
from transformers import Cache

from prefixd.server.model.attention import StepAttention
from prefixd.server.model.layers import Layers

_Own = TypeVar("_Own", bound=Cache)


def cache_of(module: Any, kind: type[_Own]) -> type[_Own]:
    """``kind``, as a subclass of the cache in the model's code: MiniMax takes no other."""
    code = vars(sys.modules[type(module).__module__])
    own = [c for c in code.values() if isinstance(c, type) and issubclass(c, Cache)]
    own = [c for c in own if c.__module__ == type(module).__module__]
    return type(kind.__name__, (kind, *own), {}) if own else kind


def cache_argument(module: Any) -> str:
    """The name under which a model takes its cache."""
    names = inspect.signature(module.forward).parameters
    return "cache_params" if "cache_params" in names else "past_key_values"


class StepCache(Cache):  # type: ignore[misc]  # of transformers, which has no types
    """The ``past_key_values`` of one pass of a flat batch."""

    def __init__(self, attention: StepAttention, layers: Layers, positions: torch.Tensor) -> None:
        """``positions`` [num_tokens] are those of the flat tokens in their sequences."""
        Cache.__init__(self, layers=[])
        self._attention, self._positions = attention, positions
        self.last_layer = 0
        """The layer that cached last."""
        self._expanded = {layer.cache for layer in layers.attention.values() if not layer.direct}

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values [1, heads, num_tokens, width] to the pool.

        Returns them, for attention that reads the pool by itself; or all that the layer cached for
        the rows of the pass, one row after another, where the model computes with it.
        """
        self.last_layer = layer_idx
        self._attention.write(
            layer_idx, key_states[0].transpose(0, 1), value_states[0].transpose(0, 1)
        )
        if layer_idx in self._expanded:
            return self._attention.cached(layer_idx)
        return key_states, value_states

    def get_seq_length(self, layer_idx: int | None = None) -> Any:
        """What a model adds to the places of its tokens in the pass to get their positions: a
        number for each token [num_tokens] where it asks for a layer, as Llama 4 does. 0 where it
        asks in general: it was given positions."""
        if layer_idx is None:
            return 0
        places = torch.arange(len(self._positions), device=self._positions.device)
        return self._positions - places
