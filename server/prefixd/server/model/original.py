"""The model that a quantized one was made of: the setting ``fingerprint_of``.

Prefixes are bound to the fingerprint of the base that they were trained for. A quantized copy has
another one. Where its operator names the original, it takes that fingerprint, if the two agree in
all that can be compared.
"""

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from prefixd.server.model.architecture import UnsupportedModel
from prefixd.server.model.checkpoint import read_tokenizer, read_weights
from prefixd.server.model.fingerprint import fingerprint_of, sample
from prefixd.server.model.load import LoadedBase, find_model
from prefixd.server.model.quantized import plain, scheme_of
from prefixd.server.model.tensors import is_wrapped

log = logging.getLogger(__name__)

_IGNORED = frozenset(
    {
        "_attn_implementation_autoset",
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "bos_token_id",
        "compression_config",
        "distributed_config",
        "dtype",
        "eos_token_id",
        "initializer_range",
        "pad_token_id",
        "pretraining_tp",
        "quantization_config",
        "tie_word_embeddings",  # quantizers separate the head from the embeddings
        "torch_dtype",
        "transformers_version",
        "unk_token_id",
        "use_cache",
    }
)
"""Keys of a config that do not decide what a prefix means to the model."""

_LIKE = 0.2
"""Largest relative difference of the input embeddings of a model and its quantized copy: four bits
make about 0.1, other models more than 1."""


@dataclass(frozen=True, slots=True)
class Original:
    """What is known of an original: no weights but a sample of the input embeddings."""

    name: str
    fingerprint: str
    config: Any
    tokenizer: Any
    embeddings: torch.Tensor

    def bind(self, base: LoadedBase) -> LoadedBase:
        """The base with this original's fingerprint. Raises UnsupportedModel unless the base is
        quantized and agrees with it in config, tokenizer and, roughly, input embeddings."""
        require_agreement(base.module.config, base.tokenizer, self, name=base.name)
        if base.scheme is None:
            raise UnsupportedModel(_plain(base.name, self.name))
        weight = base.module.get_input_embeddings().weight
        if weight.is_floating_point() or is_wrapped(weight):
            own = sample(plain(weight.detach()))
            if own.shape != self.embeddings.shape:
                raise UnsupportedModel(
                    f"{_named(self.name)} has input embeddings of another shape than {base.name}"
                )
            difference = float((own - self.embeddings).norm() / self.embeddings.norm())
            if not difference <= _LIKE:
                raise UnsupportedModel(
                    f"{_named(self.name)}, whose input embeddings differ from those of {base.name} "
                    f"by {difference:.2g} of their size; expected at most {_LIKE}, as in the model "
                    "that it was quantized from"
                )
        log.info("%s takes prefixes of %s (%s)", base.name, self.name, self.fingerprint)
        return replace(base, fingerprint=self.fingerprint, own_fingerprint=base.fingerprint)


def read_original(model: str, *, cache_dir: Path) -> Original:
    """Read ``model`` (as for ``load_base``) and compute its fingerprint. The weights of safetensors
    are mapped, not copied, and dropped afterwards. Raises as ``load_base`` does."""
    source, name, config = _find_plain(model, cache_dir=cache_dir)
    tokenizer = read_tokenizer(source)
    module = read_weights(source, config)
    return Original(
        name,
        fingerprint_of(module, tokenizer),
        config,
        tokenizer,
        sample(plain(module.get_input_embeddings().weight.detach())),
    )


def check_original(original: str, model: str, *, cache_dir: Path) -> None:
    """Raise UnsupportedModel unless ``model`` is quantized and agrees with ``original``, which is
    not, as far as configs and tokenizers say."""
    source, name, config = _find_plain(original, cache_dir=cache_dir)
    if model == "demo":  # finding it would convert it first
        raise UnsupportedModel(_plain(model, name))
    own_source, own_name, own_config = find_model(model, cache_dir=cache_dir)
    if scheme_of(own_config) is None:
        raise UnsupportedModel(_plain(own_name, name))
    expected = Original(name, "", config, read_tokenizer(source), torch.empty(0))
    require_agreement(own_config, read_tokenizer(own_source), expected, name=own_name)


def _find_plain(model: str, *, cache_dir: Path) -> tuple[str, str, Any]:
    """``find_model`` of an original. Raises UnsupportedModel also for a quantized model."""
    source, name, config = find_model(model, cache_dir=cache_dir)
    if scheme := scheme_of(config):
        raise UnsupportedModel(
            f"{_named(name)}: expected the model that the served one was quantized from; received "
            f"one that is quantized with {scheme}"
        )
    return source, name, config


def require_agreement(config: Any, tokenizer: Any, original: Original, *, name: str) -> None:
    """Raise UnsupportedModel unless a model's config and tokenizer are those of its original."""
    expected, got = _config_fields(original.config), _config_fields(config)
    for key in ("model_type", *sorted(expected.keys() | got.keys())):  # the plainest first
        if expected.get(key) != got.get(key):
            raise UnsupportedModel(
                f"{_named(original.name)}, whose {key} is {_short(expected.get(key))}; {name} has "
                f"{_short(got.get(key))}: expected the model that it was quantized from"
            )
    texts = _tokenizer_parts(original.tokenizer), _tokenizer_parts(tokenizer)
    for key in sorted(texts[0].keys() | texts[1].keys()):
        if texts[0].get(key) != texts[1].get(key):
            raise UnsupportedModel(
                f"{_named(original.name)}, whose tokenizer ({len(original.tokenizer)} tokens) has "
                f"another {key} than that of {name} ({len(tokenizer)} tokens); expected the same"
            )


def _named(original: str) -> str:
    return f"fingerprint_of names {original}"


def _plain(name: str, original: str) -> str:
    return (
        f"{_named(original)} as the original of {name}, which is not quantized; expected a "
        "quantized model, or no original"
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _config_fields(config: Any) -> dict[str, Any]:
    fields = json.loads(json.dumps(config.get_text_config(decoder=True).to_dict(), default=str))
    return {key: value for key, value in fields.items() if key not in _IGNORED}


def _tokenizer_parts(tokenizer: Any) -> dict[str, Any]:
    """What decides the ids of a text; truncation and padding are settings of a call."""
    parts: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return {key: value for key, value in parts.items() if key not in {"truncation", "padding"}}
