"""Times one request for generation, and tells the figures, the log and the trace how it ended."""

import time

import structlog

from prefixd.server.api.generate.admission import Admitted
from prefixd.server.api.generate.usage import UsageCounter
from prefixd.server.api.metrics import Metrics
from prefixd.server.api.request_record import Outcome, RequestRecord, Started, Taken, Tracer
from prefixd.server.engine.request import FinishEvent
from prefixd.server.errors import PrefixdError

log = structlog.get_logger("prefixd.generation")


class RequestRecorder:
    """From arrival to the end. Call ``finish`` at least once."""

    def __init__(self, started: Started, *, metrics: Metrics, trace: Tracer | None = None) -> None:
        self._begun = time.perf_counter()
        self._started = started
        self._metrics = metrics
        self._trace = trace
        self._taken: Taken | None = None
        self._tally: UsageCounter | None = None
        self._first: float | None = None
        self._last: dict[int, float] = {}
        self._output_tokens = 0
        self._reasons: dict[int, str] = {}
        self._queue: float | None = None
        self._finished = False

    def admitted(self, admitted: Admitted, usage: UsageCounter, *, served_model: str) -> None:
        """It fits, and goes to the engine. ``usage`` is kept by whoever makes the answer."""
        self._tally = usage
        prefix, request = admitted.prefix, admitted.requests[0]
        self._taken = Taken(
            id=admitted.id,
            model=admitted.model,
            served_model=served_model,
            digest=None if prefix is None else prefix.digest,
            virtual_tokens=0 if prefix is None else prefix.num_virtual_tokens,
            choices=admitted.num_choices,
            max_tokens=request.stop.max_tokens,
            temperature=request.sampling.temperature,
        )

    def tokens(self, choice: int, count: int) -> None:
        """``count`` tokens of one sequence just arrived."""
        if not count:
            return
        now = time.perf_counter()
        before = self._last.get(choice)
        self._last[choice] = now
        self._output_tokens += count
        if self._first is None:
            self._first = now
            self._metrics.first_token(self._started, now - self._begun)
        if before is not None:
            self._metrics.gaps(self._started, (now - before) / count, count)

    def ended(self, choice: int, event: FinishEvent) -> None:
        """One sequence is done."""
        self._reasons[choice] = event.reason.value
        if event.queue_s is not None:
            self._queue = min(self._queue or event.queue_s, event.queue_s)

    def finish(self, outcome: Outcome, error: Exception | None = None) -> None:
        """The request ended. Later calls change nothing: the first outcome is the true one."""
        if self._finished:
            return
        self._finished = True
        record = self._record(outcome, error)
        self._metrics.ended(record)
        log.info("generation", **record.log_fields())
        if self._trace is not None:
            self._trace(record)

    def _record(self, outcome: Outcome, error: Exception | None) -> RequestRecord:
        usage = self._tally
        completed = 0 if usage is None else usage.completion_tokens
        return RequestRecord(
            started=self._started,
            taken=self._taken,
            outcome=outcome,
            error_code=error.code if isinstance(error, PrefixdError) else None,
            prompt_tokens=0 if usage is None else usage.prompt_tokens,
            output_tokens=max(self._output_tokens, completed),
            cached_tokens=0 if usage is None else usage.cached_tokens,
            queue=self._queue,
            first_token=None if self._first is None else self._first - self._begun,
            total=time.perf_counter() - self._begun,
            finish_reasons=tuple(reason for _, reason in sorted(self._reasons.items())),
        )
