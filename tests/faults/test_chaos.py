"""Faults one after another and in pairs, under traffic of four tenants with known answers.

``PREFIXD_TEST_CHAOS_SECONDS`` sets the duration (``make chaos`` takes ten minutes),
``PREFIXD_TEST_CHAOS_SEED`` another seed than the committed one. The seed decides the order of the
faults and what clients send; what they are answered also depends on the speed of the machine.
"""

import asyncio
import os
import random
import signal
import time
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.faults.faults_chaos import Report, Tenant
from tests.faults.faults_clock import ServerClock
from tests.faults.faults_injections import (
    descriptors_and_threads,
)
from tests.faults.faults_model import ALL_KINDS, library
from tests.faults.faults_outage import (
    RECOVERED_WITHIN_S,
    HealthProber,
    check_integrity,
    check_recovers,
    within,
)
from tests.faults.faults_process import KillableServer
from tests.faults.faults_reference import Reference
from tests.faults.faults_stacks import NAMES, PROMPTS, Fault, Stack, embedded, plan, shared
from tests.faults.faults_traffic import caller

SECONDS = float(os.environ.get("PREFIXD_TEST_CHAOS_SECONDS") or "60")
SEED = os.environ.get("PREFIXD_TEST_CHAOS_SEED") or "2026-11"
CONTENTS = library(2 * len(NAMES), lengths=(5, 16, 20), seed=9, kinds=ALL_KINDS)
FLAGS: tuple[str, ...] = (
    "--max-connections",
    "96",
    "--max-connections-per-address",
    "48",
    "--block-size",
    "8",
)
FLAGS += ("--max-running", "32", "--kv-tokens", "8192", "--gc-interval", "2")
HOLD_S = (2.0, 5.0)
WARM_UP = 40
MAX_DEFECTS = 50
POOLED = 12
"""Descriptors of database connections and threads that a pool may have kept in addition."""

pytestmark = [pytest.mark.serial, pytest.mark.timeout(SECONDS * 2 + 600)]


@dataclass
class Row:
    """The table's row of one fault or pair."""

    count: int = 0
    refusals: int = 0
    lost: int = 0
    wrong: int = 0
    live: float = 0.0
    recovery: float = 0.0


@dataclass
class Run:
    """Traffic against one server process, and the faults it goes through."""

    stack: Stack
    url: str
    reference: Reference
    rng: random.Random
    rows: dict[str, Row]
    report: Report = field(default_factory=Report)
    tenants: list[Tenant] = field(default_factory=list)

    async def go(self, server: KillableServer, *, seconds: float) -> None:
        """Warm up, run the faults with traffic, check what they left, and kill the server."""
        async with AsyncExitStack() as clients:
            for number, name in enumerate(NAMES):
                http = await clients.enter_async_context(caller(self.url, self.stack.keys[name]))
                contents = {f"own{i}": CONTENTS[2 * number + i] for i in range(2)}
                rng = random.Random(f"{SEED}/{self.stack.name}/{name}")
                self.tenants.append(Tenant(name, http, contents, self.reference, self.report, rng))
            for tenant in self.tenants:
                await tenant.prepare()
            await asyncio.gather(*(t.generate(None) for t in self.tenants * (WARM_UP // 4)))
            await asyncio.gather(*(t.change(0.6) for t in self.tenants * (WARM_UP // 4)))
            await self._wait_until_idle()
            start = descriptors_and_threads(server.pid)
            await self._traffic(seconds)
            await self._wait_until_idle()
            await self._check_returned(server.pid, start)
            await self._kill(server)
        assert not self.report.wrong, self.report.wrong[:5]
        assert set(self.report.answers) == {"base", "parts", *ALL_KINDS}, self.report.answers
        assert not self.report.lost, self.report.lost[:5]
        assert not self.report.defects, "\n".join(self.report.defects[:20])

    async def check_restarted(self, url: str) -> None:
        """The acknowledged state is what a server that starts on the same stack has."""
        for tenant in self.tenants:
            async with caller(url, self.stack.keys[tenant.name]) as tenant.http:
                await tenant.verify_all()
                assert await tenant.generate(None)
        assert not self.report.lost, self.report.lost[:5]

    async def _traffic(self, seconds: float) -> None:
        ends = time.monotonic() + seconds
        async with asyncio.TaskGroup() as group:
            for tenant in self.tenants:
                group.create_task(tenant.read())
                group.create_task(tenant.write())
            with HealthProber(self.url) as prober:
                try:
                    faults = self.stack.faults + self.stack.client_faults(self.url)
                    for chosen in plan(faults, self.rng):
                        if time.monotonic() > ends or len(self.report.defects) > MAX_DEFECTS:
                            break
                        await self._inject(chosen, prober)
                finally:
                    self.report.over = True
        prober.check_live()

    async def _inject(self, faults: tuple[Fault, ...], prober: HealthProber) -> None:
        name = " + ".join(sorted(fault.name for fault in faults))
        row = self.rows.setdefault(name, Row())
        self.report.standing = name
        refusals, probes = self.report.refusals.total(), len(prober.live)
        lost, wrong = len(self.report.lost), len(self.report.wrong)
        with ExitStack() as standing_faults:
            for fault in faults:
                await asyncio.to_thread(standing_faults.enter_context, fault.stand())
            await asyncio.sleep(self.rng.uniform(*HOLD_S))
            await asyncio.to_thread(standing_faults.close)
        row.recovery = max(row.recovery, await self._recover(name))
        await asyncio.gather(*(tenant.verify() for tenant in self.tenants))
        row.count += 1
        row.refusals += self.report.refusals.total() - refusals
        row.lost += len(self.report.lost) - lost
        row.wrong += len(self.report.wrong) - wrong
        row.live = max([row.live, *prober.live[probes:]])

    async def _recover(self, name: str) -> float:
        """Seconds until every tenant is served and the server is ready."""
        started = time.monotonic()
        while True:
            works = [await t.generate("own0") and await t.change(0.6) for t in self.tenants]
            ready = await self.tenants[0].http.get("/health/ready")
            seconds = time.monotonic() - started
            if all(works) and ready.status_code == 200:
                return seconds
            if seconds > within(RECOVERED_WITHIN_S):
                self.report.defects.append(f"{name}: not recovered: {works}, {ready.text}")
                return seconds
            await asyncio.sleep(0.1)

    async def _wait_until_idle(self) -> None:
        """No sequence runs and no block is held by one; fail after a minute."""
        async with asyncio.timeout(60):
            while True:
                page = (await self.tenants[0].http.get("/metrics")).text
                values = dict(
                    line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#")
                )
                running = sum(float(v) for k, v in values.items() if "_requests_running" in k)
                if not running and float(values['prefixd_kv_blocks{holds="sequences"}']) == 0:
                    return
                await asyncio.sleep(0.1)

    async def _check_returned(self, pid: int, start: tuple[int, int]) -> None:
        """Descriptors and threads are back where they were."""
        deadline = time.monotonic() + within(RECOVERED_WITHIN_S)
        while time.monotonic() < deadline:
            now = descriptors_and_threads(pid)
            if now[0] <= start[0] + POOLED and now[1] <= start[1] + POOLED:
                self.rows[
                    f"at the end: descriptors {start[0]} → {now[0]}, threads {start[1]} → {now[1]}"
                ] = Row()
                return
            await asyncio.sleep(0.2)
        self.report.defects.append(f"descriptors and threads: {start}, then {now}")

    async def _kill(self, server: KillableServer) -> None:
        """Kill the server while all tenants write and read."""
        self.report.over, self.report.broken = False, True
        async with asyncio.TaskGroup() as group:
            for tenant in self.tenants:
                group.create_task(tenant.read())
                group.create_task(tenant.write())
            await asyncio.sleep(1)
            server.send(signal.SIGKILL)
            self.report.over = True


def run_on(stack: Stack, model: Path, log: Path, rows: dict[str, Row], *, seconds: float) -> None:
    stack.make_keys()

    def server() -> KillableServer:
        server = KillableServer(
            data_dir=stack.data,
            model=model,
            flags=(*FLAGS, *stack.flags),
            environment=stack.clock.environment,
        )
        server.log = log
        return server

    with server() as first:
        url, reference = first.ready(), Reference(PROMPTS)
        run = Run(stack, url, reference, random.Random(f"{SEED}/{stack.name}"), rows)
        asyncio.run(run.go(first, seconds=seconds))
    started = time.monotonic()
    with server() as second:
        url = second.ready()
        recovery = time.monotonic() - started
        asyncio.run(run.check_restarted(url))
        check_recovers(lambda: check_integrity(stack.data, *stack.flags))
    lost, wrong = len(run.report.lost), len(run.report.wrong)
    rows["kill -9 and restart"] = Row(1, 0, lost, wrong, 0.0, recovery)
    rows[
        f"in all: answers {dict(run.report.answers)}, {run.report.writes} writes, refusals "
        f"{dict(run.report.refusals)}"
    ] = Row()


def table(rows: dict[str, Row]) -> str:
    lines = ["| Fault | Count | Refusals | Lost | Wrong | Worst live probe, s | Recovery, s |"]
    lines.append("|---|---|---|---|---|---|---|")
    lines += [
        f"| {name} | {row.count} | {row.refusals} | {row.lost} | {row.wrong} "
        f"| {row.live:.2f} | {row.recovery:.1f} |"
        for name, row in rows.items()
    ]
    return "\n".join(lines)


def run_and_show(
    stack: Stack, model: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: dict[str, Row] = {}
    try:
        run_on(stack, model, folder / "log", rows, seconds=SECONDS / 2)
    finally:
        with capsys.disabled():
            print(f"\nchaos seed {SEED}, {stack.name}\n{table(rows)}")


def test_chaos_on_sqlite_and_files(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with embedded(tmp_path, ServerClock.make(tmp_path / "offset")) as stack:
        run_and_show(stack, tiny_folder, tmp_path, capsys)


@pytest.mark.usefixtures("s3_url")  # sets the credentials
def test_chaos_on_postgres_and_a_bucket(
    tiny_folder: Path,
    tmp_path: Path,
    s3_endpoint: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = ServerClock.make(tmp_path / "offset")
    with shared(tmp_path, clock, s3_endpoint, monkeypatch) as stack:
        run_and_show(stack, tiny_folder, tmp_path, capsys)
