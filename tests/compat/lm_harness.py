#!/usr/bin/env python3
"""lm-evaluation-harness against a server, and its own hf backend with PEFT: equal numbers?

    python -m venv /tmp/harness
    /tmp/harness/bin/pip install "lm-eval[api]==0.4.13" torch transformers peft -c constraints.txt
    python -m tests.compat.lm_harness --harness /tmp/harness/bin/python

The harness is unmodified: `local-completions` on the server, `hf` with `peft=` next to it, both on
the demo model in float32 and 100 multiple-choice items. Prints the figures of each prefix, and
keeps whether they are equal as rows of the table of clients. The exit status is 1 where an accuracy
differs, or a log-likelihood by more than 1e-4.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from prefixd.client import Client
from prefixd.server.cli.demo.child import ServerProcess, admin
from prefixd.server.model.demo import default_cache_dir, demo_model
from tests.compat.clients import record

HERE = Path(__file__).parent
EXAMPLES = HERE.parent.parent / "examples"
TITLE = "lm-evaluation-harness"
PREFIXES = {"base": None, "soft prompt": "sentiment", "KV prefix": "triage"}
TOLERANCE = 1e-4
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def evaluate(harness: str, model: str, arguments: str, out: Path, **env: str) -> dict[str, Any]:
    """Accuracies of a run, and the log-likelihoods of all choices."""
    command = [harness, "-m", "lm_eval", "run", "--model", model, "--model_args", arguments]
    command += ["--tasks", "prefixd_choices", "--include_path", ".", "--batch_size", "1"]
    command += ["--device", "cpu", "--output_path", str(out), "--log_samples"]
    environment = {**os.environ, **OFFLINE, **env}
    ran = subprocess.run(
        command, cwd=out.parent, env=environment, capture_output=True, text=True, check=False
    )
    if ran.returncode:
        raise SystemExit(f"{' '.join(command)}\n{ran.stdout[-4000:]}\n{ran.stderr[-4000:]}")
    results = json.loads(next(out.rglob("results_*.json")).read_text())
    lines = next(out.rglob("samples_*.jsonl")).read_text().splitlines()
    samples = sorted((json.loads(line) for line in lines), key=lambda each: each["doc_id"])
    scores = results["results"]["prefixd_choices"]
    return {
        "acc": scores["acc,none"],
        "acc_norm": scores["acc_norm,none"],
        "items": len(samples),
        "logprobs": [float(r[0]) for each in samples for r in each["filtered_resps"]],
        "greedy": [str(r[1]) for each in samples for r in each["filtered_resps"]],
    }


def call_of(label: str) -> str:
    """The name of a row in the table."""
    return f"local-completions, {label}"


def version_of(harness: str) -> str:
    """The version of the harness that is installed."""
    code = "from importlib.metadata import version; print(version('lm_eval'))"
    ran = subprocess.run([harness, "-c", code], capture_output=True, text=True, check=True)
    return ran.stdout.strip()


def compare(harness: str, folder: Path, scratch: Path) -> list[dict[str, Any]]:
    """Run all rows."""
    rows, version = [], version_of(harness)
    for name in ("choices.yaml", "choices.jsonl"):
        shutil.copy(HERE / name, scratch)
    data = scratch / "data"
    data.mkdir()
    admin(data, "tenant", "create", "harness")
    issued = admin(data, "key", "create", "--tenant", "harness")
    assert isinstance(issued, dict)
    key = str(issued["key"])
    with ServerProcess(data_dir=data, port=0, model=str(folder)) as server:
        url = server.wait_until_ready(timeout=540, on_event=lambda _: None)
        with Client(url, api_key=key) as client:
            base = client.list_models()[0].id
            for name in filter(None, PREFIXES.values()):
                client.upload_folder(name, EXAMPLES / name)
        print("| Under | acc, server | acc, hf + PEFT | acc_norm | log-likelihoods differ by |")
        print("|---|---|---|---|---|")
        for label, prefix in PREFIXES.items():
            ours = evaluate(
                harness,
                "local-completions",
                f"model={prefix or base},base_url={url}/v1/completions,tokenizer={folder},"
                "num_concurrent=8,max_retries=1,tokenizer_backend=huggingface",
                scratch / f"ours-{label}",
                OPENAI_API_KEY=key,
            )
            peft = f",peft={EXAMPLES / prefix}" if prefix else ""
            theirs = evaluate(
                harness, "hf", f"pretrained={folder},dtype=float32{peft}", scratch / f"hf-{label}"
            )
            pairs = zip(ours["logprobs"], theirs["logprobs"], strict=True)
            largest = max(abs(a - b) for a, b in pairs)
            same = all(ours[k] == theirs[k] for k in ("acc", "acc_norm", "items", "greedy"))
            ok = same and largest < TOLERANCE
            reason = "" if ok else f"figures differ, log-likelihoods by {largest:.1e}"
            rows.append({"call": call_of(label), "ok": ok, "version": version, "reason": reason})
            print(
                f"| {label} | {ours['acc']:.2f} | {theirs['acc']:.2f} | "
                f"{ours['acc_norm']:.2f}, {theirs['acc_norm']:.2f} | {largest:.1e} |",
                flush=True,
            )
    return rows


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description="Compare with the hf backend of the harness.")
    parser.add_argument("--harness", required=True, help="the python of its environment")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = demo_model(default_cache_dir())
        rows = compare(arguments.harness, folder, Path(scratch))
    record(TITLE, rows)
    return 0 if all(row["ok"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
