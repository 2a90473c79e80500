"""500 prefixes in a pool that holds 20: every output is correct, and prefixes do not thrash.

``benchmarks/many_prefixes.py`` measures the throughput of the same load on the demo model.
"""

import asyncio
import random
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.faults.faults_model import KINDS, Content, make_prompts
from tests.faults.faults_reference import Reference
from tests.faults.faults_server import RunningServer, running
from tests.faults.faults_traffic import Answer, caller, greedy, stream

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PREFIXES, RESIDENT, LENGTH, COUNT, CLIENTS = 500, 20, 16, 8, 24
CONTENTS = [Content(KINDS[i % 3], LENGTH, i) for i in range(PREFIXES)]
PROMPTS = make_prompts(1, lengths=(9,))
BUDGET = RESIDENT * LENGTH
"""Positions that prefixes may occupy in the pool."""


@dataclass
class StoredPrefixes:
    """A data folder that holds all prefixes. Prefix ``i`` has the name ``p<i>``."""

    model: Path
    data: Path
    digests: list[str]
    answers: dict[Content, list[int]]


@pytest.fixture(scope="module")
def stored(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> StoredPrefixes:
    data = tmp_path_factory.mktemp("stored") / "data"

    async def fill(server: RunningServer) -> list[str]:
        async with caller(server.url, server.keys["acme"]) as http:
            digests = []
            for number, content in enumerate(CONTENTS):
                response = await http.put(f"/v1/prefixes/p{number}", **content.body())
                assert response.status_code == 201, response.text
                digests.append(response.json()["digest"])
            return digests

    with running(tiny_folder, data) as server:
        digests = asyncio.run(fill(server))
    assert len(set(digests)) == PREFIXES
    answers = Reference(PROMPTS).each(CONTENTS, COUNT)
    assert len({tuple(tokens) for tokens in answers.values()}) > 0.98 * PREFIXES
    return StoredPrefixes(tiny_folder, data, digests, answers)


def uniform() -> list[int]:
    """Each prefix once, in random order."""
    return random.Random(1).sample(range(PREFIXES), PREFIXES)


def zipf() -> list[int]:
    """PREFIXES requests; the r-th most popular prefix occurs 1 / r as often as the first."""
    weights = [1 / rank for rank in range(1, PREFIXES + 1)]
    return random.Random(2).choices(range(PREFIXES), weights, k=PREFIXES)


@pytest.mark.parametrize(("traffic", "host_tokens"), [(uniform, 0), (zipf, 0), (zipf, 4 * BUDGET)])
def test_many_prefixes_in_a_small_pool_give_correct_output_without_thrashing(
    stored: StoredPrefixes, traffic: Any, host_tokens: int
) -> None:
    order = traffic()
    with running(
        stored.model,
        stored.data,
        max_resident_tokens=BUDGET,
        host_kv_tokens=host_tokens,
        kv_tokens=BUDGET + CLIENTS * 32,
    ) as server:
        most = asyncio.run(send_all(server, stored, order))
        stats = server.engine.stats()
    assert most <= BUDGET
    loads = stats.prefix_loads
    assert loads["store"] >= len(set(order))
    # No thrashing: prefixes are used before they are evicted, about as with one request at a time.
    assert sum(loads.values()) <= 1.2 * lru_misses(order)
    assert (loads["host"] > 0) == (host_tokens > 0)


def lru_misses(order: list[int]) -> int:
    """Requests of ``order`` whose prefix is not among the RESIDENT most recently used."""
    held: OrderedDict[int, None] = OrderedDict()
    misses = 0
    for number in order:
        misses += number not in held
        held[number] = None
        held.move_to_end(number)
        if len(held) > RESIDENT:
            held.popitem(last=False)
    return misses


async def send_all(server: RunningServer, stored: StoredPrefixes, order: list[int]) -> int:
    """Send a request under each prefix of ``order``, with concurrent clients, and check each
    output. Returns the largest number of prefix positions seen in the pool."""
    remaining, most = iter(order), 0

    async def client() -> None:
        nonlocal most
        async with caller(server.url, server.keys["acme"]) as http:
            for number in remaining:
                answer = await stream(http, greedy(f"p{number}", PROMPTS[0], COUNT))
                check(answer, stored, number)
                most = max(most, server.engine.stats().resident_tokens)

    async with asyncio.TaskGroup() as group:
        for _ in range(CLIENTS):
            group.create_task(client())
    return most


def check(answer: Answer, stored: StoredPrefixes, number: int) -> None:
    """Check the digest of the prefix and the output."""
    assert answer.ok, answer
    assert answer.digest == stored.digests[number]
    expected = stored.answers[CONTENTS[number]]
    assert answer.tokens[0][: len(expected)] == expected, number
    assert len(answer.tokens[0]) == COUNT
