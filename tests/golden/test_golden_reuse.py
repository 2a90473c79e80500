"""Shared KV, and KV restored from host memory, gives the same tokens as computed KV."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from prefixd.server.engine.request import PrefixHandle
from prefixd.server.model.prefix import SoftPrompt
from tests.golden.golden_harness import (
    RequestFailed,
    Served,
    make_adapter,
    peft_configs,
    prompts,
    tiny_model,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

COUNT = 12
LENGTHS = [5, 16, 20, 33, 21, 32]  # full and partial blocks of 16


def prefixes_of(served: Served, folder: Path) -> list[PrefixHandle | None]:
    """One of each PEFT type, a hard prompt and the bare base."""
    model = tiny_model("llama")
    adapters = [
        served.add(make_adapter(model, peft_type, length, folder / peft_type))
        for peft_type, length in zip(peft_configs(1), LENGTHS, strict=True)
    ]
    return [*adapters, served.add_tokens(prompts(1, seed=9)[0]), None]


def conversation(served: Served, prefix: PrefixHandle | None, *, kv_reuse: bool) -> list[list[int]]:
    """Three turns; each prompt holds the conversation so far."""
    history: list[int] = []
    answers = []
    for turn in prompts(3, seed=6):
        history = history + turn
        answer = served.start(history, prefix, count=COUNT, kv_reuse=kv_reuse)()
        history = history + answer
        answers.append(answer)
    return answers


def test_kv_reuse_on_and_off_give_the_same_tokens(
    tmp_path: Path, serving: Callable[..., Served]
) -> None:
    served = serving(tiny_model("llama"), num_blocks=400)
    prefixes = prefixes_of(served, tmp_path)
    off = [conversation(served, prefix, kv_reuse=False) for prefix in prefixes]
    assert served.stats().kv_reused_tokens == 0
    assert served.stats().kv_queried_tokens == 0
    for _ in range(2):
        assert [conversation(served, prefix, kv_reuse=True) for prefix in prefixes] == off
    stats = served.stats()
    assert stats.kv_reused_tokens > stats.kv_queried_tokens / 3


def test_a_preempted_sequence_reuses_its_own_blocks(serving: Callable[..., Served]) -> None:
    served = serving(tiny_model("llama"), num_blocks=40, block_size=4, max_running=8)
    requests = prompts(8, seed=2)
    expected = [served.start(p, count=32, kv_reuse=False)() for p in requests]
    with served.held():
        waits = [served.start(prompt, count=32) for prompt in requests]
    assert [wait() for wait in waits] == expected
    stats = served.stats()
    assert stats.preemptions > 0
    # Only blocks shared at the first start are reported, not those found again after preemption.
    assert stats.kv_queried_tokens == sum(map(len, requests))


def test_prefixes_restored_from_host_memory_give_the_same_tokens(
    tmp_path: Path, serving: Callable[..., Served]
) -> None:
    single = serving(tiny_model("llama"), num_blocks=400)
    prefixes = prefixes_of(single, tmp_path)
    requests = [(p, prefixes[i % len(prefixes)]) for i, p in enumerate(prompts(24, seed=8))]
    expected = [single.generate(prompt, prefix, count=COUNT) for prompt, prefix in requests]
    limited = serving(tiny_model("llama"), num_blocks=400, max_resident_tokens=40, host_tokens=1000)
    limited.prefixes = single.prefixes
    with limited.held():
        waits = [limited.start(prompt, prefix, count=COUNT) for prompt, prefix in requests]
    assert [wait() for wait in waits] == expected
    one_by_one = [limited.generate(prompt, prefix, count=COUNT) for prompt, prefix in requests]
    assert one_by_one == expected
    stats = limited.stats()
    assert stats.prefix_evictions > len(prefixes)
    assert stats.prefix_loads["host"] > len(prefixes)
    assert stats.prefix_loads["store"] < stats.prefix_loads["host"]
    assert stats.resident_tokens <= 40


def test_kv_with_nan_is_never_reused(serving: Callable[..., Served]) -> None:
    served = serving(tiny_model("llama"))
    hidden = served.base.shape.embedding_width
    bad = served.put(SoftPrompt(torch.full((5, hidden), float("nan"))))
    prompt = prompts(1, seed=3)[0] * 4
    for _ in range(3):
        with pytest.raises(RequestFailed, match="non-finite"):
            served.generate(prompt, bad)
    assert served.stats().kv_reused_tokens == 0
    assert served.stats().blocks_remembered == 0
