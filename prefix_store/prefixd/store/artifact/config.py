"""PEFT's ``adapter_config.json``, checked by itself and against the base.

Shapes come from the base; where the config states them it must agree with the base. Paths in the
config (PEFT opens ``prompt_tuning_init_state_dict_path``) are data here, and are never opened.
"""

from dataclasses import dataclass
from typing import Any

from prefixd.store.artifact.base_spec import SEQ_2_SEQ, BaseSpec
from prefixd.store.artifact.kinds import CHANGES_LAYERS, KINDS, Kind
from prefixd.store.artifact.strict import StrictJsonError, parse_object, shown
from prefixd.store.errors import ArtifactRefused, quoted

MAX_CONFIG_BYTES = 256 * 1024
"""CPT repeats its token ids three times; all other types stay under 2 KiB."""

MAX_BASE_NAME_CHARACTERS = 512


_LAYERS = (
    ", which changes the layers of the base; here all requests run through the same layers, "
    "so merge it into a base of its own (docs/decisions/0023-lora-stays-outside.md)"
)

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


def _malformed_config(message: str, *, param: str = "config") -> ArtifactRefused:
    return ArtifactRefused("malformed_config", f"adapter_config.json: {message}", param=param)
