"""500 prefixes in a pool that holds 20 of them, compared with a pool that holds all.

``python -m benchmarks.many_prefixes [--rounds 3] [--requests 96] [--out results.json]``

Three servers alternate in one run: all prefixes resident, 20 resident, and 20 resident with the
host tier. Each gets the same Zipf traffic (the r-th most popular prefix 1 / r as often as the
first) by 32 clients. The outputs are compared: in float32 they must be equal.
"""

import argparse
import asyncio
import random
import statistics
import tempfile
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path

import httpx2

from benchmarks import serving
from benchmarks.serving import Timed, body, client, closed_loop, prompts, soft_prompt, upload

PREFIXES, RESIDENT, VIRTUAL = 500, 20, 20
PROMPT, OUTPUT, CLIENTS = 64, 64, 32
BLOCK_POSITIONS = 32
"""Positions that a prefix of 20 occupies: two blocks of 16."""

KINDS: dict[str, tuple[str, ...]] = {
    "all resident": ("--kv-tokens", str(PREFIXES * BLOCK_POSITIONS + CLIENTS * 160)),
    "20 resident": (
        *("--kv-tokens", str(PREFIXES * BLOCK_POSITIONS + CLIENTS * 160)),
        *("--max-resident-tokens", str(RESIDENT * VIRTUAL)),
    ),
    "20 and the host tier": (
        *("--kv-tokens", str(PREFIXES * BLOCK_POSITIONS + CLIENTS * 160)),
        *("--max-resident-tokens", str(RESIDENT * VIRTUAL)),
        *("--host-kv-tokens", str(PREFIXES * VIRTUAL)),
    ),
}


def traffic(requests: int, seed: int) -> list[int]:
    """The number of the prefix of each request."""
    weights = [1 / rank for rank in range(1, PREFIXES + 1)]
    return random.Random(seed).choices(range(PREFIXES), weights, k=requests)


async def fill(http: httpx2.AsyncClient) -> None:
    """Upload all prefixes and send one request under each."""
    for number in range(PREFIXES):
        await upload(http, f"p{number}", soft_prompt(VIRTUAL, seed=number))
    bodies = [body([1000], 1, model=f"p{number}") for number in range(PREFIXES)]
    await _all_ok(http, bodies)


async def _all_ok(
    http: httpx2.AsyncClient, bodies: list[dict[str, object]]
) -> tuple[float, list[Timed]]:
    seconds, results = await closed_loop(http, bodies, clients=CLIENTS)
    wrong = [result.error for result in results if not result.ok]
    assert not wrong, wrong[0]
    return seconds, results


async def one_round(url: str, key: str, *, requests: int, seed: int) -> tuple[float, list[str]]:
    """Output tokens per second, and the outputs in the order of the requests."""
    prefixes = traffic(requests, seed)
    bodies = [
        body(prompt, OUTPUT, model=f"p{prefix}")
        for prefix, prompt in zip(prefixes, prompts(requests, PROMPT, seed=seed), strict=True)
    ]
    async with client(url, key) as http:
        seconds, results = await _all_ok(http, bodies)
    # Each client takes the next request when its previous one ends, so they are sent in order.
    return requests * OUTPUT / seconds, [one.text for one in sorted(results, key=lambda r: r.sent)]


def main() -> None:
    """Measure, print a table, and write JSON when ``--out`` is given."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    machine = serving.machine()
    rates = defaultdict(list)
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        servers = {}
        for kind, flags in KINDS.items():
            data = Path(scratch) / kind.replace(" ", "-")
            server, keys = stack.enter_context(serving.serving(data, *flags))
            servers[kind] = (server.url, keys["bench"])
            asyncio.run(_fill(*servers[kind]))
            print(f"{kind}: ready", flush=True)
        for number in range(options.rounds + 1):
            answers = {}
            for kind, (url, key) in servers.items():
                rate, answers[kind] = asyncio.run(
                    one_round(url, key, requests=options.requests, seed=number)
                )
                print(f"round {number}, {kind}: {rate:.1f} tokens/s", flush=True)
                if number:
                    rates[kind].append(rate)
            first, *others = answers.values()
            same = [sum(a == b for a, b in zip(first, other, strict=True)) for other in others]
            print(f"  answers equal to those of '{next(iter(answers))}': {same}", flush=True)
        loads = {kind: asyncio.run(_loads(*where)) for kind, where in servers.items()}
    median = {kind: statistics.median(values) for kind, values in rates.items()}
    print(f"\n{PREFIXES} soft prompts of {VIRTUAL}, Zipf, {CLIENTS} clients, medians")
    for kind, rate in median.items():
        ratio = rate / median["all resident"]
        print(f"{kind:24}{rate:8.1f} tokens/s {ratio:8.2f}   {loads[kind]}")
    report = {
        "machine": machine,
        "rounds": options.rounds,
        "requests": options.requests,
        "tokens_per_s": median,
        "ratio": {kind: rate / median["all resident"] for kind, rate in median.items()},
    }
    serving.write(options.out, report)


async def _fill(url: str, key: str) -> None:
    async with client(url, key) as http:
        await fill(http)


async def _loads(url: str, key: str) -> dict[str, float]:
    async with client(url, key) as http:
        found = await serving.figures(http)
    words = ("swaps", "compiles", "evictions")
    return {word: found[f"prefixd_prefix_{word}_total"] for word in words}


if __name__ == "__main__":
    main()
