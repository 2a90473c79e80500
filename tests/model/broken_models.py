"""Small models, right ones and models that are wrong in one way each, for the self-check."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaModel, LlamaRotaryEmbedding
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

VOCAB = 97
SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GATED = {
    **SMALL,
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
EXPERTS = {**GATED, "num_experts_per_tok": 2}


def random_model(config: Any, *, seed: int = 0) -> Any:
    """A random model whose logits depend strongly on its input."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data.mul_(4)
    return model


def right_models() -> dict[str, Any]:
    """Configs of models that must pass."""
    return {
        "llama": transformers.LlamaConfig(**GATED),
        "gpt2": transformers.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4),
        "opt": transformers.OPTConfig(**SMALL, ffn_dim=48, word_embed_proj_dim=32),
        "mixtral": transformers.MixtralConfig(**EXPERTS, num_local_experts=4, sliding_window=None),
        "olmoe": transformers.OlmoeConfig(**EXPERTS, num_experts=8),
        "yarn": transformers.LlamaConfig(
            **GATED,
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            },
        ),
    }


Change = Callable[[torch.Tensor], torch.Tensor]
"""A function of the hidden states [1, num_tokens, hidden_size] of one pass."""


def changed(change: Change, **config: Any) -> Any:
    """A Llama whose first layer applies ``change`` to the output of its MLP."""
    model = random_model(transformers.LlamaConfig(**{**GATED, **config}))

    class ChangedMLP(LlamaMLP):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return change(super().forward(x))

    model.model.layers[0].mlp.__class__ = ChangedMLP
    return model


def pooled(x: torch.Tensor) -> torch.Tensor:
    """Adds the mean over all tokens of the pass."""
    return x + x.mean(1, keepdim=True)


def looks_ahead(x: torch.Tensor) -> torch.Tensor:
    """Adds the next token's state, where the pass has one."""
    return x + torch.nn.functional.pad(x[:, 1:], (0, 0, 0, 1))


def shifted(x: torch.Tensor) -> torch.Tensor:
    """Adds the previous token's state, zeros at the start of the pass: causal, but by chunk."""
    return x + torch.nn.functional.pad(x[:, :-1], (0, 0, 1, 0))


def quantised(x: torch.Tensor) -> torch.Tensor:
    """Rounds to 256 steps of the largest value in the pass."""
    step = x.abs().amax() / 127
    return (x / step).round() * step


def normed(x: torch.Tensor) -> torch.Tensor:
    """Divides by the standard deviation over the tokens of the pass."""
    return x / (x.std(1, keepdim=True, unbiased=False) + 1)


def slightly_by_chunk(x: torch.Tensor) -> torch.Tensor:
    """Scales the first token of a pass by less than the rounding of bfloat16."""
    first = torch.ones_like(x)
    first[:, 0] += 2**-9
    return x * first


def wrong_in_long_passes(x: torch.Tensor) -> torch.Tensor:
    """Scales tokens by their index in the pass, beyond 200: a floor of the position by mistake."""
    index = torch.arange(x.shape[1], device=x.device)[None, :, None]
    return x * (1 + (index // 200).to(x.dtype))


def wrong_in_batches(x: torch.Tensor) -> torch.Tensor:
    """Scales all tokens but the first in a pass of sixteen: a batch of sixteen sequences."""
    return torch.cat([x[:, :1], x[:, 1:] * 2], 1) if x.shape[1] == 16 else x


def wrong_past_500(x: torch.Tensor) -> torch.Tensor:
    """Scales tokens whose index in the pass is past 500."""
    index = torch.arange(x.shape[1], device=x.device)[None, :, None]
    return torch.where(index > 500, x * 2, x)


def limited_capacity() -> Any:
    """A Mixtral whose experts take at most twice their even share of a pass, and at least four."""
    config = transformers.MixtralConfig(**EXPERTS, num_local_experts=8, sliding_window=None)
    model = random_model(config)

    class Limited(MixtralTopKRouter):
        def forward(self, hidden_states: torch.Tensor) -> Any:
            logits, weights, chosen = super().forward(hidden_states)
            capacity = max(4, 2 * chosen.numel() // 8)
            taken = torch.nn.functional.one_hot(chosen, 8).flatten(0, 1).cumsum(0)  # [T * k, E]
            rank = taken.gather(1, chosen.reshape(-1, 1)).view(chosen.shape)
            return logits, torch.where(rank <= capacity, weights, 0), chosen

    for layer in model.model.layers:
        layer.mlp.gate.__class__ = Limited
    return model


def rotated_by_length(rope_type: str) -> Any:
    """A Llama whose rotary frequencies depend on the longest position of a pass, past 64. Its own
    config, which would be refused by name, does not show it."""
    model = random_model(transformers.LlamaConfig(**GATED))
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 8.0}
    if rope_type == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
        rope["original_max_position_embeddings"] = 64
    config = transformers.LlamaConfig(**{**GATED, "max_position_embeddings": 64})
    config.rope_parameters = rope
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    return model


def bidirectional(num_layers: int) -> Any:
    """A Llama whose own attention sees later tokens."""
    config = transformers.LlamaConfig(**{**GATED, "num_hidden_layers": num_layers})
    config.is_causal = False
    return random_model(config)


def sees_a_whole_beginning() -> Any:
    """A Llama as a prefix language model: its first eight tokens see each other."""
    model = random_model(transformers.LlamaConfig(**GATED))

    class PrefixLM(LlamaModel):
        def forward(self, input_ids: Any = None, inputs_embeds: Any = None, **kwargs: Any) -> Any:
            embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            length = embeds.shape[1]
            seen = torch.ones(length, length, dtype=torch.bool).tril()
            seen[:8, :8] = True
            hidden = torch.finfo(embeds.dtype).min
            kwargs["attention_mask"] = torch.where(seen, 0.0, hidden).to(embeds)[None, None]
            return super().forward(inputs_embeds=embeds, **kwargs)

    model.model.__class__ = PrefixLM
    return model


BROKEN: dict[str, tuple[Callable[[], Any], str]] = {
    "pooled": (lambda: changed(pooled), "later tokens"),
    "looks_ahead": (lambda: changed(looks_ahead), "later tokens"),
    "bidirectional": (lambda: bidirectional(2), "later tokens"),
    "bidirectional_in_one_layer": (lambda: bidirectional(1), "later tokens"),
    "prefix_lm": (sees_a_whole_beginning, "later tokens"),
    "dynamic": (lambda: rotated_by_length("dynamic"), "other sequences"),
    "longrope": (lambda: rotated_by_length("longrope"), "other sequences"),
    "shifted": (lambda: changed(shifted), "cut into chunks"),
    "slightly_by_chunk": (lambda: changed(slightly_by_chunk), "cut into chunks"),
    "wrong_in_long_passes": (lambda: changed(wrong_in_long_passes), "other sequences"),
    "quantised": (lambda: changed(quantised), ""),
    "normed": (lambda: changed(normed), "later tokens"),
    "wrong_in_batches": (lambda: changed(wrong_in_batches), "other sequences"),
    "limited_capacity": (limited_capacity, ""),
    "past_an_onset": (
        lambda: changed(wrong_past_500, max_position_embeddings=640, floor_scale=500),
        "cut into chunks",
    ),
    "past_an_onset_of_another_name": (
        lambda: changed(wrong_past_500, max_position_embeddings=640, mixing_onset=500),
        "cut into chunks",
    ),
}
"""Models that must be refused, and what the message says of them."""
