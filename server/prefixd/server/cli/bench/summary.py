"""Figures of one level: rates, times and their percentiles, goodput, errors by kind."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prefixd.server.cli.bench.generation import Generation
from prefixd.server.cli.bench.levels import Level

PERCENTILES = {"median": 50, "p90": 90, "p95": 95, "p99": 99}


@dataclass(frozen=True, slots=True)
class Goodput:
    """Bounds in seconds that a request meets to count; None: no bound."""

    ttft: float | None = None
    tpot: float | None = None
    e2el: float | None = None

    def is_met(self, result: Generation) -> bool:
        """Whether a request without error meets every bound."""
        tpot = result.tpot
        return not (
            (self.ttft is not None and result.ttft > self.ttft)
            or (self.tpot is not None and tpot is not None and tpot > self.tpot)
            or (self.e2el is not None and result.ended > self.e2el)
        )


def percentile(values: Sequence[float], percent: float) -> float:
    """The percentile of sorted ``values``, interpolated linearly between two of them."""
    place = (len(values) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (place - low)


def distribution(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """Mean, standard deviation and percentiles in milliseconds, under the keys of vLLM's reports
    (``mean_ttft_ms``); None for no values."""
    ordered = sorted(1000 * value for value in values)
    figures: dict[str, float | None] = dict.fromkeys(("mean", "std", *PERCENTILES))
    if ordered:
        figures["mean"] = statistics.fmean(ordered)
        figures["std"] = statistics.stdev(ordered) if len(ordered) > 1 else 0.0
        figures |= {key: percentile(ordered, percent) for key, percent in PERCENTILES.items()}
    return {
        f"{key}_{name}_ms": None if figure is None else round(figure, 3)
        for key, figure in figures.items()
    }


def summarize(level: Level, *, goodput: Goodput | None, output_tokens: int) -> dict[str, object]:
    """The figures of a level as plain data. Rates are per second, times in milliseconds."""
    served = [result for result in level.results if result.error is None]
    tokens = sum(result.output_tokens for result in served)
    prompt_tokens = sum(result.prompt_tokens or 0 for result in served)
    seconds = level.seconds or 1e-9
    good = None if goodput is None else sum(map(goodput.is_met, served))
    return {
        "max_concurrency": level.load.concurrency,
        "request_rate": _json_rate(level.load.rate),
        "num_prompts": level.num_requests,
        "completed": len(served),
        "failed": len(level.results) - len(served),
        "unfinished": level.num_unfinished,
        "errors": errors_by_kind(level.results),
        "duration": round(level.seconds, 4),
        "client_cpu": round(level.client_cpu, 4),
        "max_send_delay_ms": round(1000 * max((r.late for r in level.results), default=0.0), 3),
        "total_input_tokens": prompt_tokens,
        "total_output_tokens": tokens,
        "short_outputs": sum(result.output_tokens < output_tokens for result in served),
        "tokens_counted_by": _counted_by(served),
        "request_throughput": round(len(served) / seconds, 4),
        "request_goodput": None if good is None else round(good / seconds, 4),
        "good_requests": good,
        "output_throughput": round(tokens / seconds, 3),
        "total_token_throughput": round((tokens + prompt_tokens) / seconds, 3),
        **distribution("ttft", [result.ttft for result in served]),
        **distribution("tpot", [t for result in served if (t := result.tpot) is not None]),
        **distribution("itl", [gap for result in served for gap in result.gaps()]),
        **distribution("e2el", [result.ended for result in served]),
    }


def errors_by_kind(results: Sequence[Generation]) -> Mapping[str, dict[str, object]]:
    """How many requests failed in each way, with one message, the most frequent first."""
    failed = [result for result in results if result.error is not None]
    messages = {str(result.error): result.message for result in reversed(failed)}
    counts = Counter(str(result.error) for result in failed)
    return {
        kind: {"count": count, "message": messages[kind]} for kind, count in counts.most_common()
    }


def _counted_by(served: Sequence[Generation]) -> str | None:
    """Where numbers of output tokens come from: the server's usage, or its events with text."""
    if not served:
        return None
    return "usage" if all(result.has_usage for result in served) else "events"


def _json_rate(rate: float | None) -> float | str | None:
    """JSON has no infinity."""
    return "inf" if rate == float("inf") else rate
