"""Compare ensembles of differently seeded prefixes with their members, on a running server:
`python -m examples.ensembles FOLDER`.

FOLDER has `<seed>/<task>/`, as `python -m examples.train <task> --seed N --out FOLDER/N` writes.
The prefixes of each task are uploaded as `<task>-seed-<seed>` with the recipe of the example. Every
row of its held-out file is answered over the HTTP API, greedy, under

    each member       by itself
    mean_logprob      the ensemble that averages the members' log-probabilities
    vote              the ensemble that takes the most frequent answer

Prints the table of README.md; `--out` also writes all outputs and the totals as JSON.
"""

import argparse
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from examples.runtime import EXAMPLES, read_rows
from examples.tasks import TRAINED, Task
from prefixd.client import Client

COMBINATIONS = ("mean_logprob", "vote")
REQUESTS = 4  # in flight at once
HEAD = "| Task | Rows | Members, by seed | Their mean | Best member | `mean_logprob` | `vote` |"


def main() -> None:
    """Score every task that has trained prefixes in the folder and print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="has <seed>/<task>/ for each member")
    parser.add_argument("--url", default=os.environ.get("PREFIXD_URL", "http://127.0.0.1:8000"))
    parser.add_argument("--key", default=os.environ.get("PREFIXD_API_KEY"))
    parser.add_argument("--out", type=Path, help="JSON file for all outputs and the totals")
    arguments = parser.parse_args()
    seeds = {task.name: trained_seeds(arguments.folder, task) for task in TRAINED}
    tasks = [task for task in TRAINED if len(seeds[task.name]) > 1]
    if not tasks:
        parser.error(f"expected two or more <seed>/<task>/ of one task in {arguments.folder}")
    with Client(arguments.url, api_key=arguments.key, timeout=300) as client:
        reports = [compare(client, task, arguments.folder, seeds[task.name]) for task in tasks]
    print("\n".join(table(reports)))
    if arguments.out:
        text = json.dumps(reports, indent=1, ensure_ascii=False)
        arguments.out.write_text(text + "\n", "utf-8")


def trained_seeds(folder: Path, task: Task) -> list[int]:
    """The seeds that `task` was trained with, in ascending order."""
    return sorted(
        int(path.parent.name)
        for path in folder.glob(f"*/{task.name}")
        if path.parent.name.isdecimal()
    )


def compare(client: Client, task: Task, folder: Path, seeds: list[int]) -> dict[str, Any]:
    """Return `{"totals": {way: n}, "rows": [...]}`, where a way is a member or a combination."""
    recipe = json.loads((EXAMPLES / task.name / "recipe.json").read_text("utf-8"))
    members = [f"{task.name}-seed-{seed}" for seed in seeds]
    references = []
    for seed, member in zip(seeds, members, strict=True):
        metadata = {"recipe": recipe}
        uploaded = client.upload_folder(member, folder / str(seed) / task.name, metadata=metadata)
        references.append(f"{member}@{uploaded.prefix.version}")
    base = next(model.id for model in client.list_models() if model.parent is None)
    ways: dict[str, dict[str, Any]] = {
        member: {"model": reference} for member, reference in zip(members, references, strict=True)
    }
    for combine in COMBINATIONS:
        ensemble = {"ensemble": references, "combine": combine}
        ways[combine] = {"model": base, "prefix": ensemble}
    rows = read_rows(task.held_out or task.name, "test")
    prompts = [row["prompt"] for row in rows]
    answers = {way: answer_all(client, prompts, fields) for way, fields in ways.items()}
    totals = {
        way: sum(task.score(row, text)["right"] for row, text in zip(rows, texts, strict=True))
        for way, texts in answers.items()
    }
    detail = [
        {"prompt": prompt, **{way: answers[way][index] for way in ways}}
        for index, prompt in enumerate(prompts)
    ]
    return {
        "name": task.name,
        "held_out": len(rows),
        "seeds": seeds,
        "totals": totals,
        "rows": detail,
    }


def answer_all(client: Client, prompts: list[str], fields: dict[str, Any]) -> list[str]:
    """The greedy answers to single messages. A warning, as of recipes that differ, is an error."""

    def ask(prompt: str) -> str:
        answer = client.chat([{"role": "user", "content": prompt}], temperature=0, **fields)
        if answer.warnings:
            raise RuntimeError("; ".join(answer.warnings))
        return answer.text

    with ThreadPoolExecutor(REQUESTS) as pool:
        return list(pool.map(ask, prompts))


def table(reports: list[dict[str, Any]]) -> list[str]:
    """The lines of a Markdown table, one row for each task."""
    lines = [HEAD, "|---" * HEAD.count(" | ") + "|---|"]
    for report in reports:
        totals = report["totals"]
        members = [totals[f"{report['name']}-seed-{seed}"] for seed in report["seeds"]]
        cells = [
            f"`{report['name']}`",
            report["held_out"],
            ", ".join(map(str, members)),
            f"{sum(members) / len(members):.1f}",
            max(members),
            *(totals[combine] for combine in COMBINATIONS),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


if __name__ == "__main__":
    main()
