"""Tests of kernels, CUDA graphs, device sampler and runner, and golden tests, on a GPU.

``python3 tests/gpu/check.py [--out FILE.json] [--budget SECONDS]``. Needs torch, Triton,
transformers, peft, pytest and hypothesis; no FastAPI, pydantic or SQLAlchemy, and this project need
not be installed. Without a CUDA device it prints a message and exits with 0.

Each part is a pytest process of its own, since an illegal memory access ends all work of a process
on the device. Several run at once, in order; a part that fails or hangs stops no other. The report
is written after each.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCES = tuple(ROOT / folder for folder in ("server", "prefix_store", "clients"))
BUDGET_S = 225.0
_LEAST_S = 15.0
"""A part is not begun with less time left: importing torch alone may take it."""

ATTENTION, GOLDEN = "tests/model/kernels/test_attention.py", "tests/golden"
KERNELS = (ATTENTION, "tests/model/kernels/test_elementwise.py")


@dataclass(frozen=True, slots=True)
class Part:
    """Tests that one process runs: of some files, those that ``select`` matches (pytest's -k)."""

    name: str
    files: tuple[str, ...]
    select: str = ""


PARTS = (
    Part("kernels, bfloat16", KERNELS, "bfloat16"),
    Part("CUDA graphs", ("tests/model/test_graphs.py",)),
    Part("one step ahead", ("tests/model/test_device_runner.py",)),
    Part("decoders", ("tests/model/test_paged.py",)),
    Part("device sampler", ("tests/model/test_device_sampler.py",)),
    Part("golden, one step ahead", (f"{GOLDEN}/test_golden_paged.py",)),
    Part("golden, PEFT", (f"{GOLDEN}/test_golden_peft.py",), "llama or qwen3"),
    Part("kernels, float32", KERNELS, "not float16"),
    Part("golden, mixed", (f"{GOLDEN}/test_golden_mixed.py",), "not gpt2 and not preempting"),
    Part("kernels, float16", KERNELS, "float16 and not bfloat16"),
    Part("golden, preempted", (f"{GOLDEN}/test_golden_mixed.py",), "llama and preempting"),
    Part("golden, KV reuse", (f"{GOLDEN}/test_golden_reuse.py",)),
    Part("golden, other layers", (f"{GOLDEN}/test_golden_peft.py",), "gpt2 or gpt_neox"),
)
"""The most telling first. "not float16" leaves out bfloat16 too."""

NOT_HERE = {
    "tests/engine, tests/machines": "use no device",
    "tests/model/kernels/test_ops.py, test_binaries.py": "references and compilation, on a CPU",
    "tests/model/test_decode_body.py, test_buffers.py": "fake tensors, host memory",
    "golden oracle, families, speculation": "minutes; they compute with the module's layers",
    "golden int8, kernels, parallel": "decoders of a CPU, or two GPUs",
    "golden convert, pull, server": "need the client or the HTTP server",
}
"""Tests that are no part, and why."""


def main() -> int:
    """Run the parts; the exit status is 0 when all pass or there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write device, versions and results as JSON")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds for all parts")
    parser.add_argument("--jobs", type=int, default=max(1, min(8, (os.cpu_count() or 1) // 2)))
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("gpu-check: skipped, torch finds no CUDA device")
        return 0
    report = machine() | {"parts": {}, "not_here": NOT_HERE}
    print(f"gpu-check: {report['device']}, {report['versions']}", flush=True)

    def write(name: str, result: Mapping[str, Any]) -> None:
        report["parts"][name] = result
        if options.out:
            options.out.write_text(json.dumps(report, indent=1) + "\n")
        print(f"{name}: {json.dumps(result)}", flush=True)

    run_parts(PARTS, device="cuda", jobs=options.jobs, budget=options.budget, ended=write)
    failed = [name for name, each in report["parts"].items() if each["status"] != "passed"]
    print("gpu-check: " + (f"not passed: {', '.join(failed)}" if failed else "all parts passed"))
    return 1 if failed else 0


def machine() -> dict[str, Any]:
    """The device, the date and the versions of what runs on it."""
    import torch

    is_cuda = torch.cuda.is_available()
    versions = {"python": sys.version.partition(" ")[0], "cuda": torch.version.cuda}
    for package in ("torch", "triton", "transformers", "peft", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "device": torch.cuda.get_device_name() if is_cuda else "cpu",
        "date": time.strftime("%Y-%m-%d"),
        "commit": _commit(),
        "versions": versions,
    }


def _commit() -> str | None:
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        ran = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return ran.stdout.strip()


def run_parts(
    parts: Sequence[Part],
    *,
    device: str,
    jobs: int,
    budget: float,
    ended: Callable[[str, Mapping[str, Any]], None],
) -> None:
    """Run parts, ``jobs`` at a time, and call ``ended`` with the result of each; one that would
    begin at the end of the ``budget`` (seconds) is left out."""
    deadline = time.monotonic() + budget

    def run(part: Part) -> Mapping[str, Any]:
        left = deadline - time.monotonic()
        if left < _LEAST_S:
            return {"status": "left out", "seconds": 0.0}
        return run_part(part, device=device, timeout=left)

    with ThreadPoolExecutor(jobs) as threads:
        names = {threads.submit(run, part): part.name for part in parts}
        for future in as_completed(names):
            ended(names[future], future.result())


def run_part(part: Part, *, device: str, timeout: float) -> dict[str, Any]:
    """The status of a part, its seconds, counts of its tests and its first failure."""
    command, environment = pytest_call(part, device)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        results, log = Path(folder) / "results.xml", Path(folder) / "log"
        with log.open("w") as output:
            try:
                status = subprocess.run(
                    [*command, f"--junitxml={results}"],
                    cwd=ROOT,
                    env=environment,
                    check=False,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=timeout,
                ).returncode
            except subprocess.TimeoutExpired:
                status = None
        seconds = round(time.monotonic() - started, 1)
        text = log.read_text(errors="replace")
        summary = _summary(results) if results.exists() else {}
    name = {0: "passed", None: "ran out of time"}.get(status, f"failed ({status})")
    if status != 0 and "first_failure" not in summary:
        summary["last_output"] = text[-3000:]
    return {"status": name, "seconds": seconds, **summary}


def _summary(results: Path) -> dict[str, Any]:
    """Counts and the first failure in pytest's file of results."""
    suite = next(ET.parse(results).getroot().iter("testsuite"))
    counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    for case in suite.iter("testcase"):
        for kind in ("failure", "error"):
            found = case.find(kind)
            if found is not None:
                text = f"{found.get('message', '')}\n{(found.text or '')[-2500:]}"
                return counts | {"first_failure": f"{case.get('name')}: {text}"}
    return counts


def pytest_call(part: Part, device: str) -> tuple[list[str], dict[str, str]]:
    """The command line and environment of pytest. The project's own options ask for plug-ins that
    a bare machine lacks."""
    environment = os.environ | {
        "PREFIXD_TEST_DEVICE": device,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "2",
        "PYTHONPATH": os.pathsep.join(str(folder) for folder in (ROOT, *SOURCES)),
    }
    environment.setdefault("TRITON_CACHE_DIR", str(triton_cache()))
    options = ["-v", "--import-mode=importlib", "-p", "no:cacheprovider", "-p", "no:schemathesis"]
    options += ["-o", "addopts=", "-o", "filterwarnings=default", "-W", "default", "--maxfail=5"]
    options += ["-k", part.select] if part.select else []
    return [sys.executable, "-m", "pytest", *options, *part.files], environment


def triton_cache() -> Path:
    """Where compiled kernels are kept from one script to the next, unless TRITON_CACHE_DIR says."""
    return ROOT / "build" / "triton"


if __name__ == "__main__":
    sys.exit(main())
