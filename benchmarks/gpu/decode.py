"""Steady decode steps on a runner, without a scheduler."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.gpu.sizes import BLOCK, ModelSize
from benchmarks.gpu.timing import synchronize
from prefixd.server.engine.request import SamplingParams
from prefixd.server.engine.step import PENDING, Chunk, Step
from prefixd.server.model.batch import FlatBatch, lay_out
from prefixd.server.model.device_runner import DeviceRunner
from prefixd.server.model.graphs import DecodeGraphs
from prefixd.server.model.paged import PagedDecoder

GREEDY = SamplingParams(temperature=0)
STEPS = 16


@dataclass(frozen=True, slots=True)
class Rows:
    """Sequences that decode, and come to ``positions`` in the last step. The first ``shared`` are
    those of one prefix for all."""

    rows: int
    positions: int
    shared: int = 0

    @property
    def num_blocks(self) -> int:
        """Blocks of a pool that holds them, with the null block."""
        common = self.shared // BLOCK
        return 1 + common + self.rows * (-(-self.positions // BLOCK) - common)

    def chunk(self, row: int, start: int, token: int) -> Chunk:
        """One token of a row, at ``start``."""
        common, blocks = self.shared // BLOCK, -(-self.positions // BLOCK)
        first = 1 + common + row * (blocks - common)
        table = (*range(1, 1 + common), *range(first, first + start // BLOCK + 1 - common))
        return Chunk(row, [token], start, table, sampling=GREEDY, num_prefix_tokens=self.shared)

    def steps(self, count: int) -> list[Step]:
        """The last steps; all tokens but those of the first are pending."""
        return [
            Step(
                chunks=[
                    self.chunk(row, self.positions - count + number, PENDING if number else 5)
                    for row in range(self.rows)
                ]
            )
            for number in range(count)
        ]

    def batch(self) -> FlatBatch:
        """The last step, for a decoder."""
        return lay_out([self.chunk(row, self.positions - 1, 5) for row in range(self.rows)])


def step_seconds(runner: DeviceRunner, steps: list[Step]) -> float:
    """Seconds of a step, one always in flight while the next is submitted. The first two, which
    fill the pipeline, do not count."""
    synchronize(runner.decoder.device)
    runner.submit(steps[0])
    runner.submit(steps[1])
    runner.collect()
    started = time.perf_counter()
    for step in steps[2:]:
        runner.submit(step)
        runner.collect()
    runner.collect()
    return (time.perf_counter() - started) / (len(steps) - 1)


def decode_case(
    decoder: PagedDecoder, rows: Rows, graphs: DecodeGraphs | None
) -> Callable[[], float]:
    """Measures a step, with graphs or without."""
    steps = rows.steps(STEPS)

    def run() -> float:
        decoder._graphs = graphs  # noqa: SLF001 - a server has them or not, this compares
        return step_seconds(DeviceRunner(decoder, max_rows=rows.rows), steps)

    return run


def described(size: ModelSize, rows: Rows, seconds: float, copy_rate: float) -> dict[str, float]:
    """Tokens a second, and the share of the floor. A shared prefix is counted once."""
    own = rows.positions - STEPS / 2 - rows.shared
    floor = size.floor(1, rows.shared + rows.rows * own, copy_rate)
    return {
        "ms_a_step": round(1e3 * seconds, 3),
        "tokens_per_s": round(rows.rows / seconds, 1),
        "share_of_floor": round(floor / seconds, 4),
    }
