"""Must be true 3, the counts: 500 prefixes through a pool that holds 20, every answer right.

The throughput of the same on the demo model is measured by ``benchmarks/many_prefixes.py``.
"""

import asyncio
import random
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from prefixd.server.testing import FakeRunner, fake_generate
from tests.faults.faults_model import KINDS, Content, Oracle, make_prompts
from tests.faults.faults_traffic import Answer, caller, greedy, stream
from tests.faults.faults_world import World, running

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PREFIXES, HELD, LENGTH, COUNT, CLIENTS = 500, 20, 16, 8, 24
CONTENTS = [Content(KINDS[i % 3], LENGTH, i) for i in range(PREFIXES)]
PROMPTS = make_prompts(1, lengths=(9,))
BUDGET = HELD * LENGTH
"""Positions that prefixes may hold in the pool."""


@dataclass
class Shop:
    """A data folder with all the prefixes in it. Prefix ``i`` is ``p<i>``."""

    model: Path
    data: Path
    digests: list[str]
    answers: dict[Content, list[int]]


@pytest.fixture(scope="module")
def shop(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    data = tmp_path_factory.mktemp("shop") / "data"

    async def fill(world: World) -> list[str]:
        async with caller(world.url, world.keys["acme"]) as http:
            digests = []
            for number, content in enumerate(CONTENTS):
                response = await http.put(f"/v1/prefixes/p{number}", **content.body())
                assert response.status_code == 201, response.text
                digests.append(response.json()["digest"])
            return digests

    with running(tiny_folder, data) as world:
        digests = asyncio.run(fill(world))
    assert len(set(digests)) == PREFIXES
    return Shop(tiny_folder, data, digests, Oracle(PROMPTS).each(CONTENTS, COUNT))


def uniform() -> list[int]:
    """Every prefix once."""
    return random.Random(1).sample(range(PREFIXES), PREFIXES)


def zipf() -> list[int]:
    """As many requests, the r-th most popular prefix 1 / r as often as the first."""
    weights = [1 / rank for rank in range(1, PREFIXES + 1)]
    return random.Random(2).choices(range(PREFIXES), weights, k=PREFIXES)


@pytest.mark.parametrize(
    ("runner", "traffic", "host_tokens"),
    [
        ("real", uniform, 0),
        ("real", zipf, 0),
        ("real", zipf, 4 * BUDGET),
        ("fake", uniform, 0),
        ("fake", zipf, 4 * BUDGET),
    ],
)
def test_many_prefixes_in_a_small_pool(
    shop: Shop, runner: str, traffic: Any, host_tokens: int
) -> None:
    order = traffic()
    with running(
        shop.model,
        shop.data,
        wrap=(lambda _: FakeRunner()) if runner == "fake" else (lambda real: real),
        max_resident_tokens=BUDGET,
        host_kv_tokens=host_tokens,
        kv_tokens=BUDGET + CLIENTS * 32,
    ) as world:
        most = asyncio.run(ask_all(world, shop, order, fake=runner == "fake"))
        stats = world.engine.stats()
    assert most <= BUDGET
    loads = stats.prefix_loads
    assert loads["store"] >= len(set(order))
    # No thrashing: what comes in is used before it leaves, as if requests came one at a time.
    assert sum(loads.values()) <= 1.2 * cold(order)
    assert (loads["host"] > 0) == (host_tokens > 0)


def cold(order: list[int]) -> int:
    """Requests of ``order`` whose prefix is not among the HELD used last."""
    held: OrderedDict[int, None] = OrderedDict()
    misses = 0
    for number in order:
        misses += number not in held
        held[number] = None
        held.move_to_end(number)
        if len(held) > HELD:
            held.popitem(last=False)
    return misses


async def ask_all(world: World, shop: Shop, order: list[int], *, fake: bool) -> int:
    """Ask for the prefixes in ``order``, many at a time, and check each answer. Returns the most
    prefix positions that were seen in the pool."""
    left, most = iter(order), 0

    async def client() -> None:
        nonlocal most
        async with caller(world.url, world.keys["acme"]) as http:
            for number in left:
                answer = await stream(http, greedy(f"p{number}", PROMPTS[0], COUNT))
                check(answer, shop, number, fake=fake)
                most = max(most, world.engine.stats().resident_tokens)

    async with asyncio.TaskGroup() as group:
        for _ in range(CLIENTS):
            group.create_task(client())
    return most


def check(answer: Answer, shop: Shop, number: int, *, fake: bool) -> None:
    """The right prefix answered, and rightly."""
    assert answer.ok, answer
    assert answer.digest == shop.digests[number]
    if fake:
        want = fake_generate(shop.digests[number], PROMPTS[0], COUNT)
    else:
        want = shop.answers[CONTENTS[number]]
    assert answer.tokens[0][: len(want)] == want, number
    assert len(answer.tokens[0]) == COUNT
