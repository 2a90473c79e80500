"""What the engine did and holds, as plain data: figures for metrics, the state for an operator."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from prefixd.server.engine.background import Background
from prefixd.server.engine.entries import Entry, Stage
from prefixd.server.engine.fair_queue import FairQueue
from prefixd.server.engine.request import FinishReason
from prefixd.server.engine.scheduler import Scheduler
from prefixd.server.engine.sequence import Sequence
from prefixd.server.engine.step import Step, StepOutput, ThreadUse

TENANT_CLASSES = ("low", "standard", "high")
"""Tenants by their weight: below 1, 1, above 1."""

_SMOOTHING = 0.95
_MAX_LISTED = 1000


def tenant_class(weight: float) -> str:
    """The one of TENANT_CLASSES that a tenant of ``weight`` belongs to."""
    return "standard" if weight == 1 else "low" if weight < 1 else "high"


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counters since start (sums) and gauges of this moment.

    ``steps`` are forward passes run; ``distinct_prefixes_*`` count the different prefixes among
    the rows of one pass; times are in seconds, blocks exclude the null block, tokens of prefixes
    are virtual tokens. Of ``draft_tokens`` proposed, ``accepted_tokens`` became output.
    ``passes_by_*`` and ``step_times`` count passes by what they carried and by how long they took
    (upper edge in seconds). ``running``, ``waiting``, ``waiting_tokens`` and ``preemptions`` are
    those of the foreground, ``background_*`` those of the background class, of whose tokens
    ``background_tokens`` were run and ``background_generated_tokens`` are output; all other sums
    are of both.
    """

    steps: int
    step_seconds: float
    step_times: Mapping[float, int]
    tokens_run: int
    prompt_tokens: int
    generated_tokens: int
    draft_tokens: int
    accepted_tokens: int
    distinct_prefixes_last: int
    distinct_prefixes_max: int
    passes_by_distinct_prefixes: Mapping[int, int]
    passes_by_tokens: Mapping[int, int]
    compile_seconds: float
    masks: int
    mask_seconds: float
    running: int
    running_by_class: Mapping[str, int]
    waiting: int
    waiting_by_class: Mapping[str, int]
    waiting_tokens: int
    background_running: int
    background_waiting: int
    background_waiting_tokens: int
    background_tokens: int
    background_generated_tokens: int
    background_preemptions: int
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
    threads: int
    thread_changes: int
    late_steps: int


STEP_TIME_EDGES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
"""Upper edges of ``step_times``, in seconds; longer steps count under infinity."""


@dataclass(slots=True)
class StatsCounters:
    """Counts on the engine's thread; ``snapshot`` reads together with the scheduler."""

    steps: int = 0
    step_seconds: float = 0.0
    step_failures: int = 0
    out_of_memory: int = 0
    restarts: int = 0
    tokens_run: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    background_tokens: int = 0
    background_generated_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    compile_seconds: float = 0.0
    masks: int = 0
    mask_seconds: float = 0.0
    distinct_last: int = 0
    rate: float = 0.0
    thread_use: ThreadUse = field(default_factory=lambda: ThreadUse(0, 0, 0))
    passes: Counter[int] = field(default_factory=Counter)
    passes_by_tokens: Counter[int] = field(default_factory=Counter)
    step_times: Counter[float] = field(default_factory=Counter)
    finished: Counter[str] = field(
        default_factory=lambda: Counter({reason.value: 0 for reason in FinishReason})
    )

    def step(self, step: Step, seconds: float, output: StepOutput) -> None:
        """Count one forward pass and its output."""
        num_tokens, num_distinct = step.num_tokens, step.distinct_prefixes
        self.steps += 1
        self.step_seconds += seconds
        self.step_times[next((e for e in STEP_TIME_EDGES if seconds <= e), float("inf"))] += 1
        self.tokens_run += num_tokens
        # Rounded up to a power of two, so that the table does not grow over a long life.
        self.passes_by_tokens[1 << max(0, num_tokens - 1).bit_length()] += 1
        self.distinct_last = num_distinct
        self.thread_use = output.thread_use or self.thread_use
        self.passes[num_distinct] += 1
        num_accepted = self._count_tokens(step, output)
        if num_tokens:
            if step.compiles:
                self.compile_seconds += seconds * step.num_compiled / num_tokens
            rate = (num_tokens - step.num_drafts + num_accepted) / max(seconds, 1e-6)
            self.rate = _SMOOTHING * self.rate + (1 - _SMOOTHING) * rate if self.rate else rate

    def _count_tokens(self, step: Step, output: StepOutput) -> int:
        """Count the new tokens of a step; returns how many of them were proposed."""
        num_new = {i: sum(token.finite for token in new) for i, new in output.sampled.items()}
        self.generated_tokens += sum(num_new.values())
        if step.num_foreground is not None:
            self.background_tokens += step.background_tokens
            ids = [chunk.seq_id for chunk in step.chunks[step.num_foreground :]]
            self.background_generated_tokens += sum(num_new.get(seq_id, 0) for seq_id in ids)
        drafted = [chunk.seq_id for chunk in step.chunks if chunk.draft is not None]
        num_accepted = sum(max(0, num_new[seq_id] - 1) for seq_id in drafted)
        self.draft_tokens += step.num_drafts
        self.accepted_tokens += num_accepted
        return num_accepted

    def snapshot(self, scheduler: Scheduler) -> EngineStats:
        """All figures at this moment."""
        memory, prefix_loader, waiting = (
            scheduler.memory,
            scheduler.prefix_loader,
            scheduler.waiting,
        )
        residency, pool, background = memory.residency, memory.pool, scheduler.background
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
            draft_tokens=self.draft_tokens,
            accepted_tokens=self.accepted_tokens,
            distinct_prefixes_last=self.distinct_last,
            distinct_prefixes_max=max(self.passes, default=0),
            passes_by_distinct_prefixes=dict(self.passes),
            passes_by_tokens=dict(self.passes_by_tokens),
            compile_seconds=self.compile_seconds,
            masks=self.masks,
            mask_seconds=self.mask_seconds,
            running=len(scheduler.running),
            running_by_class=_by_class(scheduler.running),
            waiting=by_class.total(),
            waiting_by_class=by_class,
            waiting_tokens=waiting.num_tokens,
            background_running=len(background.running),
            background_waiting=background.waiting.num_sequences,
            background_waiting_tokens=background.waiting.num_tokens,
            background_tokens=self.background_tokens,
            background_generated_tokens=self.background_generated_tokens,
            background_preemptions=background.num_preemptions,
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
            pinned_prefixes=len(residency.pins),
            prefixes_resident=len(residency) - residency.num_loading,
            prefix_loads={"store": 0, "host": 0} | prefix_loader.num_loads,
            prefix_compiles=residency.num_compiles,
            prefix_evictions=residency.num_evictions,
            prefix_swaps=prefix_loader.num_swaps,
            kv_queried_tokens=memory.reuse.num_queried_tokens,
            kv_reused_tokens=memory.reuse.num_reused_tokens,
            threads=self.thread_use.threads,
            thread_changes=self.thread_use.num_changes,
            late_steps=self.thread_use.late_steps,
        )


def _by_class(sequences: Iterable[Sequence]) -> Counter[str]:
    counts: Counter[str] = Counter(dict.fromkeys(TENANT_CLASSES, 0))
    counts.update(tenant_class(sequence.request.weight) for sequence in sequences)
    return counts


def debug_state(scheduler: Scheduler, *, now: float) -> dict[str, Any]:
    """What runs, waits and is resident, ready for JSON: ids, counts and names of tenants, never a
    token of a prompt or of an answer. Lists are cut at 1000, but all is counted."""
    memory, prefix_loader, waiting = scheduler.memory, scheduler.prefix_loader, scheduler.waiting
    pool, residency, config = memory.pool, memory.residency, scheduler.config
    backoff, retired = scheduler.recovery.backoff, scheduler.eviction.retired
    return {
        "pool": {
            "block_size": config.block_size,
            "blocks": pool.num_usable,
            "free": pool.num_free,
            "remembered": pool.num_remembered,
            "prefixes": residency.num_blocks,
        },
        "limits": {
            "max_running": backoff.max_running,
            "max_prefill_chunk": backoff.max_chunk,
            "max_tokens_per_step": config.max_tokens_per_step,
            "seconds_per_prompt_token": scheduler.step_budget.token_s,
            "seconds_per_decode_step": scheduler.step_budget.decode_s,
            "max_resident_tokens": config.max_resident_tokens,
            "max_waiting_tokens": config.max_waiting_tokens,
        },
        "running": {
            "count": len(scheduler.running),
            "sequences": [_sequence(s, now) for s in scheduler.running[:_MAX_LISTED]],
        },
        "waiting": {
            "count": len(waiting),
            "tokens": waiting.num_tokens,
            "tenants": [_tenant(waiting, tenant, now) for tenant in waiting.tenants],
        },
        "background": _background(scheduler.background, now),
        "prefixes": {
            "count": len(residency),
            "tokens": residency.num_tokens,
            "entries": [
                _entry(entry, pinned=entry.key in residency.pins, retired=entry.key in retired)
                for entry in islice(residency, _MAX_LISTED)
            ],
        },
        "host": {"count": len(memory.host), "tokens": memory.host.num_tokens},
        "pins": [{"tenant": key.tenant, "digest": key.content} for key in residency.pins],
        "warming": len(prefix_loader.preloads),
        "forcing": None if prefix_loader.forcing is None else prefix_loader.forcing.content,
        "preemptions": scheduler.num_preemptions,
    }


def _sequence(sequence: Sequence, now: float) -> dict[str, Any]:
    return {
        "request_id": sequence.request.request_id,
        "index": sequence.index,
        "tenant": sequence.tenant,
        "prefix": sequence.prefix.key.content if sequence.prefix else None,
        "prompt_tokens": sequence.request.num_prompt_tokens,
        "output_tokens": sequence.num_output,
        "cached_tokens": sequence.num_cached,
        "computed_tokens": sequence.num_computed,
        "blocks": sequence.num_blocks,
        "age_s": round(now - sequence.arrived, 3),
    }


def _background(background: Background, now: float) -> dict[str, Any]:
    waiting = background.waiting
    return {
        "running": [_sequence(s, now) for s in background.running[:_MAX_LISTED]],
        "count": len(background.running) + len(waiting),
        "tokens": waiting.num_tokens,
        "tenants": [_tenant(waiting, tenant, now) for tenant in waiting.tenants],
        "preemptions": background.num_preemptions,
    }


def _tenant(waiting: FairQueue, tenant: str, now: float) -> dict[str, Any]:
    queued = waiting.of(tenant)
    return {
        "tenant": tenant,
        "count": len(queued),
        "tokens": waiting.tokens_of(tenant),
        "counter": waiting.counter(tenant),
        "weight": waiting.weight(tenant),
        "oldest_s": round(now - min(sequence.arrived for sequence in queued), 3),
    }


def _entry(entry: Entry, *, pinned: bool, retired: bool) -> dict[str, Any]:
    return {
        "tenant": entry.key.tenant,
        "digest": entry.key.content,
        "tier": entry.tier,
        "tokens": entry.num_tokens,
        "compiled": entry.num_compiled,
        "blocks": entry.num_blocks,
        "users": entry.num_users,
        "pinned": pinned,
        "leaving": entry.stage is Stage.LEAVING,
        "retired": retired,
    }
