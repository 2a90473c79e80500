"""Microseconds of a turn of the engine without the model: by resident prefixes, and by sequences.

``python -m benchmarks.step_cost [--turns 200] [--rounds 5]``

The runner samples at once, so what is measured is the scheduler, the output processor and what the
engine publishes. Loads are those of ``tests/engine/crowded_pools.py``. Figures are medians over the
rounds of the median turn; the numbers of residents alternate within a round.
"""

import argparse
import statistics
import time
from collections import defaultdict

from benchmarks.serving import machine
from tests.engine.crowded_pools import LOADS, CrowdedPool, decoding

RESIDENTS = (0, 1000, 10_000)
ROWS = (1, 8, 32)
WARM_UP = 30


def turn_us(pool: CrowdedPool, turns: int) -> float:
    """Median time of a turn in microseconds, and the pool is closed."""
    times = []
    for number in range(WARM_UP + turns):
        pool.prepare()
        started = time.perf_counter_ns()
        pool.core.turn()
        if number >= WARM_UP:
            times.append((time.perf_counter_ns() - started) / 1000)
    pool.close()
    return statistics.median(times)


def main() -> None:
    """Measure and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    by_load: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
    by_rows: defaultdict[int, list[float]] = defaultdict(list)
    for _ in range(options.rounds):
        for load in LOADS:
            for residents in RESIDENTS:
                by_load[load.__name__, residents] += [turn_us(load(residents), options.turns)]
        for rows in ROWS:
            by_rows[rows] += [turn_us(decoding(0, rows), options.turns)]
    print(machine())
    print("load", *(f"{residents:,} residents" for residents in RESIDENTS), sep="\t")
    for load in LOADS:
        row = (f"{statistics.median(by_load[load.__name__, each]):.0f}" for each in RESIDENTS)
        print(load.__name__, *row, sep="\t")
    for rows in ROWS:
        print(f"{rows} sequences decode", f"{statistics.median(by_rows[rows]):.0f}", sep="\t")


if __name__ == "__main__":
    main()
