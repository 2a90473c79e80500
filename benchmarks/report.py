"""The results of a comparison as JSON, as tables of Markdown and as plots."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.engines import OURS
from benchmarks.rounds import Series, median

AGREEING = 4
"""Tokens from the start of an output that are compared between engines. In bfloat16 correct engines
part soon after; a wrong prefix or position shows in the first."""

CELLS = (
    f"Medians; in brackets how many times faster {OURS.name} was in the same rounds, and the CPU "
    "seconds of all requests."
)


def described(series: Series) -> dict[str, Any]:
    """One workload: medians and single values of each engine, and how many rounds counted."""
    names = dict.fromkeys(name for each in series.counted for name in each.runs)
    loads = [run.load for each in series.counted for run in each.runs.values()]
    return {
        "unit": str(series.workload.figure),
        "rounds": len(series.counted),
        "dropped": len(series.dropped),
        "dropped_for": [each.noisy for each in series.dropped],
        "foreign_most": _rounded(max((load.foreign for load in loads), default=0.0)),
        "steal_most": _rounded(max((load.steal for load in loads), default=0.0)),
        "failed": series.failed,
        "engines": {name: _engine(series, name) for name in names},
    }


def _engine(series: Series, name: str) -> dict[str, Any]:
    figures = series.figures(name)
    runs = [each.runs[name] for each in series.counted if name in each.runs]
    return {
        "median": _rounded(median(figures)),
        "values": [_rounded(value) for value in figures],
        "cpu_seconds": _rounded(median(series.cpu_seconds(name))),
        "cpu_values": [_rounded(value) for value in series.cpu_seconds(name)],
        "wall_seconds": _rounded(median([run.seconds for run in runs])),
        "first_token_seconds": _rounded(
            median([sum(run.first) / len(run.first) for run in runs if run.first])
        ),
        "requests": len(runs[0].tokens),
        "ours_faster": _rounded(median(series.ratios(OURS.name, name))),
        "agreeing": _rounded(_agreeing(series, name)),
    }


def _agreeing(series: Series, name: str) -> float | None:
    """The share of requests whose first tokens are ours."""
    pairs = [
        (ours[:AGREEING], theirs[:AGREEING])
        for each in series.counted
        if name in each.runs and OURS.name in each.runs
        for ours, theirs in zip(each.runs[OURS.name].tokens, each.runs[name].tokens, strict=False)
    ]
    return sum(a == b for a, b in pairs) / len(pairs) if pairs else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def text(results: Mapping[str, Any]) -> str:
    """Tables for people: a row for each engine, a column for each workload."""
    processor = results["processor"]
    machine = (
        f"{processor['name']} ({processor['vendor']} family {processor['family']} model "
        f"{processor['model']}), {processor['cores']} cores, {', '.join(processor['kernels'])}"
    )
    lines = [f"{machine}; {results['dtype']}; {results['date']}"]
    for name, condition in results["conditions"].items():
        lines += ["", f"{name}: {condition['threads']} threads. {CELLS}", "", *_table(condition)]
        lines += [_rounds(*item) for item in condition["workloads"].items()]
        lines += _costs(condition["workloads"])
        lines += [f"missing: {why.splitlines()[0]}" for why in condition["missing"].values()]
        lines += [
            f"failed in {workload}: {why.splitlines()[0]}"
            for workload, each in condition["workloads"].items()
            for why in each["failed"].values()
        ]
    return "\n".join(lines)


def _rounds(workload: str, described: Mapping[str, Any]) -> str:
    return (
        f"{workload}: {described['rounds']} rounds, {described['dropped']} dropped as noisy; "
        f"others used at most {described['foreign_most']} cores, steal {described['steal_most']}"
    )


def _costs(workloads: Mapping[str, Any]) -> list[str]:
    """What prefixes cost each engine: its rate under them, of that on the base."""
    if "W1" not in workloads:
        return []
    lines = []
    for name, base in workloads["W1"]["engines"].items():
        shares = [
            f"{workload}/W1 {described['engines'][name]['median'] / base['median']:.3f}"
            for workload, described in workloads.items()
            if workload in ("W2", "W3", "W4") and name in described["engines"]
        ]
        lines += [f"{name}: {', '.join(shares)}"] if shares else []
    return lines


def _table(condition: Mapping[str, Any]) -> list[str]:
    workloads = condition["workloads"]
    heads = [f"{name}, {each['unit']}" for name, each in workloads.items()]
    rows = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for engine, about in condition["engines"].items():
        cells = [_cell(each["engines"].get(engine)) for each in workloads.values()]
        rows.append(f"| {engine} {about.get('version', '')} | {' | '.join(cells)} |")
    return [*rows, ""]


def _cell(figures: Mapping[str, Any] | None) -> str:
    if figures is None:
        return "-"
    ratio = figures["ours_faster"]
    brackets = [] if ratio is None else [f"{ratio:.2f}x"]
    brackets.append(f"{figures['cpu_seconds']:.3g} s")
    return f"{figures['median']:.4g} ({', '.join(brackets)})"


def write(results: Mapping[str, Any], path: Path) -> None:
    """The results as JSON, with a plot of each condition next to it if matplotlib is installed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    try:
        from benchmarks.plots import plot  # noqa: PLC0415  # needs the extra "bench"
    except ModuleNotFoundError as error:
        print(f"no plots: {error}; pip install -e '.[bench]'")
        return
    for name, condition in results["conditions"].items():
        plot(condition, f"{name}, {results['processor']['name']}", path.with_suffix(f".{name}.svg"))
