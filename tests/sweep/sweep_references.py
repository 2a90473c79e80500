"""Greedy tokens of PEFT and transformers, for one unpadded request, with their margin."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache, DynamicCache

from prefixd.server.model.load import LoadedBase
from prefixd.server.model.prefix import KVPrefix, Prefix, SoftPrompt
from tests.golden.placed import Piece

COUNT = 32
"""Tokens of each output: past any window of the sweep."""


@dataclass(frozen=True)
class Greedy:
    """``tokens``, and the least difference between the two largest logits of any of them, as a
    multiple of the logits' standard deviation. Where it is small, rounding may decide."""

    tokens: list[int]
    margin: float


Reference = Callable[[list[int]], Greedy]
"""The tokens after a prompt."""

_SETTINGS: dict[str, Any] = {
    "max_new_tokens": COUNT,
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": 0,
    "return_dict_in_generate": True,
    "output_logits": True,
}


@torch.no_grad()
def generate(model: Any, prompt: list[int], *, extra: int = 0, **inputs: Any) -> Greedy:
    """The tokens that ``model.generate`` appends. ``extra`` counts positions that are in
    ``inputs`` and not in the prompt."""
    ids = torch.tensor([prompt])
    if "inputs_embeds" not in inputs:
        inputs["input_ids"] = ids
    mask = torch.ones(1, extra + len(prompt), dtype=torch.long)
    out = model.generate(attention_mask=mask, **inputs, **_SETTINGS)
    return _greedy(torch.stack(out.logits)[:, 0])


def _greedy(logits: torch.Tensor) -> Greedy:
    """What was chosen by ``logits`` [COUNT, vocab_size]."""
    best, tokens = logits.topk(2)
    margin = float(((best[:, 0] - best[:, 1]) / logits.std(-1)).min())
    return Greedy(tokens[:, 0].tolist(), margin)


@torch.no_grad()
def _generate_after(model: Any, prompt: list[int], cache: Cache) -> Greedy:
    """The tokens after a prompt whose prefix is in ``cache``, pass by pass: ``model.generate`` of
    some families (MPT) runs the last token alone when it is given a cache."""
    ids, logits = torch.tensor([prompt]), []
    for _ in range(COUNT):
        mask = torch.ones(1, cache.get_seq_length() + ids.shape[1], dtype=torch.long)
        output = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        logits.append(output.logits[0, -1])
        ids = logits[-1].argmax()[None, None]
    return _greedy(torch.stack(logits))


def of_base(model: Any, before: list[int]) -> Reference:
    """transformers, with the tokens ``before`` in front of the prompt."""
    return lambda prompt: generate(model, [*before, *prompt])


def of_peft(wrapped: Any) -> Reference:
    """PEFT's own ``generate``."""
    return lambda prompt: generate(wrapped, prompt)


def of_prefix(model: Any, prefix: Prefix, base: LoadedBase) -> Reference:
    """transformers with the embeddings, or the keys and values, that prefixd serves."""
    if isinstance(prefix, SoftPrompt):
        rows = (0, prefix.num_tokens)
        return lambda prompt: _after_pieces(model, prefix.embeddings, [rows, prompt])
    assert isinstance(prefix, KVPrefix)
    return lambda prompt: _generate_after(model, prompt, _cache(model, prefix, base))


PIECES = 9
"""Virtual tokens of a placed prompt in front; the others stand in the middle of the prompt."""


def placed_pieces(length: int, prompt: list[int]) -> list[Piece]:
    """Where the virtual tokens of a soft prompt of ``length`` stand among those of a prompt."""
    middle = len(prompt) // 2
    return [(0, PIECES), prompt[:middle], (PIECES, length), prompt[middle:]]


def of_placed(model: Any, embeddings: torch.Tensor) -> Reference:
    """transformers with a soft prompt in two places of the prompt."""
    length = len(embeddings)
    return lambda prompt: _after_pieces(model, embeddings, placed_pieces(length, prompt))


def _after_pieces(model: Any, embeddings: torch.Tensor, pieces: list[Piece]) -> Greedy:
    """The tokens after words and rows of ``embeddings``. Where ``generate`` takes no embeddings,
    each is that of a pass over the whole text, without a cache."""
    words = model.get_input_embeddings()
    parts = [
        words(torch.tensor(piece)) if isinstance(piece, list) else embeddings[slice(*piece)]
        for piece in pieces
    ]
    inputs = torch.cat(parts)
    try:
        return generate(model, [], extra=len(inputs), inputs_embeds=inputs[None])
    except (ValueError, RuntimeError) as error:
        if "inputs_embeds" not in str(error):
            raise
    ids = [
        token
        for piece in pieces
        for token in (piece if isinstance(piece, list) else [_NO_TOKEN] * (piece[1] - piece[0]))
    ]
    logits: list[torch.Tensor] = []
    with torch.no_grad():
        for _ in range(COUNT):
            layers = _per_layer(model, ids)
            output = model(inputs_embeds=inputs[None], use_cache=False, **layers)
            logits.append(output.logits[0, -1])
            ids.append(int(logits[-1].argmax()))
            inputs = torch.cat([inputs, words(torch.tensor(ids[-1:]))])
    return _greedy(torch.stack(logits))


_NO_TOKEN = 0
"""The id of the padding token."""


def _per_layer(model: Any, ids: list[int]) -> dict[str, torch.Tensor]:
    """What each layer of Gemma 4 looks up by token: for virtual tokens, as for images, by the
    padding token."""
    if not getattr(model.config, "hidden_size_per_layer_input", None):
        return {}
    return {"per_layer_inputs": model.model.get_per_layer_inputs(torch.tensor([ids]), None)}


def _cache(model: Any, prefix: KVPrefix, base: LoadedBase) -> DynamicCache:
    """transformers' cache, whose layers with a window keep what is inside of it."""
    config, heads = model.config.get_text_config(), base.shape.num_kv_heads
    # [2 * num_layers, 1, num_kv_heads, num_tokens, head_dim]
    split = prefix.kv.view(len(prefix.kv), 1, prefix.num_tokens, heads, -1).transpose(2, 3)
    cache = DynamicCache(config=config)
    for layer in range(len(split) // 2):
        cache.update(split[2 * layer], split[2 * layer + 1], layer)
    return cache
