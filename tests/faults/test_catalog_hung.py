"""A catalog that hangs: liveness, refusals in time, running streams, shutdown and recovery."""

import asyncio
import os
import signal
import sqlite3
import subprocess
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from prefixd.server.api.catalog_calls import WAIT_S
from prefixd.server.serve.catalog import CatalogParts, open_catalog
from prefixd.server.serve.settings import Settings
from tests.faults.faults_model import TINY, make_prompts
from tests.faults.faults_outage import (
    LIVE_WITHIN_S,
    NOT_READY_WITHIN_S,
    READY_WITHIN_S,
    RECOVERED_WITHIN_S,
    REFUSED_WITHIN_S,
    Called,
    HealthProber,
    call_all,
    check_integrity,
    check_recovers,
    check_refused,
    request,
    wait_until,
    within,
)
from tests.faults.faults_process import KillableServer
from tests.faults.faults_reference import Reference
from tests.faults.faults_traffic import Answer, caller, greedy, stream
from tests.real_services import Postgres, running_postgres

pytestmark = [pytest.mark.serial, pytest.mark.timeout(300)]

CALLERS = 100
UPLOADS = 6
"""Below the bound of uploads at a time."""

LONG = 1500
"""Output tokens of a stream that runs for longer than it takes to pause the catalog."""

EXITED_WITHIN_S = 8.0
"""A server without running requests exits: docs/operations.md."""

NO_LIMITS = {
    "requests_per_minute": None,
    "tokens_per_minute": None,
    "max_concurrent_requests": None,
}


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with running_postgres() as server:
        yield server


def stopped(server: Postgres) -> list[int]:
    """Stop PostgreSQL's processes, the first one before it has more children; their ids."""
    needle = str(server.port).encode()
    # A child has its parent's command line for a moment.
    parents = {
        pid: parent
        for pid, parent, command in processes()
        if command[0].endswith(b"/postgres") and needle in command
    }
    [first] = [pid for pid, parent in parents.items() if parent not in parents]
    os.kill(first, signal.SIGSTOP)
    children = [pid for pid, parent, _ in processes() if parent == first]
    for pid in children:
        os.kill(pid, signal.SIGSTOP)
    return [first, *children]


def processes() -> Iterator[tuple[int, int, list[bytes]]]:
    """The id, the parent and the command line of each process."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                # pid (comm) state ppid …; comm may hold spaces
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                command = (entry / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
            except OSError:
                continue
            yield int(entry.name), int(fields[1]), command


@contextmanager
def paused(server: Postgres) -> Iterator[None]:
    """PostgreSQL accepts connections and responds to nothing."""
    pids = stopped(server)
    try:
        yield
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Another process has SQLite's write lock."""
    with closing(sqlite3.connect(file, isolation_level=None, timeout=30)) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        yield
        holder.execute("ROLLBACK")


@contextmanager
def restarted(server: Postgres) -> Iterator[None]:
    """PostgreSQL is killed, all of it, and comes back on its port at the end of the block."""
    pids = stopped(server)
    command = Path(f"/proc/{pids[0]}/cmdline").read_text().rstrip("\0").split("\0")
    folder = Path(f"/proc/{pids[0]}/cwd").readlink()
    owner = folder.stat().st_uid
    for pid in pids:
        with suppress(ProcessLookupError):  # it ended with the first one
            os.kill(pid, signal.SIGKILL)
    # A dead process that was not waited for still has its id, which the lock file names.
    os.waitpid(pids[0], 0)
    try:
        yield
    finally:
        again = subprocess.Popen(
            command, cwd=folder, user=owner, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        STARTED.append(again)


STARTED: list["subprocess.Popen[bytes]"] = []


@dataclass(frozen=True)
class Served:
    """A server over a catalog, and headers of a tenant with limits and of one without."""

    url: str
    data: Path
    flags: tuple[str, ...]
    limited: dict[str, str]
    free: dict[str, str]
    process: KillableServer

    def get_models(self) -> httpx2.Request:
        return request(self.url, "GET", "/v1/models", self.free)

    def generate(self, headers: dict[str, str]) -> httpx2.Request:
        body = greedy(TINY, [5, 6, 7], 4)
        return request(self.url, "POST", "/v1/completions", headers, json=body)

    def upload(self, name: str) -> httpx2.Request:
        body = {"kind": "text", "text": "alpha"}
        return request(self.url, "PUT", f"/v1/prefixes/{name}", self.free, json=body)

    def check_works(self) -> None:
        """Reads, generation with and without limits, and a change succeed."""
        requests = [self.get_models(), self.generate(self.limited), self.generate(self.free)]
        calls = call_all(self.url, [*requests, self.upload("after")])
        assert [call.status for call in calls[:3]] == [200, 200, 200], calls
        assert calls[3].status in {200, 201}, calls[3]

    def check_nothing_lost(self) -> None:
        """The acknowledged prefix is there, no request holds a place, nothing is damaged."""
        shown = request(self.url, "GET", "/v1/prefixes/before", self.free)
        assert call_all(self.url, [shown])[0].status == 200
        with opened(*self.flags, data=self.data) as parts:
            wait_until(lambda: not _leases(parts), timeout_s=within(RECOVERED_WITHIN_S))
        check_integrity(self.data, *self.flags)


def _leases(parts: CatalogParts) -> int:
    with parts.database.begin() as connection:
        counted = connection.exec_driver_sql("SELECT count(*) FROM request_leases")
        return int(counted.scalar_one())


@contextmanager
def serving(model: Path, data: Path, *flags: str, **environment: str) -> Iterator[Served]:
    data.mkdir()
    keys = make_keys(data, *flags)
    with KillableServer(
        data_dir=data, model=model, flags=flags, environment=environment
    ) as process:
        served = Served(process.ready(), data, flags, keys["acme"], keys["free"], process)
        assert call_all(served.url, [served.upload("before")])[0].status == 201
        yield served


class LongStream(threading.Thread):
    """A stream of ``LONG`` tokens that begins before the fault."""

    def __init__(self, served: Served, prompt: list[int]) -> None:
        super().__init__(daemon=True)
        self._served, self._prompt = served, prompt
        self._begun = threading.Event()
        self.answer: Answer | None = None

    def begin(self) -> None:
        self.start()
        assert self._begun.wait(60)

    def run(self) -> None:
        asyncio.run(self._read())

    async def _read(self) -> None:
        key = self._served.limited["authorization"].removeprefix("Bearer ")
        async with caller(self._served.url, key) as http:
            begun = asyncio.Event()
            body = greedy(TINY, self._prompt, LONG)
            reading = asyncio.create_task(stream(http, body, begun=begun))
            await begun.wait()
            self._begun.set()
            self.answer = await reading


@contextmanager
def opened(*flags: str, data: Path) -> Iterator[CatalogParts]:
    """The catalog of the server, with the tenants ``acme`` and ``free``, which has no limits."""
    options = dict(zip(flags[::2], flags[1::2], strict=True))
    settings = Settings(data_dir=data, database_url=options.get("--database-url"))
    parts = open_catalog(settings)
    try:
        yield parts
    finally:
        parts.database.dispose()


def make_keys(data: Path, *flags: str) -> dict[str, dict[str, str]]:
    """Headers of a tenant with every limit, and of one without."""
    with opened(*flags, data=data) as parts:
        for name in ("acme", "free"):
            parts.tenants.create_tenant(name, quota=NO_LIMITS)
        limits: dict[str, int | None] = {
            "requests_per_minute": 100_000,
            "tokens_per_minute": 10_000_000,
            "max_concurrent_requests": CALLERS,
        }
        parts.tenants.set_quota("acme", limits)
        keys = {name: parts.tenants.create_key(tenant=name).text for name in ("acme", "free")}
    return {name: {"authorization": f"Bearer {key}"} for name, key in keys.items()}


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(make_prompts(2, lengths=(8,)))


@pytest.fixture(scope="module")
def on_postgres(
    tiny_folder: Path, postgres: Postgres, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    postgres.execute("CREATE DATABASE hung")
    data = tmp_path_factory.mktemp("hung") / "data"
    with serving(tiny_folder, data, "--database-url", f"{postgres.url}hung") as served:
        yield served
    for process in STARTED:
        process.send_signal(signal.SIGQUIT)
        process.wait(30)


@pytest.mark.parametrize("fault", [paused, restarted])
def test_requests_are_refused_in_time_while_postgresql_fails(
    on_postgres: Served, postgres: Postgres, reference: Reference, fault: Any
) -> None:
    """Many callers at once, a running stream, uploads: then everything works again."""
    served, running = on_postgres, LongStream(on_postgres, list(reference.prompts[0]))
    with HealthProber(served.url) as health:
        health.wait_for_ready(200, timeout_s=within(READY_WITHIN_S))
        running.begin()
        with fault(postgres):
            requests = [served.get_models() for _ in range(CALLERS)]
            requests += [served.generate(served.limited) for _ in range(5)]
            requests += [served.upload("during")]
            calls = call_all(served.url, requests)
            check_refused(calls, status=503, code="storage_unavailable")
            reason = health.wait_for_ready(503, timeout_s=within(NOT_READY_WITHIN_S))
            assert "catalog" in str(reason)
            check_refused_at_once(call_all(served.url, requests))
            running.join(within(REFUSED_WITHIN_S))
            assert running.answer is not None, "the stream did not end during the fault"
        check_recovers(served.check_works)
        health.wait_for_ready(200, timeout_s=within(READY_WITHIN_S))
        health.check_live()
    assert running.answer.ok, running.answer
    assert reference.agrees(None, 0, running.answer.tokens, count=LONG)
    served.check_nothing_lost()


def check_refused_at_once(calls: list[Called]) -> None:
    """The circuit breaker is open: no caller waits."""
    check_refused(calls, status=503, code="storage_unavailable")
    assert max(call.seconds for call in calls) <= within(LIVE_WITHIN_S)


def test_changes_are_refused_in_time_while_sqlite_is_locked(
    tiny_folder: Path, tmp_path: Path, reference: Reference
) -> None:
    """Another process has the write lock: what only reads goes on."""
    # Reads wait until the breaker has opened for writes, which a busy machine may delay.
    slack = {"PREFIXD_CATALOG_TIMEOUT": str(within(WAIT_S))}
    with (
        serving(tiny_folder, tmp_path / "data", **slack) as served,
        HealthProber(served.url) as health,
    ):
        running = LongStream(served, list(reference.prompts[0]))
        running.begin()
        with locked(served.data / "catalog.sqlite3"):
            changes = [served.generate(served.limited) for _ in range(40)]
            changes += [served.upload(f"during-{number}") for number in range(UPLOADS)]
            reads = [served.get_models() for _ in range(40)] + [served.generate(served.free)]
            calls = call_all(served.url, [*changes, *reads])
            check_refused(calls[: len(changes)], status=503, code="storage_unavailable")
            assert {call.status for call in calls[len(changes) :]} == {200}
            reason = health.wait_for_ready(503, timeout_s=within(NOT_READY_WITHIN_S))
            assert "locked" in str(reason)
            check_refused_at_once(call_all(served.url, changes))
            running.join(within(REFUSED_WITHIN_S))
            assert running.answer is not None, "the stream did not end during the fault"
        check_recovers(served.check_works)
        health.wait_for_ready(200, timeout_s=within(READY_WITHIN_S))
        health.check_live()
        assert running.answer.ok, running.answer
        assert reference.agrees(None, 0, running.answer.tokens, count=LONG)
        served.check_nothing_lost()


def test_sigterm_ends_a_server_whose_catalog_hangs(
    tiny_folder: Path, postgres: Postgres, tmp_path: Path
) -> None:
    """Requests that wait for the catalog are refused, and the exit status is 0."""
    postgres.execute("CREATE DATABASE terminated")
    flags = ("--database-url", f"{postgres.url}terminated")
    with serving(tiny_folder, tmp_path / "data", *flags) as served, paused(postgres):
        waiting = threading.Thread(
            target=call_all, args=(served.url, [served.get_models() for _ in range(20)])
        )
        waiting.start()
        served.process.send(signal.SIGTERM)
        assert served.process.ended(limit=within(EXITED_WITHIN_S)) == 0
        waiting.join()
        assert served.process.family == []
