"""Which models lean layers and native kernels compute: those built of known classes alone.

A class is compared by identity and by its place in transformers: a subclass, a replaced part, a
changed ``forward`` or a hook may compute something else under the same name.
"""

from typing import Any

import torch

from prefixd.server.model.load import LoadedBase
from prefixd.server.model.tensors import is_packed

_FAMILIES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "mixtral": "Mixtral",
    "qwen2": "Qwen2",
    "qwen2_moe": "Qwen2Moe",
    "qwen3": "Qwen3",
    "qwen3_moe": "Qwen3Moe",
}
"""Packages of transformers, with how the names of their classes begin."""

_CLASSES = (
    "Attention",
    "DecoderLayer",
    "Experts",
    "ForCausalLM",
    "MLP",
    "Model",
    "RMSNorm",
    "RotaryEmbedding",
    "SparseMoeBlock",
    "TopKRouter",
)
_COMMON = {
    "torch.nn.modules.activation.SiLU",
    "torch.nn.modules.container.ModuleList",
    "torch.nn.modules.linear.Linear",
    "torch.nn.modules.sparse.Embedding",
    "transformers.activations.SiLUActivation",
}


class NotExact(Exception):
    """The model is not of an exact family; the message says what differs."""


def require_plain(base: LoadedBase) -> None:
    """Raise NotExact for attention beyond that over all positions and over what a layer caches."""
    if beyond := base.layers.beyond_plain():
        raise NotExact(f"{base.name} has {beyond}; expected plain attention in all layers")


def require_exact(module: Any, name: str) -> None:
    """Raise NotExact unless every part of a model is one that lean layers know."""
    family = str(getattr(module.config, "model_type", None))
    if family not in _FAMILIES:
        raise NotExact(f"{name} is of the family {family}; expected one of {', '.join(_FAMILIES)}")
    known = _COMMON | {
        f"transformers.models.{family}.modeling_{family}.{_FAMILIES[family]}{kind}"
        for kind in _CLASSES
    }
    for part_name, part in module.named_modules():
        where = part_name or "its root"
        if _path(type(part)) not in known:
            raise NotExact(f"{name} has a {_path(type(part))} at {where}, which lean layers lack")
        if is_packed(part):
            raise NotExact(f"{name} has quantized weights at {where}, which lean layers lack")
        if "forward" in vars(part):
            raise NotExact(f"{name} has a changed forward at {where}")
        if part._forward_hooks or part._forward_pre_hooks:  # noqa: SLF001 - torch has no question for it
            raise NotExact(f"{name} has a hook at {where}")
    _require_one_value(module, name)


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _require_one_value(module: Any, name: str) -> None:
    """Lean layers compute all layers with one epsilon, one scale and one activation."""
    activation = getattr(module.config, "hidden_act", None)
    if activation not in {"silu", "swish"}:
        raise NotExact(f"{name} has the activation {activation}; expected silu")
    for what, attribute in (("epsilons of norms", "variance_epsilon"), ("scales", "scaling")):
        parts = [part for part in module.modules() if hasattr(part, attribute)]
        values = {float(getattr(part, attribute)) for part in parts}
        if len(values) != 1:
            raise NotExact(f"{name} has the {what} {sorted(values)}; expected one")
    meta = [key for key, value in module.state_dict().items() if value.device.type == "meta"]
    if meta:
        raise NotExact(f"{name} has weights that are not in memory: {meta[0]}")


def require_read(module: Any, name: str, read: set[str]) -> None:
    """Raise NotExact if the module has weights of other names than ``read``."""
    unread = set(module.state_dict()) - read
    if unread:
        raise NotExact(f"{name} has weights that lean layers do not read: {min(unread)}")


def require_rotated(cosine: torch.Tensor, head_dim: int, name: str) -> None:
    """Raise NotExact unless all of a head is rotated. ``cosine`` is [positions, rotated / 2]."""
    if 2 * cosine.shape[1] != head_dim:
        raise NotExact(
            f"{name} rotates {2 * cosine.shape[1]} of the {head_dim} dimensions of a head; "
            "expected all"
        )
