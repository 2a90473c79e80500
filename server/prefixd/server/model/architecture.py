"""Which models can be served: others are rejected by name at start.

Compiling a prefix to KV is correct only if every later token sees it at every layer. Models that
break this are rejected here by their config; ``prefixd.server.model.selfcheck`` runs the model to
detect what the config does not show.
"""

from dataclasses import dataclass
from typing import Any


class UnsupportedModel(Exception):
    """The model cannot be served correctly; the message names the reason."""


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a decoder, read from its config."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden_size: int
    vocab_size: int
    max_positions: int


def refuse_unsupported(config: Any) -> None:
    """Raise UnsupportedModel for the Hugging Face config of a model that cannot be served."""
    name = f"{config.model_type} ({', '.join(config.architectures or ['no architecture named'])})"
    if config.is_encoder_decoder:
        raise UnsupportedModel(f"{name} is an encoder-decoder; prefixd serves decoder-only models")
    text = config.get_text_config(decoder=True)
    if getattr(text, "add_cross_attention", False):
        raise UnsupportedModel(f"{name} has cross-attention; prefixd serves decoder-only models")
    kinds = getattr(text, "layer_types", None)
    if kinds is not None:
        unsupported = sorted(set(kinds) - {"full_attention"})
        if unsupported:
            raise UnsupportedModel(
                f"{name} has layers of the kinds {', '.join(unsupported)}; only with "
                "full_attention every token sees the prefix"
            )
    elif getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True):
        raise UnsupportedModel(
            f"{name} attends within a sliding window of {text.sliding_window} tokens: "
            "later tokens would not see the prefix"
        )
    rope = getattr(text, "rope_parameters", None) or {}
    kind = rope.get("rope_type", "default") if isinstance(rope, dict) else "default"
    if kind in {"dynamic", "longrope"}:
        raise UnsupportedModel(
            f"{name} uses {kind} rotary embeddings, which change with the longest sequence of a "
            "batch: one request would change another's output"
        )


def shape_of(config: Any) -> Shape:
    """Read the sizes of a decoder; raise UnsupportedModel when the config lacks one."""
    text = config.get_text_config(decoder=True)
    try:
        heads = int(text.num_attention_heads)
        return Shape(
            num_layers=int(text.num_hidden_layers),
            num_heads=heads,
            num_kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
            head_dim=int(getattr(text, "head_dim", None) or text.hidden_size // heads),
            hidden_size=int(text.hidden_size),
            vocab_size=int(text.vocab_size),
            max_positions=int(text.max_position_embeddings),
        )
    except AttributeError as error:
        raise UnsupportedModel(
            f"{config.model_type}: its config lacks {error.name}; prefixd serves attention "
            "decoders with a fixed number of positions"
        ) from error
