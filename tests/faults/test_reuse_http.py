"""KV reuse over HTTP changes no token and is limited to one tenant and prefix version."""

import asyncio
import itertools
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from tests.faults.faults_model import Content, make_prompts
from tests.faults.faults_reference import Reference
from tests.faults.faults_server import RunningServer, running
from tests.faults.faults_traffic import Answer, caller, complete, greedy, stream

BLOCK, COUNT = 8, 12
PROMPTS = make_prompts(4, lengths=(64, 41, 9, 5))
FIRST, SECOND = Content("soft", 20, 1), Content("kv", 16, 2)
SCOPES = {
    "another tenant": ("beta", "mine"),
    "another prefix": ("acme", "other"),
    "another version": ("acme", "mine@2"),
    "no prefix": ("acme", "tiny"),
}


@pytest.fixture
def server(tiny_folder: Path, tmp_path: Path) -> Iterator[RunningServer]:
    with running(tiny_folder, tmp_path / "data", block_size=BLOCK) as server:
        asyncio.run(fill(server))
        yield server


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(PROMPTS)


async def fill(server: RunningServer) -> None:
    """Both tenants have the same bytes under the same name; acme's ``mine`` has two versions."""
    for tenant, uploads in {
        "acme": {"mine": [FIRST, Content("soft", 20, 3)], "other": [SECOND]},
        "beta": {"mine": [FIRST]},
    }.items():
        async with caller(server.url, server.keys[tenant]) as http:
            for name, contents in uploads.items():
                for content in contents:
                    response = await http.put(f"/v1/prefixes/{name}", **content.body())
                    assert response.status_code == 201, response.text


def shareable(prompt: int, content: Content | None) -> int:
    """Tokens of a prompt that are not computed the second time: those in full blocks before the
    last token, which is always computed. The first block may start with the prefix's tail."""
    head = 0 if content is None else content.length
    return max(0, (head + len(PROMPTS[prompt]) - 1) // BLOCK * BLOCK - head)


@pytest.mark.parametrize("model", ["mine@1", "other", "tiny"])
def test_a_repeated_prompt_is_cached_and_gives_the_same_output(
    server: RunningServer, reference: Reference, model: str
) -> None:
    content = {"mine@1": FIRST, "other": SECOND, "tiny": None}[model]

    async def scenario() -> list[list[Answer]]:
        async with caller(server.url, server.keys["acme"]) as http:
            return [
                [await generate(http, model, prompt), await generate(http, model, prompt)]
                for prompt in range(len(PROMPTS))
            ]

    for prompt, (first, second) in enumerate(asyncio.run(scenario())):
        assert first.cached == 0
        assert second.cached == shareable(prompt, content)
        for answer in (first, second):
            assert reference.agrees(content, prompt, answer.tokens, count=COUNT), prompt


@pytest.mark.parametrize("scope", SCOPES)
def test_kv_is_not_shared_across_tenants_prefixes_or_versions(
    server: RunningServer, scope: str
) -> None:
    tenant, model = SCOPES[scope]

    async def scenario() -> tuple[Answer, int]:
        async with caller(server.url, server.keys["acme"]) as http:
            first = await generate(http, "mine@1", 0)
            assert (await generate(http, "mine@1", 0)).cached > 0
        before = server.engine.stats().kv_reused_tokens
        async with caller(server.url, server.keys[tenant]) as http:
            other = await generate(http, model, 0)
        if tenant == "beta":
            assert other.tokens == first.tokens
        return other, server.engine.stats().kv_reused_tokens - before

    answer, counted = asyncio.run(scenario())
    assert (answer.cached, counted) == (0, 0)


def test_concurrent_requests_give_the_same_output_with_and_without_kv_reuse(
    server: RunningServer, reference: Reference
) -> None:
    """The same concurrent requests with and without reuse, with common beginnings of any length."""

    async def scenario(*, reuse: bool) -> list[Answer]:
        async with caller(server.url, server.keys["acme"]) as http:
            combinations = itertools.product(
                range(3), ["mine@1", "other", "tiny"], range(len(PROMPTS))
            )
            # Has ended before the others, which may all start in one step.
            await generate(http, "tiny", 0, reuse=reuse)
            return await asyncio.gather(
                *(generate(http, model, prompt, reuse=reuse) for _, model, prompt in combinations)
            )

    without, with_reuse = (asyncio.run(scenario(reuse=reuse)) for reuse in (False, True))
    assert [answer.tokens for answer in without] == [answer.tokens for answer in with_reuse]
    assert sum(answer.cached for answer in without) == 0
    assert sum(answer.cached for answer in with_reuse) > 0


def test_a_tenant_setting_turns_kv_reuse_off(server: RunningServer) -> None:
    server.loaded.tenants.set_settings("acme", {"kv_reuse": False})

    async def scenario() -> list[Answer]:
        async with caller(server.url, server.keys["acme"]) as http:
            return [await generate(http, "mine", 0) for _ in range(2)]

    assert [answer.cached for answer in asyncio.run(scenario())] == [0, 0]


async def generate(
    http: httpx2.AsyncClient, model: str, prompt: int, *, reuse: bool = True
) -> Answer:
    send = stream if prompt % 2 else complete
    answer = await send(http, greedy(model, PROMPTS[prompt], COUNT, kv_reuse=reuse))
    assert answer.ok, answer
    return answer
