"""Ten times what the server can do, for a minute: who is served, who is told to come back.

``python -m benchmarks.overload [--seconds 60] [--factor 10] [--out results.json]``

First the capacity is measured (requests a second when there is always work) and the latency of
single requests on the idle server. Then requests are sent at ``factor`` times that rate, whether or
not earlier ones were answered. Of those that are served, the slowest hundredth is compared with the
bound that the limits of the queue imply; all others must get 429 or 503 with Retry-After. Then the
crowd stops, and the first single requests after it are compared with those before.
"""

import argparse
import asyncio
import itertools
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import httpx2

from benchmarks import serving
from benchmarks.serving import BenchServer, Timed, body, client, closed_loop, prompts, timed

PROMPT, OUTPUT, ROWS = 64, 32, 32
SINGLE = 8
WAITING_TOKENS = 4096
QUEUE_WAIT_S = 20.0
HANG_S = 120.0


@dataclass
class Crowd:
    """What the flood brought."""

    served: list[Timed] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    unfit: list[str] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)


async def single(http: httpx2.AsyncClient, seed: int) -> list[float]:
    """Latencies of one request after another."""
    asked = [body(prompt, OUTPUT) for prompt in prompts(SINGLE, PROMPT, seed=seed)]
    _, results = await closed_loop(http, asked, clients=1)
    assert all(result.ok for result in results), [result.error for result in results]
    return [result.latency for result in results]


async def capacity(http: httpx2.AsyncClient) -> float:
    """Requests a second when all rows are busy."""
    asked = [body(prompt, OUTPUT) for prompt in prompts(3 * ROWS, PROMPT, seed=1)]
    seconds, results = await closed_loop(http, asked, clients=ROWS)
    assert all(result.ok for result in results), [result.error for result in results]
    return len(asked) / seconds


async def flood(
    http: httpx2.AsyncClient, server: BenchServer, *, rate: float, seconds: float
) -> Crowd:
    """Send ``rate`` requests a second for so long, and wait for every answer."""
    crowd = Crowd()
    started = time.perf_counter()

    async def one(number: int) -> None:
        prompt = prompts(1, PROMPT, seed=1_000_000 + number)[0]
        try:
            result = await asyncio.wait_for(timed(http, body(prompt, OUTPUT)), HANG_S)
        except (TimeoutError, httpx2.TransportError) as error:
            crowd.unfit.append(f"{type(error).__name__}: {error}")
            return
        if result.ok:
            crowd.served.append(result)
        elif result.status in {429, 503} and result.retry_after is not None:
            crowd.refused[str(result.status)] += 1
        else:
            crowd.unfit.append(f"{result.status} {result.error}")

    async with asyncio.TaskGroup() as group:
        for number in itertools.count():
            due = started + number / rate
            if due > started + seconds:
                break
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            group.create_task(one(number))
            if number % max(1, int(rate)) == 0:
                crowd.memory.append(server.resident_mib)
    crowd.memory.append(server.resident_mib)
    return crowd


async def measure(
    server: BenchServer, key: str, *, seconds: float, factor: float
) -> dict[str, float]:
    """All figures of one run; times in seconds."""
    async with client(server.url, key) as http:
        await single(http, 1)
        before = await single(http, 2)
        able = await capacity(http)
        print(f"capacity {able:.2f} requests/s", flush=True)
        crowd = await flood(http, server, rate=factor * able, seconds=seconds)
        after = await single(http, 3)
    assert not crowd.unfit, (len(crowd.unfit), crowd.unfit[:3])
    latencies = sorted(one.latency for one in crowd.served)
    per_request = PROMPT + OUTPUT
    # The queue is worth so many requests; behind them, a row's own time when all rows are busy.
    bound = min(QUEUE_WAIT_S, WAITING_TOKENS / per_request / able) + ROWS / able
    late = crowd.memory[len(crowd.memory) // 3 :]
    return {
        "capacity": able,
        "sent": len(crowd.served) + crowd.refused.total(),
        "served": len(crowd.served),
        "refused_429": crowd.refused["429"],
        "refused_503": crowd.refused["503"],
        "p50": statistics.median(latencies),
        "p99": latencies[int(0.99 * (len(latencies) - 1))],
        "bound": bound,
        "memory_start_mib": late[0],
        "memory_end_mib": late[-1],
        "single_before": statistics.median(before),
        "first_after": after[0],
        "single_after": statistics.median(after),
    }


def main() -> None:
    """Measure, print a table, and write JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--factor", type=float, default=10.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    machine = serving.machine()
    flags = (
        *("--max-running", str(ROWS)),
        *("--max-waiting-tokens", str(WAITING_TOKENS)),
        *("--max-queue-wait", str(QUEUE_WAIT_S)),
    )
    with (
        tempfile.TemporaryDirectory() as scratch,
        serving.serving(Path(scratch) / "data", *flags) as (server, keys),
    ):
        run = measure(server, keys["bench"], seconds=options.seconds, factor=options.factor)
        found = asyncio.run(run)
    print(f"\n{options.factor:g} times the capacity for {options.seconds:g} s")
    for name, value in found.items():
        print(f"{name:24}{value:10.2f}")
    print(f"{'p99 / bound':24}{found['p99'] / found['bound']:10.2f}")
    print(f"{'first after / before':24}{found['first_after'] / found['single_before']:10.2f}")
    report = {"machine": machine, "seconds": options.seconds, "factor": options.factor, **found}
    serving.write(options.out, report)


if __name__ == "__main__":
    main()
