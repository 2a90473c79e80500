"""What the engine did and holds, as a plain snapshot for metrics and the curious."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from server.engine.request import PrefixKey
from server.engine.residency import Stage
from server.engine.scheduler import Progress, Scheduler
from server.engine.step import Step


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since start (sums) and gauges of this moment.

    ``steps`` are forward passes run; ``distinct_prefixes_*`` count the different prefixes among
    the rows of one pass; ``prefixes_held`` are in the pool or on their way into it; times are in
    seconds, blocks exclude the null block.
    """

    steps: int
    step_seconds: float
    tokens_run: int
    prompt_tokens: int
    generated_tokens: int
    distinct_prefixes_last: int
    distinct_prefixes_max: int
    passes_by_distinct_prefixes: Mapping[int, int]
    running: int
    waiting: int
    finished: Mapping[str, int]
    preemptions: int
    step_failures: int
    blocks_total: int
    blocks_free: int
    blocks_prefix: int
    prefixes_resident: int
    prefix_fetches: int
    prefix_compiles: int
    prefix_evictions: int
    prefixes_held: frozenset[PrefixKey]


@dataclass(slots=True)
class StatsKeeper:
    """Counts on the engine's thread; ``snapshot`` reads together with the scheduler."""

    steps: int = 0
    step_seconds: float = 0.0
    step_failures: int = 0
    tokens_run: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    distinct_last: int = 0
    passes: Counter[int] = field(default_factory=Counter)
    finished: Counter[str] = field(default_factory=Counter)

    def step(self, step: Step, seconds: float, progress: list[Progress]) -> None:
        """Count one forward pass and what it brought."""
        self.steps += 1
        self.step_seconds += seconds
        self.tokens_run += step.num_tokens
        self.distinct_last = step.distinct_prefixes
        self.passes[step.distinct_prefixes] += 1
        self.generated_tokens += sum(p.sampled is not None for p in progress)

    def snapshot(self, scheduler: Scheduler) -> EngineStats:
        """All figures at this moment."""
        residency, pool = scheduler.memory.residency, scheduler.memory.pool
        entries = list(residency)
        return EngineStats(
            steps=self.steps,
            step_seconds=self.step_seconds,
            tokens_run=self.tokens_run,
            prompt_tokens=self.prompt_tokens,
            generated_tokens=self.generated_tokens,
            distinct_prefixes_last=self.distinct_last,
            distinct_prefixes_max=max(self.passes, default=0),
            passes_by_distinct_prefixes=dict(self.passes),
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            finished=dict(self.finished),
            preemptions=scheduler.num_preemptions,
            step_failures=self.step_failures,
            blocks_total=pool.num_usable,
            blocks_free=pool.num_free,
            blocks_prefix=sum(len(entry.blocks) for entry in entries),
            prefixes_resident=sum(entry.stage is Stage.RESIDENT for entry in entries),
            prefix_fetches=residency.num_fetches,
            prefix_compiles=residency.num_compiles,
            prefix_evictions=residency.num_evictions,
            prefixes_held=frozenset(entry.key for entry in entries),
        )
