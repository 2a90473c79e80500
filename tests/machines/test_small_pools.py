"""Many requests on very small pools: every request finishes."""

import itertools
import random

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
from prefixd.server.testing import FakeRunner, FakeStaged, fake_generate

BLOCK, ARRIVALS, MOST_STEPS = 4, 20, 1500


def random_request(rng: random.Random, config: SchedulerConfig, number: int) -> Sequence | None:
    """A request that fits, up to the size of the pool; None when admission would reject it."""
    tenant = rng.choice("abcd")
    handle = None
    if rng.random() < 0.7:
        length, place = rng.choice([1, 4, 8, 13]), rng.choice(["in", "in", "gated"])
        key = PrefixKey(tenant, f"{rng.choice('xy')}-{length}-{place}")
        handle = PrefixHandle(key, length, gated=place == "gated")
    fits = config.max_tokens_for(0)
    if handle is not None:
        fits = config.max_tokens_for(handle.num_tokens, gated=handle.gated)
    prompt = tuple(rng.choices(range(256), k=rng.randint(1, 10)))
    output = rng.choice([2, 6, fits - len(prompt)])
    if output < 1 or len(prompt) + output > fits:
        return None
    stop, sampling = StopParams(max_tokens=output), SamplingParams(temperature=0)
    request = AdmittedRequest(str(number), tenant, prompt, handle, sampling, stop)
    return Sequence(number, request, 0, 0, list(prompt))


@settings(max_examples=60, deadline=None)
@given(
    blocks=st.integers(5, 9),
    state_blocks=st.sampled_from([0, 1]),
    running=st.integers(1, 4),
    chunk=st.sampled_from([1, 3, 12]),
    staged=st.sampled_from([2, 16]),
    wait=st.sampled_from([0.0, 0.2]),
    seed=st.integers(0, 10**9),
)
def test_requests_that_each_fit_the_pool_all_finish(
    *, blocks: int, state_blocks: int, running: int, chunk: int, staged: int, wait: float, seed: int
) -> None:
    config = SchedulerConfig(
        num_blocks=blocks + 2 * state_blocks + 1,
        block_size=BLOCK,
        max_tokens_per_step=12,
        max_prefill_chunk=chunk,
        max_running=running,
        max_staged=staged,
        max_prefix_wait_s=wait,
        state_blocks=state_blocks,
    )
    scheduler, runner = Scheduler(config), FakeRunner(block_size=BLOCK, state_blocks=state_blocks)
    rng, sequences = random.Random(seed), []
    for number in itertools.count():
        if number < ARRIVALS:
            sequence = random_request(rng, config, number)
            if sequence is not None:
                sequences.append(sequence)
                scheduler.add(sequence, now=number / 10)
        elif scheduler.idle:
            break
        assert number < MOST_STEPS, f"stuck: {scheduler!r}"
        step = scheduler.schedule(now=number / 10)
        scheduler.update(step, runner.run(step))
        for key in step.fetches:
            _, length, place = key.digest.split("-")
            payload = FakeStaged(int(length), 0 if place == "gated" else None)
            scheduler.prefix_staged(key, payload)
    scheduler.check_integrity()
    for sequence in sequences:
        assert sequence.reason is FinishReason.LENGTH
        digest = sequence.prefix.key.digest if sequence.prefix else None
        expected = fake_generate(digest, sequence.request.prompt, sequence.num_output)
        assert sequence.tokens[sequence.num_prompt :] == expected
