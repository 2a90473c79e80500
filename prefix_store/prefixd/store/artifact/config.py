"""What an upload says of itself: PEFT's ``adapter_config.json`` and metadata; and the base model
it is checked against.

Shapes come from the base; where the config states them it must agree with the base. Paths in the
config (PEFT opens ``prompt_tuning_init_state_dict_path``) are data here, and are never opened.

Metadata is free, with a few known fields::

    {"labels": {"team": "search"}, "description": "…", "prompt_template": "Q: {prompt}\\nA:",
     "base_fingerprint": "…", "task_id": 1, "anything": ["else"]}
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from prefixd.store.artifact.strict import StrictJsonError, canonical, parse_object, shown
from prefixd.store.errors import ArtifactRefused, quoted


class Kind(StrEnum):
    """What a prefix is made of; all compile to KV."""

    SOFT_PROMPT = "soft_prompt"
    KV_PREFIX = "kv_prefix"
    HARD_PROMPT = "hard_prompt"
    ADAPTION_PROMPT = "adaption_prompt"

    @property
    def takes_positions(self) -> bool:
        """Whether its virtual tokens come before the real ones; an adaption prompt is attended to
        in addition to them."""
        return self is not Kind.ADAPTION_PROMPT


@dataclass(frozen=True, slots=True)
class BaseSpec:
    """The served base: shapes an artifact must match and bounds its values must satisfy.

    ``embedding_width`` is that of the input embeddings, which may be narrower than the hidden size.
    ``dtype`` is the serving dtype (``float32``, ``float16`` or ``bfloat16``): values are checked
    after the cast to it. ``max_abs_embedding`` and ``max_abs_kv`` bound |x| of a soft prompt and
    of a KV prefix; the server derives them from the values the base itself produces.
    ``encoder_layers`` is None for a decoder. ``num_layers`` are those of the decoder.
    ``refused_kinds`` are those that the base cannot take, each with the reason: "expected …".
    ``attention_module`` is the name of a layer's attention, with ``{}`` for the layer, where the
    base takes adaption prompts.
    """

    name: str
    fingerprint: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    embedding_width: int
    max_virtual_tokens: int
    dtype: str
    max_abs_embedding: float
    max_abs_kv: float
    encoder_layers: int | None = None
    refused_kinds: Mapping[Kind, str] = field(default_factory=dict)
    attention_module: str | None = None

    @property
    def kv_width(self) -> int:
        """Columns of a KV prefix: layers × (K and V) × KV heads × head_dim."""
        return self.prefix_layers * 2 * self.num_kv_heads * self.head_dim

    @property
    def prefix_layers(self) -> int:
        """Layers of a KV prefix. PEFT counts those of the encoder, where there is one, which are
        too few for a longer decoder: its config must then name the decoder's."""
        return max(self.num_layers, self.encoder_layers or 0)

    @property
    def task_type(self) -> str:
        """PEFT's name for what the base does."""
        return "CAUSAL_LM" if self.encoder_layers is None else SEQ_2_SEQ

    def require_kind(self, kind: Kind) -> None:
        """Raise ArtifactRefused for a kind that the base cannot take."""
        reason = self.refused_kinds.get(kind)
        if reason is None and kind is Kind.ADAPTION_PROMPT and self.attention_module is None:
            reason = "expected another kind, since this server has no place for one"
        if reason is not None:
            raise ArtifactRefused(
                "unsupported_kind", f"{kind} on the base {self.name}: {reason}", param="kind"
            )


MAX_CONFIG_BYTES = 256 * 1024
"""CPT repeats its token ids three times; all other types stay under 2 KiB."""

MAX_BASE_NAME_CHARACTERS = 512

MAX_METADATA_BYTES = 16 * 1024
MAX_LABELS = 32
MAX_LABEL_CHARACTERS = 128

METADATA_TEXTS = ("description", "prompt_template", "base_fingerprint")
"""Known fields of the metadata that hold a string."""


KINDS = {
    "PROMPT_TUNING": Kind.SOFT_PROMPT,
    "P_TUNING": Kind.SOFT_PROMPT,
    "CPT": Kind.SOFT_PROMPT,
    "MULTITASK_PROMPT_TUNING": Kind.SOFT_PROMPT,
    "PREFIX_TUNING": Kind.KV_PREFIX,
    "CARTRIDGE": Kind.KV_PREFIX,
    "ADAPTION_PROMPT": Kind.ADAPTION_PROMPT,
}
"""The PEFT types served. The type alone decides the kind: where embedding width and KV width are
equal, the tensor's shape cannot."""

CHANGES_LAYERS = (
    "LORA",
    "ADALORA",
    "XLORA",
    "IA3",
    "LOHA",
    "LOKR",
    "OFT",
    "BOFT",
    "VERA",
    "LN_TUNING",
)
"""PEFT types that change the layers of the base, which people have next to prefixes."""

_LAYERS = (
    ", which changes the layers of the base; here all requests run through the same layers, "
    "so merge it into a base of its own (docs/decisions/0023-lora-stays-outside.md)"
)

MULTITASK = "MULTITASK_PROMPT_TUNING"

SEQ_2_SEQ = "SEQ_2_SEQ_LM"

TRAINED_ELSEWHERE = (
    "modules_to_save",
    "trainable_token_indices",
    "target_modules",
    "target_parameters",
    "layers_to_transform",
    "layers_pattern",
    "layer_replication",
    "bias",
)
"""Fields that, when set, mean weights outside the prefix or a prefix for some layers only. The base
is frozen and shared: serving the prefix without them would give other outputs than in training."""


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """The fields used of an ``adapter_config.json``; ``fields`` is all of it, as parsed.

    An adaption prompt has ``adapter_len`` virtual tokens, in the last ``adapter_layers`` layers.
    """

    kind: Kind
    peft_type: str
    num_virtual_tokens: int
    base_model_name_or_path: str | None
    fields: dict[str, Any]
    adapter_layers: int = 0


def parse_config(raw: bytes) -> PeftConfig:
    """Parse the bytes of an ``adapter_config.json``; raise ArtifactRefused."""
    if len(raw) > MAX_CONFIG_BYTES:
        raise _malformed_config(f"expected at most {MAX_CONFIG_BYTES} bytes, got {len(raw)}")
    try:
        fields = parse_object(raw)
    except StrictJsonError as error:
        raise _malformed_config(str(error)) from None
    return from_fields(fields)


def from_fields(fields: dict[str, Any]) -> PeftConfig:
    """Check a parsed config by itself, without a base; raise ArtifactRefused."""
    peft_type = fields.get("peft_type")
    if not isinstance(peft_type, str) or peft_type not in KINDS:
        raise ArtifactRefused(
            "unsupported_peft_type",
            f"expected peft_type to be one of {', '.join(KINDS)}; got {shown(peft_type)}"
            f"{_LAYERS if peft_type in CHANGES_LAYERS else ''}",
            param="peft_type",
        )
    # PEFT silently skips the prefix when task_type is null; the trained tensor is the same.
    task_type = fields.get("task_type")
    if task_type not in (None, "CAUSAL_LM", SEQ_2_SEQ):
        raise ArtifactRefused(
            "unsupported_task_type",
            f"expected task_type CAUSAL_LM, {SEQ_2_SEQ} or null, got {shown(task_type)}: this "
            "server runs language models only",
            param="task_type",
        )
    kind, layers = KINDS[peft_type], 0
    if kind is Kind.ADAPTION_PROMPT:
        count, layers = _count(fields, "adapter_len"), _count(fields, "adapter_layers")
    else:
        count = _count(fields, "num_virtual_tokens")
    base_name = fields.get("base_model_name_or_path")
    if base_name is not None:
        _check_base_name(base_name)
    _check_trained_elsewhere(fields, kind)
    return PeftConfig(kind, peft_type, count, base_name, fields, layers)


def _count(fields: dict[str, Any], name: str) -> int:
    count = fields.get(name)
    if type(count) is not int or count < 1:
        raise ArtifactRefused(
            "malformed_config",
            f"expected {name} to be a whole number from 1; got {shown(count)}",
            param=name,
        )
    return count


def _check_trained_elsewhere(fields: dict[str, Any], kind: Kind) -> None:
    for name in TRAINED_ELSEWHERE:
        value = fields.get(name)
        if kind is Kind.ADAPTION_PROMPT and name == "target_modules":
            continue  # the attention of the base: see _check_adaption_prompt
        if value is None or value is False or value in ("", "none", [], {}):
            continue
        raise ArtifactRefused(
            "trained_elsewhere",
            f"expected {name} to be null or empty, got {shown(value)}: what it names was trained "
            "too and is not in the prefix's tensors, and this server runs the base unchanged",
            param=name,
        )


def check_against_base(config: PeftConfig, base: BaseSpec) -> None:
    """Refuse a config that states other shapes than the base's; raise ArtifactRefused.

    A KV prefix needs this: 10 layers of 9 heads are exactly as wide as 30 layers of 3, so the
    tensor's shape alone would pass.
    """
    base.require_kind(config.kind)
    _check_task(config, base)
    if config.num_virtual_tokens > base.max_virtual_tokens:
        raise ArtifactRefused(
            "too_many_virtual_tokens",
            f"expected at most {base.max_virtual_tokens} virtual tokens, "
            f"got {shown(config.num_virtual_tokens)}",
            param="num_virtual_tokens",
        )
    if config.kind is Kind.ADAPTION_PROMPT:
        _check_adaption_prompt(config, base)
        return
    name = config.base_model_name_or_path
    trained_on = f", {quoted(name)}" if name else ""
    expected = {
        "num_layers": base.encoder_layers or base.num_layers,
        "token_dim": base.embedding_width,
    }
    if config.kind is Kind.KV_PREFIX:
        # PEFT saves the KV heads and the KV width here, also under grouped-query attention.
        expected["num_layers"] = base.prefix_layers
        expected["token_dim"] = base.num_kv_heads * base.head_dim
        expected["num_attention_heads"] = base.num_kv_heads
    for key, want in expected.items():
        got = config.fields.get(key)
        if got is not None and (type(got) is not int or got != want):
            raise ArtifactRefused(
                "base_mismatch",
                f"the config says {key} {shown(got)}, but {config.peft_type} for the base "
                f"{base.name} needs {want}: this prefix was trained on another model{trained_on}",
                param=key,
            )


def stored_rows(config: PeftConfig, base: BaseSpec) -> int:
    """Rows of a prefix's tensor. For an encoder-decoder PEFT stores twice as many of a soft prompt,
    unless its config says otherwise, and uses the first ``num_virtual_tokens`` alone."""
    count = config.num_virtual_tokens
    if base.encoder_layers is None or config.kind is Kind.KV_PREFIX:
        return count
    submodules = config.fields.get("num_transformer_submodules")
    if submodules is None and config.fields.get("task_type") is None:
        return count
    return count if submodules == 1 else 2 * count


def _check_task(config: PeftConfig, base: BaseSpec) -> None:
    """Refuse what was trained for a base of the other kind, a decoder or an encoder-decoder."""
    task_type = config.fields.get("task_type")
    what = "a decoder" if base.encoder_layers is None else "an encoder-decoder"
    if task_type is not None and task_type != base.task_type:
        raise ArtifactRefused(
            "unsupported_task_type",
            f"expected task_type {base.task_type} or null for the base {base.name}, which is "
            f"{what}; got {shown(task_type)}",
            param="task_type",
        )
    if base.encoder_layers is not None and config.peft_type == "CPT":
        raise ArtifactRefused(
            "unsupported_peft_type",
            f"expected another peft_type than CPT for the base {base.name}, which is {what}: PEFT "
            "has none for such models",
            param="peft_type",
        )
    submodules = config.fields.get("num_transformer_submodules")
    if submodules is None:
        return
    served = [1] if base.encoder_layers is None else [1, 2]
    if base.encoder_layers is not None and config.kind is Kind.KV_PREFIX:
        served = [2]  # with 1, PEFT gives self- and cross-attention one cache
    if type(submodules) is not int or submodules not in served:
        raise ArtifactRefused(
            "encoder_decoder",
            f"expected num_transformer_submodules {' or '.join(map(str, served))} of "
            f"{config.peft_type} for the base {base.name}, which is {what}; got "
            f"{shown(submodules)}" + _rows_stored(submodules, config.num_virtual_tokens),
            param="num_transformer_submodules",
        )


def _check_adaption_prompt(config: PeftConfig, base: BaseSpec) -> None:
    assert base.attention_module is not None
    attention = base.attention_module.rpartition(".")[2]
    target = config.fields.get("target_modules")
    if target is not None and target != attention:
        raise ArtifactRefused(
            "base_mismatch",
            f"the config says target_modules {shown(target)}, but the attention of the base "
            f"{base.name} is {attention}: this prefix was trained on another model",
            param="target_modules",
        )
    if config.adapter_layers > base.num_layers:
        raise ArtifactRefused(
            "base_mismatch",
            f"the config says adapter_layers {shown(config.adapter_layers)}, but the base "
            f"{base.name} has {base.num_layers} layers: this prefix was trained on another model",
            param="adapter_layers",
        )


def _rows_stored(submodules: object, count: int) -> str:
    if type(submodules) is not int or not 1 < submodules < 2**16:
        return ""
    return f", which stores {submodules * count} rows of a soft prompt"


def _check_base_name(name: object) -> None:
    if not isinstance(name, str):
        raise _malformed_config(
            f"expected a string or null, got {shown(name)}", param="base_model_name_or_path"
        )
    if len(name) > MAX_BASE_NAME_CHARACTERS or not name.isprintable():
        raise _malformed_config(
            f"expected at most {MAX_BASE_NAME_CHARACTERS} printable characters, got {shown(name)}",
            param="base_model_name_or_path",
        )


def encode_metadata(metadata: Mapping[str, Any] | None, *, base: BaseSpec) -> str:
    """Metadata for ``base`` as one line of JSON.

    Raises ArtifactRefused ``malformed_metadata``, or ``wrong_base`` when it names another base.
    """
    encoded = encode_fields(metadata or {})
    declared = (metadata or {}).get("base_fingerprint")
    if declared is not None:
        _check_base(declared, base)
    return encoded


def encode_fields(metadata: Mapping[str, Any]) -> str:
    """Metadata as one line of JSON; raises ArtifactRefused ``malformed_metadata``."""
    try:
        fields = dict(metadata)
        raw = canonical(fields)
        if len(raw) > MAX_METADATA_BYTES:
            raise _malformed_metadata(
                f"expected metadata of at most {MAX_METADATA_BYTES} bytes as JSON, got {len(raw)}"
            )
        parse_object(raw)
    except (StrictJsonError, TypeError, ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, StrictJsonError) else "it is not JSON"
        raise _malformed_metadata(f"expected metadata to be a JSON object: {reason}") from None
    if fields.get("labels") is not None:
        _check_labels(fields["labels"])
    for name in METADATA_TEXTS:
        if not isinstance(fields.get(name), str | None):
            raise _malformed_metadata(f"expected {name} to be a string", param=f"metadata.{name}")
    return raw.decode("ascii")


def _check_labels(labels: object) -> None:
    if not isinstance(labels, dict) or len(labels) > MAX_LABELS:
        raise _malformed_metadata(
            f"expected labels to be an object of at most {MAX_LABELS} strings",
            param="metadata.labels",
        )
    for label, value in labels.items():
        if not isinstance(value, str) or max(len(label), len(value)) > MAX_LABEL_CHARACTERS:
            raise _malformed_metadata(
                f"expected the label {quoted(label)} to be a string of at most "
                f"{MAX_LABEL_CHARACTERS} characters",
                param="metadata.labels",
            )


def _check_base(declared: str, base: BaseSpec) -> None:
    if declared != base.fingerprint:
        raise ArtifactRefused(
            "wrong_base",
            f"expected a prefix for the base {base.name} with the fingerprint {base.fingerprint}, "
            f"and this one says it was made for {quoted(declared)}",
            param="metadata.base_fingerprint",
        )


def _malformed_config(message: str, *, param: str = "config") -> ArtifactRefused:
    return ArtifactRefused("malformed_config", f"adapter_config.json: {message}", param=param)


def _malformed_metadata(message: str, *, param: str = "metadata") -> ArtifactRefused:
    return ArtifactRefused("malformed_metadata", message, param=param)
