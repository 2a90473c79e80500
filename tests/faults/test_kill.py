"""Must be true 8: a server ended at any moment comes back with all that it acknowledged."""

import asyncio
import os
import random
import secrets
import signal
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
import pytest

from prefixd.server.cli.demo.child import admin
from tests.faults.faults_model import TINY, Oracle, make_prompts
from tests.faults.faults_process import Victim
from tests.faults.faults_traffic import Answer, caller, greedy, stream
from tests.faults.faults_writers import Book, Writer, check

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SEED = os.environ.get("PREFIXD_KILL_SEED") or secrets.token_hex(4)
KILLS = int(os.environ.get("PREFIXD_KILLS", "3"))
WRITERS, READERS = 3, 3
LONG, FINITE = 1900, 800
"""Tokens of an answer that outlasts a drain of 0.3 seconds, and of one that is waited for."""
CLOSING_S = 60.0
"""Generous: how long after its limit a drained process may take to be gone."""


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(make_prompts(6, lengths=(1, 16, 33)))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


def make_key(data: Path) -> str:
    admin(data, "tenant", "create", "acme")
    issued = admin(data, "key", "create", "--tenant", "acme")
    assert isinstance(issued, dict)
    return str(issued["key"])


def test_what_was_acknowledged_survives_kill_9(
    tiny_folder: Path, data: Path, oracle: Oracle
) -> None:
    """Uploads, aliases, bindings and streams under way at the moment of death, several times."""
    key, book, rng = make_key(data), Book(), random.Random(SEED)
    for number in range(KILLS + 1):
        with Victim(data_dir=data, model=tiny_folder) as victim:
            url = victim.ready()

            async def one_life(
                url: str = url, number: int = number, victim: Victim = victim
            ) -> None:
                async with caller(url, key) as http:
                    await check(http, book, oracle, rng)
                    if number == KILLS:
                        return
                    async with writing(http, book, number):
                        await enough(http, book, book.acknowledged + rng.randint(1, 60))
                        await asyncio.sleep(rng.random() * 0.05)  # any moment, not only at a yes
                        victim.send(signal.SIGKILL)

            try:
                asyncio.run(one_life())
            except BaseException as error:
                error.add_note(f"PREFIXD_KILL_SEED={SEED}, life {number}")
                raise
    assert book.acknowledged >= KILLS


def test_a_server_asked_to_stop_finishes_what_runs(
    tiny_folder: Path, data: Path, oracle: Oracle
) -> None:
    """Every stream under way when SIGTERM comes is whole, what is acknowledged stays, and who comes
    then is turned away."""
    key, book = make_key(data), Book()
    with Victim(data_dir=data, model=tiny_folder, flags=["--shutdown-timeout", "120"]) as victim:
        url = victim.ready()

        async def scenario() -> tuple[list[Answer], Answer]:
            async with caller(url, key) as http, writing(http, book, 0):
                await enough(http, book, 10)
                streams = await all_begun(http, oracle.prompts[:4], FINITE)
                victim.send(signal.SIGTERM)
                late = await not_ready(http)
                return await asyncio.gather(*streams), late

        answers, late = asyncio.run(scenario())
        assert victim.ended(limit=120 + CLOSING_S) == 0
        assert victim.family == []
    for prompt, answer in enumerate(answers):
        assert answer.ok, answer
        assert oracle.agrees(None, prompt, answer.tokens, count=FINITE)
    assert late.status == 503
    assert late.retry_after is not None
    with Victim(data_dir=data, model=tiny_folder) as again:
        url = again.ready()

        async def look() -> None:
            async with caller(url, key) as http:
                await check(http, book, oracle, random.Random(SEED))

        asyncio.run(look())


def test_a_drain_that_takes_too_long_tells_the_streams(tiny_folder: Path, data: Path) -> None:
    """Streams that the limit cuts get an error event and their last line; the status is 0."""
    key = make_key(data)
    with Victim(data_dir=data, model=tiny_folder, flags=["--shutdown-timeout", "0.3"]) as victim:
        url = victim.ready()

        async def scenario() -> list[Answer]:
            async with caller(url, key) as http:
                streams = await all_begun(http, [(5, 6, 7 + i) for i in range(12)], LONG)
                victim.send(signal.SIGTERM)
                return await asyncio.gather(*streams)

        answers = asyncio.run(scenario())
        assert victim.ended(limit=CLOSING_S) == 0
        assert victim.family == []
    for answer in answers:
        assert answer.complete, "a stream was cut without its last line"
        assert answer.error is not None
        assert set(answer.error) == {"message", "type", "code", "param", "request_id"}
        assert 0 < len(answer.tokens[0]) < LONG


async def not_ready(http: httpx2.AsyncClient) -> Answer:
    """The refusal of a request that comes while the server drains."""
    while (await http.get("/health/ready")).status_code == 200:
        pass
    return await stream(http, greedy(TINY, [5], 4))


@asynccontextmanager
async def writing(http: httpx2.AsyncClient, book: Book, number: int) -> AsyncIterator[None]:
    """Writers, and readers of streams, for as long as the server lets them."""
    writers = [
        asyncio.create_task(Writer(index, book, SEED, number).write(http))
        for index in range(WRITERS)
    ]
    readers = [asyncio.create_task(read(http)) for _ in range(READERS)]
    yield
    await asyncio.wait_for(asyncio.gather(*writers, *readers), 120)


async def read(http: httpx2.AsyncClient) -> None:
    """Streams one after another, until the server is gone."""
    try:
        while (await stream(http, greedy(TINY, [7, 8, 9], 50))).ok:
            pass
    except httpx2.TransportError:
        return


async def enough(http: httpx2.AsyncClient, book: Book, acknowledged: int) -> None:
    """Wait until so many changes were acknowledged."""
    while book.acknowledged < acknowledged:
        await http.get("/health/live")


async def all_begun(
    http: httpx2.AsyncClient, prompts: Sequence[Sequence[int]], count: int
) -> list[asyncio.Task[Answer]]:
    """Streams of ``count`` tokens, each of which has said something."""
    streams = []
    for prompt in prompts:
        begun = asyncio.Event()
        body = greedy(TINY, prompt, count)
        streams.append((asyncio.create_task(stream(http, body, begun=begun)), begun))
    for task, begun in streams:
        task.add_done_callback(lambda _, begun=begun: begun.set())  # type: ignore[misc]
        await begun.wait()
    return [task for task, _ in streams]
