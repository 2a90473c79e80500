"""Kinds of prefixes, and which PEFT type is of which kind."""

from enum import StrEnum


class Kind(StrEnum):
    """What a prefix is made of; all compile to KV. The last three are made of other versions."""

    SOFT_PROMPT = "soft_prompt"
    KV_PREFIX = "kv_prefix"
    HARD_PROMPT = "hard_prompt"
    ADAPTION_PROMPT = "adaption_prompt"
    STACK = "stack"
    BLEND = "blend"
    ENSEMBLE = "ensemble"

    @property
    def is_composed(self) -> bool:
        """Whether it is made of other versions: a stack, a blend or an ensemble."""
        return self in {Kind.STACK, Kind.BLEND, Kind.ENSEMBLE}

    @property
    def is_soft(self) -> bool:
        """Whether its virtual tokens are embeddings, which may stand inside a prompt."""
        return self in {Kind.SOFT_PROMPT, Kind.BLEND}

    @property
    def takes_positions(self) -> bool:
        """Whether its virtual tokens come before the real ones; an adaption prompt is attended to
        in addition to them."""
        return self is not Kind.ADAPTION_PROMPT


class TextRole(StrEnum):
    """Where a hard prompt stands: in front of the prompt, or as the system turn of a chat."""

    RAW = "raw"
    SYSTEM = "system"


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

MULTITASK = "MULTITASK_PROMPT_TUNING"
