"""The catalog's metrics, read from what is known in this process: a scrape calls no database."""

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from prefixd.server.api.catalog_access import CatalogAccess


class CatalogCollector(Collector):
    """Collects the metrics of ``catalog`` at each scrape."""

    def __init__(self, catalog: CatalogAccess) -> None:
        self._catalog = catalog

    def collect(self) -> Iterable[Metric]:
        """All families, in a fixed order."""
        health, settlements = self._catalog.health, self._catalog.settlements
        breaker = GaugeMetricFamily(
            "prefixd_catalog_circuit_open",
            "1 while calls on the catalog are refused at once.",
            labels=["calls"],
        )
        breaker.add_metric(["read"], float(health.reads_refused))
        breaker.add_metric(["write"], float(health.writes_refused))
        yield breaker
        calls = GaugeMetricFamily(
            "prefixd_catalog_calls", "Calls that run or wait for a thread.", labels=["kind"]
        )
        calls.add_metric(["short"], self._catalog.calls.num_calls)
        calls.add_metric(["long"], self._catalog.long_calls.num_calls)
        yield calls
        yield GaugeMetricFamily(
            "prefixd_settlements_pending",
            "Ended requests whose limits are not settled yet.",
            value=settlements.pending,
        )
        yield CounterMetricFamily(
            "prefixd_settlements_dropped",
            "Ended requests whose limits were not settled in time.",
            value=settlements.dropped,
        )
