"""PEFT's ``adapter_config.json``, read strictly and believed as little as possible.

Shapes come from the base; where the config speaks of them it must agree with the base. Paths in it
(PEFT opens ``prompt_tuning_init_state_dict_path``) are data here, and nothing follows them.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from prefixd.store.artifact.base import BaseSpec
from prefixd.store.artifact.strict_json import StrictJsonError, parse_object, shown
from prefixd.store.errors import ArtifactRefused

MAX_CONFIG_BYTES = 256 * 1024
"""CPT lists its token ids three times over; all others stay under 2 KiB."""

MAX_BASE_NAME_CHARACTERS = 512


class Kind(StrEnum):
    """What a prefix is made of; all compile to KV."""

    SOFT_PROMPT = "soft_prompt"
    KV_PREFIX = "kv_prefix"
    HARD_PROMPT = "hard_prompt"


KINDS = {
    "PROMPT_TUNING": Kind.SOFT_PROMPT,
    "P_TUNING": Kind.SOFT_PROMPT,
    "CPT": Kind.SOFT_PROMPT,
    "MULTITASK_PROMPT_TUNING": Kind.SOFT_PROMPT,
    "PREFIX_TUNING": Kind.KV_PREFIX,
    "CARTRIDGE": Kind.KV_PREFIX,
}
"""The PEFT types served. The type alone decides the kind: where hidden size and KV width happen to
be equal, the tensor's shape could not."""

MULTITASK = "MULTITASK_PROMPT_TUNING"


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """What is taken from an ``adapter_config.json``; ``fields`` is all of it, as parsed."""

    peft_type: str
    num_virtual_tokens: int
    base_model_name_or_path: str | None
    fields: dict[str, Any]

    @property
    def kind(self) -> Kind:
        """Soft prompt or KV prefix."""
        return KINDS[self.peft_type]


def parse_config(raw: bytes) -> PeftConfig:
    """Parse the bytes of an ``adapter_config.json``; raise ArtifactRefused."""
    if len(raw) > MAX_CONFIG_BYTES:
        raise _malformed(f"expected at most {MAX_CONFIG_BYTES} bytes, got {len(raw)}")
    try:
        fields = parse_object(raw)
    except StrictJsonError as error:
        raise _malformed(str(error)) from None
    return from_fields(fields)


def from_fields(fields: dict[str, Any]) -> PeftConfig:
    """Judge an already parsed config by itself, without a base; raise ArtifactRefused."""
    peft_type = fields.get("peft_type")
    if not isinstance(peft_type, str) or peft_type not in KINDS:
        raise ArtifactRefused(
            "unsupported_peft_type",
            f"expected peft_type to be one of {', '.join(KINDS)}; got {shown(peft_type)}",
            param="peft_type",
        )
    _check_task_type(fields)
    count = fields.get("num_virtual_tokens")
    if type(count) is not int or count < 1:
        raise ArtifactRefused(
            "malformed_config",
            f"expected num_virtual_tokens to be a whole number from 1; got {shown(count)}",
            param="num_virtual_tokens",
        )
    return PeftConfig(peft_type, count, _base_name(fields), fields)


def check_against_base(config: PeftConfig, base: BaseSpec) -> None:
    """Refuse a config that says it was trained for other shapes; raise ArtifactRefused.

    For a KV prefix this is more than courtesy: 10 layers of 9 heads are exactly as wide as 30
    layers of 3, and the tensor alone would pass.
    """
    _check_virtual_tokens(config, base.max_virtual_tokens)
    expected = {"num_layers": base.num_layers, "token_dim": base.hidden_size}
    if config.kind is Kind.KV_PREFIX:
        # PEFT saves the KV heads and the KV width here, also under grouped-query attention.
        expected["token_dim"] = base.num_kv_heads * base.head_dim
        expected["num_attention_heads"] = base.num_kv_heads
    for field, want in expected.items():
        got = config.fields.get(field)
        if got is not None and (type(got) is not int or got != want):
            raise ArtifactRefused(
                "base_mismatch",
                f"the config says {field} {shown(got)}, but {config.peft_type} for the base "
                f"{base.name} needs {want}: this prefix was trained on another model",
                param=field,
            )
    submodules = config.fields.get("num_transformer_submodules")
    if submodules is not None and (type(submodules) is not int or submodules != 1):
        raise ArtifactRefused(
            "encoder_decoder",
            "expected num_transformer_submodules 1, for a decoder-only base, which stores "
            f"{config.num_virtual_tokens} rows; got {shown(submodules)}"
            + _rows_stored(submodules, config.num_virtual_tokens),
            param="num_transformer_submodules",
        )


def _rows_stored(submodules: object, count: int) -> str:
    if type(submodules) is not int or not 1 < submodules < 2**16:
        return ""
    return f", which stores {submodules * count}"


def _check_virtual_tokens(config: PeftConfig, limit: int) -> None:
    if config.num_virtual_tokens > limit:
        raise ArtifactRefused(
            "too_many_virtual_tokens",
            f"expected at most {limit} virtual tokens, got {shown(config.num_virtual_tokens)}",
            param="num_virtual_tokens",
        )


def _check_task_type(fields: dict[str, Any]) -> None:
    # PEFT skips the prefix in silence under a null task_type; the trained tensor is the same.
    task_type = fields.get("task_type")
    if task_type is not None and task_type != "CAUSAL_LM":
        raise ArtifactRefused(
            "unsupported_task_type",
            f"expected task_type CAUSAL_LM or null, got {shown(task_type)}: this server runs "
            "causal language models only",
            param="task_type",
        )


def _base_name(fields: dict[str, Any]) -> str | None:
    name = fields.get("base_model_name_or_path")
    if name is None:
        return None
    if not isinstance(name, str):
        raise _malformed(
            f"expected a string or null, got {shown(name)}", param="base_model_name_or_path"
        )
    if len(name) > MAX_BASE_NAME_CHARACTERS or not name.isprintable():
        raise _malformed(
            f"expected at most {MAX_BASE_NAME_CHARACTERS} printable characters, got {shown(name)}",
            param="base_model_name_or_path",
        )
    return name


def _malformed(message: str, *, param: str = "config") -> ArtifactRefused:
    return ArtifactRefused("malformed_config", f"adapter_config.json: {message}", param=param)
