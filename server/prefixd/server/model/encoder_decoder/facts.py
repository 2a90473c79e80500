"""Which encoder-decoders can be served, and their sizes, read from the config."""

from dataclasses import dataclass
from typing import Any

from prefixd.server.model.architecture import Shape, UnsupportedModel
from prefixd.server.model.encoder_decoder.hooks import Hooks
from prefixd.server.model.layers import LayerAttention, LayerCache, Layers
from prefixd.server.model.quantized import scheme_of

FAMILIES = ("t5", "mt5", "umt5", "bart", "mbart")
"""Model types of transformers whose attention ``hooks`` can replace."""


@dataclass(frozen=True, slots=True)
class EncoderDecoder:
    """What an encoder-decoder has and a decoder has not.

    ``start`` are the tokens that the decoder begins with, before the output. ``max_source`` is the
    most positions of the encoder, a soft prompt's included (None: it has no limit of its own).
    ``hooks`` are in the module.
    """

    start: tuple[int, ...]
    max_source: int | None
    encoder_layers: int
    hooks: Hooks


def refuse_unsupported_pair(config: Any, *, ranks: int = 1) -> None:
    """Raise UnsupportedModel for the config of an encoder-decoder that cannot be served."""
    if config.model_type not in FAMILIES:
        raise UnsupportedModel(
            f"{config.model_type} is an encoder-decoder of a family that prefixd does not serve; "
            f"expected a decoder, or one of {', '.join(FAMILIES)}"
        )
    if ranks > 1:
        raise UnsupportedModel(
            f"{config.model_type} is an encoder-decoder, which cannot be served with "
            "tensor_parallel"
        )
    if scheme := scheme_of(config):
        raise UnsupportedModel(
            f"{config.model_type} is an encoder-decoder that is quantized with {scheme}; expected "
            "plain weights"
        )
    layers, _, heads, width = _decoder_sizes(config)
    if layers < 1:
        raise UnsupportedModel(f"{config.model_type}: expected at least 1 decoder layer, got none")
    if 2 * layers * heads * width < config.d_model:
        raise UnsupportedModel(
            f"{config.model_type}: expected the keys and values of one position, "
            f"{2 * layers * heads * width} numbers, to hold an input embedding of {config.d_model}"
        )


def _decoder_sizes(config: Any) -> tuple[int, int, int, int]:
    """Layers of the decoder, layers of the encoder, heads, and their width."""
    if hasattr(config, "d_kv"):
        return config.num_decoder_layers, config.num_layers, config.num_heads, config.d_kv
    heads = config.decoder_attention_heads
    return config.decoder_layers, config.encoder_layers, heads, config.d_model // heads


def decoder_shape(config: Any, *, embedding_width: int, context: int) -> Shape:
    """The sizes of the decoder, whose keys and values the pool holds. One without a number of
    positions (T5: they are relative) has those of ``context``."""
    layers, _, heads, width = _decoder_sizes(config)
    return Shape(
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=width,
        embedding_width=embedding_width,
        vocab_size=config.vocab_size,
        max_positions=getattr(config, "max_position_embeddings", None) or context,
    )


def decoder_layers(shape: Shape) -> Layers:
    """What the decoder's layers cache: self-attention in block tables, and cross-attention, which
    has the same sizes, in side blocks."""
    heads, width, numbers = shape.num_kv_heads, shape.head_dim, range(shape.num_layers)
    return Layers(
        {number: LayerCache(number, heads, width, width) for number in numbers},
        {
            number: LayerAttention(number, number, direct=True, heads=heads, scale=1.0)
            for number in numbers
        },
    )


def prepare_pair(module: Any) -> EncoderDecoder:
    """Replace the attention of a loaded model, and read what it says. Raises UnsupportedModel when
    it does not say how output begins."""
    config = module.config
    start = _first_id(module, "decoder_start_token_id")
    if start is None:
        start = _first_id(module, "bos_token_id")
    if start is None:
        raise UnsupportedModel(
            f"{config.model_type}: expected decoder_start_token_id in its generation config"
        )
    forced = _first_id(module, "forced_bos_token_id")
    _, encoder_layers, _, _ = _decoder_sizes(config)
    return EncoderDecoder(
        start=(start,) if forced is None else (start, forced),
        max_source=getattr(config, "max_position_embeddings", None),
        encoder_layers=encoder_layers,
        hooks=Hooks(module),
    )


def _first_id(module: Any, name: str) -> int | None:
    for holder in (module.generation_config, module.config):
        value = getattr(holder, name, None)
        if isinstance(value, int):
            return value
    return None


def kept_in_float32(module: Any) -> list[Any]:
    """The weights that transformers keeps in float32 when it loads a model in float16: products
    with them overflow (T5)."""
    names = frozenset(getattr(module, "_keep_in_fp32_modules", None) or ())
    return [
        weight
        for name, weight in module.named_parameters()
        if not names.isdisjoint(name.split("."))
    ]
