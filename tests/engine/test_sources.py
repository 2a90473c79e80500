"""Inputs of encoders: encoded whole and once, within the budget of a step, and again after a
preemption."""

import itertools
from collections.abc import Sequence as Items

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
from prefixd.server.testing import FakeRunner, FakeStaged, fake_generate

BLOCK = 4
START = (7,)
_ids = itertools.count()


class Encoders:
    """A scheduler of sequences with inputs, over a fake runner."""

    def __init__(self, **config: int) -> None:
        defaults = {"num_blocks": 200, "block_size": BLOCK, "max_tokens_per_step": 64}
        self.scheduler = Scheduler(SchedulerConfig(**defaults | config))  # type: ignore[arg-type]
        self.runner = FakeRunner(block_size=BLOCK)

    def add(
        self, source: Items[int], *, max_tokens: int = 6, prefix: PrefixHandle | None = None
    ) -> Sequence:
        num_source = len(source) + (prefix.num_tokens if prefix and prefix.gated else 0)
        request = AdmittedRequest(
            request_id=str(next(_ids)),
            tenant="a",
            prompt=START,
            prefix=prefix,
            sampling=SamplingParams(temperature=0),
            stop=StopParams(max_tokens=max_tokens),
            num_side_blocks=-(-num_source // BLOCK),
            source=tuple(source),
        )
        sequence = Sequence(next(_ids), request, 0, 0, list(START))
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> Step:
        planned = self.scheduler.schedule()
        if planned.has_work:
            self.scheduler.update(planned, self.runner.run(planned))
        for key in planned.fetches:
            gated = 0 if key.digest.startswith("soft") else None
            self.scheduler.prefix_staged(key, FakeStaged(5, gated_from=gated))
        self.scheduler.check_integrity()
        return planned

    def run(self) -> None:
        while not self.scheduler.idle:
            self.step()


def output(sequence: Sequence) -> list[int]:
    return sequence.tokens[1:]


def expected(sequence: Sequence) -> list[int]:
    request = sequence.request
    digest = request.prefix.key.digest if request.prefix else None
    return fake_generate(digest, request.source + START, request.stop.max_tokens)


def test_input_and_prefix_reach_their_sequence() -> None:
    encoders = Encoders()
    soft = PrefixHandle(PrefixKey("a", "soft"), 5, gated=True)
    kv = PrefixHandle(PrefixKey("a", "kv"), 5)
    sequences = [
        encoders.add(range(1, 1 + length), prefix=prefix)
        for length in (1, 4, 9)
        for prefix in (None, soft, kv)
    ]
    encoders.run()
    assert [output(each) for each in sequences] == [expected(each) for each in sequences]
    encoded = [
        chunk for step in encoders.runner.steps for chunk in step.chunks if chunk.num_encoded
    ]
    assert [chunk.num_encoded for chunk in encoded if chunk.prefix == soft.key] == [6, 9, 14]
    assert len(encoded) == len(sequences)


def test_a_preempted_sequence_is_encoded_again() -> None:
    encoders = Encoders(num_blocks=11)
    sequences = [encoders.add(range(length), max_tokens=12) for length in (9, 8, 7)]
    encoders.run()
    assert encoders.scheduler.num_preemptions > 0
    assert [output(each) for each in sequences] == [expected(each) for each in sequences]


def test_inputs_share_the_budget_of_a_step() -> None:
    encoders = Encoders(max_tokens_per_step=64)
    for length in (20, 30, 20, 40):
        encoders.add([1] * length)
    assert encoders.step().num_encoded == 50  # 20 more do not fit with two first tokens
    assert encoders.step().num_encoded == 60


def test_an_input_beyond_the_budget_delays_later_prompts() -> None:
    """Running sequences decode on, one step with it is long, and those after it are short."""
    encoders = Encoders(max_tokens_per_step=16, max_running=8)
    encoders.add([1], max_tokens=40)
    encoders.step()
    encoders.add([2] * 60)
    encoders.add([3] * 4)
    steps = [encoders.step() for _ in range(6)]
    assert [step.num_encoded for step in steps] == [60, 0, 0, 0, 4, 0]
    assert all(len(step.chunks) > 1 or step.num_encoded for step in steps)


def test_without_running_sequences_nothing_is_delayed() -> None:
    encoders = Encoders(max_tokens_per_step=16, max_running=8)
    encoders.add([2] * 60, max_tokens=1)
    encoders.add([3] * 60, max_tokens=1)
    assert [encoders.step().num_encoded for _ in range(2)] == [60, 60]
