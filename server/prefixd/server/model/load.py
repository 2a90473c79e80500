"""Load the base model: weights, tokenizer, fingerprint."""

import logging
import sys
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from prefixd.server.model.architecture import (
    Shape,
    UnsupportedModel,
    refuse_unsupported,
    return_logits_alone,
    served_context,
    shape_of,
    unscaled_positions,
)
from prefixd.server.model.checkpoint import read_config, read_tokenizer, read_weights
from prefixd.server.model.checkpoint_files import refuse_unreadable_files
from prefixd.server.model.demo import MODEL_ID, demo_model
from prefixd.server.model.encoder_decoder.facts import (
    EncoderDecoder,
    decoder_layers,
    decoder_shape,
    kept_in_float32,
    prepare_pair,
    refuse_unsupported_pair,
)
from prefixd.server.model.families import adapt
from prefixd.server.model.fingerprint import fingerprint_of
from prefixd.server.model.heads import refuse_indivisible
from prefixd.server.model.layers import Layers
from prefixd.server.model.probe import probe
from prefixd.server.model.quantized import (
    computes_exactly,
    refuse_rounded,
    refuse_unloadable,
    scheme_of,
)
from prefixd.server.model.tensors import is_packed, replace_tensors, saved_places

log = logging.getLogger(__name__)

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True)
class LoadedBase:
    """The frozen base, ready to run. ``module`` is a transformers causal LM, or an
    encoder-decoder with what ``pair`` says; ``context`` is the most positions that a sequence may
    have on this server, and ``layers`` are what this process holds of them."""

    name: str
    module: Any
    tokenizer: Any
    shape: Shape
    layers: Layers
    context: int
    dtype: torch.dtype
    device: torch.device
    fingerprint: str
    eos_token_ids: frozenset[int]
    num_embeddings: int
    """Token ids that can be fed in; the tokenizer may have more."""
    num_logits: int
    """Token ids that can be sampled: those with a logit, and with an embedding to feed in."""
    scheme: str | None = None
    """How the checkpoint is quantized (None: plain weights)."""
    computes_exactly: bool = True
    """Whether no layer rounds its inputs, and all compute in float32 where these are float32."""
    own_fingerprint: str | None = None
    """That of a quantized model whose ``fingerprint`` is its original's."""
    pair: EncoderDecoder | None = None
    """None for a decoder."""

    @property
    def weights_fingerprint(self) -> str:
        """That of the weights that compute: a quantized model that takes its original's prefixes
        computes other KV of them, by each scheme."""
        return self.own_fingerprint or self.fingerprint


def resolve_device(device: str) -> torch.device:
    """``auto`` is cuda when available, else cpu."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(device)


def is_folder(model: str) -> bool:
    """Whether ``model`` is a local folder rather than a Hugging Face id.

    Raises FileNotFoundError when it is neither.
    """
    if Path(model).is_dir():
        return True
    if model.startswith(("/", ".", "~")) or model.endswith("/") or model.count("/") > 1:
        raise FileNotFoundError(f"the model folder {model} does not exist")
    return False


def check_folder(
    folder: str, *, pool_tokens: int, device: str, ranks: int = 1, rounded: bool = False
) -> str | None:
    """Check a model's config, tokenizer and files as ``load_base`` does; of the weights only names
    and types are read. ``rounded``: they will be rounded to int8. Returns how they are quantized.

    Raises UnsupportedModel.
    """
    config = read_config(folder)
    _refuse(config, pool_tokens=pool_tokens, ranks=ranks)
    refuse_unloadable(folder, config, resolve_device(device))
    if rounded:
        refuse_rounded(config)
    read_tokenizer(folder)
    scheme = scheme_of(config)
    refuse_unreadable_files(folder, quantized=scheme is not None)
    return scheme


def find_model(model: str, *, cache_dir: Path, ranks: int = 1) -> tuple[str, str, Any]:
    """The folder or Hugging Face id of ``model``, its name and its config. Raises as ``load_base``
    does, before weights are read. Turns the progress bars of transformers off in a log."""
    if not sys.stderr.isatty():
        disable_progress_bar()
    if model == "demo":
        source, name = str(demo_model(cache_dir, progress=log.info)), MODEL_ID.rpartition("/")[2]
    else:
        source, name = model, Path(model).resolve().name if is_folder(model) else model
    config = read_config(source)
    if config.is_encoder_decoder:
        refuse_unsupported_pair(config, ranks=ranks)
    elif ranks > 1:
        refuse_indivisible(config, ranks=ranks)
    return source, name, config


def _refuse(config: Any, *, pool_tokens: int | None, ranks: int = 1) -> None:
    """Raise UnsupportedModel for a config that cannot be served."""
    if config.is_encoder_decoder:
        refuse_unsupported_pair(config, ranks=ranks)
        return
    if ranks > 1:
        refuse_indivisible(config, ranks=ranks)
    refuse_unsupported(config, context=served_context(config, pool_tokens=pool_tokens))


def load_base(
    model: str,
    *,
    dtype: str,
    device: str,
    cache_dir: Path,
    pool_tokens: int | None = None,
    ranks: int = 1,
) -> LoadedBase:
    """Load ``model``: ``demo``, a local folder or a Hugging Face id, for a KV pool of
    ``pool_tokens`` positions (None: of any size). With more than one of ``ranks``, all of a process
    group call this, and each gets a part of the weights.

    Raises UnsupportedModel for a model that cannot be served correctly, DemoModelMissing when the
    demo model's package is not installed, and FileNotFoundError when the folder does not exist.
    """
    source, name, config = find_model(model, cache_dir=cache_dir, ranks=ranks)
    _refuse(config, pool_tokens=pool_tokens)
    target, scheme = resolve_device(device), scheme_of(config)
    refuse_unloadable(source, config, target)
    tokenizer = read_tokenizer(source)
    # In the checkpoint's dtype: the fingerprint must not depend on the serving dtype.
    module = read_weights(source, config, ranks=ranks, device=target)
    if scheme and not any(map(is_packed, module.modules())):
        log.info("%s: transformers restored plain weights from %s", name, scheme)
    base = prepare_base(
        module,
        tokenizer,
        name=name,
        dtype=dtype,
        device=device,
        pool_tokens=pool_tokens,
        ranks=ranks,
        scheme=scheme,
    )
    if ranks > 1 and base.layers.states:
        raise UnsupportedModel(
            f"{name} keeps a state in its layers of {base.layers.states[0].kind}, which is not "
            "cut by head, so it cannot be served with tensor_parallel"
        )
    if unscaled := unscaled_positions(config):
        log.warning(
            "%s is served up to %d positions: past them its rotary embeddings (longrope) change "
            "with the longest sequence of a batch",
            name,
            unscaled,
        )
    if unseen := base.layers.unseen_part(base.context):
        log.info(
            "%s has layers with windows; the KV pool holds all positions of all layers, so %.0f %% "
            "of the KV of a sequence of %d positions is never read again",
            name,
            100 * unseen,
            base.context,
        )
    return base


def prepare_base(
    module: Any,
    tokenizer: Any,
    *,
    name: str,
    dtype: str,
    device: str,
    pool_tokens: int | None = None,
    ranks: int = 1,
    scheme: str | None = None,
) -> LoadedBase:
    """Freeze a transformers causal LM that is already in memory and compute its fingerprint.
    ``scheme`` is how its checkpoint is quantized."""
    _refuse(module.config, pool_tokens=pool_tokens)
    is_pair = module.config.is_encoder_decoder
    sizes = decoder_shape if is_pair else shape_of
    context = served_context(module.config, pool_tokens=pool_tokens)
    num_embeddings, embedding_width = map(int, module.get_input_embeddings().weight.shape)
    head = module.get_output_embeddings()
    shape = sizes(module.config, embedding_width=embedding_width, context=context)
    fingerprint = fingerprint_of(module, tokenizer)
    return_logits_alone(module.config)
    target = resolve_device(device)
    if is_pair and dtype == "float16":
        log.warning("%s may overflow in float16; expected bfloat16 or float32", name)
    _cast(module, DTYPES[dtype], kept=kept_in_float32(module) if is_pair else ())
    module = module.to(target).eval().requires_grad_(requires_grad=False)
    try:
        adapt(module)
    except ValueError as error:
        raise UnsupportedModel(
            f"{name} does not accept an attention implementation: {error}"
        ) from error
    computes = computes_exactly(module, name=name, device=target, dtype=DTYPES[dtype])
    if is_pair:
        layers = decoder_layers(shape)
    else:
        layers = probe(module, name=name, num_layers=shape.num_layers, context=context)
    if ranks == 1 and layers.caches:  # a config may name other sizes: those of JetMoE, Gemma 4
        first = next(iter(layers.caches.values()))
        shape = replace(shape, num_kv_heads=first.num_heads, head_dim=first.key_width)
    return LoadedBase(
        name=name,
        module=module,
        tokenizer=tokenizer,
        shape=shape,
        layers=layers,
        context=context,
        dtype=DTYPES[dtype],
        device=target,
        fingerprint=fingerprint,
        eos_token_ids=_eos_token_ids(name, module, tokenizer),
        num_embeddings=num_embeddings,
        num_logits=num_embeddings if head is None else min(num_embeddings, _rows(head)),
        scheme=scheme,
        computes_exactly=computes,
        pair=prepare_pair(module) if is_pair else None,
    )


def _rows(head: Any) -> int:
    """Ids with a logit. The weight of a quantized head may have another name or shape."""
    size = getattr(head, "out_features", None)
    return len(head.weight) if size is None else int(size)


def _cast(module: Any, dtype: torch.dtype, *, kept: Collection[torch.Tensor] = ()) -> None:
    """Cast the checkpoint's weights to the serving dtype. Computed buffers keep theirs, as in
    transformers: rotary frequencies rounded to bfloat16 rotate the demo model's position 3000 by up
    to four radians too far. In float16 the weights ``kept`` are float32."""
    floating = (place for place in saved_places(module) if place[-1].is_floating_point())
    wide = {id(weight) for weight in kept} if dtype is torch.float16 else set()
    replace_tensors(
        floating, lambda weight: weight.float() if id(weight) in wide else weight.to(dtype)
    )


def _eos_token_ids(name: str, module: Any, tokenizer: Any) -> frozenset[int]:
    """Ids that end a sequence, from the generation config, the config and the tokenizer."""
    token_ids: set[int] = set()
    for holder in (module.generation_config, module.config, tokenizer):
        value = getattr(holder, "eos_token_id", None)
        if value is None:
            continue
        ids = [value] if isinstance(value, int) else value
        if not isinstance(ids, list) or not all(isinstance(token_id, int) for token_id in ids):
            raise UnsupportedModel(
                f"{name}: expected a token id or a list of them as eos_token_id, got {value!r}"
            )
        token_ids.update(ids)
    return frozenset(token_ids)
