"""The weights of exact families, by what they are for: what lean layers and native kernels compute.

An exact family is a decoder of transformers whose layers differ from Llama's by biases, by norms of
query and key heads and by experts alone. Anything else is run by the unmodified module.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from prefixd.server.model.exact import require_exact, require_read, require_rotated
from prefixd.server.model.load import LoadedBase


@dataclass(frozen=True, slots=True)
class Linear:
    """``weight`` [out, in] and ``bias`` [out] or None. With ``scales`` [out] in float32 the weight
    is int8, and stands for weight * scales of its row."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scales: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Dense:
    """An MLP: down(silu(gate(x)) * up(x))."""

    gate: Linear
    up: Linear
    down: Linear


@dataclass(frozen=True, slots=True)
class Experts:
    """Experts chosen for each token: the ``per_token`` with the largest softmax of ``router``
    [experts, width], weighted by it; ``normalize``: the weights of the chosen sum to 1.

    ``gate_up`` [experts, 2 * inner, width] with gate above up, ``down`` [experts, width, inner].
    ``shared`` runs for every token, times sigmoid of ``shared_gate`` [1, width]. With scales
    [experts, out] both are int8, as in Linear.
    """

    router: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    per_token: int
    normalize: bool
    shared: Dense | None = None
    shared_gate: torch.Tensor | None = None
    gate_up_scales: torch.Tensor | None = None
    down_scales: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer. Norms are [width], ``q_norm`` and ``k_norm`` [head_dim] or None."""

    input_norm: torch.Tensor
    post_norm: torch.Tensor
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    mlp: Dense | Experts


class Parts:
    """The parts of a model of an exact family, read from its module.

    ``cosine`` and ``sine`` [context, rotary_dim / 2] are float32 on the CPU. ``embedding`` is
    [num_embeddings, width].
    """

    def __init__(self, base: LoadedBase) -> None:
        """Raises NotExact."""
        self.base = base
        self._module = base.module
        require_exact(self._module, base.name)
        require_read(self._module, base.name, _read_names(self._module))
        self._layers: Any = self._module.model.layers
        self.norm_eps = float(self._module.model.norm.variance_epsilon)
        self.attention_scale = float(self._layers[0].self_attn.scaling)
        self.cosine, self.sine = self._rotary()
        require_rotated(self.cosine, base.shape.head_dim, base.name)

    @property
    def final_norm(self) -> torch.Tensor:
        """The weight of the norm before the head [width]."""
        return _data(self._module.model.norm.weight)

    @property
    def head(self) -> Linear:
        """The head [ids with a logit, width]."""
        return _linear(self._module.lm_head)

    @property
    def embedding(self) -> torch.Tensor:
        """The table of input embeddings."""
        return _data(self._module.model.embed_tokens.weight)

    @property
    def tied(self) -> bool:
        """Whether the head is the table of input embeddings."""
        head, embedding = self._module.lm_head.weight, self._module.model.embed_tokens.weight
        return bool(head.data_ptr() == embedding.data_ptr() and head.shape == embedding.shape)

    @property
    def has_experts(self) -> bool:
        """Whether any layer has experts."""
        return any(hasattr(layer.mlp, "experts") for layer in self._layers)

    def take_layers(self) -> Iterator[Layer]:
        """All layers in order. Each is removed from the module when the next is asked for: the
        weights are not held twice, and the module cannot be run afterwards."""
        for layer in self._layers:
            yield _layer(layer, self._module.config)
            _remove_weights(layer)

    def remove_ends(self) -> None:
        """Remove the embeddings, the last norm and the head from the module."""
        _remove_weights(self._module.lm_head)
        _remove_weights(self._module.model)

    def _rotary(self) -> tuple[torch.Tensor, torch.Tensor]:
        positions = torch.arange(self.base.context, device=self.base.device)[None]
        like = torch.empty(0, dtype=torch.float32, device=self.base.device)
        cosine, sine = self._module.model.rotary_emb(like, positions)
        half = cosine.shape[-1] // 2
        tables = [table[0, :, :half].float().cpu().contiguous() for table in (cosine, sine)]
        return tables[0], tables[1]


def _read_names(module: Any) -> set[str]:
    """Names of the weights that Parts reads."""
    names = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "lm_head.bias"}
    for index, layer in enumerate(module.model.layers):
        read = {tensor.data_ptr() for tensor in _tensors(_layer(layer, module.config))}
        parameters = layer.named_parameters()
        names |= {f"model.layers.{index}.{name}" for name, p in parameters if p.data_ptr() in read}
    return names


def _tensors(part: Any) -> Iterator[torch.Tensor]:
    """All tensors of a part and the parts in it."""
    for name in part.__slots__:
        value = getattr(part, name)
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, Linear | Dense | Experts):
            yield from _tensors(value)


def _layer(layer: Any, config: Any) -> Layer:
    attention = layer.self_attn
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return Layer(
        input_norm=_data(layer.input_layernorm.weight),
        post_norm=_data(layer.post_attention_layernorm.weight),
        q_norm=None if q_norm is None else _data(q_norm.weight),
        k_norm=None if k_norm is None else _data(k_norm.weight),
        q=_linear(attention.q_proj),
        k=_linear(attention.k_proj),
        v=_linear(attention.v_proj),
        o=_linear(attention.o_proj),
        mlp=_experts(layer.mlp, config) if hasattr(layer.mlp, "experts") else _dense(layer.mlp),
    )


def _dense(mlp: Any) -> Dense:
    return Dense(_linear(mlp.gate_proj), _linear(mlp.up_proj), _linear(mlp.down_proj))


def _experts(mlp: Any, config: Any) -> Experts:
    shared = getattr(mlp, "shared_expert", None)
    return Experts(
        router=_data(mlp.gate.weight),
        gate_up=_data(mlp.experts.gate_up_proj),
        down=_data(mlp.experts.down_proj),
        per_token=int(config.num_experts_per_tok),
        normalize=bool(getattr(mlp.gate, "norm_topk_prob", True)),  # Mixtral always does
        shared=None if shared is None else _dense(shared),
        shared_gate=None if shared is None else _data(mlp.shared_expert_gate.weight),
    )


def _linear(linear: Any) -> Linear:
    bias = getattr(linear, "bias", None)
    return Linear(_data(linear.weight), None if bias is None else _data(bias))


def _data(parameter: Any) -> torch.Tensor:
    tensor: torch.Tensor = parameter.detach()  # keeps the values when the parameter's are removed
    return tensor


def _remove_weights(module: Any) -> None:
    for parameter in module.parameters():
        parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
