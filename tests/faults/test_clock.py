"""The wall clock of a serving process is set back or forward by an hour."""

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from prefixd.server.tenants.registry import Tenants
from prefixd.store.db.database import open_database
from prefixd.store.db.migrate import upgrade
from tests.faults.faults_clock import ServerClock
from tests.faults.faults_model import TINY, make_prompts
from tests.faults.faults_outage import RECOVERED_WITHIN_S, HealthProber, check_integrity, within
from tests.faults.faults_process import KillableServer
from tests.faults.faults_traffic import Answer, caller, complete, greedy, stream

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

HOUR_S = 3600
PROMPT = make_prompts(1, lengths=(9,), seed=3)[0]
SHORT = greedy(TINY, PROMPT, 2)
LONG = greedy(TINY, PROMPT, 400)
LONGEST = greedy(TINY, PROMPT, 1900)
PER_MINUTE, AT_ONCE = 20, 2
QUOTAS = {
    "rates": {"requests_per_minute": PER_MINUTE},
    "leases": {"max_concurrent_requests": AT_ONCE},
    "stream": {"max_concurrent_requests": 1},
}


@pytest.fixture
def clock(tmp_path: Path) -> ServerClock:
    return ServerClock.make(tmp_path / "offset")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


@pytest.fixture
def keys(data: Path) -> Iterator[dict[str, str]]:
    """API keys by tenant."""
    engine = open_database(f"sqlite:///{data / 'catalog.sqlite3'}")
    upgrade(engine)
    tenants = Tenants(engine)
    for name, quota in QUOTAS.items():
        tenants.create_tenant(name, quota=quota)
    yield {name: tenants.create_key(tenant=name).text for name in QUOTAS}
    engine.dispose()


def make_server(tiny_folder: Path, data: Path, clock: ServerClock) -> KillableServer:
    return KillableServer(data_dir=data, model=tiny_folder, environment=clock.environment)


async def empty_the_bucket(http: httpx2.AsyncClient) -> None:
    answers = [await complete(http, SHORT) for _ in range(PER_MINUTE)]
    while answers[-1].ok:
        answers.append(await complete(http, SHORT))
    assert answers[-1].status == 429, answers[-1]


async def until_admitted(http: httpx2.AsyncClient) -> None:
    """Send the request until it is admitted: as soon as its limit has room again."""
    async with asyncio.timeout(within(RECOVERED_WITHIN_S)):
        while not (answer := await complete(http, SHORT)).ok:
            assert answer.status == 429, answer
            await asyncio.sleep(0.1)


async def jump_during_streams(
    url: str, keys: dict[str, str], clock: ServerClock, *, offset_s: float
) -> None:
    """Set the clock while streams run: as many as their tenant may have, and one to its end."""
    async with (
        caller(url, keys["rates"]) as rates,
        caller(url, keys["leases"]) as leases,
        caller(url, keys["stream"]) as one,
    ):
        quiet = await stream(one, LONG)
        await empty_the_bucket(rates)
        begun = [asyncio.Event() for _ in range(AT_ONCE + 1)]
        async with asyncio.TaskGroup() as group:
            running = group.create_task(stream(one, LONG, begun=begun[0]))
            held = [group.create_task(stream(leases, LONGEST, begun=event)) for event in begun[1:]]
            await asyncio.gather(*(event.wait() for event in begun))
            clock.set(offset_s)
            for _ in range(3):
                third = await complete(leases, SHORT)
                assert third.code == "concurrency_limit_exceeded", third
            assert not any(task.done() for task in held), "a stream was shorter than the test"
            for task in held:
                task.cancel()
            await until_admitted(rates)
        assert running.result().tokens == quiet.tokens
        assert (await complete(one, SHORT)).ok
        await until_admitted(leases)


def test_streams_finish_and_limits_hold_while_the_clock_jumps(
    tiny_folder: Path, data: Path, keys: dict[str, str], clock: ServerClock
) -> None:
    with make_server(tiny_folder, data, clock) as server:
        url = server.ready()
        with HealthProber(url) as prober:
            for offset_s in (-HOUR_S, 0):  # back an hour, forward an hour
                asyncio.run(jump_during_streams(url, keys, clock, offset_s=offset_s))
        prober.check_live()
        assert [status for status, _ in prober.ready] == [200]
    check_integrity(data)


def test_leases_from_the_future_do_not_survive_a_restart(
    tiny_folder: Path, data: Path, keys: dict[str, str], clock: ServerClock
) -> None:
    async def stream_until_killed(server: KillableServer, url: str) -> None:
        begun = [asyncio.Event() for _ in range(AT_ONCE)]
        async with caller(url, keys["leases"]) as leases, asyncio.TaskGroup() as group:
            for event in begun:
                group.create_task(interrupted(leases, event))
            await asyncio.gather(*(event.wait() for event in begun))
            server.send(signal.SIGKILL)

    async def interrupted(http: httpx2.AsyncClient, begun: asyncio.Event) -> Answer | None:
        try:
            return await stream(http, LONG, begun=begun)
        except httpx2.TransportError:
            return None

    async def ask(url: str) -> Answer:
        async with caller(url, keys["leases"]) as leases:
            return await complete(leases, SHORT)

    with make_server(tiny_folder, data, clock) as server:
        asyncio.run(stream_until_killed(server, server.ready()))
    clock.set(-HOUR_S)
    with make_server(tiny_folder, data, clock) as server:
        answer = asyncio.run(ask(server.ready()))
    assert answer.ok, answer
