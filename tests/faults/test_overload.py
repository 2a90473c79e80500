"""Must be true 7, in counts: ten times what there is room for, again and again.

A minute of it on the demo model is measured by ``benchmarks/overload.py``.
"""

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest

from prefixd.server.engine.engine import Engine
from prefixd.server.engine.step import Step, StepOutput
from tests.faults.faults_memory import resident_kib
from tests.faults.faults_model import Oracle, make_prompts
from tests.faults.faults_traffic import caller, greedy, stream
from tests.faults.faults_world import World, running

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

ROWS, PROMPT, OUTPUT = 8, 24, 8
COST = PROMPT + OUTPUT
PLACES = 12
"""Requests that may wait."""
CLIENTS, ATTEMPTS = 10 * (ROWS + PLACES), 4
PATIENCE_S = 0.05
_GROWTH_KIB = 24 * 1024


@dataclass
class Watch:
    """A runner that notes what waits at each step, and for how many steps each one waits.

    In a flood a step waits a moment for every place to be taken: a tiny model is quicker than HTTP
    on some machines, and then nothing is ever too much for it.
    """

    inner: Any
    engine: Engine | None = None
    flooded: bool = False
    most_waiting: int = 0
    waited: Counter[int] = field(default_factory=Counter)
    steps: int = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def run(self, step: Step) -> StepOutput:
        assert self.engine is not None
        waiting = list(self.engine.loop.scheduler.waiting)
        pause, latest = threading.Event(), time.monotonic() + PATIENCE_S * self.flooded
        while len(waiting) + len(self.engine.loop._inbox) < PLACES and time.monotonic() < latest:
            pause.wait(0.001)
        self.most_waiting = max(self.most_waiting, len(waiting))
        self.waited.update(sequence.seq_id for sequence in waiting)
        self.steps += 1
        return self.inner.run(step)


@pytest.fixture
def oracle() -> Oracle:
    return Oracle(make_prompts(8, lengths=(PROMPT,)))


@pytest.fixture(params=[0, 0.02], ids=["by tokens", "by tokens and time"])
def world(request: pytest.FixtureRequest, tiny_folder: Path, tmp_path: Path) -> Iterator[World]:
    with running(
        tiny_folder,
        tmp_path / "data",
        wrap=Watch,
        max_running=ROWS,
        max_waiting_tokens=PLACES * COST,
        max_queue_wait=request.param,
    ) as world:
        world.runner.engine = world.engine
        world.loaded.tenants.set_quota("crow", {"max_concurrent_requests": 3})
        yield world


def test_ten_times_what_fits_is_served_or_told_to_come_back(world: World, oracle: Oracle) -> None:
    alone = steps_of_one(world, oracle)
    tasks = len(world.tasks())
    happened: Counter[str] = Counter()
    asyncio.run(flood(world, oracle, happened))
    world.settle(tasks=tasks)
    before = resident_kib()
    asyncio.run(flood(world, oracle, happened))
    world.settle(tasks=tasks)
    assert happened["served"] > 2 * (ROWS + PLACES)
    assert happened["503"] > 0
    assert happened["crow 429"] > 0
    assert set(happened) <= {"served", "503", "crow 429"}
    assert happened.total() == 2 * CLIENTS * ATTEMPTS
    # Some had waited already: who has most waiting gives way to who has less than its share.
    assert world.engine.stats().finished["shed"] > 0
    # As much as may wait, and of three tenants each one that comes with less than its share.
    assert world.runner.most_waiting <= PLACES + 3
    # Each step serves a token or more of every row: what is ahead of one is over after so many.
    ahead = (world.runner.most_waiting + ROWS) * COST
    assert max(world.runner.waited.values()) <= ahead / ROWS + ROWS
    assert resident_kib() - before < _GROWTH_KIB
    assert steps_of_one(world, oracle) == alone


def steps_of_one(world: World, oracle: Oracle) -> int:
    """Steps that one request takes with the server to itself."""
    before = world.runner.steps

    async def one() -> None:
        async with caller(world.url, world.keys["acme"]) as http:
            body = greedy(world.base, oracle.prompts[0], OUTPUT, kv_reuse=False)
            assert (await stream(http, body)).ok

    asyncio.run(one())
    return world.runner.steps - before


async def flood(world: World, oracle: Oracle, happened: Counter[str]) -> None:
    """Many clients of three tenants, all at once, who try again at once."""

    async def client(number: int, tenant: str, http: httpx2.AsyncClient) -> None:
        rng = random.Random(number)
        for _ in range(ATTEMPTS):
            prompt = rng.randrange(len(oracle.prompts))
            answer = await stream(http, greedy(world.base, oracle.prompts[prompt], OUTPUT))
            if answer.ok:
                assert oracle.agrees(None, prompt, answer.tokens, count=OUTPUT)
                happened["served"] += 1
                continue
            assert answer.status in {429, 503}, answer
            assert int(str(answer.retry_after)) > 0, answer
            happened["503" if answer.status == 503 else f"{tenant} 429"] += 1

    world.runner.flooded = True
    async with asyncio.TaskGroup() as group:
        for number, tenant in enumerate(("acme", "beta", "crow")):
            group.create_task(_of_tenant(world, tenant, client, range(number, CLIENTS, 3)))
    world.runner.flooded = False


async def _of_tenant(world: World, tenant: str, client: Any, numbers: range) -> None:
    async with (
        caller(world.url, world.keys[tenant], connections=len(numbers)) as http,
        asyncio.TaskGroup() as group,
    ):
        for number in numbers:
            group.create_task(client(number, tenant, http))
