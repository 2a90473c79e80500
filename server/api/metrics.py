"""What /metrics shows: request figures counted here, engine figures read when asked.

Label values come from fixed sets (route templates, outcomes), never from requests, so their number
is bounded; no tenant and no prefix name appears, which is why the route may be public.
"""

import time
from collections.abc import Callable, Iterable
from enum import StrEnum
from http import HTTPStatus
from typing import Self

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from prefix_store.errors import StoreError
from server.engine.stats import EngineStats
from server.errors import DeadlineExceeded, PrefixdError, Unavailable

_LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
_DISTINCT = (0, 1, 2, 4, 8, 16, 32, 64, 128)

_COUNTERS = {
    "steps": "Forward passes run.",
    "step_seconds": "Seconds spent in forward passes.",
    "tokens_run": "Tokens run through the model, virtual ones included.",
    "prompt_tokens": "Prompt tokens run.",
    "generated_tokens": "Tokens generated.",
    "preemptions": "Sequences preempted for want of blocks.",
    "step_failures": "Forward passes that failed.",
    "prefix_fetches": "Prefixes brought from the store.",
    "prefix_compiles": "Prefixes compiled to KV.",
    "prefix_evictions": "Prefixes evicted from the pool.",
}
_GAUGES = {
    "running": "Sequences running.",
    "waiting": "Sequences waiting.",
    "blocks_total": "KV blocks in the pool.",
    "blocks_free": "KV blocks that are free.",
    "blocks_prefix": "KV blocks that hold prefixes.",
    "prefixes_resident": "Prefixes in the pool.",
}


class Endpoint(StrEnum):
    """The routes that generate."""

    COMPLETIONS = "completions"
    CHAT = "chat_completions"


class Outcome(StrEnum):
    """How a request for generation ended: REFUSED is the caller's doing, UNAVAILABLE a server that
    is full, starting or ending, ABORTED a client that left."""

    OK = "ok"
    REFUSED = "refused"
    UNAVAILABLE = "unavailable"
    TIMEOUT = "timeout"
    ABORTED = "aborted"
    ERROR = "error"

    @classmethod
    def of(cls, error: PrefixdError | StoreError) -> Self:
        """The outcome of a request that is answered with ``error``."""
        match error:
            case Unavailable():
                return cls.UNAVAILABLE
            case DeadlineExceeded():
                return cls.TIMEOUT
            case PrefixdError() if error.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
                return cls.ERROR
            case _:
                return cls.REFUSED


class Metrics:
    """One application's figures, in a registry of its own."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(stats))
        self.http = Counter(
            "prefixd_http_requests",
            "HTTP requests answered.",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self.generations = Counter(
            "prefixd_generation_requests",
            "Requests for generation, by how they ended.",
            ["endpoint", "outcome"],
            registry=self.registry,
        )
        self.first_token = self._histogram(
            "prefixd_time_to_first_token_seconds", "From arrival to the first token.", _LATENCY
        )
        self.per_token = self._histogram(
            "prefixd_time_per_output_token_seconds", "Between tokens after the first.", _PER_TOKEN
        )
        self.end_to_end = self._histogram(
            "prefixd_request_seconds", "From arrival to the last token.", _LATENCY
        )

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        labels = ["endpoint", "outcome"]
        return Histogram(name, text, labels, buckets=buckets, registry=self.registry)

    def render(self) -> bytes:
        """The page in Prometheus' text format."""
        return generate_latest(self.registry)


class Stopwatch:
    """Times one request for generation, from arrival to its end. Call ``finish`` once."""

    def __init__(self, metrics: Metrics, endpoint: Endpoint) -> None:
        self._metrics = metrics
        self._endpoint = endpoint
        self._started = time.perf_counter()
        self._first: float | None = None
        self._last = self._started
        self._tokens = 0
        self._finished = False

    def tokens(self, count: int) -> None:
        """``count`` tokens of one sequence just arrived."""
        self._last = time.perf_counter()
        if self._first is None:
            self._first = self._last
        self._tokens += count

    def finish(self, outcome: Outcome, *, sequences: int = 1) -> None:
        """The request ended. Later calls change nothing: the first outcome is the true one."""
        if self._finished:
            return
        self._finished = True
        labels = (self._endpoint.value, outcome.value)
        self._metrics.generations.labels(*labels).inc()
        if outcome is Outcome.REFUSED:
            return
        self._metrics.end_to_end.labels(*labels).observe(time.perf_counter() - self._started)
        if self._first is None:
            return
        self._metrics.first_token.labels(*labels).observe(self._first - self._started)
        gaps = self._tokens / max(1, sequences) - 1
        if gaps > 0:
            self._metrics.per_token.labels(*labels).observe((self._last - self._first) / gaps)


class _EngineCollector(Collector):
    """Reads the engine's snapshot at every scrape."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterable[Metric]:
        stats = self._stats()
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"prefixd_{name}", text, value=getattr(stats, name))
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"prefixd_{name}", text, value=getattr(stats, name))
        yield GaugeMetricFamily(
            "prefixd_distinct_prefixes_per_step_max",
            "Largest number of distinct prefixes one forward pass carried.",
            value=stats.distinct_prefixes_max,
        )
        finished = CounterMetricFamily(
            "prefixd_sequences_finished", "Sequences that ended, by reason.", labels=["reason"]
        )
        for reason, count in sorted(stats.finished.items()):
            finished.add_metric([reason], count)
        yield finished
        yield _distinct_prefixes(stats)


def _distinct_prefixes(stats: EngineStats) -> HistogramMetricFamily:
    passes = stats.passes_by_distinct_prefixes
    buckets = [
        (str(float(edge)), float(sum(n for distinct, n in passes.items() if distinct <= edge)))
        for edge in _DISTINCT
    ]
    buckets.append(("+Inf", float(sum(passes.values()))))
    return HistogramMetricFamily(
        "prefixd_distinct_prefixes_per_step",
        "Distinct prefixes one forward pass carried.",
        buckets=buckets,
        sum_value=sum(distinct * n for distinct, n in passes.items()),
    )
