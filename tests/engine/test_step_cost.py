"""The cost of a step does not grow with the number of resident prefixes."""

import sys
import tracemalloc
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from tests.engine.crowded_pools import LOADS, CrowdedPool

WARM_UP, TURNS = 24, 16


def operations(call: Callable[[], object]) -> int:
    """Bytecode instructions that ``call`` executes. Loops inside C functions are not among them."""
    count = 0

    def trace(frame: FrameType, event: str, _argument: object) -> Any:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def peak(call: Callable[[], object]) -> int:
    """Bytes that ``call`` has allocated at a time: a copy of all residents would show."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def costs(load: Callable[[int], CrowdedPool], num_others: int) -> tuple[float, int]:
    """Instructions of a turn, and the most bytes that a turn allocates."""
    pool = load(num_others)
    try:
        for _ in range(WARM_UP):
            pool.prepare()
            pool.core.turn()
        total, most = 0, 0
        for number in range(TURNS):
            pool.prepare()
            if number % 2:
                total += operations(pool.core.turn)
            else:
                most = max(most, peak(pool.core.turn))
        pool.core.scheduler.check_integrity()
    finally:
        pool.close()
    return total / (TURNS // 2), most


@pytest.mark.parametrize("load", LOADS, ids=lambda load: load.__name__)
def test_a_step_costs_the_same_with_many_resident_prefixes(
    load: Callable[[int], CrowdedPool],
) -> None:
    none, none_bytes = costs(load, 0)
    for num_others in (1000, 10_000):
        many, many_bytes = costs(load, num_others)
        assert 0.8 * none < many < 1.2 * none
        assert many_bytes < none_bytes + 8 * num_others, "all residents were copied"
