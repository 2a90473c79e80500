"""The engine's metrics: tables of names, read from its statistics at every scrape."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from prefixd.server.engine.stats import STEP_TIME_EDGES, EngineStats

_DISTINCT = (0, 1, 2, 4, 8, 16, 32, 64, 128)
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)

# Name -> the field of EngineStats and the help text.
_COUNTERS = {
    "steps": ("steps", "Forward passes run."),
    "step_failures": ("step_failures", "Forward passes that failed."),
    "out_of_memory": ("out_of_memory", "Forward passes for which the device had no memory."),
    "late_steps": ("late_steps", "Forward passes in which a thread that computes lost its core."),
    "thread_changes": ("thread_changes", "Changes of the number of threads that compute."),
    "engine_restarts": ("restarts", "Restarts of the step loop."),
    "prompt_tokens": ("prompt_tokens", "Prompt tokens of requests."),
    "generation_tokens": ("generated_tokens", "Tokens generated."),
    "num_preemptions": ("preemptions", "Sequences preempted: no free KV blocks."),
    "background_tokens": (
        "background_tokens",
        "Prompt, virtual and output tokens run for the background class.",
    ),
    "background_generation_tokens": (
        "background_generated_tokens",
        "Tokens generated for the background class.",
    ),
    "background_preemptions": (
        "background_preemptions",
        "Sequences of the background class preempted: others needed the KV blocks.",
    ),
    "prefix_compiles": ("prefix_compiles", "Prefixes compiled to KV."),
    "prefix_compile_seconds": (
        "compile_seconds",
        "Part of the forward passes' time that compiled prefixes.",
    ),
    "prefix_evictions": ("prefix_evictions", "Prefixes evicted from the pool."),
    "prefix_swaps": (
        "prefix_swaps",
        "Prefixes that waited too long and were swapped in for others.",
    ),
    "masks": ("masks", "Masks of allowed tokens computed, for outputs under a grammar."),
    "mask_seconds": ("mask_seconds", "CPU time of masks."),
    "spec_decode_num_draft_tokens": ("draft_tokens", "Tokens proposed and verified."),
    "spec_decode_num_accepted_tokens": ("accepted_tokens", "Proposed tokens that were accepted."),
    "kv_reuse_queries": ("kv_queried_tokens", "Prompt tokens looked up for KV to share."),
    "kv_reuse_hits": ("kv_reused_tokens", "Prompt tokens whose KV was shared, not computed."),
}
_GAUGES = {
    "num_tokens_waiting": ("waiting_tokens", "Prompt and output tokens that wait."),
    "background_requests_running": (
        "background_running",
        "Sequences of the background class running.",
    ),
    "background_requests_waiting": (
        "background_waiting",
        "Sequences of the background class waiting.",
    ),
    "background_tokens_waiting": (
        "background_waiting_tokens",
        "Prompt and output tokens that wait in the background class.",
    ),
    "threads": ("threads", "Threads that computed the last forward pass."),
    "prefixes_resident": ("prefixes_resident", "Prefixes in the pool."),
    "prefixes_pinned": ("pinned_prefixes", "Prefixes that are pinned."),
    "distinct_prefixes_per_step_max": (
        "distinct_prefixes_max",
        "Largest number of distinct prefixes one forward pass carried.",
    ),
}


class EngineCollector(Collector):
    """Collects the metrics from ``stats`` at each scrape."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        """All families, in a fixed order."""
        stats = self._stats()
        for name, (source, text) in _COUNTERS.items():
            yield CounterMetricFamily(f"prefixd_{name}", text, value=getattr(stats, source))
        for name, (source, text) in _GAUGES.items():
            yield GaugeMetricFamily(f"prefixd_{name}", text, value=getattr(stats, source))
        yield from _queue(stats)
        yield from _pool(stats)
        yield from _steps(stats)


def _queue(stats: EngineStats) -> Iterable[Metric]:
    yield _gauge(
        "num_requests_running", "Sequences running.", "tenant_class", stats.running_by_class
    )
    yield _gauge(
        "num_requests_waiting", "Sequences waiting.", "tenant_class", stats.waiting_by_class
    )
    yield _counter("sequences_finished", "Sequences that ended.", "reason", stats.finished)


def _pool(stats: EngineStats) -> Iterable[Metric]:
    used = stats.blocks_total - stats.blocks_free
    yield GaugeMetricFamily(
        "prefixd_kv_cache_usage_perc",
        "Used part of the KV pool, from 0 to 1.",
        value=used / stats.blocks_total,
    )
    holds = {
        "nothing": stats.blocks_free - stats.blocks_remembered,
        "reusable": stats.blocks_remembered,
        "prefixes": stats.blocks_prefix,
        "sequences": used - stats.blocks_prefix,
    }
    yield _gauge("kv_blocks", "KV blocks of the pool, by what they hold.", "holds", holds)
    tiers = {"device": stats.resident_tokens, "host": stats.host_tokens}
    yield _gauge("resident_tokens", "Virtual tokens of prefixes kept as KV.", "tier", tiers)
    text = "Prefixes brought into the pool, by where they came from."
    yield _counter("prefix_loads", text, "tier", stats.prefix_loads)


def _steps(stats: EngineStats) -> Iterable[Metric]:
    yield _histogram(
        "step_duration_seconds",
        "How long a forward pass took.",
        stats.step_times,
        edges=STEP_TIME_EDGES,
        total=stats.step_seconds,
    )
    yield _histogram(
        "iteration_tokens_total",
        "Tokens one forward pass ran, virtual ones included.",
        stats.passes_by_tokens,
        edges=_TOKENS,
        total=stats.tokens_run,
    )
    distinct = stats.passes_by_distinct_prefixes
    yield _histogram(
        "distinct_prefixes_per_step",
        "Distinct prefixes one forward pass carried.",
        distinct,
        edges=_DISTINCT,
        total=sum(value * count for value, count in distinct.items()),
    )


def _gauge(name: str, text: str, label: str, values: Mapping[str, int]) -> Metric:
    family = GaugeMetricFamily(f"prefixd_{name}", text, labels=[label])
    for value, count in sorted(values.items()):
        family.add_metric([value], count)
    return family


def _counter(name: str, text: str, label: str, values: Mapping[str, int]) -> Metric:
    family = CounterMetricFamily(f"prefixd_{name}", text, labels=[label])
    for value, count in sorted(values.items()):
        family.add_metric([value], count)
    return family


def _histogram(
    name: str, text: str, counts: Mapping[Any, int], *, edges: Sequence[float], total: float
) -> Metric:
    """A histogram of ``counts`` by value; ``total`` is the sum of all values."""
    buckets = [
        (str(float(edge)), float(sum(n for value, n in counts.items() if value <= edge)))
        for edge in edges
    ]
    buckets.append(("+Inf", float(sum(counts.values()))))
    return HistogramMetricFamily(f"prefixd_{name}", text, buckets=buckets, sum_value=total)
