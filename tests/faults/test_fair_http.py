"""Fifty clients of one tenant and one client of another, over HTTP: fairness in token counts.

``benchmarks/fairness.py`` measures latencies of the same load on a real process.
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
from tests.faults.faults_model import VOCAB, Content
from tests.faults.faults_recorder import StepRecorder, drift
from tests.faults.faults_server import RunningServer, running
from tests.faults.faults_traffic import caller, complete, greedy

pytestmark = [pytest.mark.serial, pytest.mark.timeout(300)]

CLIENTS, ROWS = 50, 8
PROMPT, OUTPUT = 32, 12
BATCH = 2 * ROWS
"""Prompts in one request of the single client: more than the server has rows."""

Body = Callable[[random.Random], dict[str, Any]]


@asynccontextmanager
async def fifty_clients(server: RunningServer, body: Body) -> AsyncIterator[None]:
    """Fifty clients of the tenant acme, each sending one request after another."""

    async def client(number: int, http: httpx2.AsyncClient) -> None:
        rng = random.Random(number)
        while True:
            answer = await complete(http, body(rng))
            assert answer.ok, answer

    async with caller(server.url, server.keys["acme"]) as http, asyncio.TaskGroup() as group:
        clients = [group.create_task(client(number, http)) for number in range(CLIENTS)]
        await until_waiting(server, CLIENTS // 2)
        yield
        server.runner.backlog = 0
        for one in clients:
            one.cancel()


async def until_waiting(server: RunningServer, count: int) -> None:
    """Wait until ``count`` sequences wait; later steps start only when that many wait."""
    server.runner.backlog = count
    async with caller(server.url, server.keys["crow"]) as http:
        while server.engine.stats().waiting < count:
            await http.get("/health/live")


async def single_client(server: RunningServer, bodies: Sequence[dict[str, Any]]) -> None:
    """The only client of the tenant beta, which sends one request after another."""
    async with caller(server.url, server.keys["beta"]) as http:
        for body in bodies:
            answer = await complete(http, body)
            assert answer.ok, answer


def tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(3, VOCAB) for _ in range(count)]


def make_body(
    server: RunningServer, rng: random.Random, *, prompts: int = 1, prompt: int = PROMPT
) -> Any:
    return greedy(server.base, [tokens(rng, prompt) for _ in range(prompts)], OUTPUT)


@pytest.mark.parametrize(
    ("model", "weight"),
    [pytest.param("demo", 1.0, marks=pytest.mark.demo_model), ("tiny", 2.0), ("tiny", 0.5)],
)
def test_a_single_client_gets_its_tenants_share_while_another_tenant_has_fifty(
    tiny_folder: Path, tmp_path: Path, model: str, weight: float
) -> None:
    """While both tenants wait, their service differs by at most the bound, and each gets its
    share of the total. After the fifty clients stop, the single client gets every row."""
    folder = tiny_folder if model == "tiny" else demo_model(default_cache_dir())
    sizes: dict[str, Any] = {"max_running": ROWS, "kv_tokens": 4096}
    sizes["max_token_gap"] = 0  # no limit: on a busy machine a step has room for fewer prompts
    with running(folder, tmp_path / "data", wrap=StepRecorder, **sizes) as server:
        recorder = server.runner
        recorder.engine = server.engine
        server.loaded.tenants.set_settings("beta", {"weight": weight})
        rng, tasks = random.Random(0), len(server.tasks())

        async def scenario() -> int:
            async with fifty_clients(server, lambda rng: make_body(server, rng)):
                await single_client(
                    server, [make_body(server, rng, prompts=BATCH) for _ in range(3)]
                )
            await asyncio.to_thread(server.settle, tasks=tasks)
            alone_from = len(recorder.entries)
            alone = asyncio.create_task(
                single_client(server, [make_body(server, rng, prompts=BATCH)])
            )
            await until_waiting(server, BATCH - ROWS)
            server.runner.backlog = 0
            await alone
            return alone_from

        alone_from = asyncio.run(scenario())
    runs = list(recorder.backlogged("acme", "beta"))
    assert runs
    for run in runs:
        assert drift(run, "acme", "beta", weights=(1.0, weight)) <= recorder.bound
    own_tokens = sum(entry.served["beta"] for run in runs for entry in run)
    all_tokens = sum(entry.served.total() for run in runs for entry in run)
    assert all_tokens > 2 * recorder.bound, "too short to measure"
    assert abs(own_tokens / all_tokens - weight / (1 + weight)) < 0.15
    alone = recorder.entries[alone_from:]
    assert {tenant for entry in alone for tenant in entry.rows} == {"beta"}
    waiting = [entry for entry in alone if entry.waiting]
    assert waiting
    # Only the last rows of a batch may be fewer: a step that ends rows starts as many new ones.
    assert all(entry.rows["beta"] == ROWS for entry in waiting[1:])


LONG = 400
VARIANTS: dict[str, Callable[[RunningServer, random.Random], Any]] = {
    "short": make_body,
    "long-prompts": lambda server, rng: make_body(server, rng, prompt=LONG),
    "long-prefixes": lambda server, rng: {**make_body(server, rng), "model": "long"},
    "many-prefixes": lambda server, rng: {
        **make_body(server, rng),
        "model": f"p{rng.randrange(40)}",
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_wait_of_a_single_client_is_bounded_under_every_load_of_another_tenant(
    tiny_folder: Path, tmp_path: Path, variant: str
) -> None:
    """Between the arrival and the start of each request of the single client, the other tenant is
    served at most the bound; waiting behind all fifty clients would be several times that."""
    with running(
        tiny_folder, tmp_path / "data", wrap=StepRecorder, max_running=ROWS, kv_tokens=ROWS * 640
    ) as server:
        recorder = server.runner
        recorder.engine = server.engine
        rng = random.Random(1)

        async def scenario() -> None:
            await prepare(server)
            # Its prefix is in the pool before the fifty clients start: the queue does not
            # control the time to load a prefix from the store.
            await single_client(server, [{**make_body(server, rng), "model": "mine"}])
            async with fifty_clients(server, lambda rng: VARIANTS[variant](server, rng)):
                await single_client(
                    server, [{**make_body(server, rng), "model": "mine"} for _ in range(20)]
                )

        asyncio.run(scenario())
    waited = [recorder.passed[seq_id] for seq_id in recorder.by_tenant["beta"]]
    assert waited
    assert max(waited) <= recorder.bound


async def prepare(server: RunningServer) -> None:
    """Upload the prefixes of the variants, and one for the single client."""
    many = [Content("soft", 20, 100 + number) for number in range(40)]
    own = {"long": Content("text", LONG, 1), **{f"p{i}": one for i, one in enumerate(many)}}
    for tenant, contents in {"acme": own, "beta": {"mine": Content("soft", 20, 99)}}.items():
        async with caller(server.url, server.keys[tenant]) as http:
            for name, content in contents.items():
                response = await http.put(f"/v1/prefixes/{name}", **content.body())
                assert response.status_code == 201, response.text
