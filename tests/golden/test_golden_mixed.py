"""Must be true 2, 4, 5, 6: requests of many prefixes in one pass, each as if it were alone."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from prefixd.server.engine.request import PrefixHandle, SamplingParams
from prefixd.server.engine.residency import Stage
from prefixd.server.engine.step import Step
from prefixd.server.model.prefix import StagedEmbeddings, StagedKV
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
    served: Served, requests: list[tuple[list[int], PrefixHandle | None]]
) -> list[list[int]]:
    with served.held():
        waits = [served.start(prompt, prefix, count=COUNT) for prompt, prefix in requests]
    return [wait() for wait in waits]


def preempt_often(served: Served) -> None:
    """Throw the youngest running sequence out before every ninth step, room or no room."""
    scheduler = served.engine.scheduler
    schedule, calls = scheduler.schedule, itertools.count(1)

    def schedule_after_preempting(*, now: float) -> Step:
        if next(calls) % 9 == 0 and len(scheduler.running) > 1:
            scheduler.preempt(scheduler.running[-1])
        return schedule(now=now)

    scheduler.schedule = schedule_after_preempting  # type: ignore[method-assign]


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize("tight", [False, True], ids=["roomy", "preempting"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_mixed_batch_gives_each_request_its_own_tokens(
    architecture: str, tight: bool, chunk: int, tmp_path: Path, serving: Callable[..., Served]
) -> None:
    model = tiny_model(architecture)
    lone = serving(model)
    prefixes = many_prefixes(lone, model, tmp_path)
    requests = [(p, prefixes[i % len(prefixes)]) for i, p in enumerate(prompts(20, seed=3))]
    expected = alone(lone, requests)

    options = {"block_size": 4, "num_blocks": 110} if tight else {}
    mixed = serving(model, max_prefill_chunk=chunk, **options)
    mixed.staged = lone.staged
    if tight:
        preempt_often(mixed)
    assert together(mixed, requests) == expected

    stats = mixed.stats()
    assert (stats.preemptions >= 10) is tight
    if not tight:
        # A token a step is also what prefixes come in by: some rows end before others begin.
        assert stats.distinct_prefixes_max >= (8 if chunk > 1 else 3)
    assert len({tuple(tokens) for tokens in expected}) > len(prefixes)


def test_a_prefix_is_stored_and_compiled_once(
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

    # While they run, each sequence holds only what lies behind the two whole blocks.
    held = []
    run = served.runner.run

    def watch(step: object) -> object:
        scheduler = served.engine.scheduler
        pool = scheduler.memory.pool
        held.append((pool.num_usable - pool.num_free, len(scheduler.running)))
        return run(step)  # type: ignore[arg-type]

    served.runner.run = watch  # type: ignore[method-assign, assignment]
    with served.held():
        waits = [served.start([5, 6, 7], prefix, count=3) for _ in range(10)]
    for wait in waits:
        wait()
    assert (3 + 10, 10) in held  # one own block each (8 virtual + 6 real tokens), 3 shared once
    assert served.stats().prefix_compiles == 1


def test_the_same_bytes_of_two_tenants_are_two_prefixes(
    tmp_path: Path, serving: Callable[..., Served]
) -> None:
    model = tiny_model("llama")
    served = serving(model)
    adapter = make_adapter(model, "PROMPT_TUNING", 5, tmp_path)
    mine, theirs = served.add(adapter, tenant="a"), served.add(adapter, tenant="b")
    assert served.generate([3, 4], mine) == served.generate([3, 4], theirs)
    assert served.stats().prefix_compiles == 2


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 3e38])
@pytest.mark.parametrize("kind", ["soft", "kv"])
def test_a_poisoned_prefix_harms_nobody_else(
    kind: str, poison: float, tmp_path: Path, serving: Callable[..., Served]
) -> None:
    model = tiny_model("llama")
    served = serving(model, num_blocks=48, max_running=16)
    good = served.add(make_adapter(model, "PREFIX_TUNING", 21, tmp_path))
    honest = [(p, good if i % 2 else None) for i, p in enumerate(prompts(8, seed=4))]
    expected = alone(served, honest)

    shape = served.base.shape
    if kind == "soft":
        bad = served.put(StagedEmbeddings(torch.full((19, shape.hidden_size), poison)))
    else:
        width = shape.num_kv_heads * shape.head_dim
        bad = served.put(StagedKV(torch.full((2 * shape.num_layers, 19, width), poison)))
    for _ in range(3):  # the poisoned blocks are freed and reused in each round
        bad_waits = [served.start(prompt, bad, count=COUNT) for prompt in prompts(4, seed=5)]
        assert together(served, honest) == expected
        for wait in bad_waits:
            try:
                wait()  # huge but finite values may give some answer; it is their own
            except RequestFailed as error:
                assert "non-finite" in str(error)  # noqa: PT017  # either outcome is right
        evict_everything(served)
    assert served.engine.ready


def evict_everything(served: Served) -> None:
    """Fill the pool once, so that idle prefixes leave and their blocks are handed out again."""
    size = served.engine.config.max_tokens_for(0) - 1
    served.generate([3] * size, count=1)
    entries = served.engine.scheduler.memory.residency
    assert not [entry for entry in entries if entry.stage is Stage.RESIDENT]


def test_a_nan_prefix_fails_its_own_request_with_a_clear_message(
    serving: Callable[..., Served],
) -> None:
    served = serving(tiny_model("llama"))
    hidden = served.base.shape.hidden_size
    bad = served.put(StagedEmbeddings(torch.full((4, hidden), float("nan"))))
    with pytest.raises(RequestFailed, match="non-finite logits for this request"):
        served.generate([3, 4, 5], bad)


def test_a_seed_gives_the_same_tokens_in_any_company(serving: Callable[..., Served]) -> None:
    served = serving(tiny_model("llama"))
    chance = SamplingParams(temperature=1.0, top_p=0.95, seed=7)
    lone = served.start([5, 6, 7], count=COUNT, sampling=chance)()
    others = [served.start(p, count=COUNT, sampling=SamplingParams()) for p in prompts(6)]
    again = served.start([5, 6, 7], count=COUNT, sampling=chance)
    assert again() == lone
    for wait in others:
        wait()
    other_seed = SamplingParams(temperature=1.0, top_p=0.95, seed=8)
    assert served.start([5, 6, 7], count=COUNT, sampling=other_seed)() != lone
