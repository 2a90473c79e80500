"""One way for both generating routes: admit, run, answer at once or as a stream."""

import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from starlette.responses import Response

from prefixd.server.api.drain_state import DrainState
from prefixd.server.api.error_responses import error_body, fault_of_ours, request_id_of
from prefixd.server.api.generate.admission import Admission, Admitted
from prefixd.server.api.generate.charge import UsageCharge
from prefixd.server.api.generate.error_responses import failure_of, refusal_of
from prefixd.server.api.generate.event_stream import ClientGone, Generation, while_connected
from prefixd.server.api.generate.formatter import ChoiceBuffer, PrefixUsed, ResponseFormatter
from prefixd.server.api.generate.recorder import RequestRecorder
from prefixd.server.api.generate.requests import GenerationFields
from prefixd.server.api.generate.sse import DONE, EventStream, frame
from prefixd.server.api.generate.usage import UsageCounter
from prefixd.server.api.metrics import Metrics
from prefixd.server.api.request_record import Outcome, Started, TenantClass, Tracer
from prefixd.server.api.served import ServedModel
from prefixd.server.engine.engine import Engine
from prefixd.server.engine.request import FinishEvent, QueueFull, TokenEvent
from prefixd.server.errors import PrefixdError, Unavailable
from prefixd.server.tenants.limiter import Grant, Limiter
from prefixd.server.tenants.principal import Principal

CLIENT_CLOSED_REQUEST = 499
"""What nginx logs when the client left first; nobody receives it."""

TRACE_HEADERS = ("traceparent", "tracestate")
"""W3C trace context."""


@dataclass(frozen=True, slots=True)
class GenerationService:
    """Admits requests and runs them on the engine, for both generating routes."""

    admission: Admission
    engine: Engine
    limiter: Limiter
    drain_state: DrainState
    served: ServedModel
    metrics: Metrics
    trace: Tracer | None = None

    async def respond(
        self,
        request: Request,
        principal: Principal,
        body: GenerationFields,
        admit: Callable[[], Admitted],
        formatter: ResponseFormatter,
    ) -> Response:
        """Run ``admit`` off the loop, charge the tenant, run the request on the engine, and format
        the outcome."""

        def admit_and_charge() -> tuple[Admitted, Grant]:
            admitted = admit()
            grant = self.limiter.admit(
                principal.tenant, principal.quota, tokens=admitted.prompt_tokens
            )
            return admitted, grant

        started = Started(
            endpoint=formatter.endpoint,
            tenant=principal.tenant,
            tenant_class=TenantClass.of(principal.weight),
            request_id=request_id_of(request),
            stream=bool(body.stream),
            at_ns=time.time_ns(),
            trace={
                name: request.headers[name] for name in TRACE_HEADERS if name in request.headers
            },
        )
        recorder = RequestRecorder(started, metrics=self.metrics, trace=self.trace)
        try:
            self._check_ready(principal)
            admitted, grant = await run_in_threadpool(admit_and_charge)
        except Exception as error:
            recorder.finish(Outcome.of(error), error)
            raise
        usage = UsageCounter(admitted)
        recorder.admitted(admitted, usage, served_model=self.served.name)
        answer = _Answer(
            engine=self.engine,
            drain_state=self.drain_state,
            admitted=admitted,
            bill=UsageCharge(self.limiter, grant, prompt_tokens=admitted.prompt_tokens),
            formatter=formatter,
            watch=recorder,
            usage=usage,
            created=int(time.time()),
            wants_usage=body.wants_usage,
            request_id=request_id_of(request),
        )
        try:
            if not body.stream:
                whole = await while_connected(request.receive, answer.whole())
                return JSONResponse(whole, headers=answer.headers)
            frames = answer.frames()
            # The first frame decides the status: a request the engine fails at once is an error
            # response and not a stream.
            first = await while_connected(request.receive, _next(frames))
            return EventStream(first, frames, answer.headers)
        except ClientGone:
            # The client may have left before the work began.
            recorder.finish(Outcome.ABORTED)
            await answer.bill.settle()
            return Response(status_code=CLIENT_CLOSED_REQUEST)

    def _check_ready(self, principal: Principal) -> None:
        """Raise Unavailable, before any work is done, for a request the engine would refuse."""
        self.drain_state.check()
        trouble = self.engine.trouble
        if trouble is not None:
            raise Unavailable(trouble, retry_after=1)
        try:
            self.engine.check_room(principal.tenant, weight=principal.weight)
        except QueueFull as full:
            raise refusal_of(full, self.drain_state) from full


async def _next(frames: AsyncGenerator[bytes]) -> bytes:
    return await anext(frames)


@dataclass(frozen=True, slots=True)
class _Answer:
    """One admitted request on its way back."""

    engine: Engine
    drain_state: DrainState
    admitted: Admitted
    bill: UsageCharge
    formatter: ResponseFormatter
    watch: RequestRecorder
    usage: UsageCounter
    created: int
    wants_usage: bool
    request_id: str | None

    @property
    def headers(self) -> dict[str, str]:
        """Which prefix answers and what is left of the rates, for those who read no bodies."""
        used = self._used
        if used is None:
            return dict(self.bill.headers)
        return {
            **self.bill.headers,
            "x-prefixd-prefix": f"{used.name}@{used.version}",
            "x-prefixd-prefix-digest": used.digest,
            "x-prefixd-prefix-chosen-by": used.chosen_by,
        }

    async def whole(self) -> dict[str, Any]:
        """Everything at once. Raises EngineFailure, DeadlineExceeded or Unavailable when a
        sequence has no complete answer."""
        choices = [ChoiceBuffer() for _ in range(self.admitted.num_choices)]
        try:
            async with Generation(self.engine, self.admitted, self.drain_state) as generation:
                async for choice, event in generation:
                    if isinstance(event, FinishEvent):
                        self._ended(choice, event)
                        choices[choice].finish_reason = event.reason
                    else:
                        self._generated(choice, event)
                        choices[choice].add(event)
            answer = {
                **self._envelope(self.formatter.object),
                "choices": [
                    self.formatter.whole(choice, one) for choice, one in enumerate(choices)
                ],
                "usage": self.usage.usage(),
            }
            self.watch.finish(Outcome.OK)
        except Exception as error:
            self._failed(error)
            raise
        finally:
            self.watch.finish(Outcome.ABORTED)
            await self.bill.settle()
        return answer

    async def frames(self) -> AsyncGenerator[bytes]:
        """The same as server-sent events. A refusal is raised only before the first frame."""
        choices = [ChoiceBuffer() for _ in range(self.admitted.num_choices)]
        opened = False
        try:
            async with Generation(self.engine, self.admitted, self.drain_state) as generation:
                async for choice, event in generation:
                    if isinstance(event, FinishEvent):
                        self._ended(choice, event)
                    if not opened:
                        opened = True
                        for each in range(len(choices)):
                            opening = self.formatter.opening(each)
                            if opening is not None:
                                yield self._chunk([opening])
                    if isinstance(event, FinishEvent):
                        yield self._chunk([self.formatter.closing(choice, event.reason)])
                        continue
                    self._generated(choice, event)
                    if event.text or event.logprobs:
                        yield self._chunk([self.formatter.delta(choice, event, choices[choice])])
            if self.wants_usage:
                yield self._chunk([], usage=self.usage.usage())
            # Before the last frame: who has read it may send the next request.
            await self.bill.settle()
            self.watch.finish(Outcome.OK)
            yield DONE
        except Exception as error:
            self._failed(error)
            if not opened:
                raise
            told = error if isinstance(error, PrefixdError) else fault_of_ours()
            yield frame(error_body(told, self.request_id))
            await self.bill.settle()
            yield DONE
            if told is not error:
                raise  # for the log
        finally:
            self.watch.finish(Outcome.ABORTED)
            await self.bill.settle()

    def _generated(self, choice: int, event: TokenEvent) -> None:
        self.watch.tokens(choice, len(event.token_ids))
        self.bill.output_tokens += len(event.token_ids)

    def _ended(self, choice: int, event: FinishEvent) -> None:
        """Raise when a sequence of this request failed: the others are not worth waiting for."""
        self.watch.ended(choice, event)
        self.usage.ended(choice, event)
        failure = failure_of(event, self.drain_state)
        if failure is not None:
            raise failure

    def _failed(self, error: Exception) -> None:
        outcome = Outcome.of(error)
        self.watch.finish(outcome, error)
        self.bill.unserved = outcome is Outcome.UNAVAILABLE

    def _chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> bytes:
        chunk = {**self._envelope(self.formatter.chunk_object), "choices": choices}
        if self.wants_usage:
            chunk["usage"] = usage
        return frame(chunk)

    def _envelope(self, kind: str) -> dict[str, Any]:
        used = self._used
        return {
            "id": self.admitted.id,
            "object": kind,
            "created": self.created,
            "model": self.admitted.model,
            "prefix": used and used.model_dump(),
        }

    @property
    def _used(self) -> PrefixUsed | None:
        prefix, why = self.admitted.prefix, self.admitted.choice.chosen_by
        if prefix is None or why is None:
            return None
        return PrefixUsed(
            name=prefix.name, version=prefix.version, digest=prefix.digest, chosen_by=why
        )
