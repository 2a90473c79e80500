"""The accounting of one request for generation: metrics, log, trace, usage and charge."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from types import TracebackType
from typing import Any, Protocol, Self

import structlog
from sqlalchemy.exc import SQLAlchemyError

from prefixd.server.api.admitted import Admitted
from prefixd.server.api.metrics import Endpoint, Metrics, Outcome, TenantClass
from prefixd.server.api.settlements import Settlements
from prefixd.server.engine.request import FinishEvent
from prefixd.server.errors import (
    DeadlineExceeded,
    InsufficientStorage,
    PrefixdError,
    Unavailable,
)
from prefixd.server.tenants.limiter import Grant, Limiter
from prefixd.store.errors import BlobsUnavailable, CorruptArtifact, StoreError
from prefixd.store.store import Manifest

log = structlog.get_logger("prefixd")
generation_log = structlog.get_logger("prefixd.generation")

_SHORT_DIGEST = 12


class ClientGone(Exception):
    """The client closed the connection before its response was complete."""


def outcome_of(error: BaseException) -> Outcome:
    """The outcome of a request that raised ``error``; its task may have been cancelled."""
    match error:
        case ClientGone() | asyncio.CancelledError() | GeneratorExit():
            return Outcome.ABORTED
        case Unavailable() | InsufficientStorage() | BlobsUnavailable() | SQLAlchemyError():
            return Outcome.UNAVAILABLE
        case DeadlineExceeded():
            return Outcome.TIMEOUT
        case PrefixdError() if error.status < HTTPStatus.INTERNAL_SERVER_ERROR:
            return Outcome.REFUSED
        case StoreError() if not isinstance(error, CorruptArtifact):
            return Outcome.REFUSED
        case _:
            return Outcome.ERROR


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """One request for generation, for metrics, log, trace and ``usage``. No prompt and no text.

    ``at_ns`` is Unix time; ``trace_context`` are the W3C headers as received; ``admitted`` is None
    when the request was refused. Times in seconds: ``queue`` is from submission until the first
    sequence began to run, ``first_token`` and ``total`` count from arrival; None when that point
    was not reached. ``generated_tokens`` counts the tokens received from the engine, those of an
    ensemble once for each row; ``agreed`` and ``compared`` how often each member of an ensemble
    agreed with its answers: with their tokens, or with whole ones where they vote.
    """

    endpoint: Endpoint
    tenant: str
    tenant_class: TenantClass
    served_model: str
    request_id: str | None = None
    stream: bool = False
    trace_context: Mapping[str, str] = field(default_factory=dict)
    at_ns: int = field(default_factory=time.time_ns)
    admitted: Admitted | None = None
    outcome: Outcome = Outcome.OK
    error_code: str | None = None
    generated_tokens: int = 0
    queue: float | None = None
    first_token: float | None = None
    total: float = 0.0
    finished: dict[int, FinishEvent] = field(default_factory=dict)
    agreed: list[int] = field(default_factory=list)
    compared: int = 0

    def sequence_finished(self, choice: int, event: FinishEvent) -> None:
        """One sequence of the request ended."""
        self.finished[choice] = event
        if event.queue_s is not None:
            self.queue = event.queue_s if self.queue is None else min(self.queue, event.queue_s)
        if event.agreed:
            self.members_agreed(event.agreed, compared=event.completion_tokens)

    def members_agreed(self, counts: Sequence[int], *, compared: int) -> None:
        """Count how often each member of an ensemble agreed."""
        self.agreed = [
            sum(pair) for pair in zip(self.agreed or [0] * len(counts), counts, strict=True)
        ]
        self.compared += compared

    @property
    def num_rows(self) -> int:
        """Sequences that each answer of the engine takes."""
        return self.admitted.num_rows if self.admitted else 1

    @property
    def completion_tokens(self) -> int:
        """Tokens of the sequences that ended, those of an ensemble for each row."""
        return self.num_rows * sum(event.completion_tokens for event in self.finished.values())

    @property
    def output_tokens(self) -> int:
        """Tokens of all sequences, whether they ended or not."""
        return max(self.generated_tokens, self.completion_tokens)

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens whose KV was shared and not computed.

        A prompt counts once for its n sequences, with the least that any of them shared: the later
        ones share what the first computed.
        """
        cached: dict[int, int] = {}
        n = self.admitted.requests[0].n if self.admitted else 1
        for choice, event in self.finished.items():
            if choice and self.admitted and self.admitted.shared_tokens:
                continue  # what it shares was computed for the first one
            prompt = choice // n
            cached[prompt] = min(cached.get(prompt, event.cached_tokens), event.cached_tokens)
        return sum(cached.values())

    @property
    def finish_reasons(self) -> tuple[str, ...]:
        """Why the sequences ended, in the order of the choices."""
        return tuple(event.reason.value for _, event in sorted(self.finished.items()))

    def usage(self) -> dict[str, Any]:
        """The ``usage`` object of the response; virtual tokens are not included."""
        prompt_tokens = self.admitted.prompt_tokens if self.admitted else 0
        completion_tokens = self.completion_tokens
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }

    def log_fields(self) -> dict[str, Any]:
        """Fields of the log line that are known; no names that tenants chose."""
        fields: dict[str, Any] = {
            "request_id": self.request_id,
            "tenant": self.tenant,
            "endpoint": self.endpoint.value,
            "stream": self.stream,
            "outcome": self.outcome.value,
            "code": self.error_code,
            "queue_seconds": self.queue,
            "first_token_seconds": self.first_token,
            "seconds": self.total,
        }
        if self.admitted is not None:
            prefix = self.admitted.prefix.manifest if self.admitted.prefix else None
            fields |= {
                "id": self.admitted.id,
                "prefix": prefix.digest[:_SHORT_DIGEST] if prefix else None,
                "virtual_tokens": prefix.num_virtual_tokens if prefix else 0,
                "choices": self.admitted.num_choices,
                "prompt_tokens": self.admitted.prompt_tokens,
                "cached_tokens": self.cached_tokens,
                "output_tokens": self.output_tokens,
                "finish_reasons": list(self.finish_reasons),
            }
        return {
            name: round(value, 4) if isinstance(value, float) else value
            for name, value in fields.items()
            if value is not None
        }


class Tracer(Protocol):
    """A further destination of records, in addition to metrics and log."""

    def __call__(self, record: RequestRecord) -> None:
        """Export a record. Must neither block nor raise."""
        ...

    def close(self) -> None:
        """Flush what was exported, and accept nothing more."""
        ...


CountAgreement = Callable[[Manifest, Sequence[int], int], None]
"""Adds to the counts of a saved ensemble: for each member how often it agreed, of how many times.
Blocking. Raises SQLAlchemyError."""


@dataclass(slots=True, kw_only=True)
class RequestRecorder:
    """Entered when a request arrives. On exit the outcome is recorded and the tenant's charge is
    settled, once, however the request ended.

    ``grant`` is set when the limiter has admitted the request.
    """

    record: RequestRecord
    metrics: Metrics
    limiter: Limiter
    settlements: Settlements
    trace: Tracer | None = None
    count_agreement: CountAgreement | None = None
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
            record.outcome = outcome_of(error)
            record.error_code = error.code if isinstance(error, PrefixdError) else None
        self.metrics.ended(
            record.endpoint,
            record.outcome,
            record.tenant_class,
            total=record.total,
            queue=record.queue,
        )
        generation_log.info("generation", **record.log_fields())
        if self.trace is not None:
            self.trace(record)
        if record.agreed and record.admitted is not None and self.count_agreement is not None:
            self._count_agreement(record.admitted, self.count_agreement)
        grant = self.grant
        if grant is not None and grant.quota.is_metered and not self._settled_later(grant):
            # Goes on when this task is cancelled: the lease would stay until it expires.
            await self.settlements.settle(partial(self._settle, grant))

    def tokens(self, choice: int, count: int, *, now: float) -> None:
        """Count new tokens of one sequence, which were taken together ``now``, by
        ``time.perf_counter``: each took an equal part of the time since the last ones."""
        if not count:
            return
        self.record.generated_tokens += count * self.record.num_rows
        if self.record.first_token is None:
            self.record.first_token = now - self._arrived
            self.metrics.first_token[self.record.endpoint].observe(self.record.first_token)
        last = self._last_token.get(choice)
        num_gaps = count if last is not None else count - 1
        if num_gaps:
            gap = 0.0 if last is None else (now - last) / num_gaps
            self.metrics.per_token[self.record.endpoint].observe(gap, num_gaps)
        self._last_token[choice] = now

    def _count_agreement(self, admitted: Admitted, count: CountAgreement) -> None:
        """In the background: no answer waits for it."""
        prefix, agreed, compared = admitted.prefix, tuple(self.record.agreed), self.record.compared
        if prefix is not None and prefix.manifest.version:
            manifest = prefix.manifest
            self.settlements.add(lambda _again: count(manifest, agreed, compared))

    @property
    def _is_unserved(self) -> bool:
        return self.record.outcome is Outcome.UNAVAILABLE and not self.record.generated_tokens

    def _settled_later(self, grant: Grant) -> bool:
        """Whether the limiter charges the output without a transaction for this request alone."""
        if self._is_unserved:
            return False
        return self.limiter.settle_later(grant, output_tokens=self.record.generated_tokens)

    def _settle(self, grant: Grant, unsure: bool) -> None:
        """Charge the output, or return the tokens of a request that the server could not serve.
        Raises SQLAlchemyError."""
        record, limiter = self.record, self.limiter
        if self._is_unserved:
            tokens = record.admitted.charged_tokens if record.admitted else 0
            limiter.give_back(grant, tokens=tokens, unsure=unsure)
        else:
            limiter.settle(grant, output_tokens=record.generated_tokens, unsure=unsure)
