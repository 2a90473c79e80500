"""Layers of several kinds: windows, chunks, sinks, soft caps, latents and shared keys and values.

Twelve requests run in one pass: three each of the bare base, a text, a soft prompt and a KV prefix.
The prefix and one prompt are longer than the window, and generation goes past it.
"""

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixd.server.engine.request import PrefixHandle, PrefixKey
from prefixd.server.engine.step import Chunk, CompileChunk
from prefixd.server.model.batch import lay_out
from prefixd.server.model.load import prepare_base
from prefixd.server.model.module_decoder import ModuleDecoder
from prefixd.server.model.prefix import SoftPrompt
from prefixd.store.artifact.kinds import Kind
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
SHARED: dict[str, Any] = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": WINDOW,
}
SCHEDULES: dict[str, dict[str, Any]] = {
    "chunk of 64": {"max_prefill_chunk": 64},
    "chunk of 7, preempting": {"max_prefill_chunk": 7, "block_size": 4, "num_blocks": 200},
    "chunk of 1": {"max_prefill_chunk": 1},
}
FAST = [("gemma3_text", "chunk of 64"), ("gpt_oss", "chunk of 7, preempting")]
SLOW = list(zip(list(WINDOWED)[len(FAST) :], itertools.cycle(SCHEDULES), strict=False))

Reference = Callable[[list[int]], list[int]]
Kinds = list[tuple[PrefixHandle | None, Reference]]


OTHER: dict[str, dict[str, Any]] = {
    "deepseek_v2": {},
    "deepseek_v3": {},
    "diffllama": {},
    "gemma4_text": SHARED,
}
"""Latents, values used twice, and shared keys and values."""


def windowed_model(family: str, **more: Any) -> Any:
    untied = {"tie_word_embeddings": False}  # else the models of Gemma repeat a token
    changes = OTHER[family] if family in OTHER else {"sliding_window": WINDOW, **WINDOWED[family]}
    return family_model(family, **{**untied, **changes, **more})


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


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in OTHER if family != "gemma4_text"])
def test_latents_and_repeated_values_give_the_tokens_of_peft(
    family: str, tmp_path: Path, serving: Callable[..., Served]
) -> None:
    model = windowed_model(family)
    served = serving(model, **SCHEDULES["chunk of 7, preempting"])
    preempt_often(served)
    kinds = all_kinds(served, model, tmp_path)
    assert len(kinds) == (3 if family.startswith("deepseek") else 4)
    require_equal(served, kinds)


def gemma4_tokens(model: Any, prefix: torch.Tensor, prompt: list[int]) -> list[int]:
    """Greedy tokens after embeddings ``prefix`` [P, width], each from one pass over everything.
    There is no token at these positions: the layers get the embeddings of padding."""
    layers, tokens = model.model, list(prompt)
    padding = torch.full((1, len(prefix)), model.config.pad_token_id)
    with torch.no_grad():
        for _ in range(COUNT):
            ids = torch.tensor([tokens])
            embeddings = torch.cat([prefix[None], layers.embed_tokens(ids)], 1)
            per_layer = [layers.get_per_layer_inputs(part, None) for part in (padding, ids)]
            logits = model(
                inputs_embeds=embeddings, per_layer_inputs=torch.cat(per_layer, 1), use_cache=False
            ).logits
            tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.slow
def test_layers_may_differ_in_size_and_share_keys_and_values(
    serving: Callable[..., Served],
) -> None:
    """PEFT cannot run a soft prompt here: Gemma 4 looks its input up by token in every layer."""
    model = windowed_model("gemma4_text")
    served = serving(model, **SCHEDULES["chunk of 7, preempting"])
    assert len({cache.shape for cache in served.base.layers.caches.values()}) == 2
    assert [layer.cache for layer in served.base.layers.attention.values()] == [0, 1, 0, 1]
    soft = torch.randn(PREFIX, 64, generator=torch.Generator().manual_seed(1))
    text = prompts(3, seed=5)[2][:PREFIX]
    kinds: Kinds = [
        (None, lambda prompt: plain_generate(model, prompt, COUNT)),
        (served.add_tokens(text), lambda prompt: plain_generate(model, [*text, *prompt], COUNT)),
        (served.put(SoftPrompt(soft)), partial(gemma4_tokens, model, soft)),
    ]
    require_equal(served, kinds)


BLOCK, OWN, BAD = 4, tuple(range(1, 13)), tuple(range(20, 33))


def run_next_to(decoder: ModuleDecoder, neighbour: torch.Tensor) -> torch.Tensor:
    """The logits of a sequence over five passes, while a soft prompt is compiled and used."""
    tokens = some_prompts()[2]
    key, payload = PrefixKey("t", "bad"), SoftPrompt(neighbour)
    decoder.zero([*OWN, *BAD])
    batches = [
        lay_out(
            [Chunk(0, tokens, 0, OWN)],
            [CompileChunk(key, payload, 0, len(neighbour), BAD)],
            outputs=[len(tokens) - 1],
        )
    ]
    for step in range(4):
        own = Chunk(0, [step + 5], len(tokens) + step, OWN)
        other = Chunk(1, [step + 5], len(neighbour) + step, BAD)
        batches.append(lay_out([other, own], outputs=[1]))
    return torch.stack([decoder.forward(batch).values[0] for batch in batches])


@pytest.mark.parametrize(
    "family", ["gemma3_text", "gpt_oss", "gemma2", "llama4_text", "deepseek_v3", "gemma4_text"]
)
def test_nan_next_to_a_sequence_and_in_freed_blocks_leaves_it_bit_equal(family: str) -> None:
    # A neighbour's experts change the sizes of products, and so the rounding of others.
    dense = {"first_k_dense_replace": 2} if family == "deepseek_v3" else {}
    model = windowed_model(family, **dense)
    base = prepare_base(model, None, name=family, dtype="float32", device="cpu")
    decoder = ModuleDecoder(base, num_blocks=40, block_size=BLOCK)
    width = base.shape.embedding_width
    count = 45  # the two rows share a group, and the sequence is padded there
    good = torch.randn(count, width, generator=torch.Generator().manual_seed(1))
    expected = run_next_to(decoder, good)
    assert expected.isfinite().all()
    for tensor in decoder.cache.tensors:  # all except the null block; what is used is zeroed again
        tensor[:, 1:] = torch.nan
    assert torch.equal(run_next_to(decoder, torch.full((count, width), torch.nan)), expected)
    assert any(tensor[:, list(BAD)].isnan().any() for tensor in decoder.cache.tensors)
