"""Find how large the inputs of a model's products become in ordinary text."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from prefixd.server.model.architecture import UnsupportedModel
from prefixd.server.model.int8 import Peaks
from prefixd.server.model.load import LoadedBase
from prefixd.server.model.module_decoder import ModuleDecoder
from prefixd.server.model.plain_texts import count_blocks, run_texts


def find_peaks(base: LoadedBase, texts: Sequence[list[int]], *, block_size: int) -> list[Peaks]:
    """Run texts through the unmodified module of an exact family and return the peaks of every
    layer. Raises UnsupportedModel for inputs that are not finite."""
    blocks = 1 + count_blocks(texts, block_size)
    decoder = ModuleDecoder(base, num_blocks=blocks, block_size=block_size)
    with ExitStack() as watching:
        watched = [watching.enter_context(_watch(layer)) for layer in base.module.model.layers]
        for _ in run_texts(decoder, texts):
            pass
    for index, seen in enumerate(watched):
        for name, peaks in seen.items():
            if not peaks.isfinite().all():
                raise UnsupportedModel(
                    f"{base.name}, layer {index}: the inputs of {name} reach {float(peaks.amax())} "
                    "in the calibration text; expected finite ones"
                )
    return [Peaks(seen["q"], seen.get("gate"), seen.get("down")) for seen in watched]


@contextmanager
def _watch(layer: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Yields the peaks of a layer's inputs [in] by the name of the product, kept up to date."""
    seen: dict[str, torch.Tensor] = {}
    products = {"q": layer.self_attn.q_proj}
    if hasattr(layer.mlp, "gate_proj"):
        products |= {"gate": layer.mlp.gate_proj, "down": layer.mlp.down_proj}

    def see(name: str, inputs: torch.Tensor) -> None:
        peaks = inputs.abs().flatten(0, -2).amax(0).float()
        seen[name] = torch.maximum(seen[name], peaks) if name in seen else peaks

    hooks = [
        product.register_forward_pre_hook(lambda _, given, name=name: see(name, given[0]))
        for name, product in products.items()
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
