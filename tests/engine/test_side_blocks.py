"""Side blocks: where they come from, what they count against, and that no state is used twice."""

import pytest

from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.failures import probe_step
from prefixd.server.engine.request import (
    AdmittedRequest,
    PrefixHandle,
    PrefixKey,
    SamplingParams,
    StopParams,
)
from prefixd.server.engine.scheduler import Scheduler
from prefixd.server.engine.sequence import Sequence
from prefixd.server.engine.step import BlockCopy, Step
from prefixd.server.testing import FakeRunner, FakeStaged, fake_generate

BLOCK, STATE = 4, 2
PREFIX = PrefixHandle(PrefixKey("t", "p-6"), 6)


class Bench:
    """A scheduler of a model with states, and the runner that checks them."""

    def __init__(self, *, num_blocks: int = 40, state_blocks: int = STATE, **config: int) -> None:
        self.config = SchedulerConfig(
            num_blocks=num_blocks,
            block_size=BLOCK,
            max_tokens_per_step=64,
            state_blocks=state_blocks,
            speculate=True,
            **config,
        )
        self.scheduler = Scheduler(self.config)
        self.runner = FakeRunner(block_size=BLOCK, state_blocks=state_blocks)
        self.num_added = 0

    def add(self, prefix: PrefixHandle | None = None, *, side_blocks: int = 0) -> Sequence:
        """Queue a request of 5 prompt tokens."""
        request = AdmittedRequest(
            str(self.num_added),
            "t",
            (1, 2, 3, 4, 5),
            prefix,
            SamplingParams(temperature=0),
            StopParams(max_tokens=6),
            num_side_blocks=side_blocks,
        )
        sequence = Sequence(self.num_added, request, 0, 0, list(request.prompt))
        self.num_added += 1
        self.scheduler.add(sequence)
        return sequence

    def plan(self) -> Step:
        step = self.scheduler.schedule()
        for key in step.fetches:
            self.scheduler.prefix_staged(key, FakeStaged(PREFIX.num_tokens))
        return step

    def run(self) -> Step:
        step = self.plan()
        self.scheduler.update(step, self.runner.run(step))
        self.scheduler.check_integrity()
        return step

    def finish(self, *sequences: Sequence) -> None:
        while not self.scheduler.idle:
            self.run()
        for sequence in sequences:
            digest = sequence.prefix.key.digest if sequence.prefix else None
            assert sequence.tokens[5:] == fake_generate(digest, (1, 2, 3, 4, 5), 6)


def test_a_sequence_starts_from_fresh_blocks_or_from_a_copy_of_its_prefix_state() -> None:
    bench = Bench()
    plain = bench.add()
    step = bench.run()
    assert len(plain.side_blocks) == STATE
    assert set(plain.side_blocks) <= set(step.fresh)
    assert not step.copies
    under = bench.add(PREFIX)
    while not under.side_blocks:
        step = bench.run()
    entry = bench.scheduler.memory.residency.get(PREFIX.key)
    assert entry is not None
    assert step.copies == [
        BlockCopy(entry.blocks[1], under.block_table[1]),
        *map(BlockCopy, entry.side_blocks, under.side_blocks),
    ]
    bench.finish(plain, under)


def test_blocks_of_a_request_come_after_those_of_the_state_and_are_freed_with_them() -> None:
    bench = Bench()
    sequence = bench.add(PREFIX, side_blocks=3)
    while not sequence.side_blocks:
        bench.run()
    assert len(sequence.side_blocks) == STATE + 3
    bench.finish(sequence)
    pool, residency = bench.scheduler.memory.pool, bench.scheduler.memory.residency
    assert residency.num_blocks == 2 + STATE
    assert pool.num_free == pool.num_usable - residency.num_blocks


def test_what_can_ever_fit_includes_side_blocks() -> None:
    config = SchedulerConfig(num_blocks=21, block_size=BLOCK, state_blocks=STATE)
    assert config.max_tokens_for(0) == (20 - STATE) * BLOCK + 1
    assert config.max_tokens_for(0, num_side_blocks=3) == (20 - STATE - 3) * BLOCK + 1
    assert config.max_tokens_for(8) == (20 - (2 + STATE) - STATE) * BLOCK + 1


@pytest.mark.parametrize(("state_blocks", "side_blocks"), [(STATE, 0), (0, 3)])
def test_kv_of_sequences_with_side_blocks_is_not_reused(
    state_blocks: int, side_blocks: int
) -> None:
    bench = Bench(state_blocks=state_blocks)
    for _ in range(2):
        sequence = bench.add(side_blocks=side_blocks)
        bench.finish(sequence)
        assert sequence.num_cached == 0
    assert bench.scheduler.memory.pool.num_remembered == 0


def test_a_compile_and_a_prefill_that_failed_start_over_in_fresh_blocks() -> None:
    """The failed step has advanced their states."""
    bench = Bench(max_prefill_chunk=3)
    sequences = [bench.add(), bench.add(PREFIX)]
    failed = Step()
    while not (failed.compiles and failed.chunks):
        failed = bench.plan()
        output = bench.runner.run(failed)
        if not (failed.compiles and failed.chunks):
            bench.scheduler.update(failed, output)
    assert bench.scheduler.step_failed(failed, "boom", alone=False) == []
    bench.scheduler.check_integrity()
    assert not sequences[0].side_blocks
    bench.finish(*sequences)


def test_evicted_prefixes_are_saved_with_their_state_which_counts_in_host_memory() -> None:
    bench = Bench(host_tokens=PREFIX.num_tokens + STATE * BLOCK)
    bench.finish(bench.add(PREFIX))
    memory = bench.scheduler.memory
    entry = memory.residency.get(PREFIX.key)
    assert entry is not None
    side, step = tuple(entry.side_blocks), Step()
    memory.evict(step, entry, save=True)
    assert step.saves[0].side_blocks == side
    assert memory.host.takes(PREFIX.num_tokens)
    assert not memory.host.takes(PREFIX.num_tokens + 1)


def test_a_probe_has_a_state() -> None:
    step = probe_step([7, 8, 9])
    assert (step.chunks[0].block_table, step.chunks[0].side_blocks) == ([7], [8, 9])
    FakeRunner(block_size=BLOCK, state_blocks=2).run(step)
