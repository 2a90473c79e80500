"""The engine's figures as metrics: one table of names, read from its snapshot at every scrape."""

from collections.abc import Callable, Iterable, Mapping

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from server.engine.stats import EngineStats

_DISTINCT = (0, 1, 2, 4, 8, 16, 32, 64, 128)

_COUNTERS = {
    "steps": ("steps", "Forward passes run."),
    "step_failures": ("step_failures", "Forward passes that failed."),
    "step_seconds": ("step_seconds", "Seconds spent in forward passes."),
    "tokens_run": ("tokens_run", "Tokens run through the model, virtual ones included."),
    "prompt_tokens": ("prompt_tokens", "Prompt tokens of requests."),
    "generation_tokens": ("generated_tokens", "Tokens generated."),
    "num_preemptions": ("preemptions", "Sequences preempted for want of blocks."),
    "prefix_fetches": ("prefix_fetches", "Prefixes brought from the store."),
    "prefix_compiles": ("prefix_compiles", "Prefixes compiled to KV."),
    "prefix_evictions": ("prefix_evictions", "Prefixes evicted from the pool."),
}
_GAUGES = {
    "num_requests_running": ("running", "Sequences running."),
    "num_requests_waiting": ("waiting", "Sequences waiting."),
    "prefixes_resident": ("prefixes_resident", "Prefixes in the pool."),
    "distinct_prefixes_per_step_max": (
        "distinct_prefixes_max",
        "Largest number of distinct prefixes one forward pass carried.",
    ),
}


class EngineCollector(Collector):
    """Gives what ``stats`` says at that moment."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        """All families, in a fixed order."""
        stats = self._stats()
        for name, (source, text) in _COUNTERS.items():
            yield CounterMetricFamily(f"prefixd_{name}", text, value=getattr(stats, source))
        for name, (source, text) in _GAUGES.items():
            yield GaugeMetricFamily(f"prefixd_{name}", text, value=getattr(stats, source))
        yield from _pool(stats)
        finished = CounterMetricFamily(
            "prefixd_sequences_finished", "Sequences that ended, by reason.", labels=["reason"]
        )
        for reason, count in sorted(stats.finished.items()):
            finished.add_metric([reason], count)
        yield finished
        yield _histogram(
            "prefixd_distinct_prefixes_per_step",
            "Distinct prefixes one forward pass carried.",
            stats.passes_by_distinct_prefixes,
            _DISTINCT,
        )


def _pool(stats: EngineStats) -> Iterable[Metric]:
    used = stats.blocks_total - stats.blocks_free
    yield GaugeMetricFamily(
        "prefixd_kv_cache_usage_perc",
        "Part of the KV pool that is in use; 1 is all of it.",
        value=used / stats.blocks_total,
    )
    blocks = GaugeMetricFamily(
        "prefixd_kv_blocks", "KV blocks of the pool, by what they hold.", labels=["holds"]
    )
    blocks.add_metric(["nothing"], stats.blocks_free)
    blocks.add_metric(["prefixes"], stats.blocks_prefix)
    blocks.add_metric(["sequences"], used - stats.blocks_prefix)
    yield blocks


def _histogram(
    name: str, text: str, counts: Mapping[int, int], edges: Iterable[float]
) -> HistogramMetricFamily:
    """From how often each value came."""
    buckets = [
        (str(float(edge)), float(sum(n for value, n in counts.items() if value <= edge)))
        for edge in edges
    ]
    buckets.append(("+Inf", float(sum(counts.values()))))
    total = sum(value * n for value, n in counts.items())
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=total)
