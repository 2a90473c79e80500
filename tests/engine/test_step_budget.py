"""The prompt tokens of a step follow their measured cost, on a simulated device."""

import itertools
from dataclasses import dataclass, field

import pytest

from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.request import (
    AdmittedRequest,
    PrefixHandle,
    PrefixKey,
    SamplingParams,
    StopParams,
)
from prefixd.server.engine.scheduler import Scheduler
from prefixd.server.engine.sequence import Sequence
from prefixd.server.engine.step import Step
from prefixd.server.engine.step_budget import LEAST, UNMEASURED, StepBudget
from prefixd.server.testing import FakeRunner, FakeStaged

GAP = 0.25


@dataclass
class Device:
    """A scheduler whose steps take ``fixed + row * decode rows + token * other tokens`` seconds."""

    token: float
    fixed: float = 0.01
    row: float = 0.001
    gap: float | None = GAP
    budget: int = 2048
    chunk: int = 2048
    running: int = 64
    steps: list[tuple[Step, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        config = SchedulerConfig(
            num_blocks=2001,
            max_tokens_per_step=self.budget,
            max_prefill_chunk=self.chunk,
            max_token_gap_s=self.gap,
            max_running=self.running,
        )
        self.scheduler = Scheduler(config)
        self.runner = FakeRunner()
        self.ids = itertools.count()

    def add(self, prompt: int, output: int = 1, prefix: int = 0) -> int:
        number = next(self.ids)
        handle = PrefixHandle(PrefixKey("a", f"{number}-{prefix}"), prefix) if prefix else None
        request = AdmittedRequest(
            request_id=str(number),
            tenant="a",
            prompt=tuple(range(prompt % 7, prompt % 7 + 1)) * prompt,
            prefix=handle,
            sampling=SamplingParams(temperature=0),
            stop=StopParams(max_tokens=output),
            kv_reuse=False,
        )
        self.scheduler.add(Sequence(number, request, 0, 0, list(request.prompt)))
        return number

    def step(self, *, slower: float = 1.0) -> Step:
        step = self.scheduler.schedule()
        decodes = sum(len(chunk.tokens) == 1 for chunk in step.chunks)
        seconds = self.fixed + self.row * decodes + self.token * (step.num_tokens - decodes)
        self.scheduler.step_budget.observe(step, slower * seconds)
        self.scheduler.update(step, self.runner.run(step))
        for key in step.fetches:
            self.scheduler.prefix_staged(key, FakeStaged(int(key.digest.split("-")[1])))
        self.steps.append((step, seconds))
        return step

    def run(self) -> None:
        while not self.scheduler.idle:
            self.step()


def largest(steps: list[tuple[Step, float]]) -> int:
    return max(len(chunk.tokens) for step, _ in steps for chunk in step.chunks)


@pytest.mark.parametrize("token", [0.00005, 0.0003, 0.001, 0.004])
def test_a_prompt_runs_in_the_largest_parts_that_keep_the_gap_of_streams(token: float) -> None:
    device = Device(token)
    device.add(2048)
    device.run()
    for _ in range(16):
        device.add(8, output=400)
    while any(len(s.tokens) - s.num_computed > 1 for s in device.scheduler.sequences()):
        device.step()
    for _ in range(3):
        device.step()
    device.steps.clear()
    long = device.add(4096)
    while any(s.seq_id == long for s in device.scheduler.sequences()):
        device.step()
    assert all(len(step.chunks) == 17 for step, _ in device.steps), "a stream missed a step"
    longest = max(seconds for _, seconds in device.steps)
    assert longest <= GAP
    assert longest >= 0.9 * min(GAP, 2048 * token)


def test_without_streams_a_prompt_runs_in_one_part_once_its_cost_is_known() -> None:
    device = Device(token=0.0004)
    device.add(2048)
    device.run()
    assert [step.num_tokens for step, _ in device.steps] == [UNMEASURED, 2048 - UNMEASURED]
    device.steps.clear()
    device.add(2048)
    device.run()
    assert [step.num_tokens for step, _ in device.steps] == [2048]


def test_a_slow_model_runs_parts_of_a_few_gaps_without_streams_and_always_some_tokens() -> None:
    device = Device(token=0.1)
    device.add(300)
    device.run()
    device.steps.clear()
    device.add(64)
    device.run()
    assert [step.num_tokens for step, _ in device.steps] == [LEAST, LEAST]


def test_one_slow_step_changes_nothing() -> None:
    quiet, disturbed = Device(token=0.001), Device(token=0.001)
    for device in (quiet, disturbed):
        device.add(2048)
        device.run()
        device.add(8, output=400)
        device.step()
        device.add(2048)
    for number in range(12):
        assert quiet.step().num_tokens == disturbed.step(slower=20 if number == 3 else 1).num_tokens


def test_a_device_that_becomes_slower_gets_smaller_parts() -> None:
    budget = StepBudget(GAP)
    device = Device(token=0.001)
    for _ in range(5):
        device.add(1000)
        device.run()
    for step, seconds in device.steps:
        budget.observe(step, seconds)
    before = budget.prompt_tokens(num_decoding=1)
    for step, seconds in device.steps:
        budget.observe(step, 3 * seconds)
    after = budget.prompt_tokens(num_decoding=1)
    assert before is not None
    assert after == pytest.approx(before / 3, rel=0.05)


def test_configured_sizes_are_hard_limits() -> None:
    device = Device(token=0.00001, budget=300, chunk=100)
    for _ in range(8):
        device.add(500)
    device.run()
    assert max(step.num_tokens for step, _ in device.steps) == 300
    assert largest(device.steps) == 100
    unbounded = Device(token=10, gap=None)
    unbounded.add(2048)
    unbounded.run()
    assert [step.num_tokens for step, _ in unbounded.steps] == [2048]


def test_a_short_prompt_does_not_wait_for_a_long_one() -> None:
    device = Device(token=0.001)
    device.add(2048)
    device.run()
    device.add(8000)
    device.step()
    short = device.add(20)
    step = device.step()
    assert len(step.chunks) == 2
    assert step.chunks[-1].seq_id == short
    assert step.chunks[-1].sampling is not None


def test_prompts_that_cannot_start_leave_the_step_to_those_that_run() -> None:
    device = Device(token=0.0001, running=1)
    device.add(2048)
    device.run()
    device.steps.clear()
    device.add(2048)
    device.add(2048)
    device.run()
    assert [step.num_tokens for step, _ in device.steps] == [2048, 2048]


def test_a_cold_prefix_is_compiled_within_the_gap_of_streams() -> None:
    device = Device(token=0.001)
    device.add(2048)
    device.run()
    for _ in range(4):
        device.add(8, output=400)
    for _ in range(4):
        device.step()
    device.steps.clear()
    cold = device.add(8, prefix=1024)
    while any(s.seq_id == cold for s in device.scheduler.sequences()):
        device.step()
    compiles = [seconds for step, seconds in device.steps if step.compiles]
    assert len(compiles) >= 1024 * 0.001 / GAP
    assert max(compiles) <= GAP


def test_attention_of_a_chunk_is_bounded_in_long_contexts() -> None:
    device = Device(token=0.000001)
    device.add(30_000)
    device.run()
    sizes = [(len(c.tokens), c.start + len(c.tokens)) for s, _ in device.steps for c in s.chunks]
    assert max(size for size, _ in sizes) == 2048
    assert all(size <= 256 or size * seen <= 2**24 for size, seen in sizes)
    assert min(size for size, _ in sizes[:-1]) >= 256


def test_the_cost_of_a_token_and_of_a_decode_step_are_measured_apart() -> None:
    device = Device(token=0.001)
    device.add(100, output=3)
    device.run()
    measured = device.scheduler.step_budget
    assert measured.token_s == pytest.approx(0.001, rel=0.2)
    assert measured.decode_s == pytest.approx(0.011)
