"""Speed on a GPU, as shares of what its memory allows. Takes less than four minutes.

``python -m benchmarks.gpu [--out FILE.json] [--budget SECONDS]``, by ``make gpu-bench``, which sets
the path of the sources: this project need not be installed. Needs torch, Triton, transformers, peft
and pytest. Without a CUDA device it prints a message and exits with 0.

The floor of a decode step is (weights + KV) bytes over the rate at which the device copies memory,
measured in the same call and counting what is read and written. All rounds alternate, figures are
medians of five after a warm-up. What the budget does not allow is listed as dropped; a part that
fails is reported and stops no other. The report is written after each part.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import torch

from tests.gpu.check import triton_cache


def main() -> int:
    """Measure; the exit status is 0 unless a part failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the report as JSON")
    parser.add_argument("--budget", type=float, default=215.0, help="seconds for all parts")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu-bench: skipped, torch finds no CUDA device")
        return 0
    os.environ.setdefault("TRITON_CACHE_DIR", str(triton_cache()))
    from benchmarks.gpu.parts import Bench  # noqa: PLC0415  # imports transformers: seconds

    def write(report: object) -> None:
        text = json.dumps(report, indent=1)
        if options.out:
            options.out.write_text(text + "\n")

    bench = Bench(torch.device("cuda"), budget=options.budget, write=write)
    bench.run()
    print(json.dumps(bench.report, indent=1))
    return 1 if bench.report["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
