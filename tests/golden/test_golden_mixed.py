"""Requests of many prefixes in one pass get the same tokens as alone."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from prefixd.server.engine.request import PrefixHandle, SamplingParams
from prefixd.server.engine.step import Step
from prefixd.server.model.prefix import KVPrefix, SoftPrompt
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

LENGTHS = {  # one not a multiple of the block size (16), one longer than several blocks
    "PROMPT_TUNING": 5,
    "P_TUNING": 16,
    "CPT": 20,
    "MULTITASK_PROMPT_TUNING": 33,
    "PREFIX_TUNING": 75,
    "CARTRIDGE": 32,
}
COUNT = 32


def many_prefixes(served: Served, model: object, folder: Path) -> list[PrefixHandle | None]:
    """Nine prefixes of all kinds, and the bare base."""
    prefixes: list[PrefixHandle | None] = [
        served.add(make_adapter(model, peft_type, LENGTHS[peft_type], folder / peft_type))
        for peft_type in peft_configs(1)
    ]
    prefixes += [served.add_tokens(tokens) for tokens in prompts(3, seed=9)]
    return [*prefixes, None]


def alone(served: Served, requests: list[tuple[list[int], PrefixHandle | None]]) -> list[list[int]]:
    return [served.generate(prompt, prefix, count=COUNT) for prompt, prefix in requests]


def together(
    served: Served, requests: list[tuple[list[int], PrefixHandle | None]], count: int = COUNT
) -> list[list[int]]:
    with served.held():
        waits = [served.start(prompt, prefix, count=count) for prompt, prefix in requests]
    return [wait() for wait in waits]


def preempt_often(served: Served) -> None:
    """Preempt the youngest running sequence before every ninth step."""
    scheduler = served.engine.core.scheduler
    schedule, calls = scheduler.schedule, itertools.count(1)

    def schedule_after_preempting(*, now: float = 0.0) -> Step:
        if next(calls) % 9 == 0 and len(scheduler.running) > 1:
            scheduler.preempt(scheduler.running[-1])
        return schedule(now=now)

    scheduler.schedule = schedule_after_preempting  # type: ignore[method-assign]


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("tight", [False, True], ids=["large pool", "preempting"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_mixed_batch_gives_each_request_the_tokens_it_gets_alone(
    architecture: str, tight: bool, chunk: int, tmp_path: Path, serving: Callable[..., Served]
) -> None:
    model = tiny_model(architecture)
    single = serving(model)
    prefixes = many_prefixes(single, model, tmp_path)
    requests = [(p, prefixes[i % len(prefixes)]) for i, p in enumerate(prompts(20, seed=3))]
    expected = alone(single, requests)

    options = {"block_size": 4, "num_blocks": 110} if tight else {}
    mixed = serving(model, max_prefill_chunk=chunk, **options)
    mixed.prefixes = single.prefixes
    if tight:
        preempt_often(mixed)
    assert together(mixed, requests) == expected

    stats = mixed.stats()
    assert (stats.preemptions >= 10) is tight
    if not tight:
        # With one token a step, prefixes also compile slowly: some rows end before others begin.
        assert stats.distinct_prefixes_max >= (8 if chunk > 1 else 3)
    assert len({tuple(tokens) for tokens in expected}) > len(prefixes)


def test_concurrent_requests_share_one_compiled_prefix(
    tmp_path: Path, serving: Callable[..., Served]
) -> None:
    model = tiny_model("llama")
    served = serving(model)
    prefix = served.add(make_adapter(model, "PROMPT_TUNING", 40, tmp_path))
    waits = [served.start(prompt, prefix, count=8) for prompt in prompts(16)]
    for wait in waits:
        wait()
    stats = served.stats()
    assert stats.prefix_compiles == 1
    assert stats.prefix_loads["store"] == 1
    assert stats.blocks_prefix == 3  # 40 virtual tokens in blocks of 16
    assert stats.blocks_free == stats.blocks_total - 3

    # While they run, each sequence holds only the blocks after the two full shared ones.
    held = []
    submit = served.runner.submit

    def watch(step: Step) -> None:
        scheduler = served.engine.core.scheduler
        pool = scheduler.memory.pool
        held.append((pool.num_usable - pool.num_free, len(scheduler.running)))
        submit(step)

    served.runner.submit = watch
    with served.held():
        waits = [served.start([5, 6, 7], prefix, count=3) for _ in range(10)]
    for wait in waits:
        wait()
    assert (3 + 10, 10) in held  # one own block each (8 virtual + 6 real tokens), 3 shared once
    assert served.stats().prefix_compiles == 1


def test_equal_bytes_of_two_tenants_compile_as_two_prefixes(
    tmp_path: Path, serving: Callable[..., Served]
) -> None:
    model = tiny_model("llama")
    served = serving(model)
    adapter = make_adapter(model, "PROMPT_TUNING", 5, tmp_path)
    first, second = served.add(adapter, tenant="a"), served.add(adapter, tenant="b")
    assert served.generate([3, 4], first) == served.generate([3, 4], second)
    assert served.stats().prefix_compiles == 2


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("kind", ["soft", "kv"])
def test_a_prefix_with_non_finite_values_does_not_change_other_requests(
    kind: str, poison: float, tmp_path: Path, serving: Callable[..., Served]
) -> None:
    model = tiny_model("llama")
    served = serving(model, num_blocks=33, max_running=16)  # no more than the model has positions
    good = served.add(make_adapter(model, "PREFIX_TUNING", 21, tmp_path))
    good_requests = [(p, good if i % 2 else None) for i, p in enumerate(prompts(8, seed=4))]
    expected = alone(served, good_requests)

    shape = served.base.shape
    if kind == "soft":
        bad = served.put(SoftPrompt(torch.full((19, shape.embedding_width), poison)))
    else:
        width = shape.num_kv_heads * shape.head_dim
        bad = served.put(KVPrefix(torch.full((2 * shape.num_layers, 19, width), poison)))
    for _ in range(3):  # the poisoned blocks are freed and reused in each round
        bad_waits = [served.start(prompt, bad, count=COUNT) for prompt in prompts(4, seed=5)]
        assert together(served, good_requests) == expected
        for wait in bad_waits:
            try:
                wait()  # huge but finite values may give an output of their own
            except RequestFailed as error:
                assert "non-finite" in str(error)  # noqa: PT017  # both outcomes are correct
        evict_everything(served)
    assert served.engine.ready


def evict_everything(served: Served) -> None:
    """Fill the pool once, so that idle prefixes are evicted and their blocks are reused."""
    size = served.engine.config.max_tokens_for(0) - 1
    served.generate([3] * size, count=1)
    entries = served.engine.core.scheduler.memory.residency
    assert not [entry for entry in entries if entry.is_compiled]


def test_a_prefix_with_nan_fails_its_request_with_a_clear_message(
    serving: Callable[..., Served],
) -> None:
    served = serving(tiny_model("llama"))
    hidden = served.base.shape.embedding_width
    bad = served.put(SoftPrompt(torch.full((4, hidden), float("nan"))))
    with pytest.raises(RequestFailed, match="non-finite logits for this request"):
        served.generate([3, 4, 5], bad)


def test_a_seed_gives_the_same_tokens_alone_and_in_a_batch(serving: Callable[..., Served]) -> None:
    served = serving(tiny_model("llama"))
    settings = SamplingParams(temperature=1.0, top_p=0.95, seed=7)
    single = served.start([5, 6, 7], count=COUNT, sampling=settings)()
    batch = [served.start(p, count=COUNT, sampling=SamplingParams()) for p in prompts(6)]
    again = served.start([5, 6, 7], count=COUNT, sampling=settings)
    assert again() == single
    for wait in batch:
        wait()
    other_seed = SamplingParams(temperature=1.0, top_p=0.95, seed=8)
    assert served.start([5, 6, 7], count=COUNT, sampling=other_seed)() != single
