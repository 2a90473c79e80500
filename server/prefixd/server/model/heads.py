"""Which models several processes can share: each has a part of the attention heads."""

from dataclasses import replace
from typing import Any

from prefixd.server.model.architecture import Shape, UnsupportedModel
from prefixd.server.model.quantized import refuse_divided

_HEADS = ({"q_proj", "k_proj", "v_proj"}, {"query_key_value"})
"""The projections that a plan must cut by head, as attention and the KV pool are cut: those of one
of these sets."""


def refuse_indivisible(config: Any, *, ranks: int) -> None:
    """Raise UnsupportedModel for the config of a model that ``ranks`` processes cannot share."""
    refuse_divided(config, ranks=ranks)
    text = config.get_text_config(decoder=True)
    plan = getattr(text, "base_model_tp_plan", None) or {}
    cut = {name.rpartition(".")[2] for name, style in plan.items() if style == "colwise"}
    if not any(cut.issuperset(heads) for heads in _HEADS):
        raise UnsupportedModel(
            f"{config.model_type}: transformers has no plan that cuts its attention by head, so "
            "it cannot be served with tensor_parallel"
        )
    heads = int(text.num_attention_heads)
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    for what, count in (("KV heads", kv_heads), ("attention heads", heads)):
        if count % ranks:
            fitting = [str(n) for n in range(2, kv_heads + 1) if kv_heads % n == heads % n == 0]
            expected = " or ".join(fitting) or "1, which is no tensor parallel"
            raise UnsupportedModel(
                f"{config.model_type} has {count} {what}, which {ranks} ranks cannot share "
                f"evenly; expected a tensor_parallel of {expected}"
            )


def local_shape(shape: Shape, *, ranks: int) -> Shape:
    """What one rank holds of a model's heads."""
    return replace(
        shape, num_heads=shape.num_heads // ranks, num_kv_heads=shape.num_kv_heads // ranks
    )
