"""The lines of one batch: run a few at a time, and commit their answers in groups.

::

    input ──> slots ──> requests to the application ──> answers ──> committed in groups
                ^                  │
                └── pause <── refused for now: queue full, rate limit, draining

Until it is committed an answer counts for nothing: a line without one runs again, on whichever
server holds the batch then.
"""

import asyncio
import uuid
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Literal

import structlog
from fastapi.concurrency import run_in_threadpool
from starlette.types import ASGIApp

from prefixd.server.api.batches.assembly import Assembly
from prefixd.server.api.batches.line_request import LineResponse, send_line
from prefixd.server.api.batches.lines import InputLine, answered, numbered, parse_line
from prefixd.server.api.batches.storage_calls import TEMPORARY, until_available
from prefixd.server.api.catalog_access import CatalogAccess
from prefixd.server.api.error_responses import error_response, internal_error
from prefixd.server.api.metrics import LineOutcome, Metrics
from prefixd.server.errors import NotAuthenticated
from prefixd.server.tenants.batch_records import BatchError, BatchRecord, LineAnswer
from prefixd.server.tenants.batch_state import BatchStatus
from prefixd.server.tenants.batches import Batches
from prefixd.server.tenants.registry import Tenants

log = structlog.get_logger("prefixd")

GROUP = 64
"""Answers that are committed at once, when so many are there."""

GROUP_S = 0.25
"""How long an answer waits for others, in seconds."""

_MOST_UNCOMMITTED = 4 * GROUP
_PAGE = 64
_STORAGE_RETRY_S = 5.0


class Stop(Enum):
    """Why no more lines of a batch run here. RELEASED: this server stops. LOST: another server
    holds the batch."""

    CANCELLED = "cancelled"
    EXPIRED = "expired"
    KEY = "key"
    RELEASED = "released"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class BatchParts:
    """What all batches of a server share. ``holder`` has their leases."""

    app: ASGIApp
    batches: Batches
    tenants: Tenants
    catalog: CatalogAccess
    metrics: Metrics
    assembly: Assembly
    holder: str = field(default_factory=lambda: uuid.uuid4().hex)


class LineRunner:
    """Runs the lines of a batch that is in progress. ``stop`` ends it early, on the same event
    loop; ``stopping`` is then the reason, and ``failure`` is then the error of the batch."""

    def __init__(self, batch: BatchRecord, parts: BatchParts, *, slots: asyncio.Semaphore) -> None:
        """``slots`` are the lines that may run at a time, of all batches together."""
        self.batch = batch
        self.stopping: Stop | None = None
        self.failure: BatchError | None = None
        self._parts = parts
        self._slots = slots
        self._changed = asyncio.Event()
        self._acquiring: asyncio.Task[Literal[True]] | None = None
        self._running: set[asyncio.Task[None]] = set()
        self._again: deque[InputLine] = deque()
        self._page: deque[InputLine] = deque()
        self._finished: list[LineAnswer] = []
        self._complete = False
        self._resumes_at = 0.0

    @property
    def num_waiting(self) -> int:
        """Lines without an answer that do not run now."""
        done = self.batch.completed + self.batch.failed + len(self._finished)
        return max(0, self.batch.total - done - len(self._running))

    def stop(self, reason: Stop, failure: BatchError | None = None) -> None:
        """Run no more lines: the first reason counts, and LOST in any case."""
        if self.stopping is None or reason is Stop.LOST:
            self.stopping, self.failure = reason, failure
        if self._acquiring is not None:
            self._acquiring.cancel()
        self._changed.set()

    async def run(self, path: Path, *, done: set[int], seconds: float) -> None:
        """Run the lines of the input that are not ``done``, for at most ``seconds``, and commit
        their answers. Raises LeaseLost."""
        loop = asyncio.get_running_loop()
        expiry = loop.call_later(max(0.0, seconds), self.stop, Stop.EXPIRED)
        committing = asyncio.create_task(self._commit_all())
        committing.add_done_callback(self._committed)
        try:
            with path.open("rb") as file:
                await self._start_all(self._lines(file, done))
        finally:
            expiry.cancel()
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)
            self._complete = True
            self._changed.set()
        await committing

    def _committed(self, committing: asyncio.Task[None]) -> None:
        if not committing.cancelled() and committing.exception() is not None:
            self.stop(Stop.LOST)

    def _lines(self, file: BinaryIO, done: set[int]) -> Iterator[InputLine]:
        # The server that validated the input may have had another limit of a line: a longer one
        # gets the answer of the route.
        for number, raw in numbered(file):
            if number not in done:
                yield parse_line(number, raw, endpoint=self.batch.endpoint)

    async def _start_all(self, lines: Iterator[InputLine]) -> None:
        while self.stopping is None:
            line = await self._next(lines)
            if line is None and not self._running and not self._again:
                return
            if line is None:  # one that runs may have to run again
                await self._wait(lambda: bool(self._running) and not self._again)
            elif await self._slot():
                task = asyncio.create_task(self._run_line(line))
                self._running.add(task)
                task.add_done_callback(self._ended)

    async def _next(self, lines: Iterator[InputLine]) -> InputLine | None:
        if self._again:
            return self._again.popleft()
        if not self._page:
            self._page.extend(await run_in_threadpool(lambda: list(islice(lines, _PAGE))))
        return self._page.popleft() if self._page else None

    async def _slot(self) -> bool:
        """Wait for a slot; False when the batch stops."""
        loop = asyncio.get_running_loop()
        await self._wait(lambda: len(self._finished) >= _MOST_UNCOMMITTED)
        while self.stopping is None and loop.time() < self._resumes_at:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(self._resumes_at):
                    await self._wait(lambda: True)
        if self.stopping is not None:
            return False
        acquiring = self._acquiring = asyncio.create_task(self._slots.acquire())
        try:
            await asyncio.wait({acquiring})
        finally:
            acquiring.cancel()
            self._acquiring = None
        return not acquiring.cancelled()

    async def _wait(self, while_: Callable[[], bool]) -> None:
        """Wait until the batch stops, or the condition is false."""
        while self.stopping is None and while_():
            self._changed.clear()
            await self._changed.wait()

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._slots.release()  # here, since a task may be cancelled before its first step
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a line of a batch was lost; it runs again", exc_info=error)
        self._changed.set()

    async def _run_line(self, line: InputLine) -> None:
        metrics = self._parts.metrics
        request_id = f"{self.batch.id}-{line.number}"
        with metrics.batch_lines_running.track_inprogress():
            try:
                response = await self._response(line, request_id)
            except BaseException:
                self._again.append(line)
                raise
        if response is None:
            return
        if response.retry_after is not None:
            metrics.batch_lines.labels(LineOutcome.RETRIED).inc()
            resumes_at = asyncio.get_running_loop().time() + response.retry_after
            self._resumes_at = max(self._resumes_at, resumes_at)
            self._again.append(line)
            return
        answer = answered(
            self.batch.id, line, status=response.status, request_id=request_id, body=response.body
        )
        metrics.batch_lines.labels(
            LineOutcome.FAILED if answer.failed else LineOutcome.COMPLETED
        ).inc()
        self._finished.append(answer)

    async def _response(self, line: InputLine, request_id: str) -> LineResponse | None:
        """None where the key of the batch is not valid any more."""
        parts = self._parts
        try:
            principal = await parts.catalog.calls.read(parts.tenants.principal, self.batch.key_id)
            return await send_line(
                parts.app,
                path=self.batch.endpoint,
                body=line.body,
                request_id=request_id,
                principal=principal,
            )
        except NotAuthenticated as error:
            self.stop(Stop.KEY, BatchError(error.code, error.message))
            return None
        except TEMPORARY:
            return LineResponse(503, b"", _STORAGE_RETRY_S)
        except Exception:
            log.exception("a line of a batch failed", request_id=request_id)
            body = error_response(internal_error(), request_id).body
            return LineResponse(500, bytes(body), None)

    async def _commit_all(self) -> None:
        """Commit answers in groups until the lines are complete. Raises LeaseLost."""
        while not self._complete or self._finished:
            if not self._finished:
                await self._changed_before(None)
                continue
            deadline = asyncio.get_running_loop().time() + GROUP_S
            while not self._complete and len(self._finished) < GROUP:
                if not await self._changed_before(deadline):
                    break
            await self._commit(self._finished[:_MOST_UNCOMMITTED])

    async def _commit(self, group: list[LineAnswer]) -> None:
        parts = self._parts
        commit = partial(parts.batches.commit, parts.holder, self.batch.id, group)
        batch = await until_available(parts.catalog.calls, commit)
        del self._finished[: len(group)]
        self.batch = batch
        if batch.status is BatchStatus.CANCELLING:
            self.stop(Stop.CANCELLED)
        self._changed.set()

    async def _changed_before(self, deadline: float | None) -> bool:
        self._changed.clear()
        try:
            async with asyncio.timeout_at(deadline):
                await self._changed.wait()
        except TimeoutError:
            return False
        return True
