"""What the input of a model is besides looked up embeddings: other inputs, and a multiplier."""

import inspect
from collections.abc import Iterable
from typing import Any

import torch


def word_scale(module: Any) -> float:
    """What the embeddings of words are multiplied by before they are the input. Falcon-H1 does it
    where it gets token ids; others do it in the table or with any input."""
    config = module.config
    return float(config.embedding_multiplier) if config.model_type == "falcon_h1" else 1.0


def soft_prompt_refused(module: Any) -> str | None:
    """Why a model takes no soft prompts; None: it does.

    transformers and PEFT give a prompt behind one to the model as embeddings, and the tokens of the
    output as ids.
    """
    if module.config.model_type == "gemma3n_text":
        lost = "the embeddings that each layer looks up by token"
    elif word_scale(module) != 1.0:
        lost = f"the multiplier of their embeddings ({word_scale(module):g})"
    else:
        return None
    return (
        f"transformers and PEFT run the words of a prompt behind a soft prompt without {lost}, and "
        "those of the output with it"
    )


class PerLayerInputs:
    """The embeddings that every layer of Gemma 3n and 4 gets besides the input, looked up by
    token."""

    def __init__(self, module: Any) -> None:
        decoder = getattr(module, "base_model", None)
        config = getattr(decoder, "config", None)
        has_them = getattr(config, "hidden_size_per_layer_input", None)
        self._look_up = getattr(decoder, "get_per_layer_inputs", None) if has_them else None
        # Gemma 4's also takes embeddings.
        more = inspect.signature(self._look_up).parameters if self._look_up else ()
        self._others = [None] * (len(more) - 1)
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
        return {"per_layer_inputs": self._look_up(token_ids[None], *self._others)}
