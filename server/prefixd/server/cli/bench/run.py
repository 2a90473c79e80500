"""A measurement from its options: adapt to the server, run the levels, keep what was measured."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from prefixd.client.transport import http_options
from prefixd.server.cli.bench.connection import ConnectionPool
from prefixd.server.cli.bench.generation import OPTIONAL_FIELDS, Endpoint, Generation, Target
from prefixd.server.cli.bench.levels import Level, Load, Traffic, run_level
from prefixd.server.cli.bench.summary import Goodput, summarize
from prefixd.server.cli.bench.workload import PromptSource

PROBE_WORDS = (8, 24)
"""Lengths of the prompts by which the tokens of a word and of an empty prompt are estimated."""


@dataclass(frozen=True)
class Plan:
    """What to measure. ``models`` empty: the first that the server lists. ``num_prompts`` None:
    ``default_prompts`` of each load. ``timeout`` bounds a request, ``max_seconds`` a level."""

    url: str
    api_key: str | None
    loads: Sequence[Load]
    seed: int
    endpoint: Endpoint = "completions"
    models: tuple[str, ...] = ()
    zipf: float | None = None
    num_prompts: int | None = None
    input_tokens: int = 64
    output_tokens: int = 64
    goodput: Goodput | None = None
    timeout: float = 300.0
    max_seconds: float = 600.0

    def prompts_of(self, load: Load) -> int:
        """The number of requests of one level."""
        return default_prompts(load) if self.num_prompts is None else self.num_prompts


def default_prompts(load: Load) -> int:
    """Four rounds of a concurrency, at least 16 requests; 64 arrivals of a rate."""
    return 64 if load.concurrency is None else max(16, 4 * load.concurrency)


@dataclass
class Measurement:
    """What was measured, complete or until an interruption. ``refused`` are optional fields that
    the server does not take; ``num_words`` is the length of the prompts."""

    plan: Plan
    models: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    num_words: int = 0
    levels: list[Level] = field(default_factory=list)
    interrupted: bool = False

    def summaries(self) -> list[dict[str, object]]:
        """The figures of each level that has results."""
        return [
            summarize(level, goodput=self.plan.goodput, output_tokens=self.plan.output_tokens)
            for level in self.levels
            if level.results or not self.interrupted
        ]


async def measure(
    measurement: Measurement,
    *,
    on_level: Callable[[Level], None] = lambda _: None,
    on_result: Callable[[Generation], None] = lambda _: None,
) -> None:
    """Run the plan of ``measurement`` and record in it. Raises ClientError where the server does
    not serve a first request of each model."""
    plan = measurement.plan
    headers = http_options(plan.url, api_key=plan.api_key, timeout=plan.timeout)["headers"]
    pool = ConnectionPool(plan.url, headers | {"user-agent": "prefixd-bench"})
    prompts = PromptSource(plan.seed)
    try:
        target = Target(pool, plan.endpoint, plan.timeout)
        measurement.models = plan.models or tuple((await target.models())[:1])
        first, *others = measurement.models
        target = await target.adapted(prompts.draw(1), model=first)
        refused = [name for name in OPTIONAL_FIELDS if name not in target.optional]
        measurement.refused = tuple(refused)
        measurement.num_words = await _words_for(plan.input_tokens, target, prompts, model=first)
        for model in dict.fromkeys(others):
            await target.generate(prompts.draw(1), model=model, output_tokens=1)
        traffic = Traffic(
            prompts=prompts,
            random=Random(plan.seed),
            models=measurement.models,
            zipf=plan.zipf,
            num_words=measurement.num_words,
            output_tokens=plan.output_tokens,
        )
        for load in plan.loads:
            level = Level(load, plan.prompts_of(load))
            measurement.levels.append(level)
            on_level(level)
            await run_level(
                level, target, traffic, max_seconds=plan.max_seconds, on_result=on_result
            )
    finally:
        pool.close()
        # Aborted connections close in the next turn of the loop.
        await asyncio.sleep(0)


async def _words_for(tokens: int, target: Target, prompts: PromptSource, *, model: str) -> int:
    """How many words make a prompt of ``tokens``, by what the server counts in two prompts. A
    server that counts nothing gets one word for each token."""
    counts = []
    for num_words in PROBE_WORDS:
        probe = await target.generate(prompts.draw(num_words), model=model, output_tokens=1)
        if probe.prompt_tokens is None:
            return tokens
        counts.append(probe.prompt_tokens)
    per_word = max(1e-9, (counts[1] - counts[0]) / (PROBE_WORDS[1] - PROBE_WORDS[0]))
    empty = counts[0] - per_word * PROBE_WORDS[0]
    return max(1, min(4 * tokens, round((tokens - empty) / per_word)))
