"""Metrics of the storage, read from memory: a scrape touches neither a disk nor a bucket."""

from collections.abc import Callable, Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from prefixd.store.disk import DiskGuard


class DiskCollector(Collector):
    """Collects the metrics of ``disk`` at each scrape."""

    def __init__(self, disk: DiskGuard) -> None:
        self._disk = disk

    def collect(self) -> Iterable[Metric]:
        """All families, in a fixed order."""
        free = GaugeMetricFamily(
            "prefixd_disk_free_bytes", "Free bytes of the disk with a folder.", labels=["folder"]
        )
        for folder, size in sorted(self._disk.free.copy().items()):
            free.add_metric([folder], size)
        yield free
        yield GaugeMetricFamily(
            "prefixd_disk_reserve_bytes",
            "Bytes held in reserve for deletes on a full disk; 0 while freed.",
            value=self._disk.reserved,
        )
        refusals = CounterMetricFamily(
            "prefixd_storage_refusals", "Requests that the storage failed.", labels=["reason"]
        )
        for reason, count in sorted(self._disk.refusals.copy().items()):
            refusals.add_metric([reason], count)
        yield refusals


class BucketCollector(Collector):
    """Collects the number of requests that the bucket failed, read by ``failures``."""

    def __init__(self, failures: Callable[[], int]) -> None:
        self._failures = failures

    def collect(self) -> Iterable[Metric]:
        """The one family."""
        yield CounterMetricFamily(
            "prefixd_bucket_failures",
            "Requests to the bucket that failed or made no progress.",
            value=self._failures(),
        )
