"""The page /metrics: request figures counted here, engine figures read at each scrape.

Label values come from fixed sets (route templates, outcomes, classes), never from requests, so
their number is bounded. No tenant or prefix name appears, so the route may be public. Metrics that
vLLM has too have vLLM's names.
"""

import itertools
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Self

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    disable_created_metrics,
    generate_latest,
)

from prefixd.server.api.disk_metrics import DiskCollector
from prefixd.server.api.engine_metrics import EngineCollector
from prefixd.server.api.served import DecoderInfo
from prefixd.server.api.thread_metrics import ThreadCollector
from prefixd.server.api.token_times import TokenTimes, TokenTimesCollector
from prefixd.server.engine.stats import EngineStats
from prefixd.server.tenants.batch_state import OPEN
from prefixd.store.disk import DiskGuard

# The creation time of each series: 50 % more lines, and unused.
disable_created_metrics()  # type: ignore[no-untyped-call]  # untyped

_LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class Endpoint(StrEnum):
    """The routes that generate."""

    COMPLETIONS = "completions"
    CHAT = "chat_completions"
    RESPONSES = "responses"
    MESSAGES = "messages"
    LOGLIKELIHOOD = "loglikelihood"


class Outcome(StrEnum):
    """How a request for generation ended. REFUSED: an error of the caller. UNAVAILABLE: the server
    is full, starting, stopping or without its storage. ABORTED: the client disconnected."""

    OK = "ok"
    REFUSED = "refused"
    UNAVAILABLE = "unavailable"
    TIMEOUT = "timeout"
    ABORTED = "aborted"
    ERROR = "error"


class TenantClass(StrEnum):
    """Tenants grouped by weight: a label with a fixed number of values."""

    LOW = "low"
    STANDARD = "standard"
    HIGH = "high"

    @classmethod
    def of(cls, weight: float) -> Self:
        """The class of a tenant of ``weight``: below, at or above 1."""
        if weight == 1:
            return cls.STANDARD
        return cls.LOW if weight < 1 else cls.HIGH


class GrammarOutcome(StrEnum):
    """What became of a grammar."""

    COMPILED = "compiled"
    REFUSED = "refused"


class GrammarLookup(StrEnum):
    """Whether a grammar was compiled already."""

    HIT = "hit"
    MISS = "miss"


class RenderOutcome(StrEnum):
    """What became of a chat template of a tenant. REFUSED: there was no place to render it."""

    RENDERED = "rendered"
    FAILED = "failed"
    REFUSED = "refused"


class LineOutcome(StrEnum):
    """What became of a line of a batch. FAILED: its answer is an error. RETRIED: it was refused for
    now, and runs again."""

    COMPLETED = "completed"
    FAILED = "failed"
    RETRIED = "retried"


class ConnectionLimit(StrEnum):
    """Which limit refused a connection."""

    TOTAL = "total"
    ADDRESS = "address"


class Metrics:
    """The metrics of one application, in its own registry."""

    def __init__(
        self, stats: Callable[[], EngineStats], disk: DiskGuard, decoder: DecoderInfo
    ) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(stats))
        self.registry.register(DiskCollector(disk))
        self.registry.register(ThreadCollector())
        info = Info("prefixd_decoder", "What computes the model.", registry=self.registry)
        info.info(decoder.labels())
        self.http = Counter(
            "prefixd_http_requests",
            "HTTP requests answered.",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self.connections = Gauge(
            "prefixd_connections", "Open connections of clients.", registry=self.registry
        )
        self.refused_connections = Counter(
            "prefixd_connections_refused",
            "Connections over a limit.",
            ["limit"],
            registry=self.registry,
        )
        for limit in ConnectionLimit:
            self.refused_connections.labels(limit)
        self.evicted_connections = Counter(
            "prefixd_connections_evicted",
            "Idle connections closed for new ones at the total limit.",
            registry=self.registry,
        )
        self.accept_failures = Counter(
            "prefixd_accept_failures",
            "Failed attempts to accept a connection.",
            registry=self.registry,
        )
        self.write_timeouts = Counter(
            "prefixd_write_timeouts",
            "Clients disconnected because they stopped reading.",
            registry=self.registry,
        )
        self._generations = Counter(
            "prefixd_generation_requests",
            "Requests for generation, by how they ended.",
            ["endpoint", "outcome"],
            registry=self.registry,
        )
        first_token = self._histogram(
            "prefixd_time_to_first_token_seconds",
            "From arrival to the first token.",
            {"endpoint": Endpoint},
            _LATENCY,
        )
        self.first_token = {endpoint: first_token.labels(endpoint) for endpoint in Endpoint}
        self.per_token = {endpoint: TokenTimes(_PER_TOKEN) for endpoint in Endpoint}
        self.registry.register(
            TokenTimesCollector(
                "prefixd_time_per_output_token_seconds",
                "Between two tokens of a sequence.",
                "endpoint",
                self.per_token.items(),
            )
        )
        self._total = self._histogram(
            "prefixd_e2e_request_latency_seconds",
            "From arrival to the end of the answer.",
            {"endpoint": Endpoint, "outcome": Outcome},
            _LATENCY,
        )
        self._queue = self._histogram(
            "prefixd_request_queue_time_seconds",
            "From submission until the request began to run.",
            {"tenant_class": TenantClass},
            _LATENCY,
        )

        self._grammars = self._histogram(
            "prefixd_grammar_compile_seconds",
            "How long a schema or grammar took to compile.",
            {"outcome": GrammarOutcome},
            _LATENCY,
        )
        self._grammar_lookups = Counter(
            "prefixd_grammar_lookups",
            "Requests with a schema or grammar, by whether it was compiled already.",
            ["result"],
            registry=self.registry,
        )
        for result in GrammarLookup:
            self._grammar_lookups.labels(result)
        self._renders = Counter(
            "prefixd_template_renders",
            "Chat templates of tenants, by what became of them.",
            ["outcome"],
            registry=self.registry,
        )
        for outcome in RenderOutcome:
            self._renders.labels(outcome)

        self.batch_lines = Counter(
            "prefixd_batch_lines",
            "Lines of batches that this server ran, by what became of them.",
            ["outcome"],
            registry=self.registry,
        )
        for line_outcome in LineOutcome:
            self.batch_lines.labels(line_outcome)
        self.batch_lines_running = Gauge(
            "prefixd_batch_lines_running", "Lines of batches that run.", registry=self.registry
        )
        self.batch_lines_waiting = Gauge(
            "prefixd_batch_lines_waiting",
            "Lines that wait, of the batches that this server works on.",
            registry=self.registry,
        )
        self.batches = Gauge(
            "prefixd_batches",
            "Batches that this server works on, by status.",
            ["status"],
            registry=self.registry,
        )
        for status in OPEN:
            self.batches.labels(status)

    def _histogram(
        self,
        name: str,
        text: str,
        labels: Mapping[str, type[StrEnum]],
        buckets: tuple[float, ...],
    ) -> Histogram:
        histogram = Histogram(name, text, list(labels), buckets=buckets, registry=self.registry)
        # All series from the start: a rate needs a first value of zero.
        for values in itertools.product(*labels.values()):
            histogram.labels(*values)
        return histogram

    def ended(
        self,
        endpoint: Endpoint,
        outcome: Outcome,
        tenant_class: TenantClass,
        *,
        total: float,
        queue: float | None,
    ) -> None:
        """Count a request that ended after ``total`` seconds, ``queue`` of them in the queue."""
        self._generations.labels(endpoint, outcome).inc()
        if outcome is not Outcome.REFUSED:
            self._total.labels(endpoint, outcome).observe(total)
        if queue is not None:
            self._queue.labels(tenant_class).observe(queue)

    def grammar_compiled(self, outcome: GrammarOutcome, seconds: float) -> None:
        """Count a grammar that was compiled or refused."""
        self._grammars.labels(outcome).observe(seconds)

    def template_rendered(self, outcome: RenderOutcome) -> None:
        """Count a chat template of a tenant."""
        self._renders.labels(outcome).inc()

    def grammar_looked_up(self, result: GrammarLookup) -> None:
        """Count a request with a grammar."""
        self._grammar_lookups.labels(result).inc()

    def render(self) -> bytes:
        """The page in Prometheus' text format."""
        return generate_latest(self.registry)
