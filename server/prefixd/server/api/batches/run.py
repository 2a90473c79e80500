"""One batch on this server: validate its input, run its lines, write its files."""

import asyncio
from functools import partial

import structlog

from prefixd.server.api.batches.assembly import LOST_INPUT
from prefixd.server.api.batches.line_runner import BatchParts, LineRunner, Stop
from prefixd.server.api.batches.lines import Validated, validate
from prefixd.server.api.batches.storage_calls import until_available
from prefixd.server.errors import NotAuthenticated
from prefixd.server.tenants.batch_records import BatchError, BatchRecord
from prefixd.server.tenants.batch_state import BatchStatus
from prefixd.server.tenants.batches import LeaseLost

log = structlog.get_logger("prefixd")


class BatchRun:
    """Runs a batch that this server holds, until it has ended or is stopped."""

    def __init__(self, batch: BatchRecord, parts: BatchParts, *, slots: asyncio.Semaphore) -> None:
        self._parts = parts
        self._lines = LineRunner(batch, parts, slots=slots)

    @property
    def batch(self) -> BatchRecord:
        """The batch as this server last saw it."""
        return self._lines.batch

    @property
    def num_waiting(self) -> int:
        """Lines without an answer that do not run now."""
        return self._lines.num_waiting

    def stop(self, reason: Stop) -> None:
        """Run no more lines, on the same event loop."""
        self._lines.stop(reason)

    async def run(self) -> None:
        """Run to the end. A batch that is released or lost is left as it is."""
        try:
            if self.batch.status is BatchStatus.VALIDATING:
                await self._validate()
            if self.batch.status is BatchStatus.IN_PROGRESS:
                await self._run_lines()
            if self.batch.status in {BatchStatus.FINALIZING, BatchStatus.CANCELLING}:
                await self._finish()
        except LeaseLost:
            log.info("a batch is not held by this server any more", batch=self.batch.id)

    async def _validate(self) -> None:
        parts, batch = self._parts, self.batch
        try:
            valid = await until_available(parts.catalog.long_calls, self._validated)
        except LOST_INPUT as error:
            valid = Validated(0, (BatchError("input_unavailable", error.message),))
        except NotAuthenticated as error:
            valid = Validated(0, (BatchError(error.code, error.message),))
        if valid.errors:
            await self._end_early(BatchStatus.FAILED, valid.errors)
        elif parts.batches.seconds_left(batch) <= 0:
            await self._end_early(BatchStatus.EXPIRED)
        else:
            await self._change(
                partial(parts.batches.begin, parts.holder, batch.id, total=valid.total)
            )
            log.info("a batch runs", batch=batch.id, tenant=batch.tenant, lines=valid.total)

    def _validated(self) -> Validated:
        """Blocking. Raises LOST_INPUT, NotAuthenticated."""
        parts = self._parts
        quota = parts.tenants.principal(self.batch.key_id).quota
        with parts.assembly.input_of(self.batch).open("rb") as file:
            return validate(
                file,
                endpoint=self.batch.endpoint,
                max_lines=quota.max_batch_lines,
                max_bytes=parts.assembly.max_bytes,
            )

    async def _run_lines(self) -> None:
        parts, batch = self._parts, self.batch
        try:
            path = await until_available(parts.catalog.long_calls, parts.assembly.input_of, batch)
        except LOST_INPUT as error:
            await self._end_early(
                BatchStatus.FAILED, [BatchError("input_unavailable", error.message)]
            )
            return
        done = await until_available(parts.catalog.calls, parts.batches.answered, batch.id)
        await self._lines.run(path, done=done, seconds=parts.batches.seconds_left(batch))
        match self._lines.stopping:
            case None | Stop.CANCELLED:  # nothing changes for one that is being cancelled
                await self._change(partial(parts.batches.complete, parts.holder, batch.id))
            case Stop.EXPIRED:
                await self._end_early(BatchStatus.EXPIRED)
            case Stop.KEY:
                assert self._lines.failure is not None
                await self._end_early(BatchStatus.FAILED, [self._lines.failure])
            case Stop.RELEASED | Stop.LOST:
                return

    async def _finish(self) -> None:
        parts, calls = self._parts, self._parts.catalog.long_calls
        self._lines.batch = await until_available(
            calls, parts.assembly.finish, parts.holder, self.batch
        )
        await until_available(calls, parts.batches.remove_answers, self.batch.id)
        self._report()

    async def _end_early(
        self, outcome: BatchStatus, errors: "tuple[BatchError, ...] | list[BatchError]" = ()
    ) -> None:
        parts = self._parts
        end = parts.batches.end_early
        await self._change(partial(end, parts.holder, self.batch.id, outcome, errors))
        if self.batch.has_ended:
            self._report()

    async def _change(self, call: "partial[BatchRecord]") -> None:
        self._lines.batch = await until_available(self._parts.catalog.calls, call)

    def _report(self) -> None:
        batch = self.batch
        log.info(
            "a batch has ended",
            batch=batch.id,
            tenant=batch.tenant,
            status=batch.status.value,
            total=batch.total,
            completed=batch.completed,
            failed=batch.failed,
        )
