"""Budgets, alternating rounds and the copy rate of the device."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

Clock = Callable[[], float]


@dataclass
class Budget:
    """Seconds that are left, from now on."""

    seconds: float
    clock: Clock = time.perf_counter
    _started: float = field(init=False)

    def __post_init__(self) -> None:
        self._started = self.clock()

    @property
    def left(self) -> float:
        """Seconds that are left; negative when it is exceeded."""
        return self._started + self.seconds - self.clock()

    def part(self, seconds: float) -> "Budget":
        """A budget of at most ``seconds`` within this one."""
        return Budget(min(seconds, self.left), self.clock)


def alternating(
    cases: Mapping[str, Callable[[], float]], *, rounds: int, budget: Budget
) -> tuple[dict[str, float], list[str]]:
    """Medians of what the cases return, over rounds that alternate, and those that were dropped
    for the budget, or with the error that they raised.

    The first of them run first. One that has run once, to warm up, is kept if all rounds of it and
    of those kept before fit what is left.
    """
    kept: dict[str, float] = {}  # seconds of a round
    dropped: list[str] = []
    for name, run in cases.items():
        if budget.left <= rounds * sum(kept.values()):
            dropped.append(name)
            continue
        before = budget.left
        try:
            run()
        except Exception as error:  # noqa: BLE001 - the other cases still give figures
            dropped.append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
            continue
        seconds = before - budget.left
        if rounds * (sum(kept.values()) + seconds) <= budget.left:
            kept[name] = seconds
        else:
            dropped.append(name)
    values: dict[str, list[float]] = {name: [] for name in kept}
    for _ in range(rounds):
        for name in kept:
            values[name].append(cases[name]())
    return {name: statistics.median(each) for name, each in values.items()}, dropped


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(run: Callable[[], object], device: torch.device, *, repeats: int) -> float:
    """Seconds of one of ``repeats`` calls in a row."""
    synchronize(device)
    started = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize(device)
    return (time.perf_counter() - started) / repeats


def copy_rate(device: torch.device, num_bytes: int) -> float:
    """Bytes a second that a copy on the device reads and writes: median of seven."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = [seconds_of(lambda: target.copy_(source), device, repeats=5) for _ in range(8)][1:]
    return 2 * num_bytes / statistics.median(times)
