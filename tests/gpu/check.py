"""Golden tests on CUDA, then a short throughput measurement. Takes less than ten minutes.

``python3 tests/gpu/check.py [--out FILE.json]``. Needs torch, transformers, peft, pytest and
hypothesis; no FastAPI, pydantic or SQLAlchemy, and this project need not be installed. Without
a CUDA device it prints a message and exits with 0.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SOURCES = tuple(ROOT / folder for folder in ("server", "prefix_store", "clients"))
TESTS = ("tests/golden", "tests/engine", "tests/machines", "tests/model")
EXCLUDED = (
    *("tests/golden/test_golden_server.py", "tests/model/test_demo.py"),
    *("tests/golden/test_golden_convert.py", "tests/golden/test_golden_pull.py"),
    *("tests/model/test_tokenizer.py", "tests/model/test_tokenizer_sweep.py"),
    *("tests/golden/test_golden_families.py", "tests/model/cpu"),
)
"""These need the HTTP server, the demo model or the client, take minutes on a CPU, or test its
kernels."""

REQUESTS, PROMPT, OUTPUT, VIRTUAL = 32, 64, 64, 20
BLOCKS = 1024


def main() -> int:
    """Run the checks; the exit status is 0 when all pass or there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write device, versions and figures here as JSON")
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("gpu-check: skipped, torch finds no CUDA device")
        return 0
    device = torch.cuda.get_device_name()
    print(f"gpu-check: {device}, torch {torch.__version__}")
    status = run_tests()
    report: dict[str, object] = {
        "device": device,
        "date": time.strftime("%Y-%m-%d"),
        "torch": torch.__version__,
    }
    report |= {"golden": "passed" if status == 0 else f"failed ({status})"}
    report |= {"tokens_per_second": throughput(billion_weights(), device="cuda")}
    print(json.dumps(report, indent=2))
    if options.out:
        options.out.write_text(json.dumps(report, indent=2) + "\n")
    return status


def run_tests() -> int:
    """Run the tests that need no server; golden tests run reference and engine on the GPU."""
    command, environment = pytest_call("cuda")
    return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


def pytest_call(device: str) -> tuple[list[str], dict[str, str]]:
    """The command line and environment of pytest."""
    environment = os.environ | {
        "PREFIXD_TEST_DEVICE": device,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(str(folder) for folder in (ROOT, *SOURCES)),
    }
    ignored = [f"--ignore={path}" for path in EXCLUDED]
    return [sys.executable, "-m", "pytest", "-W", "default", "-x", *TESTS, *ignored], environment


def throughput(model: object, *, device: str) -> dict[str, float]:
    """Output tokens per second, for the base and with mixed prefixes."""
    import torch

    figures = {}
    for dtype in ("bfloat16", "float32"):
        figures[f"{dtype}, base"], figures[f"{dtype}, {REQUESTS} soft prompts"] = measure(
            model, dtype, device
        )
        torch.cuda.empty_cache()
    return figures


def billion_weights() -> object:
    """A random Llama with the size of a 1B model, on the GPU."""
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=4096,
    )
    with torch.device("cuda"):
        return transformers.LlamaForCausalLM(config)


def measure(model: Any, dtype: str, device: str) -> tuple[float, float]:
    """Medians of three runs; base and mixed runs alternate."""
    sys.path[:0] = [str(folder) for folder in (ROOT, *SOURCES)]
    import torch

    from prefixd.server.model.prefix import SoftPrompt
    from tests.golden.golden_harness import serve

    served = serve(model, num_blocks=BLOCKS, dtype=dtype, device=device, max_tokens_per_step=4096)
    table = model.get_input_embeddings().weight.detach().to(served.base.dtype)
    prefixes = [served.put(SoftPrompt(table[i : i + VIRTUAL].clone())) for i in range(REQUESTS)]
    prompts = torch.randint(3, len(table), (REQUESTS, PROMPT)).tolist()
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(4):
        for mixed in (False, True):
            started = time.perf_counter()
            waits = [
                served.start(prompt, prefix if mixed else None, count=OUTPUT)
                for prompt, prefix in zip(prompts, prefixes, strict=True)
            ]
            for wait in waits:
                wait()
            seconds[mixed].append(time.perf_counter() - started)
    served.engine.stop()
    base, mixed_rate = (REQUESTS * OUTPUT / sorted(seconds[kind][1:])[1] for kind in (False, True))
    return round(base, 1), round(mixed_rate, 1)


if __name__ == "__main__":
    sys.exit(main())
