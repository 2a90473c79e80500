"""Families whose attention is code of its own, outside transformers' attention interface.

Each module here has a subclass of a family's attention that computes over KV blocks while a pass
runs, and as transformers does otherwise: the self-check compares with that.
"""

from importlib import import_module
from typing import Any

from prefixd.server.model.attention import IMPLEMENTATION

FAMILIES = frozenset(
    {"bloom", "codegen", "falcon", "gpt_neo", "gpt_neox_japanese", "gptj", "mpt", "xglm"}
)
"""Model types, and the modules that adapt them. Each is imported when such a model is loaded."""

_SDPA = "sdpa"


def adapt(module: Any) -> None:
    """Let a transformers causal LM attend over KV blocks: through transformers' interface, or by
    code of ours. Raises ValueError for a model that accepts neither."""
    kind = module.config.model_type
    if kind in FAMILIES:
        import_module(f"{__name__}.{kind}").adapt(module)
    use_attention(module, IMPLEMENTATION)


def use_attention(module: Any, implementation: str) -> None:
    """Set the attention of passes to come. Raises ValueError for one that the model lacks."""
    if module.config.model_type not in FAMILIES:
        module.set_attn_implementation(implementation)
        return
    if implementation == _SDPA and not getattr(module, "_supports_sdpa", False):
        raise ValueError(f"{type(module).__name__} has no attention by {implementation}")
    module.config._attn_implementation = implementation  # noqa: SLF001  # there is no other way


def reference_attention(module: Any) -> str:
    """The attention that is right by itself. Falcon's eager one adds ALiBi twice."""
    return _SDPA if module.config.model_type == "falcon" else "eager"
