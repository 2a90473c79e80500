"""A tenant of which nothing runs gets a place, however long the sequences of others are."""

import itertools

import pytest

from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.request import AdmittedRequest, SamplingParams, StopParams
from prefixd.server.engine.scheduler import Scheduler
from prefixd.server.engine.sequence import Sequence
from prefixd.server.testing import FakeRunner

_ids = itertools.count()
BLOCKS, SIZE, ROWS = 40, 4, 4


def sequence(tenant: str, *, prompt: int = 8, max_tokens: int = 3, weight: float = 1.0) -> Sequence:
    tokens = tuple(range(1, prompt + 1))
    request = AdmittedRequest(
        request_id=str(next(_ids)),
        tenant=tenant,
        prompt=tokens,
        prefix=None,
        sampling=SamplingParams(temperature=0),
        stop=StopParams(max_tokens=max_tokens),
        weight=weight,
    )
    return Sequence(next(_ids), request, 0, 0, list(tokens))


class Bench:
    """A scheduler with a clock: one step takes 0.1 s."""

    def __init__(self, *, max_running: int = ROWS, max_tenant_wait_s: float | None = 1.0) -> None:
        self.now = 0.0
        self.scheduler = Scheduler(
            SchedulerConfig(
                num_blocks=BLOCKS + 1,
                block_size=SIZE,
                max_running=max_running,
                max_tenant_wait_s=max_tenant_wait_s,
            )
        )
        self.runner = FakeRunner(block_size=SIZE)

    def add(self, *sequences: Sequence) -> None:
        for one in sequences:
            self.scheduler.add(one, now=self.now)

    def run(self, steps: int) -> None:
        for _ in range(steps):
            planned = self.scheduler.schedule(now=self.now)
            if planned.has_work:
                self.scheduler.update(planned, self.runner.run(planned))
            self.now += 0.1
            self.scheduler.check_integrity()

    def until_finished(self, one: Sequence, *, within: int) -> int:
        for number in range(within):
            self.run(1)
            if one.finished:
                return number + 1
        raise AssertionError(f"{one} did not end within {within} steps: {self.scheduler!r}")


@pytest.mark.parametrize("prompt", [8, 32], ids=["all rows", "all blocks"])
def test_the_youngest_sequence_of_a_tenant_with_everything_yields(prompt: int) -> None:
    bench = Bench()
    greedy = [sequence("a", prompt=prompt, max_tokens=40) for _ in range(ROWS)]
    greedy += [sequence("a", prompt=prompt, max_tokens=40) for _ in range(4 * ROWS)]
    bench.add(*greedy)
    bench.run(4)
    running = [one for one in greedy if one.state.name == "RUNNING"]
    other = sequence("b", prompt=prompt)
    bench.add(other)
    assert bench.until_finished(other, within=20) > 8  # not before it has waited for a second
    assert sum(one.num_yields for one in greedy) in {1, 2}
    assert running[0].num_yields == 0
    bench.run(800)
    assert all(one.finished for one in greedy)


def test_without_the_rule_it_waits_until_a_sequence_ends() -> None:
    bench = Bench(max_tenant_wait_s=None)
    bench.add(*(sequence("a", max_tokens=30) for _ in range(ROWS)))
    bench.run(4)
    other = sequence("b")
    bench.add(other)
    bench.run(20)
    assert other.started is None


def test_one_sequence_that_holds_the_pool_yields_and_still_ends() -> None:
    """Two tenants whose sequences need all blocks: both advance, and both end."""
    bench = Bench()
    greedy = [sequence(tenant, prompt=60, max_tokens=90) for tenant in "ab"]
    bench.add(*greedy)
    bench.run(2)
    other = sequence("c", prompt=60, max_tokens=40)
    bench.add(other)
    bench.run(90)
    assert max(one.num_yields for one in greedy) >= 1
    bench.run(1500)
    assert all(one.finished for one in (*greedy, other))
    assert max(one.num_yields for one in greedy) <= 2


def test_tenants_with_one_place_each_do_not_preempt_each_other() -> None:
    bench = Bench()
    bench.add(*(sequence(f"t{number}", max_tokens=20) for number in range(3 * ROWS)))
    bench.run(200)
    assert bench.scheduler.num_preemptions == 0
    assert bench.scheduler.idle


def test_a_tenant_that_was_served_more_gets_no_place_of_another() -> None:
    bench = Bench()
    heavy = sequence("b", prompt=100, max_tokens=30)
    bench.add(heavy)
    bench.run(40)
    bench.add(*(sequence("a", max_tokens=30) for _ in range(ROWS)))
    bench.scheduler.waiting.charge("b", 10_000)
    bench.run(2)
    bench.add(sequence("b"))
    bench.run(25)
    assert bench.scheduler.num_preemptions == 0
