"""That the engines compute the same: greedy tokens of ours and of transformers in float32."""

import sys
from pathlib import Path
from typing import Any

from benchmarks.children import Child
from benchmarks.engines import OURS, PEERS
from benchmarks.models import model_path, prefixes
from benchmarks.workloads import Figure, Prompts, Workload, kv_names, soft_names

CASES = (
    Workload("base", "one prompt", Figure.RATE, requests=1, output=32),
    Workload("soft", "one soft prompt", Figure.RATE, 1, output=32, prefixes=soft_names(1)),
    Workload("kv", "one KV prefix", Figure.RATE, 1, output=32, prefixes=kv_names()[:1]),
)


class TokensDiffer(Exception):
    """Two engines chose different tokens in float32."""


def check_tokens(folder: Path) -> dict[str, Any]:
    """Compare 32 greedy tokens of one prompt alone, under a soft prompt and under a KV prefix.

    Raises TokensDiffer, with the position of the first difference.
    """
    needed = {name for case in CASES for name in case.prefixes}
    described = {name: each for name, each in prefixes(folder).items() if name in needed}
    answers: dict[str, dict[str, list[int]]] = {}
    for engine in (OURS, PEERS["transformers"]):
        start = {
            "model": str(model_path(folder, "float32")),
            "dtype": "float32",
            "threads": 1,
            "prefixes": described,
        }
        with Child(engine, Path(sys.executable), start) as child:
            child.wait()
            prompts = Prompts(seed="agreement")
            answers[engine.name] = {
                case.name: child.run(prompts.take(case), case.output).tokens[0] for case in CASES
            }
    for case in CASES:
        pairs = zip(*(tokens[case.name] for tokens in answers.values()), strict=True)
        differing = [position for position, (a, b) in enumerate(pairs) if a != b]
        if differing:
            raise TokensDiffer(
                f"{case.title}: expected the same {case.output} greedy tokens from "
                f"{' and '.join(answers)} in float32, they differ from position {differing[0]} on"
            )
    return {"dtype": "float32", "cases": {case.name: case.output for case in CASES}}
