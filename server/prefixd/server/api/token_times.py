"""The histogram of the time between two tokens, which many tokens enter at once."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate

from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class TokenTimes:
    """Seconds by bucket, and their sum; ``edges`` are the upper ones. Only the event loop adds, so
    that a token costs no lock."""

    def __init__(self, edges: Sequence[float]) -> None:
        self.edges = edges
        self.counts = [0] * (len(edges) + 1)
        self.total = 0.0

    def observe(self, seconds: float, num_tokens: int) -> None:
        """Count ``num_tokens`` tokens that took ``seconds`` each."""
        self.counts[bisect_left(self.edges, seconds)] += num_tokens
        self.total += seconds * num_tokens


class TokenTimesCollector(Collector):
    """Shows histograms as one metric, by the value of one label."""

    def __init__(
        self, name: str, text: str, label: str, times: Iterable[tuple[str, TokenTimes]]
    ) -> None:
        self._name, self._text, self._label = name, text, label
        self._times = tuple(times)

    def collect(self) -> Iterable[Metric]:
        """The metric, with all its series."""
        family = HistogramMetricFamily(self._name, self._text, labels=[self._label])
        for value, times in self._times:
            edges = [*map(floatToGoString, times.edges), "+Inf"]
            counts = map(float, accumulate(times.counts))
            family.add_metric([value], list(zip(edges, counts, strict=True)), times.total)
        yield family
