"""What prefixes that are not in front of the text cost the other rows of their passes.

``python -m benchmarks.placed_prompts [--rounds 7] [--threads 2] [--ways base adaption]
[--out results.json]``

32 streams at once on the demo model, 64 prompt and 64 output tokens each. 28 are on the base; the
other 4 are on the base too, under a soft prompt of 20 virtual tokens in front, under the same one
whose template places 12 of them inside, or under an adaption prompt of 10 rows in all 30 layers.
The ways alternate in each round, with fresh prompts;
the first round is not counted. The rate is that of the 28: their tokens by the time from the first
request until the last of their tokens.
"""

import argparse
import asyncio
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import httpx2

from benchmarks import host
from benchmarks.serving import (
    MODEL,
    adaption_prompt,
    body,
    client,
    prompts,
    serving,
    soft_prompt,
    timed,
    upload,
    write,
)

ROWS, PLACED, TOKENS, VIRTUAL = 32, 4, 64, 20
TEMPLATE = "{prefix:0:8}{prompt}{prefix:8:20}"
WAYS = {"base": MODEL, "in front": "front", "placed": "placed", "adaption": "adaption"}


async def rate(http: httpx2.AsyncClient, model: str, *, seed: int) -> float:
    """Tokens per second of the 28 next to 4 under ``model``."""
    texts = prompts(ROWS, TOKENS, seed=seed)
    models = [model if index % (ROWS // PLACED) == 0 else MODEL for index in range(ROWS)]
    bodies = [body(text, TOKENS, model=each) for text, each in zip(texts, models, strict=True)]
    results = await asyncio.gather(*(timed(http, each) for each in bodies))
    assert all(result.ok and len(result.tokens) == TOKENS for result in results), results
    others = [r for index, r in enumerate(results) if index % (ROWS // PLACED)]
    seconds = max(r.tokens[-1] for r in others) - min(r.sent for r in results)
    return len(others) * TOKENS / seconds


async def measure(
    http: httpx2.AsyncClient, rounds: int, chosen: Sequence[str]
) -> dict[str, list[float]]:
    """Rates of each way, one for each round."""
    soft = soft_prompt(VIRTUAL, seed=1)
    await upload(http, "front", soft)
    metadata = ("metadata.json", json.dumps({"prompt_template": TEMPLATE}).encode())
    await upload(http, "placed", {"files": {**soft["files"], "metadata": metadata}})
    await upload(http, "adaption", adaption_prompt(10, layers=30, seed=1))
    rates: dict[str, list[float]] = {way: [] for way in chosen}
    seed = os.getpid() * 1000  # other prompts in each run
    for number in range(rounds + 1):
        ways, results = list(chosen), dict[str, float]()
        for way in ways[number % len(ways) :] + ways[: number % len(ways)]:
            seed += 1
            results[way] = round(await rate(http, WAYS[way], seed=seed), 1)
        print(f"round {number} of {rounds}, tokens/s: {results}", flush=True)
        if number:
            for way, result in results.items():
                rates[way].append(result)
    return rates


async def _report(url: str, key: str, rounds: int, chosen: Sequence[str]) -> dict[str, list[float]]:
    async with client(url, key) as http:
        return await measure(http, rounds, chosen)


def main() -> None:
    """Measure, print the figures and write them with ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    flags = ("--dtype", options.dtype, "--threads", str(options.threads))
    with (
        tempfile.TemporaryDirectory() as scratch,
        serving(Path(scratch) / "data", *flags) as (server, keys),
    ):
        rates = asyncio.run(_report(server.url, keys["bench"], options.rounds, options.ways))
    of_base = {
        way: [rate / base for rate, base in zip(values, rates["base"], strict=True)]
        for way, values in rates.items()
    }
    report = {
        "machine": host.processor(Path("/proc/cpuinfo").read_text()),
        "tokens_per_s": {way: round(statistics.median(each), 1) for way, each in rates.items()},
        "ratio_to_base": {way: round(statistics.median(each), 3) for way, each in of_base.items()},
        "rounds": rates,
    }
    print(json.dumps(report, indent=2))
    write(options.out, report)


if __name__ == "__main__":
    main()
