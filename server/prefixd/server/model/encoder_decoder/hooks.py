"""Attention and positions of T5 and BART, replaced where they stand in transformers' model.

The model runs one flat row of tokens, [1, num_tokens], of many requests. While a pass runs, its
attention modules project as they do, and the pass attends each request by itself; the embeddings of
positions are those of each request. Outside a pass the model is transformers' own.

T5 adds a bias by the distance of a key from its query, for each head; one attention module of each
stack has it for all layers, or each its own (umT5).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from prefixd.server.model.architecture import UnsupportedModel

_SELF = frozenset({"SelfAttention", "self_attn"})
_CROSS = frozenset({"EncDecAttention", "encoder_attn"})


@dataclass(frozen=True, slots=True)
class Bias:
    """What attention adds by the distance of a key from its query: the row
    ``buckets[distance + reach]`` of ``embedding`` [buckets, num_heads]. ``buckets``
    [2 * reach + 1] begins at the distance -reach; beyond its ends nothing changes."""

    embedding: Any
    buckets: torch.Tensor

    def of(self, distances: torch.Tensor) -> torch.Tensor:
        """[num_heads, *distances.shape] for key positions minus query positions (int64)."""
        reach = len(self.buckets) // 2
        table: torch.Tensor = self.embedding.weight[self.buckets].T  # [num_heads, 2 * reach + 1]
        return table[:, distances.clamp(-reach, reach) + reach]


@dataclass(frozen=True, slots=True)
class Attention:
    """One attention module. ``scale`` multiplies the scores; ``bias`` is None without one."""

    module: Any
    layer: int
    num_heads: int
    head_dim: int
    scale: float
    bias: Bias | None

    def queries(self, states: torch.Tensor) -> torch.Tensor:
        """Queries [n, num_heads, head_dim] of states [n, width]."""
        return self._by_head(_part(self.module, "q"), states)

    def keys_and_values(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values, each [n, num_heads, head_dim], of states [n, width]."""
        key, value = _part(self.module, "k"), _part(self.module, "v")
        return self._by_head(key, states), self._by_head(value, states)

    def _by_head(self, projection: Any, states: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = projection(states)
        return projected.view(len(states), self.num_heads, self.head_dim)


class Pass(Protocol):
    """What attends while the model runs. All states are flat: those of one request after those of
    another."""

    @property
    def positions(self) -> torch.Tensor:
        """The position of each token [num_tokens] in its request."""
        ...

    @property
    def outputs(self) -> torch.Tensor | None:
        """The tokens whose logits are wanted [n]; None: the head does not run."""
        ...

    def attend_self(self, attention: Attention, states: torch.Tensor) -> torch.Tensor:
        """Self-attention [n, num_heads, head_dim] of normalized states [n, width]."""
        ...

    def attend_source(self, attention: Attention, states: torch.Tensor) -> torch.Tensor:
        """Cross-attention [n, num_heads, head_dim] of normalized states [n, width]."""
        ...


class Hooks:
    """The replaced forwards of a model. ``current`` is the pass that runs; ``cross`` are the
    cross-attention modules of the decoder by layer. ``num_calls`` counts calls of attention."""

    def __init__(self, module: Any) -> None:
        """Replace the forwards. Raises UnsupportedModel for a model with other parts."""
        self.current: Pass | None = None
        self.cross: list[Attention] = []
        self.num_calls = 0
        for stack in (module.get_encoder(), module.get_decoder()):
            self._hook_stack(stack, is_decoder=stack is module.get_decoder())
        head = module.get_output_embeddings()
        head.forward = partial(self._head, head.forward)
        if not self.cross or self.cross[0].layer != 0:
            raise UnsupportedModel(f"{module.config.model_type} has no cross-attention")

    def _hook_stack(self, stack: Any, *, is_decoder: bool) -> None:
        shared: Bias | None = None
        for name, part in stack.named_modules():
            last = name.rpartition(".")[2]
            if last == "embed_positions":
                part.forward = partial(self._embed_positions, part, part.forward)
            elif last in _SELF | _CROSS:
                own = _bias_of(part) if last in _SELF else None
                shared = own or shared
                bias = shared if last in _SELF else None
                layer = getattr(part, "layer_idx", None) if is_decoder else 0
                attention = _attention(part, layer, bias)
                part.forward = partial(self._attend, attention, part.forward, last in _CROSS)
                if last in _CROSS:
                    self.cross.append(attention)

    def _attend(
        self,
        attention: Attention,
        own: Callable[..., Any],
        is_cross: bool,  # noqa: FBT001 - of a partial
        hidden_states: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """The forward of an attention module: returns what its own would, without weights."""
        running = self.current
        if running is None:
            return own(hidden_states, *args, **kwargs)
        self.num_calls += 1
        attend = running.attend_source if is_cross else running.attend_self
        attended = attend(attention, hidden_states[0])
        output = _part(attention.module, "o")(attended.reshape(1, len(attended), -1))
        # T5 returns its bias too, for the next layer.
        return (output, None, None) if _returns_bias(attention.module) else (output, None)

    def _embed_positions(
        self, part: Any, own: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        if self.current is None:
            return own(*args, **kwargs)
        return torch.nn.functional.embedding(self.current.positions + part.offset, part.weight)[
            None
        ]

    def _head(self, own: Callable[..., Any], states: torch.Tensor) -> Any:
        """The output head, of the wanted tokens alone."""
        outputs = None if self.current is None else self.current.outputs
        return own(states if outputs is None else states[:, outputs])


_NAMES = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}


def _part(module: Any, name: str) -> Any:
    """The projection of queries, keys, values or output: as T5 names it, or BART."""
    return getattr(module, name, None) or getattr(module, _NAMES[name])


def _attention(module: Any, layer: int | None, bias: Bias | None) -> Attention:
    is_t5 = hasattr(module, "key_value_proj_dim")
    if layer is None:
        raise UnsupportedModel(f"{type(module).__name__} does not say of which layer it is")
    return Attention(
        module=module,
        layer=layer,
        num_heads=module.n_heads if is_t5 else module.num_heads,
        head_dim=module.key_value_proj_dim if is_t5 else module.head_dim,
        scale=float(module.scaling),
        bias=bias,
    )


def _returns_bias(module: Any) -> bool:
    return type(module).__name__ in {"T5Attention", "MT5Attention"}


def _bias_of(module: Any) -> Bias | None:
    """The bias that a module has, by distance."""
    embedding = getattr(module, "relative_attention_bias", None)
    if embedding is None:
        return None
    reach = int(module.relative_attention_max_distance) + 1
    distances = torch.arange(-reach, reach + 1, device=embedding.weight.device)
    if type(module).__name__ == "UMT5Attention":
        buckets = module._relative_position_bucket(distances)  # noqa: SLF001
    else:
        buckets = module._relative_position_bucket(  # noqa: SLF001
            distances,
            bidirectional=not module.is_decoder,
            num_buckets=module.relative_attention_num_buckets,
            max_distance=module.relative_attention_max_distance,
        )
    return Bias(embedding, buckets)
