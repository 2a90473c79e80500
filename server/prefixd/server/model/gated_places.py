"""Which models take gated prefixes, and where their attention is: those that PEFT trains them for.

PEFT (``tuners/adaption_prompt/config.py``) knows three model types, and makes an adaption prompt of
the shape [1, adapter_len, hidden_size] for the attention modules of the last layers.
"""

from dataclasses import dataclass
from typing import Any

import torch

from prefixd.server.model.architecture import Shape
from prefixd.server.model.gated import take_added


@dataclass(frozen=True, slots=True)
class GatedPlace:
    """``attention`` is the name of a layer's attention module, with ``{}`` for the layer.
    ``after_projection``: what is added there is not projected."""

    attention: str
    after_projection: bool = False


PLACES = {
    "llama": GatedPlace("model.layers.{}.self_attn"),
    "mistral": GatedPlace("model.layers.{}.self_attn"),
    "gpt2": GatedPlace("transformer.h.{}.attn", after_projection=True),
}


def place_of(module: Any) -> GatedPlace | None:
    """Where a model takes gated prefixes; None for other model types."""
    return PLACES.get(str(module.config.model_type))


def attention_name(module: Any) -> str | None:
    """The name of a layer's attention module, with ``{}`` for the layer, in PEFT's files."""
    place = place_of(module)
    return None if place is None else place.attention


def refuse_gated(module: Any, shape: Shape) -> str | None:
    """Why a model takes no gated prefixes; None where it does."""
    config = module.config
    if place_of(module) is None:
        return (
            f"PEFT trains adaption prompts for the model types "
            f"{', '.join(PLACES)} alone, and this one is {config.model_type}"
        )
    width = shape.num_heads * shape.head_dim
    if width != config.hidden_size:
        return (
            "PEFT trains adaption prompts only where the heads together are as "
            f"wide as the hidden size, and here they have {width} and {config.hidden_size}"
        )
    if getattr(config, "attention_bias", False):
        return (
            "its output projection has a bias, which PEFT adds a second time with "
            " an adaption prompt"
        )
    return None


def project_module(
    module: Any, layer: int, inputs: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [n, num_kv_heads * head_dim] of ``inputs`` [n, width] in a layer of a
    transformers model that takes gated prefixes."""
    place = place_of(module)
    assert place is not None, f"{module.config.model_type} takes no gated prefixes"
    attention = module.get_submodule(place.attention.format(layer))
    if hasattr(attention, "c_attn"):
        _, keys, values = attention.c_attn(inputs).chunk(3, dim=-1)
        return keys, values
    return attention.k_proj(inputs), attention.v_proj(inputs)


def add_after_projections(module: Any, shape: Shape) -> None:
    """Let the attention modules of a model whose gated prefixes are not projected add them; more
    than once does no more."""
    place = place_of(module)
    if place is None or not place.after_projection:
        return
    for layer in range(shape.num_layers):
        attention = module.get_submodule(place.attention.format(layer))
        if _add not in attention._forward_hooks.values():  # noqa: SLF001 - torch has no question for it
            attention.register_forward_hook(_add)


def _add(module: Any, _: Any, output: Any) -> Any:
    added = take_added(module.layer_idx)
    return output if added is None else (output[0] + added, *output[1:])
