"""Adaption prompts (LLaMA-Adapter) give PEFT's tokens, alone and with all other kinds."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixd.server.engine.request import PrefixHandle
from prefixd.server.model.batch import FlatBatch
from prefixd.server.model.cpu.interface import KERNELS
from prefixd.server.model.decoder import Logits
from prefixd.server.model.decoders import PAGED
from prefixd.server.model.prefix import AdaptionPrompt
from tests.golden.golden_harness import (
    Adapter,
    RequestFailed,
    Served,
    make_adapter,
    make_adaption_prompt,
    plain_generate,
    prompts,
    tiny_model,
)
from tests.golden.test_golden_mixed import evict_everything, preempt_often, together
from tests.model.cpu.native_library import native_library

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

COUNT = 8
CASES = [
    ("llama", "module"),
    ("llama", "torch"),
    ("llama", "auto"),
    pytest.param("mistral", "auto", marks=pytest.mark.slow),
    ("gpt2", "module"),
    *(pytest.param("llama", kernels, marks=pytest.mark.slow) for kernels in (*PAGED, *KERNELS)),
    pytest.param("mistral", "module", marks=pytest.mark.slow),
    pytest.param("gpt2", "paged_module", marks=pytest.mark.slow),
]


@dataclass(frozen=True)
class Case:
    """A model with adapters of several kinds, and PEFT's tokens: text i is under adapter i modulo
    their number and one, the last of which is the bare base."""

    model: Any
    adapters: list[Adapter]
    texts: list[list[int]]
    expected: list[list[int]]


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    @functools.cache
    def make(architecture: str) -> Case:
        model, folder = tiny_model(architecture), tmp_path_factory.mktemp(architecture)
        adapters = [
            make_adaption_prompt(model, length, folder / str(length), layers=layers, seed=length)
            for length, layers in ((5, 2), (16, 1), (21, 3))
        ]
        adapters += [
            make_adapter(model, peft_type, 19, folder / peft_type)
            for peft_type in ("PROMPT_TUNING", "PREFIX_TUNING")
        ]
        texts, num = prompts(9, seed=3), len(adapters) + 1
        expected = [
            adapters[i % num].generate(text, COUNT)
            if i % num < len(adapters)
            else plain_generate(model, text, COUNT)
            for i, text in enumerate(texts)
        ]
        changed = [
            plain_generate(model, text, COUNT) != expected[i]
            for i, text in enumerate(texts)
            if i % num < 3
        ]
        assert sum(changed) >= 3, "the adaption prompts change too little"
        return Case(model, adapters, texts, expected)

    return make


@pytest.mark.parametrize(("architecture", "kernels"), CASES)
def test_every_decoder_gives_the_tokens_of_peft(
    architecture: str,
    kernels: str,
    case_of: Callable[[str], Case],
    serving: Callable[..., Served],
) -> None:
    """In a mixed batch under preemption, the second time from the host tier and with KV reuse."""
    if kernels in KERNELS and (state := native_library().states()[kernels]) != "available":
        pytest.skip(f"{kernels}: {state}")
    case = case_of(architecture)
    served = serving(
        case.model,
        kernels=kernels,
        max_prefill_chunk=7,
        max_resident_tokens=45,
        host_tokens=1000,
    )
    prefixes = [*map(served.add, case.adapters), None]
    requests = [(text, prefixes[i % len(prefixes)]) for i, text in enumerate(case.texts)]
    preempt_often(served)
    for _ in range(2):
        assert together(served, requests, count=COUNT) == case.expected
    stats = served.stats()
    assert stats.prefix_loads["host"] >= 3
    assert stats.preemptions > 0


@pytest.mark.parametrize("kernels", ["module", "torch", "auto"])
def test_a_gate_of_zero_leaves_the_base_bit_equal(
    kernels: str, tmp_path: Path, serving: Callable[..., Served]
) -> None:
    model = tiny_model("llama")
    served = serving(model, kernels=kernels)
    closed = served.add(make_adaption_prompt(model, 5, tmp_path, gate=0.0))
    logits = []
    forward = served.runner.decoder.forward

    def watched(batch: FlatBatch) -> Logits:
        result = forward(batch)
        logits.append(result.values.clone())
        return result

    served.runner.decoder.forward = watched
    for prefix in (None, closed):
        served.start([5, 6, 7, 8], prefix, count=8, kv_reuse=False)()
    half = len(logits) // 2
    assert half == 8
    assert all(map(torch.equal, logits[:half], logits[half:]))


@pytest.mark.parametrize("kernels", ["torch", "auto", "paged"])
def test_an_adaption_prompt_with_nan_ends_its_own_requests_alone(
    kernels: str, tmp_path: Path, serving: Callable[..., Served]
) -> None:
    model = tiny_model("llama")
    served = serving(model, kernels=kernels, num_blocks=33, max_running=16)
    good = served.add(make_adaption_prompt(model, 5, tmp_path))
    requests = [(text, good if i % 2 else None) for i, text in enumerate(prompts(8, seed=4))]
    expected = [served.generate(text, prefix, count=COUNT) for text, prefix in requests]
    width = served.base.shape.embedding_width
    bad = served.put(
        AdaptionPrompt(torch.full((2, 19, width), float("nan")), torch.ones(2), gated_from=1)
    )
    for _ in range(2):  # the poisoned blocks are freed and reused
        waits = [served.start(text, bad, count=COUNT) for text in prompts(4, seed=5)]
        assert together(served, requests, count=COUNT) == expected
        for wait in waits:
            with pytest.raises(RequestFailed, match="non-finite"):
                wait()
        evict_everything(served)
    assert served.engine.ready


def test_two_tenants_with_equal_adaption_prompts_share_nothing(
    case_of: Callable[[str], Case], serving: Callable[..., Served]
) -> None:
    case = case_of("llama")
    served, adapter = serving(case.model), case.adapters[2]
    handles: list[PrefixHandle | None] = [served.add(adapter, tenant=name) for name in "ab"]
    requests = [(case.texts[i], handles[i // 6 % 2]) for i in (2, 8)]
    expected = [case.expected[i] for i in (2, 8)]
    assert together(served, requests, count=COUNT) == expected
    entries = list(served.engine.core.scheduler.memory.residency)
    blocks = [block for entry in entries for block in entry.blocks]
    assert len(entries) == 2
    assert len(set(blocks)) == 4
    assert served.stats().blocks_prefix == 4
