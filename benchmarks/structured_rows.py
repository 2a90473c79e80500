"""What rows under a schema cost the free rows of the same steps.

``python -m benchmarks.structured_rows [--rounds 5] [--threads 2] [--out results.json]``

32 greedy requests at once, of which the first 16 are measured: all free, or the last 16 under a
schema, or half of all under a schema of their own each. All have the same number of output tokens:
the schema is a list of records that is never complete. The ways alternate in each round; the first
round is not counted, and one is dropped in which other processes used more than ``--noise`` cores.
Figures are medians of the tokens/s of the 16 free requests, and of their ratio to the first way.
"""

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx2

from benchmarks import host
from benchmarks.serving import MODEL, BenchServer, client, serving, write

ROWS, FREE = 32, 16
WAYS = ("free", "one schema", "own schemas")

_NAMES = ("Anna Berger", "Tomas Lind", "Mei Tanaka", "Ruth Okafor", "Ivo Marin", "Lena Sorel")


def _schema(number: int) -> dict[str, Any]:
    record = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 40},
            "age": {"type": "integer", "minimum": 0, "maximum": 120 + number},
            "role": {"enum": ["owner", "guest", "builder"]},
            "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 3},
        },
        "required": ["name", "age", "role", "tags"],
        "additionalProperties": False,
    }
    return {"type": "array", "items": record, "minItems": 1000}


async def _one(http: httpx2.AsyncClient, number: int, schema: int | None, tokens: int) -> float:
    """When the answer came."""
    name = _NAMES[number % len(_NAMES)]
    ask = f"List number {number}: people who met {name}, with age, role and tags, as JSON."
    body: dict[str, Any] = {
        "model": MODEL,
        "messages": [{"role": "user", "content": ask}],
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "kv_reuse": False,
    }
    if schema is not None:
        body["structured_outputs"] = {"json": _schema(schema)}
    answer = (await http.post("/v1/chat/completions", json=body)).raise_for_status().json()
    assert answer["usage"]["completion_tokens"] == tokens, answer
    return time.perf_counter()


async def _run(
    http: httpx2.AsyncClient, server: BenchServer, way: str, number: int, tokens: int
) -> Any:
    """Tokens/s of the free rows that are measured, and the cores that others used."""
    schemas: list[int | None] = [None] * ROWS
    for row in range(FREE, ROWS):
        schemas[row] = {"free": None, "one schema": 0, "own schemas": row}[way]
    meter = host.LoadMeter(measured=server.pid, ours={os.getsid(0)})
    began = time.perf_counter()
    ended = await asyncio.gather(
        *(_one(http, number + row, schema, tokens) for row, schema in enumerate(schemas))
    )
    load = meter.read()
    return FREE * tokens / (max(ended[:FREE]) - began), load.foreign + load.steal


async def _measure(server: BenchServer, key: str, options: argparse.Namespace) -> dict[str, Any]:
    rates: dict[str, list[float]] = {way: [] for way in WAYS}
    dropped, number = 0, os.getpid()
    async with client(server.url, key) as http:
        for index in range(options.rounds + 1):
            turn = index % len(WAYS)
            runs = {}
            for way in (*WAYS[turn:], *WAYS[:turn]):
                runs[way] = await _run(http, server, way, number, options.tokens)
                number += ROWS
            if index == 0:
                continue
            if max(foreign for _, foreign in runs.values()) > options.noise:
                dropped += 1
                continue
            for way, (rate, _) in runs.items():
                rates[way].append(rate)
            print({way: round(rate, 1) for way, (rate, _) in runs.items()}, flush=True)
    ratios = {
        way: round(
            statistics.median(a / b for a, b in zip(rates[way], rates["free"], strict=True)), 3
        )
        for way in WAYS[1:]
    }
    medians = {way: round(statistics.median(each), 1) for way, each in rates.items()}
    return {
        "tokens_per_s": medians,
        "ratio": ratios,
        "rounds": len(rates["free"]),
        "dropped": dropped,
    }


def main() -> None:
    """Measure, print the figures and write them with ``--out``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--noise", type=float, default=0.2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    flags = ("--dtype", options.dtype, "--threads", str(options.threads))
    with (
        tempfile.TemporaryDirectory() as scratch,
        serving(Path(scratch) / "data", *flags) as (server, keys),
    ):
        report = asyncio.run(_measure(server, keys["bench"], options))
    report = {
        "machine": host.processor(Path("/proc/cpuinfo").read_text()),
        "dtype": options.dtype,
        "threads": options.threads,
        **report,
    }
    print(json.dumps(report, indent=2))
    write(options.out, report)


if __name__ == "__main__":
    main()
