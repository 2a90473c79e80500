"""Output tokens per second and time to first token, compared with PEFT in the same run.

``python -m benchmarks.throughput [--dtype bfloat16] [--runs 3] [--out results.json]``

The server is a separate process, measured over HTTP with streaming: 32 concurrent clients. PEFT is
the alternative without a server: one ``PeftModel`` with all adapters loaded, one request at a time.
It runs ``--peft-requests`` of the 32 in each round (its rate does not depend on their number),
while the server is idle. The kinds alternate, and medians are reported.
"""

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel

from benchmarks import workload
from benchmarks.workload import OUTPUT, REQUESTS
from prefixd.client.aio import AsyncClient
from prefixd.client.sync import Client
from prefixd.server.cli.demo.child import ServerProcess, admin
from prefixd.server.model.demo import default_cache_dir, demo_model
from prefixd.server.model.load import DTYPES


@dataclass(frozen=True)
class Run:
    """One run of one kind: rate in output tokens per second, times in milliseconds."""

    rate: float
    ttft_mean: float
    ttft_max: float


async def _one(client: AsyncClient, prompt: list[int], model: str) -> float:
    """Seconds to the first text of one streamed request; the full response is read."""
    started, first = time.perf_counter(), None
    stream = client.stream_complete(
        prompt, model=model, max_tokens=OUTPUT, temperature=0.0, ignore_eos=True
    )
    async with stream:
        async for chunk in stream:
            if first is None and chunk.text:
                first = time.perf_counter() - started
            if chunk.usage is not None:
                assert chunk.usage.completion_tokens == OUTPUT
    return first or time.perf_counter() - started


def over_http(url: str, key: str, prompts: list[list[int]], models: list[str]) -> Run:
    """All requests at once against the server."""

    async def everything() -> list[float]:
        async with AsyncClient(url, api_key=key, timeout=600) as client:
            pairs = zip(prompts, models, strict=True)
            return list(await asyncio.gather(*(_one(client, p, m) for p, m in pairs)))

    started = time.perf_counter()
    firsts = asyncio.run(everything())
    return _run(time.perf_counter() - started, firsts, REQUESTS)


def with_peft(model: Any, prompts: list[list[int]], names: list[str]) -> Run:
    """One request after another through PEFT; a request waits for those before it."""
    started, firsts = time.perf_counter(), []
    for prompt, name in zip(prompts, names, strict=True):
        model.set_adapter(name)
        streamer = _FirstToken()
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=OUTPUT,
                max_new_tokens=OUTPUT,
                do_sample=False,
                pad_token_id=0,
                streamer=streamer,
            )
        assert streamer.first is not None
        firsts.append(streamer.first - started)
    return _run(time.perf_counter() - started, firsts, len(prompts))


class _FirstToken:
    """A streamer that records the time of the first new token (``put`` gets the prompt first)."""

    def __init__(self) -> None:
        self.calls = 0
        self.first: float | None = None

    def put(self, _: object) -> None:
        self.calls += 1
        if self.calls == 2:
            self.first = time.perf_counter()

    def end(self) -> None:
        pass


def _run(seconds: float, firsts: list[float], requests: int) -> Run:
    return Run(
        rate=requests * OUTPUT / seconds,
        ttft_mean=1000 * statistics.mean(firsts),
        ttft_max=1000 * max(firsts),
    )


def measure(options: argparse.Namespace, scratch: Path) -> dict[str, list[Run]]:
    """Alternate the kinds for ``--runs`` rounds after one warm-up round that is not counted."""
    folder = demo_model(default_cache_dir())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[options.dtype])
    work = workload.make(model, tokenizer, scratch / "prefixes")
    names = [adapter.name for adapter in work.adapters]
    peft = PeftModel.from_pretrained(model, work.adapters[0], adapter_name=names[0])
    for adapter in work.adapters[1 : options.peft_requests]:
        peft.load_adapter(adapter, adapter_name=adapter.name)
    peft.eval()

    data = scratch / "data"
    data.mkdir()
    admin(data, "tenant", "create", "bench")
    issued = admin(data, "key", "create", "--tenant", "bench")
    assert isinstance(issued, dict)
    key = str(issued["key"])
    runs: dict[str, list[Run]] = {"base": [], "mixed": [], "peft": []}
    with ServerProcess(data_dir=data, port=0) as server:
        url = server.wait_until_ready(timeout=600, on_event=print)
        with Client(url, api_key=key) as client:
            for adapter in work.adapters:
                client.upload_folder(adapter.name, adapter)
            base = client.list_models()[0].id
            for number in range(options.runs + 1):
                some = options.peft_requests
                results = {
                    "base": over_http(url, key, work.prompts, [base] * REQUESTS),
                    "mixed": over_http(url, key, work.prompts, names),
                    "peft": with_peft(peft, work.prompts[:some], names[:some]),
                }
                for kind, run in results.items():
                    print(f"round {number} {kind:5}: {run.rate:7.1f} tokens/s", flush=True)
                    if number:
                        runs[kind].append(run)
            page = client.metrics()
    line = next(
        x for x in page.splitlines() if x.startswith("prefixd_distinct_prefixes_per_step_max ")
    )
    print(line)
    return runs


def main() -> None:
    """Measure, print a table, and write JSON when ``--out`` is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--peft-requests", type=int, default=8)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    os.environ.update(PREFIXD_DTYPE=options.dtype, HF_HUB_OFFLINE="1")
    with tempfile.TemporaryDirectory() as scratch:
        runs = measure(options, Path(scratch))
    table = {
        kind: {
            field: round(statistics.median(getattr(run, field) for run in of_kind), 1)
            for field in ("rate", "ttft_mean", "ttft_max")
        }
        for kind, of_kind in runs.items()
    }
    titles = {
        "base": "prefixd, base only",
        "mixed": f"prefixd, {REQUESTS} soft prompts",
        "peft": "PEFT, one after another",
    }
    print(f"\n{options.dtype}, {REQUESTS} requests of {workload.PROMPT} + {OUTPUT} tokens, medians")
    print(f"{'':26}{'tokens/s':>10}{'TTFT mean ms':>14}{'TTFT max ms':>13}")
    for kind, row in table.items():
        ttft = (row["ttft_mean"], row["ttft_max"])
        print(f"{titles[kind]:26}{row['rate']:>10}{ttft[0]:>14}{ttft[1]:>13}")
    if options.out:
        report = {"dtype": options.dtype, "runs": options.runs, "median": table}
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
