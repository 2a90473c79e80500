"""How fifty clients of one tenant affect the single client of another, over HTTP.

``python -m benchmarks.fairness [--rounds 3] [--out results.json]``

Two measurements alternate in every round, on the demo model:

- The single client sends one request at a time: its latency while the fifty clients are active,
  compared with its latency alone.
- The tenant of the single client has more requests than the server has rows: its share of the
  tokens served while both tenants have requests waiting, with weights 1:1 and 1:2. Tokens are
  prefix + prompt + output.

The server runs at most sixteen sequences, so that most of the fifty clients always wait.
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

CLIENTS, ROWS = 50, 16
PROMPT, OUTPUT = 32, 16
REQUESTS = 5
BATCH = 64
WEIGHTS = {"even": 1.0, "double": 2.0}


@asynccontextmanager
async def many_clients(http: httpx2.AsyncClient, seed: int) -> AsyncIterator[list[Timed]]:
    """Fifty clients that send one request after another; yields all requests so far."""
    seen: list[Timed] = []
    bodies = (body(prompts(1, PROMPT, seed=n)[0], OUTPUT) for n in itertools.count(seed))

    async def one() -> None:
        for each in bodies:
            result = await timed(http, each, seen=seen)
            assert result.ok, result.error

    clients = [asyncio.create_task(one()) for _ in range(CLIENTS)]
    while sum(one.ended > 0 for one in seen) < ROWS:
        await serving.figures(http)
    yield seen
    for running in clients:
        running.cancel()
    await asyncio.gather(*clients, return_exceptions=True)


async def latencies(http: httpx2.AsyncClient, seed: int) -> list[float]:
    """Seconds of each request of the single client, one after another."""
    bodies = [body(prompt, OUTPUT) for prompt in prompts(REQUESTS, PROMPT, seed=seed)]
    _, results = await closed_loop(http, bodies, clients=1)
    assert all(result.ok for result in results)
    return [result.latency for result in results]


async def share(http: httpx2.AsyncClient, competing: list[Timed], seed: int) -> float:
    """The share of tokens that a batch of requests received while some of it was waiting."""
    batch = [
        asyncio.create_task(timed(http, body(prompt, OUTPUT)))
        for prompt in prompts(BATCH, PROMPT, seed=seed)
    ]
    first = min(one.sent for one in await asyncio.gather(*batch))
    last = max(one.result().tokens[0] for one in batch)
    own_tokens = sum(_served(one.result(), first, last) for one in batch)
    other_tokens = sum(_served(one, first, last) for one in competing)
    return own_tokens / (own_tokens + other_tokens)


def _served(one: Timed, first: float, last: float) -> int:
    """Tokens of a request served between two times; the prompt counts with the first token."""
    output = sum(first <= at <= last for at in one.tokens)
    return output + (PROMPT if one.tokens and first <= one.tokens[0] <= last else 0)


async def measure(url: str, keys: dict[str, str], rounds: int) -> dict[str, list[float]]:
    """Values by name; the first round is not counted."""
    values_by_name = defaultdict(list)
    async with client(url, keys["many_clients"]) as many:
        for number in range(rounds + 1):
            seed = 1_000_000 * (number + 1)
            results: dict[str, float] = {}
            async with client(url, keys["even"]) as http:
                results["alone"] = statistics.median(await latencies(http, seed))
                async with many_clients(many, seed + 1000):
                    results["contended"] = statistics.median(await latencies(http, seed + 100))
            for name in WEIGHTS:
                async with (
                    client(url, keys[name]) as http,
                    many_clients(many, seed + 5000) as competing,
                ):
                    results[name] = await share(http, competing, seed + 200)
            print(f"round {number}: {results}", flush=True)
            if number:
                for kind, value in results.items():
                    values_by_name[kind].append(value)
    return values_by_name


def main() -> None:
    """Measure, print a table, and write JSON when ``--out`` is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    machine = serving.machine()
    with tempfile.TemporaryDirectory() as scratch:
        started = serving.serving(
            Path(scratch) / "data",
            *("--max-running", str(ROWS)),
            tenants=("many_clients", *WEIGHTS),
            **WEIGHTS,
        )
        with started as (server, keys):
            values_by_name = asyncio.run(measure(server.url, keys, options.rounds))
    median = {kind: statistics.median(values) for kind, values in values_by_name.items()}
    ratio = median["contended"] / median["alone"]
    print(f"\n{CLIENTS} clients against 1, {PROMPT} + {OUTPUT} tokens, {ROWS} rows, medians")
    print(f"{'latency of the single client, alone':46}{1000 * median['alone']:8.0f} ms")
    print(f"{'latency with the fifty clients':46}{1000 * median['contended']:8.0f} ms")
    print(f"{'ratio':46}{ratio:8.2f}")
    for name, weight in WEIGHTS.items():
        fair = weight / (1 + weight)
        print(f"{f'share with weight {weight:g} (fair: {fair:.2f})':46}{median[name]:8.2f}")
    report = {"machine": machine, "rounds": options.rounds, "median": median, "ratio": ratio}
    serving.write(options.out, report)


if __name__ == "__main__":
    main()
