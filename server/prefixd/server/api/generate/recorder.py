"""The accounting of one request for generation: metrics, log, trace and the tenant's charge."""

import asyncio
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import structlog
from fastapi.concurrency import run_in_threadpool
from sqlalchemy.exc import SQLAlchemyError

from prefixd.server.api.metrics import Metrics
from prefixd.server.api.request_record import Outcome, RequestRecord, Tracer
from prefixd.server.engine.request import TokenEvent
from prefixd.server.errors import PrefixdError
from prefixd.server.tenants.limiter import Grant, Limiter

log = structlog.get_logger("prefixd")
generation_log = structlog.get_logger("prefixd.generation")


@dataclass(slots=True, kw_only=True)
class RequestRecorder:
    """Entered when a request arrives. On exit the outcome is recorded and the tenant's charge is
    settled, once, however the request ended.

    ``grant`` is set when the limiter has admitted the request.
    """

    record: RequestRecord
    metrics: Metrics
    limiter: Limiter
    trace: Tracer | None = None
    grant: Grant | None = None
    _arrived: float = field(default_factory=time.perf_counter)
    _last_token: dict[int, float] = field(default_factory=dict)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        record = self.record
        record.total = time.perf_counter() - self._arrived
        if error is not None:
            record.outcome = Outcome.of(error)
            record.error_code = error.code if isinstance(error, PrefixdError) else None
        self.metrics.ended(record)
        generation_log.info("generation", **record.log_fields())
        if self.trace is not None:
            self.trace(record)
        if self.grant is not None and self.grant.quota.is_metered:
            # Goes on when this task is cancelled: the lease would stay until it expires.
            await asyncio.shield(run_in_threadpool(self._settle, self.grant))

    def token(self, choice: int, event: TokenEvent) -> None:
        """Count new tokens of one sequence."""
        count = len(event.token_ids)
        if not count:
            return
        now = time.perf_counter()
        self.record.generated_tokens += count
        if self.record.first_token is None:
            self.record.first_token = now - self._arrived
            self.metrics.first_token[self.record.endpoint].observe(self.record.first_token)
        if choice in self._last_token:
            gap = (now - self._last_token[choice]) / count
            for _ in event.token_ids:
                self.metrics.per_token[self.record.endpoint].observe(gap)
        self._last_token[choice] = now

    def _settle(self, grant: Grant) -> None:
        """Charge the output, or return the tokens of a request that the server could not serve.

        Without a database the lease expires by itself; the response is not lost.
        """
        record = self.record
        try:
            if record.outcome is Outcome.UNAVAILABLE and not record.generated_tokens:
                prompt_tokens = record.admitted.prompt_tokens if record.admitted else 0
                self.limiter.give_back(grant, tokens=prompt_tokens)
            else:
                self.limiter.settle(grant, output_tokens=record.generated_tokens)
        except SQLAlchemyError:
            log.exception("a request's limits were not settled", tenant=grant.tenant)
