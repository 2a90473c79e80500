"""Continuous batching of transformers on the same model and requests, in a process of its own.

``python -m benchmarks.gpu.peer JSON`` (ModelSize, Workload and device): the last line printed.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.gpu.serving import Workload
from benchmarks.gpu.sizes import ModelSize, random_model

ROUNDS = 3


def measure(size: ModelSize, load: Workload, device: torch.device) -> dict[str, Any]:
    """Output tokens a second, prompts included in the time: the median after a warm-up."""
    import transformers  # noqa: PLC0415  # seconds

    model = random_model(size, device)
    model.set_attn_implementation("paged|sdpa")
    config = transformers.GenerationConfig(
        max_new_tokens=load.output, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    prompts = torch.randint(3, size.ids, (load.requests, load.prompt)).tolist()
    rates = []
    for _ in range(1 + ROUNDS):
        started = time.perf_counter()
        results = model.generate_batch(
            prompts, generation_config=config, progress_bar=False, persistent_manager=True
        )
        seconds = time.perf_counter() - started
        tokens = sum(len(each.generated_tokens) for each in results.values())
        if tokens != load.requests * load.output:
            return {"missing": f"{tokens} tokens of {load.requests * load.output} came"}
        rates.append(tokens / seconds)
    return {
        "tokens_per_s": round(statistics.median(rates[1:]), 1),
        "attention": "paged|sdpa",
        "version": transformers.__version__,
    }


def measure_apart(
    size: ModelSize, load: Workload, device: torch.device, *, timeout: float
) -> dict[str, Any]:
    """The result, or why there is none."""
    asked = json.dumps({"size": asdict(size), "load": asdict(load), "device": str(device)})
    command = [sys.executable, "-m", "benchmarks.gpu.peer", asked]
    try:
        ran = subprocess.run(
            command, check=False, capture_output=True, text=True, timeout=max(1.0, timeout)
        )
    except subprocess.TimeoutExpired:
        return {"missing": f"no result within {timeout:.0f} s"}
    lines = ran.stdout.strip().splitlines()
    if ran.returncode or not lines:
        return {"missing": ran.stderr.strip()[-1500:] or f"exit status {ran.returncode}"}
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def main() -> None:
    """Measure what the command line asks for."""
    asked = json.loads(sys.argv[1])
    size, load = ModelSize(**asked["size"]), Workload(**asked["load"])
    print(json.dumps(measure(size, load, torch.device(asked["device"]))), flush=True)
    sys.stderr.flush()
    # The manager's thread may still run.
    os._exit(0)


if __name__ == "__main__":
    main()
