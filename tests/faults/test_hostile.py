"""A hostile tenant never makes the server not ready, and changes nothing for its neighbour.

``PREFIXD_TEST_HOSTILE_SECONDS`` sets how long it acts on the model (``make hostile`` takes ten
minutes), ``PREFIXD_TEST_HOSTILE_SEED`` another seed than the committed one. What a client sends
depends on the seed alone; what it is answered also on the speed of the machine.
"""

import asyncio
import itertools
import logging
import os
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from prefixd.server.engine.step import Step, StepOutput
from prefixd.server.testing import FakeRunner
from tests.faults.faults_answers import Answers
from tests.faults.faults_hostile import HostileTenant
from tests.faults.faults_model import VOCAB, library, make_prompts
from tests.faults.faults_server import RunningServer, running
from tests.faults.faults_traffic import Answer, caller, complete, greedy, stream

FAKE_SECONDS = 60.0
MODEL_SECONDS = float(os.environ.get("PREFIXD_TEST_HOSTILE_SECONDS") or "10")
SEED = os.environ.get("PREFIXD_TEST_HOSTILE_SEED") or "2026-11"
CLIENTS, COUNT = 8, 16
CONTENTS = library(9, lengths=(5, 16, 20), seed=4)
NEIGHBOUR_CONTENTS = library(3, lengths=(7, 20), seed=5)
PROMPTS = make_prompts(4, lengths=(1, 9, 24), seed=6)
SIZES: dict[str, Any] = {
    "kv_tokens": 2048,
    "host_kv_tokens": 128,
    "block_size": 8,
    "max_tokens_per_step": 64,
    "max_prefill_chunk": 16,
    "max_running": 16,
    "max_body_bytes": 128 * 1024,
    "max_prefix_bytes": 128 * 1024,
}

pytestmark = pytest.mark.slow


class UnrecordedRunner(FakeRunner):
    """A FakeRunner for millions of steps: it keeps none of them."""

    def run(self, step: Step) -> StepOutput:
        self.steps.clear()
        return super().run(step)


class Scene:
    """One server with its hostile tenant, its neighbour, and what must not occur."""

    def __init__(self, server: RunningServer, *, seconds: float) -> None:
        self.server = server
        self.ends = time.monotonic() + seconds
        self.defects: list[str] = []
        self.outcomes: Counter[str] = Counter()
        self.alone: dict[tuple[str, int], Answer] = {}

    @property
    def over(self) -> bool:
        """Whether the time has passed, or enough went wrong."""
        return time.monotonic() > self.ends or len(self.defects) > 20

    async def run(self) -> None:
        """Answer the neighbour alone first, then all clients at once."""
        async with caller(self.server.url, self.server.keys["beta"]) as neighbour:
            for number, content in enumerate(NEIGHBOUR_CONTENTS):
                response = await neighbour.put(f"/v1/prefixes/own{number}", **content.body())
                assert response.status_code in {200, 201}, response.text
            models = (self.server.base, *(f"own{n}" for n in range(len(NEIGHBOUR_CONTENTS))))
            for key in itertools.product(models, range(len(PROMPTS))):
                self.alone[key] = await self._ask(neighbour, *key, send=complete)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._watch(neighbour))
                for number in range(2):
                    group.create_task(self._compare(neighbour, random.Random(number)))
                for number in range(CLIENTS):
                    group.create_task(self._attack(number))

    @staticmethod
    async def _ask(
        http: httpx2.AsyncClient, model: str, prompt: int, *, send: Callable[..., Any]
    ) -> Answer:
        answer: Answer = await send(http, greedy(model, PROMPTS[prompt], COUNT))
        assert answer.ok, answer
        return answer

    async def _watch(self, http: httpx2.AsyncClient) -> None:
        """Readiness is never false."""
        while not self.over:
            response = await http.get("/health/ready")
            self.outcomes["ready"] += 1
            if response.status_code != 200:
                self.defects.append(f"not ready: {response.text}")
            await asyncio.sleep(0.05)

    async def _compare(self, http: httpx2.AsyncClient, rng: random.Random) -> None:
        """The neighbour's tokens equal those it gets alone."""
        keys = sorted(self.alone)
        while not self.over:
            key = rng.choice(keys)
            try:
                answer = await self._ask(http, *key, send=rng.choice((complete, stream)))
            except AssertionError as error:
                self.defects.append(f"the neighbour's request failed: {error}")
                continue
            self.outcomes["neighbour"] += 1
            if (answer.tokens, answer.digest) != (self.alone[key].tokens, self.alone[key].digest):
                self.defects.append(f"{key}: alone {self.alone[key]}, now {answer}")

    async def _attack(self, number: int) -> None:
        document = self.server.loaded.app.openapi()
        for round_ in itertools.count():
            label = f"{SEED}/{number}/{round_}"
            async with caller(self.server.url, self.server.keys["acme"]) as http:
                tenant = HostileTenant(
                    http,
                    document,
                    random.Random(label),
                    CONTENTS,
                    self.server.base,
                    Answers(self.outcomes, self.defects),
                )
                for action in range(100):
                    if self.over:
                        return
                    tenant.answers.label = f"{label} action {action}"
                    await tenant.act()


def attack(model: Path, data: Path, *, seconds: float, **options: Any) -> Scene:
    """Let the tenant act on a server of ``model``, and check what is left of it."""
    logging.disable(logging.CRITICAL)  # pytest would store the log records of every request
    try:
        with running(model, data, tenants=("acme", "beta"), **SIZES, **options) as server:
            tasks = len(server.tasks())
            scene = Scene(server, seconds=seconds)
            asyncio.run(scene.run())
            server.settle(tasks=tasks)
            stats = server.engine.stats()
    finally:
        logging.disable(logging.NOTSET)
    assert not scene.defects, "\n".join(scene.defects)
    assert (stats.step_failures, stats.restarts, stats.out_of_memory) == (0, 0, 0)
    assert stats.blocks_free + stats.blocks_prefix == stats.blocks_total
    return scene


@pytest.mark.timeout(FAKE_SECONDS + 300)
def test_hostile_tenant_on_the_fake_runner(padded_folder: Path, tmp_path: Path) -> None:
    runner = UnrecordedRunner(block_size=SIZES["block_size"], vocab_size=VOCAB)
    scene = attack(padded_folder, tmp_path, seconds=FAKE_SECONDS, wrap=lambda _: runner)
    assert scene.outcomes["neighbour"] > 0


@pytest.mark.timeout(MODEL_SECONDS + 300)
def test_hostile_tenant_on_the_model(
    padded_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scene = attack(padded_folder, tmp_path, seconds=MODEL_SECONDS)
    with capsys.disabled():
        print(f"\nhostile seed {SEED}: {dict(sorted(scene.outcomes.items()))}")
