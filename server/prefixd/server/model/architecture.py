"""Which models can be served: others are rejected by name at start.

Compiling a prefix to KV is correct only if it affects later tokens through what attention caches
alone. Models that break this are rejected here by their config;
``prefixd.server.model.selfcheck`` runs the model to detect what the config does not show.
"""

import sys
from dataclasses import dataclass
from typing import Any


class UnsupportedModel(Exception):
    """The model cannot be served correctly; the message names the reason."""


FAILURES = (RuntimeError, TypeError, AttributeError, ValueError, LookupError)
"""What models raise that cannot be run; RuntimeError includes NotImplementedError."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a decoder, read from its config. Those of keys and values are of the first layer
    that caches them; layers may differ."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    embedding_width: int
    vocab_size: int
    max_positions: int


_POSITIONS = ("max_position_embeddings", "max_seq_len", "seq_length")
"""Config keys that hold the number of positions: of most models, of MPT, of BLOOM."""

_WITH_STATES = {"linear_attention", "conv", "hybrid", "mamba", "moe", "mlp"}
"""Kinds of layers that keep a state, and those of models with such layers that keep nothing."""

_ATTENTION = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Kinds of layers that cache keys and values, and nothing else."""


def served_context(config: Any, *, pool_tokens: int | None) -> int:
    """Most positions of a sequence: those that the model has and the KV pool can hold."""
    limits = (_max_positions(config), pool_tokens)
    return min((limit for limit in limits if limit is not None), default=sys.maxsize)


def _max_positions(config: Any) -> int | None:
    """Positions of a model; None where the config names no limit (BLOOM)."""
    text = config.get_text_config(decoder=True)
    limits = (getattr(text, key, None) for key in _POSITIONS)
    named = next((int(limit) for limit in limits if limit is not None), None)
    unscaled = unscaled_positions(config)
    return named if unscaled is None else min(unscaled, named or unscaled)


def unscaled_positions(config: Any) -> int | None:
    """Positions up to which no longrope of a config changes with the longest sequence of a batch;
    None: there is none. (``dynamic`` changes past all positions of a model alone.)

    Below it all sequences have the short factors, as transformers gives them. Past it one request
    would change another's output, and its own keys in the cache, which were rotated otherwise.
    """
    text = config.get_text_config(decoder=True)
    ropes = _ropes(getattr(text, "rope_parameters", None))
    return min(
        (
            int(rope["original_max_position_embeddings"])
            for rope in ropes
            if rope.get("rope_type") == "longrope"
        ),
        default=None,
    )


def refuse_unsupported(config: Any, *, context: int) -> None:
    """Raise UnsupportedModel for the Hugging Face config of a model that cannot be served to
    sequences of at most ``context`` positions."""
    name = f"{config.model_type} ({', '.join(config.architectures or ['no architecture named'])})"
    if config.is_encoder_decoder:
        raise UnsupportedModel(f"{name} is an encoder-decoder; expected a decoder")
    text = config.get_text_config(decoder=True)
    if context < 1:
        raise UnsupportedModel(
            f"{name}: expected max_position_embeddings of at least 1, got {context}"
        )
    if getattr(text, "add_cross_attention", False):
        raise UnsupportedModel(f"{name} has cross-attention; prefixd serves decoder-only models")
    _refuse_layers(name, text)


_OUTPUTS = {
    "output_attentions": False,
    "output_hidden_states": False,
    "output_router_logits": False,
    "return_dict": True,
}
"""Options of a config that change what a model returns besides logits."""


def return_logits_alone(config: Any) -> None:
    """Let a model return its logits and nothing else: a config saved by training may name more,
    such as the logits of routers."""
    for part in (config, config.get_text_config(decoder=True)):
        for option, value in _OUTPUTS.items():
            if getattr(part, option, value) != value:
                setattr(part, option, value)


def _refuse_layers(name: str, text: Any) -> None:
    """Every layer must be attention, or keep a state of a fixed size."""
    unsupported = sorted(set(getattr(text, "layer_types", None) or ()) - _ATTENTION - _WITH_STATES)
    if unsupported:
        raise UnsupportedModel(
            f"{name} has layers of the kinds {', '.join(unsupported)}; expected "
            f"{', '.join(sorted(_ATTENTION))}"
        )


def _ropes(parameters: Any) -> list[dict[str, Any]]:
    """The settings of rotary embeddings in ``rope_parameters``: one, or one for each kind of
    layer."""
    if not isinstance(parameters, dict):
        return []
    nested = [rope for value in parameters.values() for rope in _ropes(value)]
    return [parameters, *nested]


def shape_of(config: Any, *, embedding_width: int, context: int) -> Shape:
    """Read the sizes of a decoder; raise UnsupportedModel when the config lacks one.

    A model without a number of positions has those of ``context``. ``embedding_width`` is that of
    the loaded input embeddings: some models project narrower ones (OPT-350m: 512) to their hidden
    size.
    """
    text = config.get_text_config(decoder=True)
    try:
        heads = int(getattr(text, "num_attention_heads", None) or text.num_heads)
        shape = Shape(
            num_layers=int(text.num_hidden_layers),
            num_heads=heads,
            num_kv_heads=_size(text, "num_key_value_heads") or heads,
            head_dim=_size(text, "head_dim") or int(text.hidden_size) // heads,
            embedding_width=embedding_width,
            vocab_size=int(text.vocab_size),
            max_positions=_max_positions(config) or context,
        )
    except AttributeError as error:
        raise UnsupportedModel(
            f"{config.model_type}: its config lacks {error.name}; prefixd serves attention decoders"
        ) from error
    if shape.num_layers < 1:
        raise UnsupportedModel(f"{config.model_type}: expected at least 1 layer, got none")
    return shape


def _size(text: Any, key: str) -> int | None:
    """A size that a config may lack, and that layers may differ in."""
    try:
        size = getattr(text, key, None)
    except RuntimeError:  # how transformers answers where layers differ
        return None
    return None if size is None else int(size)
