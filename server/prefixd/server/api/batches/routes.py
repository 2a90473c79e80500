"""/v1/batches: create, get, list and cancel, in OpenAI's shape."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response

from prefixd.server.api.batches.schemas import BatchList, BatchShown, NewBatchRequest
from prefixd.server.api.body import json_body, json_request
from prefixd.server.api.catalog_calls import CatalogRoute
from prefixd.server.api.dependencies import Acting, BatchesDep, Generator
from prefixd.server.api.repeats import RepeatableDep
from prefixd.server.api.values import WholeNumber
from prefixd.server.tenants.batches import NewBatch
from prefixd.server.tenants.idempotency import Keep, Replay

router = APIRouter(prefix="/v1/batches", tags=["batches"], route_class=CatalogRoute)


@router.post("", response_model=BatchShown, openapi_extra=json_request(NewBatchRequest))
def create_batch(
    *,
    request: Request,
    response: Response,
    batches: BatchesDep,
    repeat: RepeatableDep,
    _principal: Generator,
    actor: Acting,
    body: Annotated[NewBatchRequest, Depends(json_body(NewBatchRequest))],
) -> Any:
    """Run the lines of a file, each as a request to `endpoint`, with what the server has idle.

    The input is validated afterwards: the batch is `failed` when a line is not valid.
    """
    body.check_endpoint()
    expiry = body.output_expires_after
    new = NewBatch(
        endpoint=body.endpoint,
        input_file_id=body.input_file_id,
        completion_window=body.completion_window,
        window=body.window(),
        metadata=body.metadata or {},
        output_expires_after=None if expiry is None else expiry.seconds,
    )

    def change(keep: Keep) -> Replay:
        replays: list[Replay] = []

        def stored(connection: Any, batch: Any) -> None:
            replays.append(Replay(200, BatchShown.of(batch).model_dump(mode="json")))
            keep(connection, replays[0])

        batches.create(new, actor=actor, at_end=stored)
        return replays[0]

    shown = repeat.once_for(body, change, response)
    request.app.state.batch_worker.wake()
    return shown


@router.get("", response_model=BatchList)
def list_batches(
    *,
    batches: BatchesDep,
    principal: Generator,
    limit: Annotated[WholeNumber, Query(ge=1, le=1000)] = 20,
    after: Annotated[str | None, Query(max_length=64)] = None,
) -> BatchList:
    """The tenant's batches, newest first."""
    page = batches.page(tenant=principal.tenant, limit=limit + 1, after=after)
    data = [BatchShown.of(batch) for batch in page[:limit]]
    return BatchList(
        data=data,
        first_id=data[0].id if data else None,
        last_id=data[-1].id if data else None,
        has_more=len(page) > limit,
    )


@router.get("/{batch_id}", response_model=BatchShown)
def get_batch(batch_id: str, batches: BatchesDep, principal: Generator) -> BatchShown:
    """One batch."""
    return BatchShown.of(batches.get(batch_id, tenant=principal.tenant))


@router.post("/{batch_id}/cancel", response_model=BatchShown)
def cancel_batch(
    *,
    batch_id: str,
    request: Request,
    batches: BatchesDep,
    principal: Generator,
    actor: Acting,
) -> BatchShown:
    """Run no more lines; what was answered is in its files when it is `cancelled`."""
    batch = batches.cancel(batch_id, tenant=principal.tenant, actor=actor)
    request.app.state.batch_worker.wake()
    return BatchShown.of(batch)
