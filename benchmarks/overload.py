"""Ten times the capacity of the server for a minute: which requests are served or rejected.

``python -m benchmarks.overload [--seconds 60] [--factor 10] [--out results.json]``

First the capacity is measured (requests per second when the queue is never empty) and the latency
of single requests on the idle server. Then requests are sent at ``factor`` times that rate,
regardless of pending responses. The 99th percentile of the served requests is compared with the
bound that follows from the limits of the queue; all others must get 429 or 503 with Retry-After.
Finally the first single requests after the overload are compared with those before.
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
class Outcome:
    """Results of the requests sent during the overload."""

    served: list[Timed] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)


async def single(http: httpx2.AsyncClient, seed: int) -> list[float]:
    """Latencies of one request after another."""
    bodies = [body(prompt, OUTPUT) for prompt in prompts(SINGLE, PROMPT, seed=seed)]
    _, results = await closed_loop(http, bodies, clients=1)
    assert all(result.ok for result in results), [result.error for result in results]
    return [result.latency for result in results]


async def capacity(http: httpx2.AsyncClient) -> float:
    """Requests per second when all rows are busy."""
    bodies = [body(prompt, OUTPUT) for prompt in prompts(3 * ROWS, PROMPT, seed=1)]
    seconds, results = await closed_loop(http, bodies, clients=ROWS)
    assert all(result.ok for result in results), [result.error for result in results]
    return len(bodies) / seconds


async def flood(
    http: httpx2.AsyncClient, server: BenchServer, *, rate: float, seconds: float
) -> Outcome:
    """Send ``rate`` requests per second for ``seconds``, and wait for every response."""
    outcome = Outcome()
    started = time.perf_counter()

    async def one(number: int) -> None:
        prompt = prompts(1, PROMPT, seed=1_000_000 + number)[0]
        try:
            result = await asyncio.wait_for(timed(http, body(prompt, OUTPUT)), HANG_S)
        except (TimeoutError, httpx2.TransportError) as error:
            outcome.failures.append(f"{type(error).__name__}: {error}")
            return
        if result.ok:
            outcome.served.append(result)
        elif result.status in {429, 503} and result.retry_after is not None:
            outcome.refused[str(result.status)] += 1
        else:
            outcome.failures.append(f"{result.status} {result.error}")

    async with asyncio.TaskGroup() as group:
        for number in itertools.count():
            due = started + number / rate
            if due > started + seconds:
                break
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            group.create_task(one(number))
            if number % max(1, int(rate)) == 0:
                outcome.memory.append(server.resident_mib)
    outcome.memory.append(server.resident_mib)
    return outcome


async def measure(
    server: BenchServer, key: str, *, seconds: float, factor: float
) -> dict[str, float]:
    """All figures of one run; times are in seconds."""
    async with client(server.url, key) as http:
        await single(http, 1)
        before = await single(http, 2)
        requests_per_s = await capacity(http)
        print(f"capacity {requests_per_s:.2f} requests/s", flush=True)
        outcome = await flood(http, server, rate=factor * requests_per_s, seconds=seconds)
        after = await single(http, 3)
    assert not outcome.failures, (len(outcome.failures), outcome.failures[:3])
    latencies = sorted(one.latency for one in outcome.served)
    per_request = PROMPT + OUTPUT
    # The time to drain a full queue, plus the time of one request when all rows are busy.
    bound = min(QUEUE_WAIT_S, WAITING_TOKENS / per_request / requests_per_s) + ROWS / requests_per_s
    settled_memory = outcome.memory[len(outcome.memory) // 3 :]
    return {
        "capacity": requests_per_s,
        "sent": len(outcome.served) + outcome.refused.total(),
        "served": len(outcome.served),
        "refused_429": outcome.refused["429"],
        "refused_503": outcome.refused["503"],
        "p50": statistics.median(latencies),
        "p99": latencies[int(0.99 * (len(latencies) - 1))],
        "bound": bound,
        "memory_start_mib": settled_memory[0],
        "memory_end_mib": settled_memory[-1],
        "single_before": statistics.median(before),
        "first_after": after[0],
        "single_after": statistics.median(after),
    }


def main() -> None:
    """Measure, print a table, and write JSON when ``--out`` is given."""
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
        figures = asyncio.run(run)
    print(f"\n{options.factor:g} times the capacity for {options.seconds:g} s")
    for name, value in figures.items():
        print(f"{name:24}{value:10.2f}")
    print(f"{'p99 / bound':24}{figures['p99'] / figures['bound']:10.2f}")
    print(f"{'first after / before':24}{figures['first_after'] / figures['single_before']:10.2f}")
    report = {"machine": machine, "seconds": options.seconds, "factor": options.factor, **figures}
    serving.write(options.out, report)


if __name__ == "__main__":
    main()
