"""What the engine did and holds, as a plain snapshot for metrics and the curious."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from prefixd.server.engine.request import FinishReason, PrefixKey
from prefixd.server.engine.residency import Stage
from prefixd.server.engine.scheduler import Progress, Scheduler
from prefixd.server.engine.sequence import Sequence
from prefixd.server.engine.step import Step

TENANT_CLASSES = ("low", "standard", "high")
"""Tenants by their weight: below 1, 1, above 1."""

_SMOOTHING = 0.95


def tenant_class(weight: float) -> str:
    """Which of TENANT_CLASSES a tenant of ``weight`` belongs to."""
    return "standard" if weight == 1 else "low" if weight < 1 else "high"


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since start (sums) and gauges of this moment.

    ``steps`` are forward passes run; ``distinct_prefixes_*`` count the different prefixes among
    the rows of one pass; times are in seconds, blocks exclude the null block, tokens of prefixes
    are virtual tokens. ``passes_by_*`` and ``step_times`` count passes by what they carried and by
    how long they took (upper edge in seconds). ``tiers`` says how far each prefix has come that is
    in the pool, on its way into it, or in host memory.
    """

    steps: int
    step_seconds: float
    step_times: Mapping[float, int]
    tokens_run: int
    prompt_tokens: int
    generated_tokens: int
    distinct_prefixes_last: int
    distinct_prefixes_max: int
    passes_by_distinct_prefixes: Mapping[int, int]
    passes_by_tokens: Mapping[int, int]
    compile_seconds: float
    running: int
    running_by_class: Mapping[str, int]
    waiting: int
    waiting_by_class: Mapping[str, int]
    waiting_tokens: int
    finished: Mapping[str, int]
    preemptions: int
    step_failures: int
    out_of_memory: int
    restarts: int
    blocks_total: int
    blocks_free: int
    blocks_remembered: int
    blocks_prefix: int
    resident_tokens: int
    host_tokens: int
    pinned_prefixes: int
    prefixes_resident: int
    prefix_loads: Mapping[str, int]
    prefix_compiles: int
    prefix_evictions: int
    prefix_swaps: int
    kv_queried_tokens: int
    kv_reused_tokens: int
    tiers: Mapping[PrefixKey, str]

    @property
    def prefixes_held(self) -> frozenset[PrefixKey]:
        """Prefixes in the pool, on their way into it, or in host memory."""
        return frozenset(self.tiers)


STEP_TIME_EDGES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
"""Upper edges of ``step_times``, in seconds; longer steps count under infinity."""


@dataclass(slots=True)
class StatsKeeper:
    """Counts on the engine's thread; ``snapshot`` reads together with the scheduler."""

    steps: int = 0
    step_seconds: float = 0.0
    step_failures: int = 0
    out_of_memory: int = 0
    restarts: int = 0
    tokens_run: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    compile_seconds: float = 0.0
    distinct_last: int = 0
    rate: float = 0.0
    passes: Counter[int] = field(default_factory=Counter)
    passes_by_tokens: Counter[int] = field(default_factory=Counter)
    step_times: Counter[float] = field(default_factory=Counter)
    finished: Counter[str] = field(
        default_factory=lambda: Counter({reason.value: 0 for reason in FinishReason})
    )
    _tiers: Mapping[PrefixKey, str] = field(default_factory=dict)
    _tiers_seen: tuple[int, int] = (-1, -1)

    def step(self, step: Step, seconds: float, progress: list[Progress]) -> None:
        """Count one forward pass and what it brought."""
        self.steps += 1
        self.step_seconds += seconds
        self.step_times[next((e for e in STEP_TIME_EDGES if seconds <= e), float("inf"))] += 1
        self.tokens_run += step.num_tokens
        self.passes_by_tokens[_rounded_up(step.num_tokens)] += 1
        self.distinct_last = step.distinct_prefixes
        self.passes[step.distinct_prefixes] += 1
        self.generated_tokens += sum(p.sampled is not None for p in progress)
        if step.num_tokens:
            compiled = sum(part.stop - part.start for part in step.compiles)
            self.compile_seconds += seconds * compiled / step.num_tokens
            rate = step.num_tokens / max(seconds, 1e-6)
            self.rate = _SMOOTHING * self.rate + (1 - _SMOOTHING) * rate if self.rate else rate

    def snapshot(self, scheduler: Scheduler) -> EngineStats:
        """All figures at this moment."""
        memory, prefix_loader, waiting = (
            scheduler.memory,
            scheduler.prefix_loader,
            scheduler.waiting,
        )
        residency, pool = memory.residency, memory.pool
        by_class: Counter[str] = Counter(dict.fromkeys(TENANT_CLASSES, 0))
        for tenant in waiting.tenants:
            by_class[tenant_class(waiting.weight(tenant))] += len(waiting.of(tenant))
        return EngineStats(
            steps=self.steps,
            step_seconds=self.step_seconds,
            step_times=dict(self.step_times),
            tokens_run=self.tokens_run,
            prompt_tokens=self.prompt_tokens,
            generated_tokens=self.generated_tokens,
            distinct_prefixes_last=self.distinct_last,
            distinct_prefixes_max=max(self.passes, default=0),
            passes_by_distinct_prefixes=dict(self.passes),
            passes_by_tokens=dict(self.passes_by_tokens),
            compile_seconds=self.compile_seconds,
            running=len(scheduler.running),
            running_by_class=_by_class(scheduler.running),
            waiting=by_class.total(),
            waiting_by_class=by_class,
            waiting_tokens=waiting.num_tokens,
            finished=dict(self.finished),
            preemptions=scheduler.num_preemptions,
            step_failures=self.step_failures,
            out_of_memory=self.out_of_memory,
            restarts=self.restarts,
            blocks_total=pool.num_usable,
            blocks_free=pool.num_free,
            blocks_remembered=pool.num_remembered,
            blocks_prefix=residency.num_blocks,
            resident_tokens=residency.num_tokens,
            host_tokens=memory.host.num_tokens,
            pinned_prefixes=len(prefix_loader.pins),
            prefixes_resident=residency.num_at(Stage.RESIDENT),
            prefix_loads={"store": 0, "host": 0} | prefix_loader.num_loads,
            prefix_compiles=residency.num_compiles,
            prefix_evictions=residency.num_evictions,
            prefix_swaps=prefix_loader.num_swaps,
            kv_queried_tokens=memory.reuse.num_queried_tokens,
            kv_reused_tokens=memory.reuse.num_reused_tokens,
            tiers=self._tiers_of(scheduler),
        )

    def _tiers_of(self, scheduler: Scheduler) -> Mapping[PrefixKey, str]:
        """Made anew only when something moved."""
        residency, host = scheduler.memory.residency, scheduler.memory.host
        seen = residency.num_changes, host.num_changes
        if seen != self._tiers_seen:
            tiers = dict.fromkeys(host.keys(), "host")
            self._tiers = tiers | {entry.key: entry.stage.name.lower() for entry in residency}
            self._tiers_seen = seen
        return self._tiers


def _by_class(sequences: Iterable[Sequence]) -> Counter[str]:
    counted: Counter[str] = Counter(dict.fromkeys(TENANT_CLASSES, 0))
    counted.update(tenant_class(sequence.request.weight) for sequence in sequences)
    return counted


def _rounded_up(tokens: int) -> int:
    """To a power of two, so that a long life does not grow the table."""
    return 1 << max(0, tokens - 1).bit_length()
