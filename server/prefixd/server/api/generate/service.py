"""What runs a request on the engine: admission, charge, accounting, and the end of it all."""

import asyncio
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from prefixd.server.api.admitted import Admitted
from prefixd.server.api.body import declared_bytes
from prefixd.server.api.catalog_calls import waited_by
from prefixd.server.api.dependencies import INSIDE, bounds_of
from prefixd.server.api.drain_state import DrainState
from prefixd.server.api.error_responses import from_queue_full
from prefixd.server.api.generate.admission import Admission
from prefixd.server.api.generate.charging import Charging
from prefixd.server.api.generate.constraints import ConstraintLoader
from prefixd.server.api.generate.ensembles import check_shape, fused
from prefixd.server.api.generate.event_stream import while_connected
from prefixd.server.api.generate.generation import Batch, EventDeliveries, Generation
from prefixd.server.api.generate.inputs import InputLoader
from prefixd.server.api.generate.votes import voted
from prefixd.server.api.metrics import Endpoint, Metrics, TenantClass
from prefixd.server.api.request_record import RequestRecord, RequestRecorder, Tracer
from prefixd.server.api.served import ServedModel
from prefixd.server.api.tenant_bounds import CATALOG_WAIT_S
from prefixd.server.engine.engine import Engine
from prefixd.server.engine.request import QueueFull
from prefixd.server.errors import TooManyTemplates, Unavailable
from prefixd.server.tenants.limiter import Grant
from prefixd.server.tenants.principal import Principal
from prefixd.store.store import Manifest

CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that disconnected first. It is only logged."""

QUICK_BYTES = 2048
"""Bodies up to this size take about a millisecond to admit, and three with 128 prompts: so long may
streams wait."""

_RETRY_S = 0.02  # a template takes about as long to render

TRACE_HEADERS = ("traceparent", "tracestate")
"""W3C trace context."""


@dataclass(frozen=True, slots=True)
class Running:
    """A request on the engine, and the headers of its response."""

    events: AsyncIterable[Batch]
    record: RequestRecord
    admitted: Admitted
    headers: dict[str, str]


@dataclass(frozen=True, slots=True)
class GenerationService:
    """Admits requests and runs them on the engine. One for each application."""

    admission: Admission
    engine: Engine
    charging: Charging
    drain_state: DrainState
    served: ServedModel
    metrics: Metrics
    inputs: InputLoader
    constraints: ConstraintLoader
    trace: Tracer | None = None
    user_header: str | None = None
    deliveries: EventDeliveries = field(default_factory=EventDeliveries)

    @asynccontextmanager
    async def running(
        self,
        request: Request,
        principal: Principal,
        admit: Callable[[], Admitted],
        *,
        endpoint: Endpoint,
        stream: bool = False,
        is_quick: bool = False,
        embedding_bytes: int = 0,
    ) -> AsyncIterator[Running]:
        """Admit with ``admit`` and run on the engine inside the block, which ends with the
        response; it raises ClientGone when the client disconnects. ``is_quick``: admission neither
        asks the catalog nor computes for long."""
        recorder = self._recorder(request, principal, endpoint, stream=stream)
        # All contexts entered here exit before the block has ended, the recorder last.
        async with AsyncExitStack() as contexts:
            await contexts.enter_async_context(recorder)
            is_background = INSIDE in request.scope["state"]
            self._check_ready(principal, background=is_background)
            if embedding_bytes:
                held = bounds_of(request).embeddings
                await contexts.enter_async_context(held.hold(principal.tenant, embedding_bytes))
            # The length of a chunked body is not declared.
            is_short = 0 < declared_bytes(request) <= QUICK_BYTES
            admitted, recorder.grant = await self._admit(
                request,
                principal,
                lambda: check_shape(admit(), stream=stream, background=is_background),
                is_quick=is_quick and is_short,
            )
            if is_background:
                admitted = admitted.in_background(server_timeout=self.admission.max_seconds)
            recorder.record.admitted = admitted
            admitted = await self.constraints.fill(await self.inputs.fill(admitted))
            recorder.record.admitted = admitted = fused(admitted)
            generation = Generation(
                self.engine, admitted, self.drain_state, recorder, self.deliveries.running()
            )
            await contexts.enter_async_context(generation)
            await contexts.enter_async_context(while_connected(request.receive))
            events: AsyncIterable[Batch] = generation
            if admitted.num_members > 1:
                votes = voted(generation, admitted, recorder.record)
                events = await contexts.enter_async_context(aclosing(votes))
            yield Running(events, recorder.record, admitted, _headers(admitted, recorder))

    async def _admit(
        self,
        request: Request,
        principal: Principal,
        admit: Callable[[], Admitted],
        *,
        is_quick: bool,
    ) -> tuple[Admitted, Grant]:
        """Admit and charge. A request that finds no place to render its tenant's template waits
        without a thread, and tries again."""
        waited, begun = waited_by(request), time.monotonic()
        try:
            return await self.charging.admit(principal, admit, waited=waited, is_quick=is_quick)
        except TooManyTemplates:
            pass
        async with bounds_of(request).templates.hold(principal.tenant, waited=waited):
            while True:
                passed = waited + time.monotonic() - begun
                try:
                    return await self.charging.admit(principal, admit, waited=passed)
                except TooManyTemplates:
                    if passed > CATALOG_WAIT_S:
                        raise
                await asyncio.sleep(_RETRY_S)

    def _recorder(
        self, request: Request, principal: Principal, endpoint: Endpoint, *, stream: bool
    ) -> RequestRecorder:
        headers = request.headers
        record = RequestRecord(
            endpoint=endpoint,
            tenant=principal.tenant,
            tenant_class=TenantClass.of(principal.weight),
            served_model=self.served.name,
            request_id=request.state.request_id,
            stream=stream,
            trace_context={name: headers[name] for name in TRACE_HEADERS if name in headers},
        )
        return RequestRecorder(
            record=record,
            metrics=self.metrics,
            limiter=self.charging.limiter,
            settlements=self.charging.catalog.settlements,
            trace=self.trace,
            count_agreement=self.admission.resolver.store.count_agreement,
        )

    def _check_ready(self, principal: Principal, *, background: bool) -> None:
        """Raise Unavailable, before any work, for a request that the engine would not take."""
        if self.drain_state.closed:
            raise self.drain_state.refusal()
        trouble = self.engine.trouble
        if trouble is not None:
            raise Unavailable(trouble, retry_after=1)
        try:
            self.engine.check_room(principal.tenant, weight=principal.weight, background=background)
        except QueueFull as full:
            raise from_queue_full(full, self.drain_state) from full


def _headers(admitted: Admitted, recorder: RequestRecorder) -> dict[str, str]:
    """The remaining rate limits and the prefix that is used, for clients that read no bodies."""
    headers = dict(recorder.grant.headers) if recorder.grant else {}
    if admitted.prefix is not None:
        manifest = admitted.prefix.manifest
        headers["x-prefixd-prefix"] = (
            manifest.reference
            if manifest.version
            else ",".join(member.reference for member in manifest.members)
        )
        headers["x-prefixd-prefix-digest"] = manifest.digest
        headers["x-prefixd-prefix-chosen-by"] = admitted.prefix.chosen_by
    return headers


def composition_of(manifest: Manifest) -> dict[str, Any]:
    """What a composition is made of, for responses."""
    members = [
        {
            "reference": member.reference,
            "digest": member.digest,
            **({} if member.weight is None else {"weight": member.weight}),
        }
        for member in manifest.members
    ]
    combine = {} if manifest.combine is None else {"combine": manifest.combine}
    return {"kind": manifest.kind, "members": members, **combine}


def envelope(admitted: Admitted, kind: str) -> dict[str, Any]:
    """The fields of a response other than its choices."""
    prefix, used = admitted.prefix, None
    if prefix is not None:
        manifest = prefix.manifest
        is_saved = manifest.version > 0
        used = {
            "name": manifest.name if is_saved else None,
            "version": manifest.version if is_saved else None,
            "digest": manifest.digest,
            "chosen_by": prefix.chosen_by,
            "recipe_revision": manifest.recipe_revision,
        }
        if manifest.members:
            used |= composition_of(manifest)
    return {
        "id": admitted.id,
        "object": kind,
        "created": int(time.time()),
        "model": admitted.model,
        "prefix": used,
    }


def service_of(request: Request) -> GenerationService:
    """That of the application."""
    # Not a dependency: FastAPI would solve one more for each request.
    service: GenerationService = request.app.state.generation
    return service
