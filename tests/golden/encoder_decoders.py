"""Small random encoder-decoders, adapters that PEFT makes for them, and what it generates."""

import copy
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from tests.golden.golden_harness import TASK, Adapter

VOCAB = 120
VIRTUAL = 5
COUNT = 12
KINDS = ("prompt", "one", "p", "multitask", "prefix", "cartridge")
"""One has as many rows as virtual tokens, the other soft prompts twice as many."""


FLAN: dict[str, Any] = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
PLAIN: dict[str, Any] = {"feed_forward_proj": "relu", "tie_word_embeddings": True}


def t5(kind: str = "T5", **changes: Any) -> Any:
    """Flan-T5's shape: gated, with a head of its own."""
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 3}
    config = getattr(transformers, f"{kind}Config")(
        **sizes | {"num_decoder_layers": 3, **FLAN} | changes,
        vocab_size=VOCAB,
        relative_attention_max_distance=20,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


def bart(kind: str = "Bart", **changes: Any) -> Any:
    sizes = {"d_model": 32, "encoder_layers": 3, "decoder_layers": 3, "scale_embedding": True}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = getattr(transformers, f"{kind}Config")(
        **sizes | heads | changes,
        vocab_size=VOCAB,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=96,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


FAST = ("t5", "bart")

MODELS: dict[str, Callable[[], Any]] = {
    "t5": t5,
    "t5-plain": lambda: t5(num_decoder_layers=2, d_kv=12, **PLAIN),
    "umt5": lambda: t5("UMT5"),
    "bart": bart,
    "mbart": lambda: bart("MBart", decoder_layers=2),
}


def _scale(key: str) -> float:
    """Of random weights: large enough that output depends on input, prefix and position, small
    enough that T5's attention, which has no scale, does not choose one key by rounding."""
    for part, scale in {
        "embed_positions": 5.0,
        "shared": 1.0,
        "embed_tokens": 1.0,
        "lm_head": 0.25,
        "attention_bias": 0.25,
        ".q.": 0.12,
        ".k.": 0.12,
        "encoder_attn": 0.18,
        "self_attn": 0.15,
        "fc": 0.15,
        "EncDecAttention": 1.0,
    }.items():
        if part in key:
            return scale
    return 0.35


def model_of(name: str) -> Any:
    """A random model whose logits depend strongly on its input and on what it wrote."""
    torch.manual_seed(3)
    model = MODELS[name]().eval()
    for key, weight in model.named_parameters():
        if weight.dim() > 1:
            weight.data = torch.randn(weight.shape) * _scale(key)
    if not model.config.tie_word_embeddings:
        return model
    # Tied, the last token would be the likeliest next one.
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(torch.randn(model.lm_head.weight.shape))
    return model


def generate(model: Any, source: list[int], **more: Any) -> list[int]:
    """Greedy tokens for a single unpadded request, after what the decoder begins with."""
    ids = torch.tensor([source])
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=COUNT,
            do_sample=False,
            num_beams=1,
            eos_token_id=None,
            **more,
        )
    return out[0].tolist()[1:]


def sources(count: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 30, (count,), generator=generator).tolist()
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def adapter_of(model: Any, folder: Path, config: Any, seed: int) -> Adapter:
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config).eval()
    for name, weight in wrapped.named_parameters():
        if "prompt_encoder" in name and weight.dim() > 1:
            weight.data = torch.randn(weight.shape)
    wrapped.save_pretrained(folder)
    is_multitask = isinstance(config, peft.MultitaskPromptTuningConfig)
    return Adapter(wrapped, folder, TASK if is_multitask else None)


def adapters_of(model: Any, folder: Path, kinds: Collection[str] = KINDS) -> list[Adapter]:
    """A random adapter of each kind."""
    common = {"task_type": "SEQ_2_SEQ_LM", "num_virtual_tokens": VIRTUAL}
    heads = {"token_dim": 48} if getattr(model.config, "d_kv", 8) == 12 else {}
    configs = {
        "prompt": peft.PromptTuningConfig(**common),
        "one": peft.PromptTuningConfig(**common, num_transformer_submodules=1),
        "p": peft.PromptEncoderConfig(**common, encoder_hidden_size=24),
        "multitask": peft.MultitaskPromptTuningConfig(**common, num_tasks=3, num_ranks=2),
        "prefix": peft.PrefixTuningConfig(**common, **heads),
        "cartridge": peft.CartridgeConfig(**common, **heads, num_frozen_tokens=1),
    }
    return [
        adapter_of(model, folder / name, config, seed)
        for seed, (name, config) in enumerate(configs.items())
        if name in kinds
    ]


def task_of(adapter: Adapter) -> dict[str, Any]:
    return {} if adapter.task_id is None else {"task_ids": torch.tensor([adapter.task_id])}
