"""A measurement as a table, as notes below it and as JSON."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from prefixd.server.cli.bench.run import Measurement
from prefixd.server.cli.bench.summary import Goodput

TITLES = (
    *("load", "ok", "failed", "req/s", "goodput/s", "tokens/s"),
    *("TTFT ms p50", "p99", "TPOT ms p50", "p99", "gap ms p50", "p99"),
)


def table(summaries: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The cells of the table, a row for each level, under TITLES."""
    return [
        [
            load_text(row),
            str(row["completed"]),
            str(row["failed"] + row["unfinished"]),
            _number(row["request_throughput"], 2),
            _number(row["request_goodput"], 2),
            _number(row["output_throughput"], 1),
            *(
                _number(row[f"{percentile}_{name}_ms"], 1)
                for name in ("ttft", "tpot", "itl")
                for percentile in ("median", "p99")
            ),
        ]
        for row in summaries
    ]


def load_text(row: Mapping[str, Any]) -> str:
    """The load of a level: ``16 at a time``, ``4/s``."""
    if row["request_rate"] is None:
        return f"{row['max_concurrency']} at a time"
    return "all at once" if row["request_rate"] == "inf" else f"{row['request_rate']:g}/s"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def notes(measurement: Measurement, summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader of the table must know: the load in tokens, errors, what the server ignored."""
    plan = measurement.plan
    lines = [_traffic_note(measurement, summaries)]
    if plan.goodput is not None:
        lines.append(f"goodput: requests per second with {_bounds(plan.goodput)}")
    for row in summaries:
        at = load_text(row)
        lines += [
            f"{at}: {error['count']} failed with {kind}: {error['message']}"
            for kind, error in row["errors"].items()
        ]
        if row["unfinished"]:
            limit = "interrupted" if measurement.interrupted else f"limit of {plan.max_seconds:g} s"
            lines.append(f"{at}: {row['unfinished']} not finished ({limit})")
        if row["short_outputs"]:
            lines.append(
                f"{at}: {row['short_outputs']} of {row['completed']} outputs have fewer than "
                f"{plan.output_tokens} tokens: the server does not honour ignore_eos"
            )
        if row["max_send_delay_ms"] > 50:
            lines.append(f"{at}: requests were sent up to {row['max_send_delay_ms']:.0f} ms late")
    if measurement.refused:
        lines.append(f"the server refused, so it was not sent: {', '.join(measurement.refused)}")
    if any(row["tokens_counted_by"] == "events" for row in summaries):
        lines.append("the server reports no usage: an event with text counts as one token")
    return lines


def _traffic_note(measurement: Measurement, summaries: Sequence[Mapping[str, Any]]) -> str:
    plan = measurement.plan
    completed = sum(row["completed"] for row in summaries) or 1
    prompt = sum(row["total_input_tokens"] for row in summaries) / completed
    output = sum(row["total_output_tokens"] for row in summaries) / completed
    first, *others = measurement.models
    models = first if not others else f"{first} and {len(others)} more"
    prompt_text = f"{prompt:.0f}" if prompt else f"about {plan.input_tokens}"
    return (
        f"{models}: {prompt_text} prompt and {output:.0f} output tokens on average, "
        f"seed {plan.seed}, every prompt used once"
    )


def _bounds(goodput: Goodput) -> str:
    bounds = {"TTFT": goodput.ttft, "TPOT": goodput.tpot, "latency": goodput.e2el}
    return ", ".join(
        f"{name} ≤ {1000 * value:g} ms" for name, value in bounds.items() if value is not None
    )


def report(measurement: Measurement, summaries: Sequence[Mapping[str, Any]]) -> dict[str, object]:
    """The measurement as JSON; docs/benchmarks.md describes the fields."""
    plan = measurement.plan
    bounds = plan.goodput
    return {
        "url": plan.url,
        "endpoint": plan.endpoint,
        "models": list(measurement.models),
        "zipf": plan.zipf,
        "seed": plan.seed,
        "input_tokens": plan.input_tokens,
        "output_tokens": plan.output_tokens,
        "prompt_words": measurement.num_words,
        "goodput_ms": None
        if bounds is None
        else {
            name: 1000 * value
            for name in ("ttft", "tpot", "e2el")
            if (value := getattr(bounds, name)) is not None and math.isfinite(value)
        },
        "fields_refused": list(measurement.refused),
        "interrupted": measurement.interrupted,
        "levels": list(summaries),
    }
