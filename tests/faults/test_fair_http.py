"""Must be true 2: fifty clients of one tenant against one of another, over HTTP, in counts.

Latencies of the same on a real process are measured by ``benchmarks/fairness.py``.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from prefixd.server.model.demo import default_cache_dir, demo_model
from tests.faults.faults_ledger import Ledger, drift
from tests.faults.faults_model import VOCAB, Content
from tests.faults.faults_traffic import caller, complete, greedy
from tests.faults.faults_world import World, running

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

CROWD, ROWS = 50, 8
PROMPT, OUTPUT = 32, 12
BATCH = 2 * ROWS
"""Prompts in one request of the lone client, when it has more to do than the server has rows."""

Body = Callable[[random.Random], dict[str, Any]]


@asynccontextmanager
async def crowd(world: World, body: Body) -> AsyncIterator[None]:
    """Fifty clients of the tenant acme, each asking again and again."""

    async def client(number: int, http: httpx2.AsyncClient) -> None:
        rng = random.Random(number)
        while True:
            answer = await complete(http, body(rng))
            assert answer.ok, answer

    async with caller(world.url, world.keys["acme"]) as http, asyncio.TaskGroup() as group:
        clients = [group.create_task(client(number, http)) for number in range(CROWD)]
        await until_waiting(world, CROWD // 2)
        yield
        world.runner.backlog = 0
        for one in clients:
            one.cancel()


async def until_waiting(world: World, count: int) -> None:
    """Wait until so many wait; from then on no step goes on before they do."""
    world.runner.backlog = count
    async with caller(world.url, world.keys["crow"]) as http:
        while world.engine.stats().waiting < count:
            await http.get("/health/live")


async def lone(world: World, bodies: Sequence[dict[str, Any]]) -> None:
    """The one client of the tenant beta, a request after another."""
    async with caller(world.url, world.keys["beta"]) as http:
        for body in bodies:
            answer = await complete(http, body)
            assert answer.ok, answer


def tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(3, VOCAB) for _ in range(count)]


def ask(world: World, rng: random.Random, *, prompts: int = 1, prompt: int = PROMPT) -> Any:
    return greedy(world.base, [tokens(rng, prompt) for _ in range(prompts)], OUTPUT)


@pytest.mark.parametrize(
    ("model", "weight"),
    [pytest.param("demo", 1.0, marks=pytest.mark.demo_model), ("tiny", 2.0), ("tiny", 0.5)],
)
def test_a_lone_client_with_much_to_do_gets_its_tenants_share(
    tiny_folder: Path, tmp_path: Path, model: str, weight: float
) -> None:
    """While both tenants wait, their service differs by no more than the bound, and each gets its
    share of the whole. When the crowd has gone the lone client gets every row."""
    folder = tiny_folder if model == "tiny" else demo_model(default_cache_dir())
    with running(folder, tmp_path / "data", wrap=Ledger, max_running=ROWS, kv_tokens=4096) as world:
        ledger = world.runner
        ledger.engine = world.engine
        world.loaded.tenants.set_settings("beta", {"weight": weight})
        rng, tasks = random.Random(0), len(world.tasks())

        async def scenario() -> int:
            async with crowd(world, lambda rng: ask(world, rng)):
                await lone(world, [ask(world, rng, prompts=BATCH) for _ in range(3)])
            await asyncio.to_thread(world.settle, tasks=tasks)
            alone_from = len(ledger.entries)
            alone = asyncio.create_task(lone(world, [ask(world, rng, prompts=BATCH)]))
            await until_waiting(world, BATCH - ROWS)
            world.runner.backlog = 0
            await alone
            return alone_from

        alone_from = asyncio.run(scenario())
    runs = list(ledger.backlogged("acme", "beta"))
    assert runs
    for run in runs:
        assert drift(run, "acme", "beta", weights=(1.0, weight)) <= ledger.bound
    mine = sum(entry.served["beta"] for run in runs for entry in run)
    both = sum(entry.served.total() for run in runs for entry in run)
    assert both > 2 * ledger.bound, "too short to tell"
    assert abs(mine / both - weight / (1 + weight)) < 0.15
    alone = ledger.entries[alone_from:]
    assert {tenant for entry in alone for tenant in entry.rows} == {"beta"}
    waiting = [entry for entry in alone if entry.waiting]
    assert waiting
    # The last rows of a prompt's batch: a step that ends rows starts as many at once.
    assert all(entry.rows["beta"] == ROWS for entry in waiting[1:])


LONG = 400
VARIANTS: dict[str, Callable[[World, random.Random], Any]] = {
    "short": ask,
    "long-prompts": lambda world, rng: ask(world, rng, prompt=LONG),
    "long-prefixes": lambda world, rng: {**ask(world, rng), "model": "long"},
    "many-prefixes": lambda world, rng: {**ask(world, rng), "model": f"p{rng.randrange(40)}"},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_whatever_the_crowd_does_the_lone_client_waits_within_the_bound(
    tiny_folder: Path, tmp_path: Path, variant: str
) -> None:
    """Others are served at most the bound between the moment a request of the lone client starts
    to wait and the moment it runs: queueing behind the whole crowd would be several times that."""
    with running(
        tiny_folder, tmp_path / "data", wrap=Ledger, max_running=ROWS, kv_tokens=ROWS * 640
    ) as world:
        ledger = world.runner
        ledger.engine = world.engine
        rng = random.Random(1)

        async def scenario() -> None:
            await prepare(world)
            # Its prefix is in the pool before the crowd comes: the time that the store takes to
            # bring one is not the queue's to divide.
            await lone(world, [{**ask(world, rng), "model": "mine"}])
            async with crowd(world, lambda rng: VARIANTS[variant](world, rng)):
                await lone(world, [{**ask(world, rng), "model": "mine"} for _ in range(20)])

        asyncio.run(scenario())
    waited = [ledger.passed[seq_id] for seq_id in ledger.by_tenant["beta"]]
    assert waited
    assert max(waited) <= ledger.bound


async def prepare(world: World) -> None:
    """Prefixes of the variants, and one of the lone client's own."""
    many = [Content("soft", 20, 100 + number) for number in range(40)]
    own = {"long": Content("text", LONG, 1), **{f"p{i}": one for i, one in enumerate(many)}}
    for tenant, contents in {"acme": own, "beta": {"mine": Content("soft", 20, 99)}}.items():
        async with caller(world.url, world.keys[tenant]) as http:
            for name, content in contents.items():
                response = await http.put(f"/v1/prefixes/{name}", **content.body())
                assert response.status_code == 201, response.text
