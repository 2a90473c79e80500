"""Score the example prefixes on their held-out rows: `python -m examples.evaluate [name ...]`.

Every row of the held-out file counts. Three conditions are compared, greedy, in float32:

    base          the bare model
    instruction   the bare model with the task written as a system message
    prefix        the model under the trained (or text) prefix, without any instruction:
                  one unpadded request at a time through PEFT's own `generate`

Prints a table; `--out` also writes all outputs and the totals as JSON.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel

from examples.runtime import EXAMPLES, generate, load_base, read_rows
from examples.tasks import ALL, Task, TextTask

WAYS = ("base", "instruction", "prefix")
BARE_BATCH = 10  # requests to the bare model that are generated together


def main() -> None:
    """Evaluate the named prefixes and print one line for each prefix and condition."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="prefixes to score (default: all)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--out", type=Path, help="folder for <name>.json with all outputs")
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - {task.name for task in ALL}:
        parser.error(f"unknown prefixes: {', '.join(sorted(unknown))}")
    for task in ALL:
        if not arguments.names or task.name in arguments.names:
            report = evaluate(task, arguments.ways)
            if arguments.out:
                arguments.out.mkdir(parents=True, exist_ok=True)
                text = json.dumps(report, indent=1, ensure_ascii=False)
                (arguments.out / f"{task.name}.json").write_text(text + "\n", "utf-8")


def evaluate(task: Task | TextTask, ways: Sequence[str] = WAYS) -> dict[str, Any]:
    """Return `{"totals": {way: {metric: n}}, "rows": [...]}` over the full held-out file."""
    rows = read_rows(task.held_out or task.name, "test")
    answers = {way: answer_all(task, way, [row["prompt"] for row in rows]) for way in ways}
    totals: dict[str, dict[str, int]] = {}
    for way in ways:
        scores = [task.score(row, text) for row, text in zip(rows, answers[way], strict=True)]
        totals[way] = {metric: sum(score[metric] for score in scores) for metric in scores[0]}
        line = ", ".join(f"{metric} {n}/{len(rows)}" for metric, n in totals[way].items())
        print(f"{task.name:16} {way:12} {line}", flush=True)
    detail = [
        {"prompt": row["prompt"], **{way: answers[way][index] for way in ways}}
        for index, row in enumerate(rows)
    ]
    return {"name": task.name, "held_out": len(rows), "totals": totals, "rows": detail}


def answer_all(task: Task | TextTask, way: str, prompts: list[str]) -> list[str]:
    """The outputs for all prompts under one condition."""
    base = load_base()
    model, system, head = base.model, list[dict[str, str]](), list[int]()
    if way == "instruction":
        system = [{"role": "system", "content": task.instruction}]
    elif way == "prefix" and isinstance(task, Task):
        model = PeftModel.from_pretrained(base.model, EXAMPLES / task.name).eval()
    elif way == "prefix":
        text = (EXAMPLES / task.name / "prefix.txt").read_text("utf-8")
        head = base.tokenizer(text)["input_ids"]

    if way == "prefix" and isinstance(task, Task) and task.template:
        ids = [base.text_ids(task.template, prompt) for prompt in prompts]
    else:
        chats = [[*system, {"role": "user", "content": prompt}] for prompt in prompts]
        ids = [head + base.chat_ids(chat) for chat in chats]
    size = 1 if way == "prefix" else BARE_BATCH
    answers: list[str] = []
    for start in range(0, len(ids), size):
        batch = ids[start : start + size]
        answers += generate(model, base, batch, max_new_tokens=task.max_new_tokens)
    return answers


if __name__ == "__main__":
    main()
