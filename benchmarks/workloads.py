"""The workloads of the comparison: what is asked of every engine, and how its figure is read.

All requests of a workload are greedy, start at once and give exactly ``output`` tokens. Prompts are
random token ids and never repeat in a run, so no cache of an engine holds any part of them.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

SOFT, SOFT_TOKENS, SOFT_SHARED = 32, 20, 8
KV, KV_TOKENS = 8, 512
SMALLEST_ID, LARGEST_ID = 1000, 40_000
"""Ids of ordinary words in the demo model's vocabulary of 49,152."""


class Figure(StrEnum):
    """What a workload reports; of the last two the smaller is better."""

    RATE = "tokens/s"
    STEP = "ms a token"
    SECONDS = "s"

    @property
    def more_is_better(self) -> bool:
        """Whether a larger figure is a faster engine."""
        return self is Figure.RATE


@dataclass(frozen=True)
class Workload:
    """``requests`` requests of ``prompt`` + ``output`` tokens; request i runs under prefix
    ``prefixes[i % len(prefixes)]``, or under none."""

    name: str
    title: str
    figure: Figure
    requests: int = 32
    prompt: int = 64
    output: int = 64
    prefixes: tuple[str, ...] = ()

    def prefix_of(self, index: int) -> str | None:
        """The prefix of request ``index``."""
        return self.prefixes[index % len(self.prefixes)] if self.prefixes else None


def soft_names(count: int = SOFT) -> tuple[str, ...]:
    """Names of the soft prompts of 20 virtual tokens."""
    return tuple(f"soft-{i:02}" for i in range(count))


def kv_names() -> tuple[str, ...]:
    """Names of the KV prefixes of 512 virtual tokens."""
    return tuple(f"kv-{i}" for i in range(KV))


WORKLOADS = {
    each.name: each
    for each in (
        Workload("W1", "32 x (64 + 64) on the base", Figure.RATE),
        Workload("W2", "the same, 8 soft prompts of 20", Figure.RATE, prefixes=soft_names(8)),
        Workload("W3", "the same, 32 soft prompts of 20", Figure.RATE, prefixes=soft_names()),
        Workload("W4", "the same, 8 prefixes of 512", Figure.RATE, prefixes=kv_names()),
        Workload("one", "one stream, 64 + 128", Figure.STEP, requests=1, output=128),
        Workload("long", "a prompt of 2,048", Figure.SECONDS, requests=1, prompt=2048, output=1),
    )
}


class Prompts:
    """Requests with prompts that were never given out before."""

    def __init__(self, *, seed: str = "") -> None:
        self._seed = seed
        self._count = 0

    def take(self, workload: Workload) -> list[dict[str, Any]]:
        """The next requests of a workload, as the pipe wants them."""
        self._count += 1
        drawn = random.Random(f"{self._seed}/{workload.name}/{self._count}")
        return [
            {
                "tokens": [drawn.randint(SMALLEST_ID, LARGEST_ID) for _ in range(workload.prompt)],
                "prefix": workload.prefix_of(index),
            }
            for index in range(workload.requests)
        ]


def figure_of(workload: Workload, *, seconds: float, first: Sequence[float], served: int) -> float:
    """The workload's figure for one run of ``served`` of its requests.

    One stream is measured from its first token on, where the engine tells when that came.
    """
    match workload.figure:
        case Figure.RATE:
            return served * workload.output / seconds
        case Figure.STEP if first:
            return 1000 * (seconds - first[0]) / (workload.output - 1)
        case Figure.STEP:
            return 1000 * seconds / workload.output
        case Figure.SECONDS:
            return seconds


def rotations(names: Sequence[str]) -> Iterator[list[str]]:
    """The order in each round: every engine is first, last and after every other in turn."""
    number = 0
    while True:
        shift = number % len(names)
        order = [*names[shift:], *names[:shift]]
        yield order if number // len(names) % 2 == 0 else order[::-1]
        number += 1
