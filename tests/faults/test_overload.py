"""Ten times the load that fits: every request is served or rejected, and nothing leaks.

``benchmarks/overload.py`` measures a minute of the same load on the demo model.
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
from prefixd.server.engine.runner import BlockingRunner
from prefixd.server.engine.step import Step, StepOutput
from tests.faults.faults_memory import resident_kib
from tests.faults.faults_model import make_prompts
from tests.faults.faults_reference import Reference
from tests.faults.faults_server import RunningServer, running
from tests.faults.faults_traffic import caller, greedy, stream

pytestmark = [pytest.mark.serial, pytest.mark.timeout(300)]

ROWS, PROMPT, OUTPUT = 8, 24, 8
COST = PROMPT + OUTPUT
QUEUE_SIZE = 12
"""Requests that may wait."""
CLIENTS, ATTEMPTS = 10 * (ROWS + QUEUE_SIZE), 4
STEP_DELAY_S = 0.05
_GROWTH_KIB = 24 * 1024


@dataclass
class QueueRecorder(BlockingRunner):
    """A runner that records the number of waiting sequences, and how many steps each one waits.

    During an overload a step waits briefly for the queue to fill: on some machines a tiny model is
    faster than HTTP, and the queue would never fill.
    """

    inner: Any
    engine: Engine | None = None
    overloaded: bool = False
    most_waiting: int = 0
    waited: Counter[int] = field(default_factory=Counter)
    steps: int = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def run(self, step: Step) -> StepOutput:
        assert self.engine is not None
        waiting = list(self.engine.core.scheduler.waiting)
        pause, latest = threading.Event(), time.monotonic() + STEP_DELAY_S * self.overloaded
        while len(waiting) + len(self.engine._inbox) < QUEUE_SIZE and time.monotonic() < latest:
            pause.wait(0.001)
        self.most_waiting = max(self.most_waiting, len(waiting))
        self.waited.update(sequence.seq_id for sequence in waiting)
        self.steps += 1
        return self.inner.run(step)


@pytest.fixture
def reference() -> Reference:
    return Reference(make_prompts(8, lengths=(PROMPT,)))


@pytest.fixture(params=[0, 0.02], ids=["by tokens", "by tokens and time"])
def server(
    request: pytest.FixtureRequest, tiny_folder: Path, tmp_path: Path
) -> Iterator[RunningServer]:
    with running(
        tiny_folder,
        tmp_path / "data",
        wrap=QueueRecorder,
        max_running=ROWS,
        max_waiting_tokens=QUEUE_SIZE * COST,
        max_queue_wait=request.param,
    ) as server:
        server.runner.engine = server.engine
        server.loaded.tenants.set_quota("crow", {"max_concurrent_requests": 3})
        yield server


def test_an_overload_is_served_or_rejected_with_retry_after(
    server: RunningServer, reference: Reference
) -> None:
    alone = steps_of_one(server, reference)
    tasks = len(server.tasks())
    outcomes: Counter[str] = Counter()
    asyncio.run(overload(server, reference, outcomes))
    server.settle(tasks=tasks)
    before = resident_kib()
    asyncio.run(overload(server, reference, outcomes))
    server.settle(tasks=tasks)
    assert outcomes["served"] > 2 * (ROWS + QUEUE_SIZE)
    assert outcomes["503"] > 0
    assert outcomes["crow 429"] > 0
    assert set(outcomes) <= {"served", "503", "crow 429"}
    assert outcomes.total() == 2 * CLIENTS * ATTEMPTS
    # Some were shed from the queue: those of the tenant with the most queued work.
    assert server.engine.stats().finished["shed"] > 0
    # The queue limit, plus one request for each of three tenants below its share.
    assert server.runner.most_waiting <= QUEUE_SIZE + 3
    # Each step serves at least one token of every row, which bounds the steps of those ahead.
    ahead = (server.runner.most_waiting + ROWS) * COST
    assert max(server.runner.waited.values()) <= ahead / ROWS + ROWS
    assert resident_kib() - before < _GROWTH_KIB
    assert steps_of_one(server, reference) == alone


def steps_of_one(server: RunningServer, reference: Reference) -> int:
    """The number of steps of one request on the idle server."""
    before = server.runner.steps

    async def one() -> None:
        async with caller(server.url, server.keys["acme"]) as http:
            body = greedy(server.base, reference.prompts[0], OUTPUT, kv_reuse=False)
            assert (await stream(http, body)).ok

    asyncio.run(one())
    return server.runner.steps - before


async def overload(server: RunningServer, reference: Reference, outcomes: Counter[str]) -> None:
    """Many concurrent clients of three tenants, which retry immediately."""

    async def client(number: int, tenant: str, http: httpx2.AsyncClient) -> None:
        rng = random.Random(number)
        for _ in range(ATTEMPTS):
            prompt = rng.randrange(len(reference.prompts))
            answer = await stream(http, greedy(server.base, reference.prompts[prompt], OUTPUT))
            if answer.ok:
                assert reference.agrees(None, prompt, answer.tokens, count=OUTPUT)
                outcomes["served"] += 1
                continue
            assert answer.status in {429, 503}, answer
            assert int(str(answer.retry_after)) > 0, answer
            outcomes["503" if answer.status == 503 else f"{tenant} 429"] += 1

    server.runner.overloaded = True
    async with asyncio.TaskGroup() as group:
        for number, tenant in enumerate(("acme", "beta", "crow")):
            group.create_task(_of_tenant(server, tenant, client, range(number, CLIENTS, 3)))
    server.runner.overloaded = False


async def _of_tenant(server: RunningServer, tenant: str, client: Any, numbers: range) -> None:
    async with (
        caller(server.url, server.keys[tenant], connections=len(numbers)) as http,
        asyncio.TaskGroup() as group,
    ):
        for number in numbers:
            group.create_task(client(number, tenant, http))
