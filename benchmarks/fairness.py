"""What fifty clients of one tenant cost the one client of another, on the demo model over HTTP.

``python -m benchmarks.fairness [--rounds 3] [--out results.json]``

Two questions, asked in turn in every round of one run:

- The lone client sends a request at a time. Its latency with the crowd, against its latency alone.
- The lone client's tenant has more to do than the server has rows. Its share of the tokens served
  while both have work waiting, with weights 1:1 and 1:2. Tokens are prefix + prompt + output.

The server runs at most sixteen sequences, so that most of the crowd always waits.
"""

import argparse
import asyncio
import itertools
import statistics
import tempfile
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2

from benchmarks import serving
from benchmarks.serving import Timed, body, client, closed_loop, prompts, timed

CROWD, ROWS = 50, 16
PROMPT, OUTPUT = 32, 16
ASKED = 5
BATCH = 64
WEIGHTS = {"even": 1.0, "double": 2.0}


@asynccontextmanager
async def crowd(http: httpx2.AsyncClient, seed: int) -> AsyncIterator[list[Timed]]:
    """Fifty clients that ask again and again; yields all they have asked so far."""
    seen: list[Timed] = []
    asked = (body(prompts(1, PROMPT, seed=n)[0], OUTPUT) for n in itertools.count(seed))

    async def one() -> None:
        for each in asked:
            result = await timed(http, each, seen=seen)
            assert result.ok, result.error

    clients = [asyncio.create_task(one()) for _ in range(CROWD)]
    while sum(one.ended > 0 for one in seen) < ROWS:
        await serving.figures(http)
    yield seen
    for running in clients:
        running.cancel()
    await asyncio.gather(*clients, return_exceptions=True)


async def latencies(http: httpx2.AsyncClient, seed: int) -> list[float]:
    """Seconds of each of the lone client's requests, one after another."""
    asked = [body(prompt, OUTPUT) for prompt in prompts(ASKED, PROMPT, seed=seed)]
    _, results = await closed_loop(http, asked, clients=1)
    assert all(result.ok for result in results)
    return [result.latency for result in results]


async def share(http: httpx2.AsyncClient, others: list[Timed], seed: int) -> float:
    """The part of the service that a batch of requests got while some of it was waiting."""
    batch = [
        asyncio.create_task(timed(http, body(prompt, OUTPUT)))
        for prompt in prompts(BATCH, PROMPT, seed=seed)
    ]
    first = min(one.sent for one in await asyncio.gather(*batch))
    last = max(one.result().tokens[0] for one in batch)
    mine = sum(_served(one.result(), first, last) for one in batch)
    theirs = sum(_served(one, first, last) for one in others)
    return mine / (mine + theirs)


def _served(one: Timed, first: float, last: float) -> int:
    """Tokens of a request that were served between two moments: its prompt with the first."""
    output = sum(first <= at <= last for at in one.tokens)
    return output + (PROMPT if one.tokens and first <= one.tokens[0] <= last else 0)


async def measure(url: str, keys: dict[str, str], rounds: int) -> dict[str, list[float]]:
    """Figures by name; the first round is not counted."""
    found = defaultdict(list)
    async with client(url, keys["crowd"]) as many:
        for number in range(rounds + 1):
            seed = 1_000_000 * (number + 1)
            results: dict[str, float] = {}
            async with client(url, keys["even"]) as http:
                results["alone"] = statistics.median(await latencies(http, seed))
                async with crowd(many, seed + 1000):
                    results["beside"] = statistics.median(await latencies(http, seed + 100))
            for name in WEIGHTS:
                async with client(url, keys[name]) as http, crowd(many, seed + 5000) as others:
                    results[name] = await share(http, others, seed + 200)
            print(f"round {number}: {results}", flush=True)
            if number:
                for kind, value in results.items():
                    found[kind].append(value)
    return found


def main() -> None:
    """Measure, print a table, and write JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    machine = serving.machine()
    with tempfile.TemporaryDirectory() as scratch:
        started = serving.serving(
            Path(scratch) / "data",
            *("--max-running", str(ROWS)),
            tenants=("crowd", *WEIGHTS),
            **WEIGHTS,
        )
        with started as (server, keys):
            found = asyncio.run(measure(server.url, keys, options.rounds))
    median = {kind: statistics.median(values) for kind, values in found.items()}
    ratio = median["beside"] / median["alone"]
    print(f"\n{CROWD} clients against 1, {PROMPT} + {OUTPUT} tokens, {ROWS} rows, medians")
    print(f"{'latency of the lone client, alone':46}{1000 * median['alone']:8.0f} ms")
    print(f"{'latency beside the crowd':46}{1000 * median['beside']:8.0f} ms")
    print(f"{'ratio':46}{ratio:8.2f}")
    for name, weight in WEIGHTS.items():
        fair = weight / (1 + weight)
        print(f"{f'share with weight {weight:g} (fair: {fair:.2f})':46}{median[name]:8.2f}")
    report = {"machine": machine, "rounds": options.rounds, "median": median, "ratio": ratio}
    serving.write(options.out, report)


if __name__ == "__main__":
    main()
