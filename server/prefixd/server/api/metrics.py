"""What /metrics shows: request figures counted here, engine figures read when asked.

Label values come from fixed sets (route templates, outcomes, classes), never from requests, so
their number is bounded; no tenant and no prefix name appears, which is why the route may be public.
Names are those that vLLM gives the same things, where it has them.
"""

import itertools
from collections.abc import Callable, Mapping
from enum import StrEnum

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from prefixd.server.api.engine_metrics import EngineCollector
from prefixd.server.api.request_record import Endpoint, Outcome, RequestRecord, Started, TenantClass
from prefixd.server.engine.stats import EngineStats

# When each series began: half as many lines again, and no use to anybody here.
disable_created_metrics()  # type: ignore[no-untyped-call]  # theirs

_LATENCY = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)


class Metrics:
    """One application's figures, in a registry of its own."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(EngineCollector(stats))
        self.http = Counter(
            "prefixd_http_requests",
            "HTTP requests answered.",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self._generations = Counter(
            "prefixd_generation_requests",
            "Requests for generation, by how they ended.",
            ["endpoint", "outcome"],
            registry=self.registry,
        )
        self._first_token = self._histogram(
            "prefixd_time_to_first_token_seconds",
            "From arrival to the first token.",
            {"endpoint": Endpoint},
            _LATENCY,
        )
        self._per_token = self._histogram(
            "prefixd_time_per_output_token_seconds",
            "Between two tokens of a sequence.",
            {"endpoint": Endpoint},
            _PER_TOKEN,
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

    def _histogram(
        self,
        name: str,
        text: str,
        labels: Mapping[str, type[StrEnum]],
        buckets: tuple[float, ...],
    ) -> Histogram:
        made = Histogram(name, text, list(labels), buckets=buckets, registry=self.registry)
        # All series from the start: a rate needs a zero to begin with.
        for values in itertools.product(*labels.values()):
            made.labels(*values)
        return made

    def first_token(self, started: Started, seconds: float) -> None:
        """A request has its first token, ``seconds`` after it came."""
        self._first_token.labels(started.endpoint.value).observe(seconds)

    def gaps(self, started: Started, seconds: float, count: int) -> None:
        """A sequence had to wait ``seconds`` for each of its next ``count`` tokens."""
        per_token = self._per_token.labels(started.endpoint.value)
        for _ in range(count):
            per_token.observe(seconds)

    def ended(self, record: RequestRecord) -> None:
        """Count a request that has ended."""
        labels = (record.started.endpoint.value, record.outcome.value)
        self._generations.labels(*labels).inc()
        if record.outcome is not Outcome.REFUSED:
            self._total.labels(*labels).observe(record.total)
        if record.queue is not None:
            self._queue.labels(record.started.tenant_class.value).observe(record.queue)

    def render(self) -> bytes:
        """The page in Prometheus' text format."""
        return generate_latest(self.registry)
