"""Random schedules of real models on small pools that begin full of NaN: windows, sinks, states.

Two tenants share the pool; the soft prompt of one is NaN. Every other request gets the tokens that
it gets alone in a pool of zeros, blocks are conserved after every step, and what remains at the end
is what is resident.
"""

import copy
import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.request import (
    AdmittedRequest,
    FinishReason,
    PrefixHandle,
    PrefixKey,
    SamplingParams,
    StopParams,
)
from prefixd.server.engine.scheduler import Scheduler
from prefixd.server.engine.sequence import Sequence
from prefixd.server.model.load import LoadedBase, prepare_base
from prefixd.server.model.module_decoder import ModuleDecoder
from prefixd.server.model.prefix import HardPrompt, Prefix, SoftPrompt, Stack
from prefixd.server.model.runner import Runner
from tests.golden.families import family_model
from tests.golden.golden_harness import VOCAB

BLOCK, ARRIVALS, MOST_STEPS = 4, 8, 600
_HYBRID = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}
SHAPES: dict[str, dict[str, Any]] = {
    "gpt_oss": {"sliding_window": 6},
    "gemma3_text": {
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
        "tie_word_embeddings": False,
    },
    "qwen3_5_text": _HYBRID,
}
SOFT, POISON = PrefixKey("a", "soft"), PrefixKey("b", "nan")


@dataclass(frozen=True)
class Model:
    """A small model, and the prefixes of its tenants."""

    base: LoadedBase
    prefixes: dict[PrefixKey, Prefix]

    def decoder(self, num_blocks: int) -> ModuleDecoder:
        return ModuleDecoder(self.base, num_blocks=num_blocks, block_size=BLOCK)


@cache
def model_of(shape: str) -> Model:
    module = family_model(shape, **SHAPES[shape])
    base = prepare_base(copy.deepcopy(module), None, name=shape, dtype="float32", device="cpu")
    width = base.shape.embedding_width
    soft = torch.randn(9, width, generator=torch.Generator().manual_seed(1))
    return Model(
        base,
        {
            SOFT: SoftPrompt(soft),
            PrefixKey("a", "text"): HardPrompt((5, 9, 2, 7, 11, 3)),
            PrefixKey("a", "stack"): Stack((HardPrompt((5, 9, 2)), SoftPrompt(soft[:4]))),
            POISON: SoftPrompt(torch.full((5, width), torch.nan)),
        },
    )


def drive(
    model: Model, config: SchedulerConfig, decoder: ModuleDecoder, arrivals: Iterator[Sequence]
) -> Scheduler:
    """Add a sequence before each step, and run steps until all have ended."""
    scheduler, runner = Scheduler(config), Runner(decoder)
    for number in itertools.count():
        sequence = next(arrivals, None)
        if sequence is not None:
            scheduler.add(sequence, now=float(number))
        elif scheduler.idle:
            return scheduler
        assert number < MOST_STEPS, f"stuck: {scheduler!r}"
        step = scheduler.schedule(now=float(number))
        if step.has_work:
            scheduler.update(step, runner.run(step))
        for key in step.fetches:
            scheduler.prefix_staged(key, model.prefixes[key])
        scheduler.check_integrity()
    raise AssertionError


def sequence_of(number: int, model: Model, key: PrefixKey | None, length: int) -> Sequence:
    rng = random.Random(number % 4)
    prompt = tuple(rng.choices(range(3, VOCAB), k=length))
    handle = None if key is None else PrefixHandle(key, model.prefixes[key].num_tokens)
    request = AdmittedRequest(
        str(number),
        "a" if key is None else key.tenant,
        prompt,
        handle,
        SamplingParams(temperature=0),
        StopParams(max_tokens=6),
    )
    return Sequence(number, request, 0, 0, list(prompt))


@cache
def alone(shape: str, key: PrefixKey | None, prompt: tuple[int, ...]) -> list[int]:
    """The tokens of a request in a pool of its own, in one chunk."""
    model = model_of(shape)
    decoder = model.decoder(40)
    config = SchedulerConfig(num_blocks=40, block_size=BLOCK, state_blocks=decoder.state_blocks)
    handle = None if key is None else PrefixHandle(key, model.prefixes[key].num_tokens)
    request = AdmittedRequest(
        "alone", "a", prompt, handle, SamplingParams(temperature=0), StopParams(max_tokens=6)
    )
    sequence = Sequence(0, request, 0, 0, list(prompt))
    drive(model, config, decoder, iter([sequence]))
    return sequence.tokens[sequence.num_prompt :]


@pytest.mark.slow
@pytest.mark.parametrize("shape", list(SHAPES))
@settings(max_examples=4, deadline=None)
@given(
    spare=st.integers(0, 12),
    running=st.integers(1, 4),
    chunk=st.sampled_from([1, 3, 7, 64]),
    seed=st.integers(0, 10**9),
)
def test_nothing_leaks_between_tenants_on_small_pools(
    *, shape: str, spare: int, running: int, chunk: int, seed: int
) -> None:
    model, rng = model_of(shape), random.Random(seed)
    state_blocks = model.decoder(2).state_blocks
    num_blocks = 1 + 9 + spare + 3 * state_blocks  # the largest prefix, and a sequence under it
    decoder = model.decoder(num_blocks)
    for tensor in decoder.cache.tensors:
        tensor[:, 1:].fill_(torch.nan)  # except the null block
    config = SchedulerConfig(
        num_blocks=num_blocks,
        block_size=BLOCK,
        max_prefill_chunk=chunk,
        max_running=running,
        state_blocks=state_blocks,
        host_tokens=64,
    )
    sequences = [
        sequence_of(number, model, rng.choice([None, *model.prefixes]), rng.randint(1, 12))
        for number in range(ARRIVALS)
    ]
    scheduler = drive(model, config, decoder, iter(sequences))
    memory = scheduler.memory
    assert memory.pool.num_usable - memory.pool.num_free == memory.residency.num_blocks
    for sequence in sequences:
        key = sequence.prefix.key if sequence.prefix else None
        if key == POISON:
            assert sequence.reason is FinishReason.ERROR
        else:
            assert sequence.reason is FinishReason.LENGTH
            tokens = sequence.tokens[sequence.num_prompt :]
            assert tokens == alone(shape, key, sequence.request.prompt)
