"""A server over a prepared folder, and the requests of W5 to it: see ``benchmarks.zipf``."""

import argparse
import asyncio
import json
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from random import Random

from benchmarks.catalog_folder import TENANT, name_of
from benchmarks.serving import MODEL, BenchServer, client, figures
from prefixd.server.cli.bench.connection import ConnectionPool
from prefixd.server.cli.bench.generation import Generation, Target
from prefixd.server.cli.bench.workload import PromptSource, arrival_times, draw_models
from prefixd.server.cli.demo.child import admin
from prefixd.server.model.demo import default_cache_dir, demo_model

CLIENTS, BLOCK = 32, 16
ASK_BEFORE_S = 0.05


@dataclass
class Sent:
    """One request: whether its prefix was resident just before it was due."""

    result: Generation
    tier: str | None

    @property
    def is_hit(self) -> bool:
        """Whether nothing had to be loaded."""
        return self.tier == "resident"


@dataclass
class Site:
    """A running server and the requests to it."""

    target: Target
    key: str
    session: int
    options: argparse.Namespace
    prompts: PromptSource
    random: Random
    fresh: Iterator[int] = field(init=False)

    def __post_init__(self) -> None:
        # The least popular ones: none of them is drawn in the warm-up, as good as surely.
        self.fresh = count(self.options.prefixes - 1, -1)

    async def send(
        self, model: str, *, output: int, due: float | None = None, words: int | None = None
    ) -> Generation:
        """One generation with a fresh prompt; raises RuntimeError for an error."""
        prompt = self.prompts.draw(self.options.input if words is None else words)
        result = await self.target.measure(prompt, model=model, output_tokens=output, due=due)
        if result.error is not None:
            raise RuntimeError(f"{model}: {result.error}: {result.message}")
        return result

    async def tier(self, model: str) -> str | None:
        """How far a prefix is loaded; None for not at all."""
        reply = await self.target.pool.send("GET", f"/v1/prefixes/{model}")
        tier: str | None = json.loads(reply.body)["tier"]
        return tier

    def draw(self, num_requests: int) -> list[str]:
        """Prefixes by popularity; rank r is prefix r - 1."""
        names = [name_of(number) for number in range(self.options.prefixes)]
        return draw_models(names, num_requests, zipf=self.options.exponent, random=self.random)

    async def closed_loop(
        self, models: list[str], *, output: int, words: int | None = None
    ) -> float:
        """Send all, CLIENTS at a time; seconds."""
        started, remaining = time.perf_counter(), iter(models)

        async def one() -> None:
            for model in remaining:
                await self.send(model, output=output, words=words)

        async with asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(one())
        return time.perf_counter() - started

    async def warm_up(self) -> int:
        """Draw prefixes until some are evicted; how many requests that took."""
        sent = 0
        while not (await self.metrics())["prefixd_prefix_evictions_total"]:
            await self.closed_loop(self.draw(200), output=1, words=1)
            sent += 200
        return sent

    async def metrics(self) -> dict[str, float]:
        """The server's metrics without labels."""
        async with client(self.target.pool.url, self.key) as http:
            return await figures(http)

    async def idle(self, rounds: int) -> dict[str, float]:
        """Median times to first token with nothing else running, in seconds."""
        hits, loads = [], []
        for number in range(rounds + 1):
            hit = await self.send(name_of(0), output=2)
            cold = await self.send(name_of(next(self.fresh)), output=2)
            if number:
                hits.append(hit.ttft)
                loads.append(cold.ttft)
        return {"hit": statistics.median(hits), "load": statistics.median(loads)}

    async def open_loop(self, rate: float, num_requests: int) -> list[Sent]:
        """Send requests as they arrive, ``rate`` per second."""
        started, sent = time.perf_counter() + ASK_BEFORE_S, list[Sent]()

        async def one(model: str, due: float) -> None:
            tier = await self.tier(model)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            result = await self.send(model, output=self.options.output, due=due)
            sent.append(Sent(result, tier))

        async with asyncio.TaskGroup() as group:
            arrivals = arrival_times(rate, random=self.random)
            for model, arrival in zip(self.draw(num_requests), arrivals, strict=False):
                due = started + arrival
                await asyncio.sleep(max(0.0, due - ASK_BEFORE_S - time.perf_counter()))
                group.create_task(one(model, due))
        return sent


@contextmanager
def serving(folder: Path, options: argparse.Namespace) -> Iterator[BenchServer]:
    """A server of the demo model over a prepared folder."""
    positions = -(-options.virtual_tokens // BLOCK) * BLOCK
    rows = CLIENTS * 2 * (options.input + options.output + 4 * BLOCK)
    flags = (
        *("--kv-tokens", str(options.resident * positions + rows)),
        *("--max-resident-tokens", str(options.resident * options.virtual_tokens)),
        *("--dtype", options.dtype, "--max-queue-wait", "0"),
        *("--model", str(demo_model(default_cache_dir())), "--served-model-name", MODEL),
    )
    with BenchServer(folder, flags) as server:
        server.wait_until_ready(timeout=600, on_event=lambda _: None)
        yield server


def site_of(server: BenchServer, folder: Path, options: argparse.Namespace) -> Site:
    """The requests to a running server, under a new key of its tenant."""
    issued = admin(folder, "key", "create", "--tenant", TENANT)
    assert isinstance(issued, dict)
    key = str(issued["key"])
    pool = ConnectionPool(server.url, {"authorization": f"Bearer {key}"})
    seed = int.from_bytes(os.urandom(4))
    target = Target(pool, "completions", timeout=300.0)
    return Site(target, key, server.pid, options, PromptSource(seed), Random(seed))
