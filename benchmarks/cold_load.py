"""The delay that a cold prefix of 1,024 virtual tokens causes for sixteen running streams.

``python -m benchmarks.cold_load [--rounds 5] [--out results.json]``

Rounds with and without a cold load alternate. Each round measures the longest gap between two
tokens of any stream after the load starts. The growth is compared with the time of one prefill
chunk, measured in the same rounds on the idle server: a quarter of a prompt of 1,024 tokens that
runs in four chunks. The gap may grow by at most one such chunk.
"""

import argparse
import asyncio
import statistics
import tempfile
from collections import defaultdict
from pathlib import Path

import httpx2

from benchmarks import serving
from benchmarks.serving import body, client, prompts, soft_prompt, timed, upload

STREAMS, PROMPT, OUTPUT = 16, 32, 64
PREFIX, CHUNK = 1024, 256


async def chunk_time(http: httpx2.AsyncClient, seed: int) -> float:
    """Seconds of one prefill chunk."""
    prompt = prompts(1, PREFIX, seed=seed)[0]
    result = await timed(http, body(prompt, 1))
    assert result.ok, result.error
    return result.latency / (PREFIX // CHUNK)


async def worst_gap(http: httpx2.AsyncClient, seed: int, *, cold: bool) -> float:
    """Seconds of the longest gap between two tokens of a stream."""
    if cold:
        await upload(http, "cold", soft_prompt(PREFIX, seed=seed))
    before = await _generated(http)
    running = [
        asyncio.create_task(timed(http, body(prompt, OUTPUT)))
        for prompt in prompts(STREAMS, PROMPT, seed=seed)
    ]
    while await _generated(http) < before + 10 * STREAMS:
        pass  # until all of them decode
    since = asyncio.get_running_loop().time()
    if cold:
        result = await timed(http, body(prompts(1, 4, seed=seed)[0], 1, model="cold"))
        assert result.ok, result.error
    streams = await asyncio.gather(*running)
    assert all(one.ok for one in streams)
    # perf_counter and the loop's clock are the same clock on all supported platforms.
    return max(gap for one in streams for gap in one.gaps(since=since))


async def _generated(http: httpx2.AsyncClient) -> float:
    return (await serving.figures(http))["prefixd_generation_tokens_total"]


async def measure(url: str, key: str, rounds: int) -> dict[str, list[float]]:
    """Seconds by kind; the first round of each is not counted."""
    seconds_by_kind = defaultdict(list)
    async with client(url, key) as http:
        for number in range(rounds + 1):
            results = {
                "chunk": await chunk_time(http, 1000 + number),
                "warm": await worst_gap(http, 2000 + number, cold=False),
                "cold": await worst_gap(http, 3000 + number, cold=True),
            }
            if number:
                for kind, seconds in results.items():
                    seconds_by_kind[kind].append(seconds)
            summary = ", ".join(f"{kind} {1000 * s:.0f} ms" for kind, s in results.items())
            print(f"round {number}: {summary}", flush=True)
    return seconds_by_kind


def main() -> None:
    """Measure, print a table, and write JSON when ``--out`` is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    machine = serving.machine()
    with tempfile.TemporaryDirectory() as scratch:
        flags = ("--max-prefill-chunk", str(CHUNK), "--max-virtual-tokens", str(PREFIX))
        with serving.serving(Path(scratch) / "data", *flags) as (server, keys):
            seconds_by_kind = asyncio.run(measure(server.url, keys["bench"], options.rounds))
    median = {kind: 1000 * statistics.median(seconds) for kind, seconds in seconds_by_kind.items()}
    growth = median["cold"] - median["warm"]
    ratio = growth / median["chunk"]
    print(f"\n{STREAMS} streams, cold prefix of {PREFIX}, chunk of {CHUNK}, medians")
    print(f"{'worst gap without a cold load':40}{median['warm']:8.0f} ms")
    print(f"{'worst gap with one':40}{median['cold']:8.0f} ms")
    print(f"{'growth':40}{growth:8.0f} ms")
    print(f"{'one prefill chunk, alone':40}{median['chunk']:8.0f} ms")
    print(f"{'growth in chunks (at most 1)':40}{ratio:8.2f}")
    report = {"machine": machine, "rounds": options.rounds, "median_ms": median, "ratio": ratio}
    serving.write(options.out, report)


if __name__ == "__main__":
    main()
