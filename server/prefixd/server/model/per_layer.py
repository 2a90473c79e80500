"""Embeddings that every layer gets besides the input: those of Gemma 4, looked up by token."""

from collections.abc import Iterable
from typing import Any

import torch


class PerLayerInputs:
    """The per-layer embeddings of a model that has them."""

    def __init__(self, module: Any) -> None:
        decoder = getattr(module, "base_model", None)
        config = getattr(decoder, "config", None)
        has_them = getattr(config, "hidden_size_per_layer_input", None)
        self._look_up = getattr(decoder, "get_per_layer_inputs", None) if has_them else None
        self._pad = getattr(config, "pad_token_id", None) or 0

    def __call__(
        self, token_ids: torch.Tensor, given: Iterable[slice] = ()
    ) -> dict[str, torch.Tensor]:
        """The arguments of the module for ``token_ids`` [num_tokens]: none for most models.

        Where the input is ``given`` as an embedding there is no token: transformers takes the
        padding token there for images. Without these arguments it would search the embedding table
        for the inputs, and fail where one is not in it.
        """
        if self._look_up is None:
            return {}
        token_ids = token_ids.clone()
        for places in given:
            token_ids[places] = self._pad
        return {"per_layer_inputs": self._look_up(token_ids[None], None)}
