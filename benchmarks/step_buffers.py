"""Host time of a decode step's layout: buffers filled in place, against lists built for each step.

``python -m benchmarks.step_buffers [--steps 50] [--rounds 5]``

64 rows decode one token each, at 256, 1,024 and 4,096 positions, 8 KV heads. ``lists`` are the
slots, positions and groups of ``tests/model/list_layout.py``; ``buffers`` are filled incrementally;
``a row ended`` fills them when the first row has gone and all others have moved up; ``groups`` are
what decoders in torch gather by, from the buffers. Medians of the rounds, which alternate.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.serving import machine
from prefixd.server.engine.step import Chunk
from prefixd.server.model.batch import FlatBatch, lay_out
from prefixd.server.model.buffers import StepBuffers, StepSizes
from prefixd.server.model.row_groups import group_rows
from tests.model import list_layout

ROWS, HEADS, BLOCK = 64, 8, 16
POSITIONS = (256, 1024, 4096)
CPU = torch.device("cpu")


class Decode:
    """Steps of sequences that decode, each at another offset in its block."""

    def __init__(self, positions: int, steps: int) -> None:
        self._start = positions
        self._width = -(-(positions + steps + ROWS) // BLOCK) + 1
        blocks = ROWS * self._width
        self.buffers = StepBuffers(
            block_size=BLOCK,
            scratch_slot=(1 + blocks) * BLOCK,
            device=CPU,
            sizes=StepSizes(ROWS, ROWS),
            max_blocks=self._width,
        )
        self._tables = [
            list(range(1 + r * self._width, 1 + (r + 1) * self._width)) for r in range(ROWS)
        ]

    def batch(self, step: int, *, first: int = 0) -> FlatBatch:
        """Step ``step``, of the rows from ``first`` on."""
        chunks = []
        for row in range(first, ROWS):
            start = self._start + step + row % BLOCK
            chunks.append(Chunk(row, [5], start, tuple(self._tables[row][: start // BLOCK + 1])))
        batch = lay_out(chunks)
        batch.outputs = list(range(len(chunks)))
        return batch


def lists(batch: FlatBatch) -> None:
    """What a step cost before there were buffers."""
    torch.tensor(list_layout.slots(batch, BLOCK))
    torch.tensor([list_layout.positions(batch)])
    list_layout.group_rows(batch.rows, block_size=BLOCK, num_kv_heads=HEADS, device=CPU)


def median_ms(run: Callable[[FlatBatch], object], batches: list[FlatBatch]) -> float:
    """Median time of a step in ms."""
    times = []
    for batch in batches:
        started = time.perf_counter_ns()
        run(batch)
        times.append((time.perf_counter_ns() - started) / 1e6)
    return statistics.median(times)


def one_round(positions: int, steps: int) -> dict[str, float]:
    """Each way once, over the same steps."""
    decode = Decode(positions, 2 * steps)
    buffers = decode.buffers
    batches = [decode.batch(step) for step in range(steps)]
    shorter = [decode.batch(step, first=1) for step in range(steps)]
    buffers.fill(batches[0])
    result = {"lists": median_ms(lists, batches[: max(3, steps // 10)])}
    result["buffers"] = median_ms(buffers.fill, batches)
    times = []
    for batch, moved in zip(batches, shorter, strict=True):
        buffers.fill(batch)
        times.append(median_ms(buffers.fill, [moved]))
    result["a row ended"] = statistics.median(times)
    buffers.fill(batches[-1])
    rows = batches[-1].rows
    result["groups"] = median_ms(
        lambda _: group_rows(rows, buffers, num_kv_heads=HEADS, device=CPU), batches[:9]
    )
    return result


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    rounds = [
        {positions: one_round(positions, options.steps) for positions in POSITIONS}
        for _ in range(options.rounds)
    ]
    print("ms a step", *(f"{positions:,} positions" for positions in POSITIONS), sep="\t")
    medians = {
        kind: [statistics.median(r[positions][kind] for r in rounds) for positions in POSITIONS]
        for kind in rounds[0][POSITIONS[0]]
    }
    for kind, values in medians.items():
        print(kind, *(f"{value:.3f}" for value in values), sep="\t")
    pairs = zip(medians["lists"], medians["buffers"], strict=True)
    print("times less", *(f"{before / now:.0f}" for before, now in pairs), sep="\t")


if __name__ == "__main__":
    main()
