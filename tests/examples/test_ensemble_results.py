"""The README's table of ensembles is the committed result, scored again from its outputs."""

import json
from collections import Counter
from pathlib import Path

import pytest

from examples.tasks import TRAINED

EXAMPLES = Path(__file__).parents[2] / "examples"
REPORTS = json.loads((EXAMPLES / "results" / "ensembles.json").read_text("utf-8"))
TASKS = {task.name: task for task in TRAINED}


@pytest.mark.parametrize("report", REPORTS, ids=[report["name"] for report in REPORTS])
def test_the_readme_has_the_scores_of_the_committed_outputs(report):
    task = TASKS[report["name"]]
    path = EXAMPLES / "data" / f"{task.held_out or task.name}.test.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    assert [row["prompt"] for row in report["rows"]] == [row["prompt"] for row in rows]

    members = [f"{task.name}-seed-{seed}" for seed in report["seeds"]]
    assert len(members) == 5
    right = {
        way: sum(
            task.score(row, entry[way])["right"]
            for row, entry in zip(rows, report["rows"], strict=True)
        )
        for way in (*members, "mean_logprob", "vote")
    }
    assert report["totals"] == right

    for entry in report["rows"]:  # among equally frequent answers, the first member's
        ballots = Counter(entry[member] for member in members)
        assert entry["vote"] == ballots.most_common(1)[0][0]

    scores = [right[member] for member in members]
    cells = [
        f"`{task.name}`",
        str(len(rows)),
        ", ".join(map(str, scores)),
        f"{sum(scores) / len(scores):.1f}",
        str(max(scores)),
        str(right["mean_logprob"]),
        str(right["vote"]),
    ]
    line = "| " + " | ".join(cells) + " |"
    assert line in (EXAMPLES / "README.md").read_text("utf-8").splitlines()
