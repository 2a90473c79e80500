"""Many requests on very small pools: every request finishes, ensembles among them."""

import itertools
import random
from collections.abc import Sequence as Items

from hypothesis import given, settings
from hypothesis import strategies as st

from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.request import (
    AdmittedRequest,
    FinishReason,
    Member,
    PrefixHandle,
    PrefixKey,
    SamplingParams,
    StopParams,
)
from prefixd.server.engine.scheduler import Scheduler
from prefixd.server.engine.sequence import Sequence, sequences_of
from prefixd.server.testing import FakeRunner, FakeStaged, fake_ensemble, fake_generate

BLOCK, ARRIVALS, MOST_STEPS = 4, 20, 1500


def random_prefix(rng: random.Random, tenant: str) -> PrefixHandle | None:
    if rng.random() >= 0.7:
        return None
    length, place = rng.choice([1, 4, 8, 13]), rng.choice(["in", "in", "gated"])
    key = PrefixKey(tenant, f"{rng.choice('xy')}-{length}-{place}")
    return PrefixHandle(key, length, gated=place == "gated")


def random_prompt(rng: random.Random) -> tuple[int, ...]:
    return tuple(rng.choices(range(256), k=rng.randint(1, 10)))


def random_request(
    rng: random.Random, config: SchedulerConfig, number: int, *, rows: int = 1
) -> AdmittedRequest | None:
    """A request that fits, up to the size of the pool; None when admission would reject it."""
    tenant = rng.choice("abcd")
    handle, prompt = random_prefix(rng, tenant), random_prompt(rng)
    fits = config.max_tokens_for(0)
    if handle is not None:
        fits = config.max_tokens_for(handle.num_tokens, gated=handle.gated)
    members = tuple(Member(random_prompt(rng), random_prefix(rng, tenant)) for _ in range(rows - 1))
    output = rng.choice([2, 6, fits - len(prompt)])
    lengths = [(handle, len(prompt) + output)]
    lengths += [(member.prefix, len(member.prompt) + output) for member in members]
    resident = sum({p: p.num_tokens for p, _ in lengths if p is not None}.values())
    if (
        output < 1
        or config.blocks_together(lengths) > config.num_usable_blocks
        or resident > (config.max_resident_tokens or resident)
        or rows > config.max_running
    ):
        return None
    stop, sampling = StopParams(max_tokens=output), SamplingParams(temperature=0)
    return AdmittedRequest(str(number), tenant, prompt, handle, sampling, stop, members=members)


def run_all(
    scheduler: Scheduler, rng: random.Random, *, state_blocks: int = 0, rows: Items[int] = (1,)
) -> list[Sequence]:
    """Queue ARRIVALS random requests, one a step, of as many rows as one of ``rows`` says, and run
    them to their ends. Returns those that were admitted."""
    runner, sequences = FakeRunner(block_size=BLOCK, state_blocks=state_blocks), []
    for number in itertools.count():
        if number < ARRIVALS:
            request = random_request(rng, scheduler.config, number, rows=rng.choice(rows))
            if request is not None:
                (sequence,) = sequences_of(request, first_id=10 * number, seed=0)
                sequences.append(sequence)
                scheduler.add(sequence, now=number / 10)
        elif scheduler.idle:
            break
        assert number < MOST_STEPS, f"stuck: {scheduler!r}"
        step = scheduler.schedule(now=number / 10)
        scheduler.update(step, runner.run(step))
        for key in step.fetches:
            scheduler.prefix_staged(key, payload_of(key))
    scheduler.check_integrity()
    return sequences


def payload_of(key: PrefixKey) -> FakeStaged:
    _, length, place = key.digest.split("-")
    return FakeStaged(int(length), 0 if place == "gated" else None)


def digest_of(sequence: Sequence) -> str | None:
    return sequence.prefix.key.digest if sequence.prefix else None


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
    sequences = run_all(Scheduler(config), random.Random(seed), state_blocks=state_blocks)
    for sequence in sequences:
        assert sequence.reason is FinishReason.LENGTH
        expected = fake_generate(digest_of(sequence), sequence.request.prompt, sequence.num_output)
        assert sequence.tokens[sequence.num_prompt :] == expected


@settings(max_examples=60, deadline=None)
@given(
    blocks=st.integers(12, 30),
    budget=st.sampled_from([None, 26, 40]),
    host=st.sampled_from([0, 26]),
    running=st.integers(3, 6),
    chunk=st.sampled_from([1, 3, 12]),
    staged=st.sampled_from([2, 16]),
    wait=st.sampled_from([0.0, 0.2]),
    pins=st.integers(0, 2),
    seed=st.integers(0, 10**9),
)
def test_ensembles_that_each_fit_the_pool_all_finish(
    *,
    blocks: int,
    budget: int | None,
    host: int,
    running: int,
    chunk: int,
    staged: int,
    wait: float,
    pins: int,
    seed: int,
) -> None:
    """They wait for several prefixes at a time, next to requests that wait for one, and to pins
    that leave no room for all of them."""
    config = SchedulerConfig(
        num_blocks=blocks,
        block_size=BLOCK,
        max_tokens_per_step=12,
        max_prefill_chunk=chunk,
        max_running=running,
        max_staged=staged,
        max_resident_tokens=budget,
        host_tokens=host,
        max_prefix_wait_s=wait,
    )
    scheduler = Scheduler(config)
    pinned = [PrefixHandle(PrefixKey("a", f"{name}-13-in"), 13) for name in "pq"[:pins]]
    scheduler.prefix_loader.set_pins(pinned)
    for sequence in run_all(scheduler, random.Random(seed), rows=(1, 2, 3)):
        assert sequence.reason is FinishReason.LENGTH
        rows = [(digest_of(row), row.request.prompt) for row in sequence.rows]
        expected = fake_generate(*rows[0], sequence.num_output)
        if sequence.ensemble:
            expected = fake_ensemble(rows, sequence.num_output)
        assert sequence.tokens[sequence.num_prompt :] == expected
        assert len(sequence.agreed) == len(sequence.ensemble)


def test_pins_leave_for_an_ensemble_whose_members_fit_next_to_them_one_by_one_only() -> None:
    config = SchedulerConfig(
        num_blocks=24, block_size=BLOCK, max_resident_tokens=26, max_prefix_wait_s=0.0
    )
    scheduler, runner = Scheduler(config), FakeRunner(block_size=BLOCK)
    pin, *members = [PrefixHandle(PrefixKey("a", f"{name}-13-in"), 13) for name in "pxy"]
    scheduler.prefix_loader.set_pins([pin])
    request = AdmittedRequest(
        "1",
        "a",
        (1, 2),
        members[0],
        SamplingParams(temperature=0),
        StopParams(max_tokens=2),
        members=(Member((1, 2), members[1]),),
    )
    (sequence,) = sequences_of(request, first_id=0, seed=0)
    for number in range(60):
        if number == 10:  # the pin is resident
            scheduler.add(sequence, now=1.0)
        step = scheduler.schedule(now=number / 10)
        scheduler.update(step, runner.run(step))
        for key in step.fetches:
            scheduler.prefix_staged(key, payload_of(key))
    assert sequence.reason is FinishReason.LENGTH
