"""What a batch of a thousand lines costs the streams of the same server, over HTTP.

``python -m benchmarks.background [--rounds 6] [--seconds 8] [--streams 16] [--out results.json]``

Streaming clients send one request after another. Windows without and with a batch alternate; the
batch is cancelled after each. A round compares the gaps between tokens in a window with those in
the windows before and after it, so that a slow drift of the machine cancels out. The first round
is not counted, and one is dropped in which other processes used more than ``--noise`` cores.
At the end the same batch runs without streams.
"""

import argparse
import asyncio
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2

from benchmarks import host
from benchmarks.serving import (
    BenchServer,
    Timed,
    body,
    client,
    figures,
    machine,
    prompts,
    serving,
    stated,
    timed,
    write,
)

LINES, PROMPT, LINE_OUTPUT, STREAM_OUTPUT = 1000, 64, 32, 400
_SETTLE_S = 1.0


@asynccontextmanager
async def streaming(http: httpx2.AsyncClient, count: int) -> AsyncIterator[list[Timed]]:
    """``count`` clients that stream one answer after another; yields all answers so far."""
    seen: list[Timed] = []

    async def one(number: int) -> None:
        for turn in itertools.count():
            (prompt,) = prompts(1, PROMPT, seed=100_000 * number + turn)
            # The first ones are short, so that the clients do not all begin at the same time.
            output = STREAM_OUTPUT if turn else STREAM_OUTPUT * (number + 1) // count
            result = await timed(http, body(prompt, output), seen=seen)
            assert result.ok, result.error

    clients = [asyncio.create_task(one(number)) for number in range(count)]
    yield seen
    for each in clients:
        each.cancel()
    await asyncio.gather(*clients, return_exceptions=True)


class Window:
    """What happened in some seconds: gaps of streams, tokens of the batch, and load of others."""

    def __init__(self, http: httpx2.AsyncClient, server: BenchServer, seen: list[Timed]) -> None:
        self._http, self._server, self._seen = http, server, seen
        self.gaps: list[float] = []
        self.rates: dict[str, float] = {}
        self.foreign = 0.0

    async def observe(self, seconds: float) -> "Window":
        """Watch for so many seconds."""
        meter = host.LoadMeter(measured=self._server.pid, ours={os.getsid(0)})
        before, began = await figures(self._http), time.perf_counter()
        await asyncio.sleep(seconds)
        ended, after = time.perf_counter(), await figures(self._http)
        load = meter.read()
        self.foreign = load.foreign + load.steal
        for one in self._seen:
            pairs = itertools.pairwise(one.tokens)
            self.gaps += [b - a for a, b in pairs if began <= a and b <= ended]
        for name in ("background_tokens", "background_generation_tokens"):
            metric = f"prefixd_{name}_total"
            self.rates[name] = (after[metric] - before[metric]) / (ended - began)
        return self


async def until(http: httpx2.AsyncClient, is_so: Callable[[dict[str, float]], bool]) -> None:
    """Wait for a state of the metrics."""
    while True:
        if is_so(await figures(http)):
            return
        await asyncio.sleep(0.2)


async def start_batch(http: httpx2.AsyncClient, seed: int) -> str:
    """A batch whose first lines run."""
    lines = []
    for number, prompt in enumerate(prompts(LINES, PROMPT, seed=seed)):
        request = body(prompt, LINE_OUTPUT, stream=False, logprobs=None)
        line = {"custom_id": str(number), "method": "POST", "url": "/v1/completions"}
        lines.append(json.dumps({**line, "body": request}))
    files = {"file": ("lines.jsonl", "\n".join(lines).encode())}
    answer = await http.post("/v1/files", data={"purpose": "batch"}, files=files)
    content = {"endpoint": "/v1/completions", "completion_window": "24h"}
    content["input_file_id"] = answer.raise_for_status().json()["id"]
    batch = (await http.post("/v1/batches", json=content)).raise_for_status().json()
    await until(http, lambda now: now["prefixd_background_requests_running"] > 0)
    return str(batch["id"])


async def cancel_batch(http: httpx2.AsyncClient, batch: str) -> None:
    """Cancel a batch, and wait until nothing of it runs."""
    (await http.post(f"/v1/batches/{batch}/cancel")).raise_for_status()
    names = [f"prefixd_background_requests_{state}" for state in ("running", "waiting")]
    await until(http, lambda now: not any(now[name] for name in names))


def compare(before: Window, during: Window, after: Window) -> dict[str, float]:
    """One round: milliseconds between tokens, and ratios to the windows around it."""
    ways: dict[str, Callable[[list[float]], float]]
    ways = {"median": statistics.median, "mean": statistics.fmean, "p95": _p95}
    report: dict[str, float] = {}
    for name, figure in ways.items():
        alone = (figure(before.gaps) + figure(after.gaps)) / 2
        report |= {f"{name}_alone_ms": 1000 * alone, f"{name}_ms": 1000 * figure(during.gaps)}
        report[f"{name}_ratio"] = figure(during.gaps) / alone
    report["foreign_cores"] = max(each.foreign for each in (before, during, after))
    return {name: round(value, 3) for name, value in {**report, **during.rates}.items()}


def _p95(gaps: list[float]) -> float:
    return statistics.quantiles(gaps, n=20)[-1]


async def measure(url: str, key: str, server: BenchServer, options: Any) -> dict[str, Any]:
    """All rounds, and the medians of those that count."""
    rounds: list[dict[str, float]] = []
    async with client(url, key) as http:
        async with streaming(http, options.streams) as seen:
            await until(http, lambda _: sum(bool(e.tokens) for e in seen) >= options.streams)
            await asyncio.sleep(_SETTLE_S)
            before = await Window(http, server, seen).observe(options.seconds)
            for number in range(options.rounds + 1):
                batch = await start_batch(http, number)
                await asyncio.sleep(_SETTLE_S)
                during = await Window(http, server, seen).observe(options.seconds)
                await cancel_batch(http, batch)
                await asyncio.sleep(_SETTLE_S)
                after = await Window(http, server, seen).observe(options.seconds)
                rounds.append(compare(before, during, after))
                print(f"round {number}: {rounds[-1]}", flush=True)
                before = after
        await start_batch(http, options.rounds + 1)
        alone = await Window(http, server, []).observe(options.seconds)
    counted = [each for each in rounds[1:] if each["foreign_cores"] <= options.noise]
    median = {name: statistics.median(e[name] for e in counted) for name in rounds[0] if counted}
    return {"rounds": rounds, "counted": len(counted), "median": median, "batch_alone": alone.rates}


def main() -> None:
    """Measure, print the medians, and write JSON when ``--out`` is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--noise", type=float, default=0.3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    report = {"machine": machine(), "options": stated(options)}
    with (
        tempfile.TemporaryDirectory() as scratch,
        serving(Path(scratch) / "data") as (server, keys),
    ):
        report |= asyncio.run(measure(server.url, keys["bench"], server, options))
    print(f"\n{report['counted']} of {options.rounds} rounds count, medians:")
    for name, value in report["median"].items():
        print(f"{name:36}{value:10.2f}")
    for name, value in report["batch_alone"].items():
        print(f"{name + ', without streams':36}{value:10.2f}")
    write(options.out, report)


if __name__ == "__main__":
    main()
