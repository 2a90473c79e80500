"""Bars of a comparison: one panel for each workload, one bar for each engine."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.engines import OURS
from benchmarks.workloads import WORKLOADS

mpl.rcParams["svg.hashsalt"] = "prefixd"  # the same figures give the same file
OUR_COLOUR, OTHER_COLOUR = "#1f6feb", "#9aa4b2"


def plot(condition: Mapping[str, Any], title: str, path: Path) -> None:
    """Write one condition of the results as SVG: medians, with the range of the counted rounds."""
    names = list(condition["engines"])
    workloads = condition["workloads"]
    figure = Figure(figsize=(2.6 * len(workloads) + 1.5, 0.36 * len(names) + 1.8))
    panels = figure.subplots(1, len(workloads), sharey=True, squeeze=False)[0]
    for panel, (workload, described) in zip(panels, workloads.items(), strict=True):
        bars = [described["engines"].get(name) for name in names]
        medians = [each["median"] if each else 0.0 for each in bars]
        below = [each["median"] - min(each["values"]) if each else 0.0 for each in bars]
        above = [max(each["values"]) - each["median"] if each else 0.0 for each in bars]
        ours = {name for name, about in condition["engines"].items() if "revision" in about}
        colours = [
            OUR_COLOUR if name in ours or name == OURS.name else OTHER_COLOUR for name in names
        ]
        panel.barh(names, medians, xerr=[below, above], color=colours)
        panel.set_title(f"{workload}: {WORKLOADS[workload].title}", fontsize=8)
        better = "more" if WORKLOADS[workload].figure.more_is_better else "less"
        panel.set_xlabel(f"{described['unit']} ({better} is better)", fontsize=8)
        panel.tick_params(labelsize=8)
    panels[0].invert_yaxis()
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
