"""A measurement as a picture. Importing this needs the extra ``bench``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

FORMATS = (".png", ".svg")


def plot(path: Path, summaries: Sequence[Mapping[str, Any]], *, title: str) -> None:
    """Draw rates and times against the load, into a file whose suffix is one of FORMATS."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    figure.suptitle(title)
    tokens, requests, first, each = figure.subplots(2, 2).flat
    by_rate = summaries[0]["request_rate"] is not None
    loads = [str(row["request_rate"] if by_rate else row["max_concurrency"]) for row in summaries]

    def line(axes: Any, key: str, label: str) -> None:
        values = [row[key] for row in summaries]
        if any(value is not None for value in values):
            shown = [float("nan") if value is None else value for value in values]
            axes.plot(loads, shown, marker="o", label=label)

    line(tokens, "output_throughput", "output tokens/s")
    line(requests, "request_throughput", "requests/s")
    line(requests, "request_goodput", "goodput")
    for axes, name in ((first, "ttft"), (each, "tpot")):
        line(axes, f"median_{name}_ms", "median")
        line(axes, f"p99_{name}_ms", "99th percentile")
    line(each, "p99_itl_ms", "99th percentile of gaps")
    first.set_title("time to first token, ms")
    each.set_title("time per output token, ms")
    for axes in (tokens, requests, first, each):
        axes.set_ylim(bottom=0)
        axes.set_xlabel("requests per second" if by_rate else "requests at a time")
        axes.grid(visible=True, alpha=0.3)
        axes.legend()
    figure.savefig(path)
