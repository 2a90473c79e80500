"""The background class takes what the foreground leaves idle, by counted steps."""

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from prefixd.server.engine.background_share import SLOWDOWN
from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.core import EngineCore
from prefixd.server.engine.output_processor import OutputProcessor
from prefixd.server.engine.queue_limiter import QueueLimiter
from prefixd.server.engine.request import (
    AdmittedRequest,
    FinishReason,
    PrefixHandle,
    PrefixKey,
    QueueFull,
    SamplingParams,
    StopParams,
)
from prefixd.server.engine.scheduler import Scheduler
from prefixd.server.engine.sequence import Sequence, State
from prefixd.server.engine.stats import debug_state
from prefixd.server.engine.step import Step
from prefixd.server.testing import ByteDetokenizer, FakeRunner, FakeSource, FakeStaged
from tests.engine.constraints import alternating

BLOCK = 4
_ids = itertools.count()


def request(tenant: str = "a", *, prompt: int = 8, output: int = 8, **more: Any) -> AdmittedRequest:
    return AdmittedRequest(
        request_id=str(next(_ids)),
        tenant=tenant,
        prompt=tuple(range(prompt)),
        prefix=more.pop("prefix", None),
        sampling=SamplingParams(temperature=0),
        stop=StopParams(max_tokens=output),
        kv_reuse=False,
        **more,
    )


class Bench:
    """A scheduler whose steps take 10 ms and ``token`` seconds for each token."""

    def __init__(
        self,
        *,
        blocks: int = 200,
        token: float = 0.001,
        holds: Callable[[Sequence], bool] = lambda _: False,
        **config: Any,
    ) -> None:
        self.scheduler = Scheduler(
            SchedulerConfig(
                num_blocks=blocks + 1,
                block_size=BLOCK,
                **{"max_running": 4, "max_tokens_per_step": 32, **config},
            ),
            holds=holds,
        )
        self.runner = FakeRunner(block_size=BLOCK)
        self.token = token
        self.now = 0.0

    def add(self, tenant: str = "a", **more: Any) -> Sequence:
        one = request(tenant, **more)
        sequence = Sequence(next(_ids), one, 0, 0, list(one.prompt))
        assert self.scheduler.add(sequence, now=self.now) == []
        return sequence

    def line(self, tenant: str = "a", **more: Any) -> Sequence:
        return self.add(tenant, background=True, **more)

    def step(self) -> Step:
        step = self.scheduler.schedule(now=self.now)
        seconds = 0.01 + self.token * step.num_tokens
        self.scheduler.update(step, self.runner.run(step))
        self.scheduler.observe(step, seconds)
        for key in step.fetches:
            if key.digest != "slow":
                self.scheduler.prefix_staged(key, FakeStaged(int(key.digest)))
        self.now += seconds
        self.scheduler.check_integrity()
        return step

    def run(self, steps: int) -> list[Step]:
        return [self.step() for _ in range(steps)]


def handle(length: int, tenant: str = "a") -> PrefixHandle:
    return PrefixHandle(PrefixKey(tenant, str(length)), length)


def test_without_foreground_it_has_the_whole_step() -> None:
    bench = Bench()
    lines = [bench.line() for _ in range(4)]
    assert bench.step().num_tokens == 32
    assert bench.step().num_tokens == 4
    bench.run(8)
    assert all(line.reason is FinishReason.LENGTH for line in lines)


def test_it_adds_little_to_the_steps_of_streams_and_starts_no_more_than_it_runs() -> None:
    bench = Bench(token=0.0001)
    streams = [bench.add(output=400) for _ in range(2)]
    lines = [bench.line(output=20) for _ in range(50)]
    for number, step in enumerate(bench.run(300)):
        assert {chunk.seq_id for chunk in step.chunks} >= {each.seq_id for each in streams}
        plain = 0.01 + bench.token * 2
        if number > 100:
            assert bench.token * step.background_tokens < 1.5 * SLOWDOWN * plain
    assert sum(line.finished for line in lines) > 5
    assert len(bench.scheduler.background.running) <= 3


def test_sequences_without_room_in_a_step_wait_in_place() -> None:
    bench = Bench(token=0.01, max_running=8)
    lines = [bench.line(output=60) for _ in range(4)]
    bench.run(2)
    bench.add(output=60)
    steps = bench.run(40)
    assert all(line.state is State.RUNNING for line in lines)
    assert 0 < sum(step.background_tokens for step in steps) < 40
    assert bench.scheduler.background.num_preemptions == 0


def test_it_starts_nothing_while_another_sequence_waits_that_could_start() -> None:
    bench = Bench(max_running=2)
    first = [bench.add(output=12) for _ in range(6)]
    line = bench.line()
    while not all(one.started is not None for one in first):
        bench.step()
        assert line.started is None or all(one.started is not None for one in first)
    bench.run(60)
    assert line.finished


def test_it_starts_nothing_in_blocks_that_are_too_few_for_another_sequence() -> None:
    bench = Bench(blocks=24)
    bench.add(prompt=56, output=8)
    bench.step()
    other, line = bench.add(prompt=48, output=2), bench.line(prompt=4, output=2)
    while other.started is None:
        assert line.started is None
        bench.step()
    bench.run(10)
    assert line.finished


def test_a_step_without_streams_is_not_prolonged_while_they_wait_for_masks() -> None:
    held: list[bool] = [False]
    bench = Bench(holds=lambda sequence: held[0] and not sequence.background)
    bench.add(output=40, constraint=alternating())
    line = bench.line(output=40)
    bench.run(2)
    held[0] = True
    assert not any(step.has_work for step in bench.run(5))
    held[0] = False
    bench.run(100)
    assert line.finished


@pytest.mark.parametrize("num_lines", [1, 3])
def test_it_is_preempted_at_once_for_a_start(num_lines: int) -> None:
    bench = Bench(blocks=24)
    lines = [bench.line(prompt=20, output=10) for _ in range(num_lines)]
    bench.run(3)
    other = bench.add(prompt=84, output=4)
    bench.step()
    assert other.started is not None
    assert [line.state for line in lines] == [State.WAITING] * num_lines
    bench.run(60)
    assert bench.scheduler.idle
    assert bench.scheduler.num_preemptions == 0
    assert bench.scheduler.background.num_preemptions >= num_lines


def test_only_as_many_are_preempted_as_have_the_blocks_that_are_needed() -> None:
    bench = Bench(blocks=24)
    lines = [bench.line(prompt=20, output=10) for _ in range(3)]
    bench.run(3)
    other = bench.add(prompt=25, output=4)
    bench.step()
    assert other.started is not None
    assert [line.state for line in lines] == [State.RUNNING, State.RUNNING, State.WAITING]


def test_it_is_preempted_before_a_stream_and_before_prefixes_leave() -> None:
    bench = Bench(blocks=24)
    bench.scheduler.prefix_loader.set_pins([handle(16)])
    bench.run(3)
    stream = bench.add(prompt=4, output=60)
    line = bench.line(prompt=30, output=6)
    bench.run(70)
    assert stream.finished
    assert bench.scheduler.num_preemptions == 0
    assert bench.scheduler.background.num_preemptions > 0
    assert bench.scheduler.memory.residency.num_evictions == 0
    bench.run(30)
    assert line.finished


@pytest.mark.parametrize("is_preload", [True, False])
def test_no_prefix_of_the_foreground_waits_for_it(is_preload: bool) -> None:
    bench = Bench(blocks=24, max_resident_tokens=48, max_tokens_per_step=128)
    lines = [bench.line(prompt=6, output=40, prefix=handle(40)) for _ in range(3)]
    bench.run(4)
    assert all(line.state is State.RUNNING for line in lines)
    if is_preload:
        bench.scheduler.prefix_loader.preloads.add(handle(36, "b"), cap=None, now=bench.now)
    else:
        bench.add("b", prefix=handle(36, "b"), output=2)
    bench.run(2)  # fetched in one, placed and compiled in the next
    entry = bench.scheduler.memory.residency.get(PrefixKey("b", "36"))
    assert entry is not None
    assert entry.is_compiled
    bench.run(300)
    assert all(line.finished for line in lines)


def test_the_counter_of_its_tenant_is_not_charged_for_it() -> None:
    bench = Bench(max_running=1)
    bench.add("c", prefix=PrefixHandle(PrefixKey("c", "slow"), 4))  # so that no counter is lifted
    lines = [bench.line("a") for _ in range(10)]
    bench.run(200)
    assert all(line.finished for line in lines)
    sequences = [bench.add(tenant, output=2) for tenant in "aaabbb"]
    bench.run(60)
    order = sorted(sequences, key=lambda sequence: sequence.started or 0.0)
    assert [sequence.tenant for sequence in order] == list("ababab")


def test_its_tenants_are_served_by_weight() -> None:
    bench = Bench(max_running=1)
    lines = [bench.line(tenant, weight=weight) for tenant, weight in [("a", 1), ("b", 2)] * 30]
    while sum(line.finished for line in lines) < 30:
        bench.step()
    served = Counter(line.tenant for line in lines if line.finished)
    assert served["b"] in range(19, 22)


def test_it_is_not_shed_and_has_only_its_own_timeout() -> None:
    bench = Bench(max_running=1, max_waiting_tokens=40, max_queue_wait_s=1.0)
    bench.add(output=600, prompt=4)
    bench.step()
    lines = [bench.line() for _ in range(5)]
    late = bench.line(timeout_s=5.0)
    bench.add("b", prompt=8)
    bench.now += 3.0
    expired = bench.scheduler.expire(now=bench.now)
    assert [sequence.background for sequence in expired] == [False]
    bench.now += 3.0
    assert bench.scheduler.expire(now=bench.now) == [late]
    assert late.reason is FinishReason.TIMEOUT
    assert not any(line.finished for line in lines)


def test_its_queue_has_a_bound_of_its_own() -> None:
    limiter = QueueLimiter(SchedulerConfig(num_blocks=9, max_waiting_tokens=40))
    lines = [request(background=True) for _ in range(2)]
    for each in lines:
        limiter.enter(each)
    with pytest.raises(QueueFull, match="32 tokens of the background class wait, of at most 40"):
        limiter.enter(request(background=True))
    with pytest.raises(QueueFull):
        limiter.check("a", weight=1.0, cost=16, background=True)
    limiter.enter(request("b", background=True))  # its share
    limiter.enter(request())
    for each in lines:
        limiter.entered(each)
    limiter.enter(request(background=True))


def test_prefixes_that_do_not_fit_together_alternate() -> None:
    bench = Bench(blocks=30, max_resident_tokens=48, max_prefix_wait_s=0.1)
    lines = [
        bench.line(tenant, prefix=handle(40, tenant), output=4 + number % 5)
        for tenant in ["a", "b"]
        for number in range(40)
    ]
    bench.run(60)
    started = {line.tenant for line in lines if line.started is not None}
    assert started == {"a", "b"}
    bench.run(3000)
    assert all(line.finished for line in lines)


def test_figures_tell_the_classes_apart() -> None:
    config = SchedulerConfig(num_blocks=64, block_size=BLOCK, max_running=2)
    limiter = QueueLimiter(config)
    core = EngineCore(
        config=config,
        runner=FakeRunner(block_size=BLOCK),
        source=FakeSource({}),
        outputs=OutputProcessor(ByteDetokenizer),
        queue_limiter=limiter,
        namespace="",
        fetch_threads=1,
        post=lambda _function: True,
    )
    for _ in range(3):
        one = request("batch", background=True)
        limiter.enter(one)
        core.add(one, lambda _event: None)
    for _ in range(2):
        core.turn()
    stats = core.build_stats()
    assert (stats.running, stats.waiting, stats.waiting_tokens) == (0, 0, 0)
    assert (stats.background_running, stats.background_waiting) == (2, 1)
    assert stats.background_waiting_tokens == 16
    assert (stats.background_tokens, stats.background_generated_tokens) == (18, 4)
    state = debug_state(core.scheduler, now=0.0)["background"]
    assert (len(state["running"]), state["count"], state["tokens"]) == (2, 3, 16)
    assert "Background(running=2, FairQueue({'batch': 1}))" in repr(core.scheduler)
    core.shut_down()
    core.stop_threads()
