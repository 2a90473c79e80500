"""Layers of several kinds: windows, chunks, sinks, soft caps, latents and shared keys and values.

Twelve requests run in one pass: three each of the bare base, a text, a soft prompt and a KV prefix.
The prefix and one prompt are longer than the window, and generation goes past it.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixd.server.engine.request import PrefixHandle
from prefixd.store.artifact.config import Kind
from tests.golden.families import family_model
from tests.golden.golden_harness import (
    VOCAB,
    Served,
    make_adapter,
    plain_generate,
    prompts,
    spec_of,
)
from tests.golden.test_golden_mixed import preempt_often

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

WINDOW, PREFIX, COUNT = 16, 21, 20
WINDOWED: dict[str, dict[str, Any]] = {
    "gemma3_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "gpt_oss": {},
    "gemma2": {},
    "mistral": {},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "cohere2": {"layer_types": ["sliding_attention", "full_attention"]},
    "exaone4": {"layer_types": ["sliding_attention", "full_attention"]},
    "olmo3": {"layer_types": ["sliding_attention", "full_attention"]},
    "flint": {"layer_types": ["sliding_attention", "full_attention"]},
    "llama4_text": {"attention_chunk_size": WINDOW, "floor_scale": 8, "num_hidden_layers": 4},
}
LATENT = ("deepseek_v2", "deepseek_v3")
SHARED = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "head_dim": 16,
    "global_head_dim": 32,
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "chunk of 64": {"max_prefill_chunk": 64},
    "chunk of 7, preempting": {"max_prefill_chunk": 7, "block_size": 4, "num_blocks": 200},
    "chunk of 1": {"max_prefill_chunk": 1},
}
FAST = [("gemma3_text", "chunk of 64"), ("gpt_oss", "chunk of 7, preempting")]
SLOW = [(family, name) for family in WINDOWED for name in SCHEDULES if (family, name) not in FAST]

Reference = Callable[[list[int]], list[int]]
Kinds = list[tuple[PrefixHandle | None, Reference]]


def windowed_model(family: str) -> Any:
    untied = {"tie_word_embeddings": False}  # else the models of Gemma repeat a token
    return family_model(family, **{"sliding_window": WINDOW, **untied, **WINDOWED[family]})


def all_kinds(served: Served, model: Any, folder: Path) -> Kinds:
    """The bare base, a text, a soft prompt and a KV prefix, with what PEFT and transformers say."""
    text = prompts(3, seed=5)[2][:PREFIX]
    kinds: Kinds = [
        (None, lambda prompt: plain_generate(model, prompt, COUNT)),
        (
            served.add_tokens(text),
            lambda prompt: plain_generate(model, [*text, *prompt], COUNT),
        ),
    ]
    for kind, peft_type in ((Kind.SOFT_PROMPT, "PROMPT_TUNING"), (Kind.KV_PREFIX, "PREFIX_TUNING")):
        if kind in spec_of(served.base).refused_kinds:
            continue
        adapter = make_adapter(model, peft_type, PREFIX, folder / peft_type)
        kinds.append((served.add(adapter), partial(adapter.generate, count=COUNT)))
    return kinds


def some_prompts() -> list[list[int]]:
    """One token, fewer than a window, and more than two."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in (1, 9, 40)]


def require_equal(served: Served, kinds: Kinds) -> None:
    requests = [(prompt, kind) for prompt in some_prompts() for kind in kinds]
    with served.held():
        waits = [served.start(prompt, handle, count=COUNT) for prompt, (handle, _) in requests]
    tokens = [wait() for wait in waits]
    expected = [reference(prompt) for prompt, (_, reference) in requests]
    assert tokens == expected
    # Every prefix changes tokens, unless all layers have lost sight of it.
    assert len({tuple(each) for each in expected}) > len(expected) - len(kinds)


@pytest.mark.parametrize(
    ("family", "schedule"), [*FAST, *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_twelve_requests_get_the_tokens_of_peft_past_the_window(
    family: str, schedule: str, tmp_path: Path, serving: Callable[..., Served]
) -> None:
    model = windowed_model(family)
    served = serving(model, **SCHEDULES[schedule])
    assert served.base.layers.beyond_plain() is not None
    if "preempting" in schedule:
        preempt_often(served)
    require_equal(served, all_kinds(served, model, tmp_path))
    assert ("preempting" in schedule) == (served.stats().preemptions > 0)
