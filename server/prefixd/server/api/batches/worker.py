"""The worker of a server: takes batches that no server holds, runs them, and keeps their leases."""

import asyncio
import time
from collections import Counter
from contextlib import suppress
from functools import partial

import structlog

from prefixd.server.api.batches.line_runner import BatchParts, Stop
from prefixd.server.api.batches.run import BatchRun
from prefixd.server.api.batches.storage_calls import TEMPORARY
from prefixd.server.api.drain_state import DrainState
from prefixd.server.tenants.batch_state import OPEN, BatchStatus

log = structlog.get_logger("prefixd")

MOST_BATCHES = 64
"""Batches that a server works on at a time; all of them share the slots for lines."""

_POLL_S = 1.0
_RELEASE_S = 2.0


class BatchWorker:
    """Works on batches while ``run`` runs, on one event loop. ``max_lines`` of all of them run at a
    time; with 0 it does nothing."""

    def __init__(self, parts: BatchParts, drain_state: DrainState, *, max_lines: int) -> None:
        self._parts = parts
        self._drain_state = drain_state
        self._max_lines = max_lines
        self._slots = asyncio.Semaphore(max_lines)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._woken = asyncio.Event()
        self._running: dict[str, tuple[BatchRun, asyncio.Task[None]]] = {}
        self._renewed_at = 0.0
        self._works = True

    def wake(self) -> None:
        """Look for batches now: one was created or cancelled. In any thread."""
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed: the server has stopped
                self._loop.call_soon_threadsafe(self._woken.set)

    async def run(self) -> None:
        """Work until the server drains, or this is cancelled; then release what is held."""
        if not self._max_lines:
            return
        self._loop = asyncio.get_running_loop()
        try:
            while not self._drain_state.closed:
                await self._tick()
                with suppress(TimeoutError):
                    async with asyncio.timeout(_POLL_S):
                        await self._woken.wait()
                self._woken.clear()
        finally:
            await self._release_all()

    async def _tick(self) -> None:
        try:
            await self._renew()
            await self._check_held()
            await self._claim()
        except TEMPORARY as error:
            why = str(error).partition("\n")[0]
            if self._works:
                log.warning("batches wait: the catalog is unavailable", why=why)
            self._works = False
        except Exception:
            if self._works:
                log.exception("the worker for batches failed; it tries again")
            self._works = False
        else:
            self._works = True
        self._show()

    async def _renew(self) -> None:
        now = time.monotonic()
        if self._running and now - self._renewed_at > self._parts.batches.lease_s / 3:
            parts = self._parts
            await parts.catalog.calls.write(parts.batches.renew, parts.holder)
            self._renewed_at = now

    async def _check_held(self) -> None:
        """Stop what was cancelled or taken by another server; release what does not run here."""
        if not self._running:
            return
        parts = self._parts
        before = set(self._running)
        held = await parts.catalog.calls.read(parts.batches.held, parts.holder)
        for batch_id, (run, _) in tuple(self._running.items()):
            if batch_id not in before or run.batch.has_ended:
                continue
            status = held.get(batch_id)
            if status is None:
                run.stop(Stop.LOST)
            elif status is BatchStatus.CANCELLING:
                run.stop(Stop.CANCELLED)
        for batch_id in held.keys() - before - self._running.keys():
            await parts.catalog.calls.write(parts.batches.release, parts.holder, batch_id)

    async def _claim(self) -> None:
        parts = self._parts
        while len(self._running) < MOST_BATCHES:
            working_on = Counter(run.batch.tenant for run, _ in self._running.values())
            claim = partial(parts.batches.claim, parts.holder, working_on=working_on)
            batch = await parts.catalog.calls.write(claim)
            if batch is None:
                return
            if batch.id in self._running:  # its lease had expired: now it is renewed
                continue
            run = BatchRun(batch, parts, slots=self._slots)
            task = asyncio.create_task(run.run())
            self._running[batch.id] = run, task
            task.add_done_callback(partial(self._ended, batch.id))

    def _ended(self, batch_id: str, task: asyncio.Task[None]) -> None:
        del self._running[batch_id]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a batch failed on this server", batch=batch_id, exc_info=error)
            return  # the next poll tries again, and not at once
        self._woken.set()

    async def _release_all(self) -> None:
        """Stop all batches and let other servers take them at once."""
        running = dict(self._running)
        for run, _ in running.values():
            run.stop(Stop.RELEASED)
        tasks = [task for _, task in running.values()]
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=_RELEASE_S)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        for batch_id in running:
            with suppress(*TEMPORARY):
                parts = self._parts
                await parts.catalog.calls.write(parts.batches.release, parts.holder, batch_id)
        self._show()

    def _show(self) -> None:
        """Set the gauges."""
        metrics = self._parts.metrics
        runs = [run for run, _ in self._running.values()]
        statuses = Counter(run.batch.status for run in runs)
        for status in OPEN:
            metrics.batches.labels(status).set(statuses[status])
        metrics.batch_lines_waiting.set(sum(run.num_waiting for run in runs))
