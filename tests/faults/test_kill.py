"""A server killed at any moment restarts with every change that it acknowledged."""

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
from tests.faults.faults_injections import open_upload
from tests.faults.faults_model import TINY, make_prompts
from tests.faults.faults_process import KillableServer
from tests.faults.faults_reference import Reference
from tests.faults.faults_traffic import Answer, caller, greedy, stream
from tests.faults.faults_writers import AcknowledgedState, Writer, check

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SEED = os.environ.get("PREFIXD_KILL_SEED") or secrets.token_hex(4)
KILLS = int(os.environ.get("PREFIXD_KILLS", "3"))
WRITERS, READERS = 3, 3
LONG, FINITE = 1900, 800
"""Output tokens that take longer than a drain of 0.3 seconds, and that finish in a drain."""
CLOSING_S = 60.0
"""Seconds that a process may take to exit after its drain limit (generous)."""


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(make_prompts(6, lengths=(1, 16, 33)))


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


def test_acknowledged_changes_survive_sigkill(
    tiny_folder: Path, data: Path, reference: Reference
) -> None:
    """The server is killed during uploads, aliases, bindings and streams, several times."""
    key, acknowledged, rng = make_key(data), AcknowledgedState(), random.Random(SEED)
    for number in range(KILLS + 1):
        with KillableServer(data_dir=data, model=tiny_folder) as server:
            url = server.ready()

            async def run_until_killed(
                url: str = url, number: int = number, server: KillableServer = server
            ) -> None:
                async with caller(url, key) as http:
                    await check(http, acknowledged, reference, rng)
                    if number == KILLS:
                        return
                    async with writing(http, acknowledged, number):
                        await until_acknowledged(
                            http, acknowledged, acknowledged.count + rng.randint(1, 60)
                        )
                        # Kill at any time, not only after a response.
                        await asyncio.sleep(rng.random() * 0.05)
                        server.send(signal.SIGKILL)

            try:
                asyncio.run(run_until_killed())
            except BaseException as error:
                error.add_note(f"PREFIXD_KILL_SEED={SEED}, run {number}")
                raise
    assert acknowledged.count >= KILLS


def test_sigterm_lets_running_streams_finish(
    tiny_folder: Path, data: Path, reference: Reference
) -> None:
    """On SIGTERM every running stream completes, acknowledged changes are kept, and new requests
    are rejected."""
    key, acknowledged = make_key(data), AcknowledgedState()
    with KillableServer(
        data_dir=data,
        model=tiny_folder,
        flags=["--shutdown-timeout", "120", "--body-timeout", "120"],
    ) as server:
        url = server.ready()

        async def scenario() -> tuple[list[Answer], Answer]:
            async with caller(url, key) as http, writing(http, acknowledged, 0):
                await until_acknowledged(http, acknowledged, 10)
                streams = await all_begun(http, reference.prompts[:4], FINITE)
                with open_upload(url, key):  # however soon the streams end
                    server.send(signal.SIGTERM)
                    rejected = await rejected_request(http)
                return await asyncio.gather(*streams), rejected

        answers, rejected = asyncio.run(scenario())
        assert server.ended(limit=120 + CLOSING_S) == 0
        assert server.family == []
    for prompt, answer in enumerate(answers):
        assert answer.ok, answer
        assert reference.agrees(None, prompt, answer.tokens, count=FINITE)
    assert rejected.status == 503
    assert rejected.retry_after is not None
    with KillableServer(data_dir=data, model=tiny_folder) as again:
        url = again.ready()

        async def check_state() -> None:
            async with caller(url, key) as http:
                await check(http, acknowledged, reference, random.Random(SEED))

        asyncio.run(check_state())


def test_streams_that_exceed_the_drain_limit_end_with_an_error_event(
    tiny_folder: Path, data: Path
) -> None:
    """Unfinished streams get an error event and their last line; the exit status is 0."""
    key = make_key(data)
    with KillableServer(
        data_dir=data, model=tiny_folder, flags=["--shutdown-timeout", "0.3"]
    ) as server:
        url = server.ready()

        async def scenario() -> list[Answer]:
            async with caller(url, key) as http:
                streams = await all_begun(http, [(5, 6, 7 + i) for i in range(12)], LONG)
                server.send(signal.SIGTERM)
                return await asyncio.gather(*streams)

        answers = asyncio.run(scenario())
        assert server.ended(limit=CLOSING_S) == 0
        assert server.family == []
    for answer in answers:
        assert answer.complete, "a stream was cut without its last line"
        assert answer.error is not None
        assert set(answer.error) == {"message", "type", "code", "param", "request_id"}
        assert 0 < len(answer.tokens[0]) < LONG


async def rejected_request(http: httpx2.AsyncClient) -> Answer:
    """The response to a request that is sent while the server drains."""
    while (await http.get("/health/ready")).status_code == 200:
        pass
    return await stream(http, greedy(TINY, [5], 4))


@asynccontextmanager
async def writing(
    http: httpx2.AsyncClient, acknowledged: AcknowledgedState, number: int
) -> AsyncIterator[None]:
    """Run writers, and readers of streams, until the server stops."""
    writers = [
        asyncio.create_task(Writer(index, acknowledged, SEED, number).write(http))
        for index in range(WRITERS)
    ]
    readers = [asyncio.create_task(read(http)) for _ in range(READERS)]
    yield
    await asyncio.wait_for(asyncio.gather(*writers, *readers), 120)


async def read(http: httpx2.AsyncClient) -> None:
    """Read one stream after another, until the server stops."""
    try:
        while (await stream(http, greedy(TINY, [7, 8, 9], 50))).ok:
            pass
    except httpx2.TransportError:
        return


async def until_acknowledged(
    http: httpx2.AsyncClient, acknowledged: AcknowledgedState, count: int
) -> None:
    """Wait until ``count`` changes were acknowledged."""
    while acknowledged.count < count:
        await http.get("/health/live")


async def all_begun(
    http: httpx2.AsyncClient, prompts: Sequence[Sequence[int]], count: int
) -> list[asyncio.Task[Answer]]:
    """Start streams of ``count`` tokens and wait for the first event of each."""
    streams = []
    for prompt in prompts:
        begun = asyncio.Event()
        body = greedy(TINY, prompt, count)
        streams.append((asyncio.create_task(stream(http, body, begun=begun)), begun))
    for task, begun in streams:
        task.add_done_callback(lambda _, begun=begun: begun.set())  # type: ignore[misc]
        await begun.wait()
    return [task for task, _ in streams]
