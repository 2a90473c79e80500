"""Must be true 5, over HTTP: reuse of KV changes no token and crosses no border."""

import asyncio
import itertools
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from tests.faults.faults_model import Content, Oracle, make_prompts
from tests.faults.faults_traffic import Answer, caller, complete, greedy, stream
from tests.faults.faults_world import World, running

BLOCK, COUNT = 8, 12
PROMPTS = make_prompts(4, lengths=(64, 41, 9, 5))
MINE, OTHER = Content("soft", 20, 1), Content("kv", 16, 2)
BORDERS = {
    "another tenant": ("beta", "mine"),
    "another prefix": ("acme", "other"),
    "another version": ("acme", "mine@2"),
    "no prefix": ("acme", "tiny"),
}


@pytest.fixture
def world(tiny_folder: Path, tmp_path: Path) -> Iterator[World]:
    with running(tiny_folder, tmp_path / "data", block_size=BLOCK) as world:
        asyncio.run(fill(world))
        yield world


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(PROMPTS)


async def fill(world: World) -> None:
    """Both tenants have the same bytes under the same name; acme's ``mine`` has two versions."""
    for tenant, uploads in {
        "acme": {"mine": [MINE, Content("soft", 20, 3)], "other": [OTHER]},
        "beta": {"mine": [MINE]},
    }.items():
        async with caller(world.url, world.keys[tenant]) as http:
            for name, contents in uploads.items():
                for content in contents:
                    response = await http.put(f"/v1/prefixes/{name}", **content.body())
                    assert response.status_code == 201, response.text


def shareable(prompt: int, content: Content | None) -> int:
    """Tokens of a prompt that need not be run the second time: those in whole blocks before the
    last token, which is always run. The first block may begin with the tail of the prefix."""
    head = 0 if content is None else content.length
    return max(0, (head + len(PROMPTS[prompt]) - 1) // BLOCK * BLOCK - head)


@pytest.mark.parametrize("model", ["mine@1", "other", "tiny"])
def test_the_second_time_is_cached_and_says_the_same(
    world: World, oracle: Oracle, model: str
) -> None:
    content = {"mine@1": MINE, "other": OTHER, "tiny": None}[model]

    async def scenario() -> list[list[Answer]]:
        async with caller(world.url, world.keys["acme"]) as http:
            return [
                [await ask(http, model, prompt), await ask(http, model, prompt)]
                for prompt in range(len(PROMPTS))
            ]

    for prompt, (first, second) in enumerate(asyncio.run(scenario())):
        assert first.cached == 0
        assert second.cached == shareable(prompt, content)
        for answer in (first, second):
            assert oracle.agrees(content, prompt, answer.tokens, count=COUNT), prompt


@pytest.mark.parametrize("border", BORDERS)
def test_nothing_is_shared_across(world: World, border: str) -> None:
    tenant, model = BORDERS[border]

    async def scenario() -> tuple[Answer, int]:
        async with caller(world.url, world.keys["acme"]) as http:
            first = await ask(http, "mine@1", 0)
            assert (await ask(http, "mine@1", 0)).cached > 0
        before = world.engine.stats().kv_reused_tokens
        async with caller(world.url, world.keys[tenant]) as http:
            there = await ask(http, model, 0)
        if tenant == "beta":
            assert there.tokens == first.tokens
        return there, world.engine.stats().kv_reused_tokens - before

    answer, counted = asyncio.run(scenario())
    assert (answer.cached, counted) == (0, 0)


def test_on_and_off_say_the_same_in_a_crowd(world: World, oracle: Oracle) -> None:
    """The same requests at once, with reuse and without, sharing beginnings of every length."""

    async def scenario(*, reuse: bool) -> list[Answer]:
        async with caller(world.url, world.keys["acme"]) as http:
            asked = itertools.product(range(3), ["mine@1", "other", "tiny"], range(len(PROMPTS)))
            return await asyncio.gather(
                *(ask(http, model, prompt, reuse=reuse) for _, model, prompt in asked)
            )

    without, with_reuse = (asyncio.run(scenario(reuse=reuse)) for reuse in (False, True))
    assert [answer.tokens for answer in without] == [answer.tokens for answer in with_reuse]
    assert sum(answer.cached for answer in without) == 0
    assert sum(answer.cached for answer in with_reuse) > 0


def test_a_tenant_can_switch_it_off(world: World) -> None:
    world.loaded.tenants.set_settings("acme", {"kv_reuse": False})

    async def scenario() -> list[Answer]:
        async with caller(world.url, world.keys["acme"]) as http:
            return [await ask(http, "mine", 0) for _ in range(2)]

    assert [answer.cached for answer in asyncio.run(scenario())] == [0, 0]


async def ask(http: httpx2.AsyncClient, model: str, prompt: int, *, reuse: bool = True) -> Answer:
    asked = stream if prompt % 2 else complete
    answer = await asked(http, greedy(model, PROMPTS[prompt], COUNT, kv_reuse=reuse))
    assert answer.ok, answer
    return answer
