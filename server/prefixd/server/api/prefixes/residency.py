"""/v1/prefixes/{reference}/warm and /pin: loading a prefix into the KV pool before a request."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import structlog
from fastapi import APIRouter, Depends, Response
from pydantic import BaseModel, Field
from sqlalchemy.exc import SQLAlchemyError

from prefixd.server.api.body import StrictModel, json_body, json_request
from prefixd.server.api.catalog_calls import CatalogRoute
from prefixd.server.api.conditions import WITH_TAG, ConditionsDep, version_tag
from prefixd.server.api.dependencies import (
    Acting,
    DrainStateDep,
    EngineDep,
    Generator,
    LimiterDep,
    PinRoomDep,
    ServedDep,
    StoreDep,
    Writer,
)
from prefixd.server.api.drain_state import DrainState
from prefixd.server.api.error_responses import from_queue_full
from prefixd.server.api.generate.admission import check_resident
from prefixd.server.api.generate.members import check_intact
from prefixd.server.api.placement import handle_of
from prefixd.server.api.prefixes.schemas import PrefixManifest
from prefixd.server.api.repeats import RepeatableDep
from prefixd.server.api.served import ServedModel
from prefixd.server.api.values import Reference
from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.engine import Engine
from prefixd.server.engine.request import PrefixHandle, QueueFull
from prefixd.server.errors import BadRequest, Conflict, DoesNotFit, PrefixdError, Unavailable
from prefixd.server.tenants.audit import Action, record
from prefixd.server.tenants.idempotency import Keep, Replay
from prefixd.server.tenants.pin_room import PinRoom, check_pinned
from prefixd.server.tenants.principal import Principal
from prefixd.store.artifact.kinds import Kind
from prefixd.store.catalog.manifests import check_base, present_members
from prefixd.store.catalog.pins import pinned
from prefixd.store.errors import StoreError
from prefixd.store.store import Manifest, PrefixStore

log = structlog.get_logger("prefixd")

router = APIRouter(prefix="/v1/prefixes", tags=["prefixes"], route_class=CatalogRoute)

RESIDENT = "resident"
QUEUED = "queued"
"""Requested, and the engine has not started to load it."""


class ChosenVersion(StrictModel):
    """Which version is meant; none: what the reference in the path means now."""

    version: int | None = Field(default=None, ge=1, le=2**31 - 1)


class ResidencyResponse(BaseModel):
    """A version that is being loaded. ``state`` is ``queued`` or a ``tier``: see PrefixShown."""

    object: Literal["prefix.residency"] = "prefix.residency"
    name: str
    version: int
    digest: str
    state: str


Chosen = Annotated[ChosenVersion, Depends(json_body(ChosenVersion, optional=True))]
_BODY = json_request(ChosenVersion, required=False)


@router.post(
    "/{reference}/warm",
    response_model=ResidencyResponse,
    status_code=202,
    responses={
        200: {"description": "It is resident already.", "model": ResidencyResponse},
        202: {"description": "It will be, as soon as there is room."},
    },
    openapi_extra=_BODY,
)
def warm_prefix(
    *,
    reference: Reference,
    response: Response,
    store: StoreDep,
    engine: EngineDep,
    served: ServedDep,
    limiter: LimiterDep,
    drain_state: DrainStateDep,
    principal: Generator,
    chosen: Chosen,
) -> ResidencyResponse:
    """Load a version into this server's KV pool before a request needs it; returns at once."""
    response.headers.update(limiter.count(principal.tenant, principal.quota))
    manifest = store.resolve(
        tenant=principal.tenant,
        reference=_with_version(reference, chosen.version),
        base=served.base,
    )
    members = store.present_members(manifest)
    state = warm(
        manifest, members, principal, engine=engine, served=served, drain_state=drain_state
    )
    if state == RESIDENT:
        response.status_code = 200
    return ResidencyResponse(
        name=manifest.name, version=manifest.version, digest=manifest.digest, state=state
    )


@router.put(
    "/{reference}/pin", response_model=PrefixManifest, responses=WITH_TAG, openapi_extra=_BODY
)
def pin_prefix(
    *,
    reference: Reference,
    response: Response,
    store: StoreDep,
    engine: EngineDep,
    served: ServedDep,
    room: PinRoomDep,
    principal: Writer,
    actor: Acting,
    conditions: ConditionsDep,
    repeat: RepeatableDep,
    chosen: Chosen,
) -> Any:
    """Have every server keep a version resident, in place of any other pinned version of it."""
    tenant = principal.tenant

    def change(keep: Keep) -> Replay:
        with store.change(tenant) as tx:
            manifest = tx.set_pin(
                _with_version(reference, chosen.version),
                base=served.base,
                creator=principal.key_id,
                precondition=conditions.check,
            )
            members = present_members(tx.connection, tenant, manifest.members)
            check_fits(manifest, members, principal, engine=engine, served=served)
            pins = pinned(tx.connection, fingerprint=served.base.fingerprint)
            check_pinned(pins, tenant, principal.quota, room=room)
            record(
                tx.connection,
                Action.PIN_SET,
                actor=actor,
                tenant=tenant,
                subject=manifest.name,
                detail={"version": manifest.version},
            )
            shown = PrefixManifest.model_validate(manifest).model_dump(mode="json")
            replay = Replay(200, shown, version_tag(manifest))
            keep(tx.connection, replay)
        return replay

    return repeat.once_for(chosen, change, response)


@router.delete("/{reference}/pin", status_code=204)
def unpin_prefix(
    reference: Reference,
    store: StoreDep,
    principal: Writer,
    actor: Acting,
    conditions: ConditionsDep,
) -> None:
    """Unpin a prefix, by its name: it may be evicted as others are."""
    with store.change(principal.tenant) as tx:
        tx.remove_pin(reference, precondition=conditions.check)
        record(
            tx.connection,
            Action.PIN_REMOVE,
            actor=actor,
            tenant=principal.tenant,
            subject=reference,
        )


def _with_version(reference: str, version: int | None) -> str:
    """The reference in the path with the version in the body. Raises BadRequest when both have
    one."""
    if version is None:
        return reference
    if "@" in reference:
        raise BadRequest(
            "expected the version either in the path or in the body; received both", param="version"
        )
    return f"{reference}@{version}"


def check_fits(
    manifest: Manifest,
    members: Sequence[Manifest],
    principal: Principal,
    *,
    engine: Engine,
    served: ServedModel,
) -> list[PrefixHandle]:
    """What stays resident of a version: of an ensemble its ``members``. Raises BaseMismatch,
    EngineFailure, QuotaExceeded or DoesNotFit for one that no request of its tenant can run under
    on this server, and Conflict where nothing of it would be in the pool."""
    check_base(manifest, served.base)
    for each in (manifest, *members):
        check_intact(each)
    kept = members if manifest.kind is Kind.ENSEMBLE else [manifest]
    return [_handle(each, principal, engine) for each in kept]


def _handle(manifest: Manifest, principal: Principal, engine: Engine) -> PrefixHandle:
    handle = handle_of(manifest)
    if handle is None:
        version = manifest.reference
        reason = (
            f"all virtual tokens of {version} stand inside the prompt, by its prompt_template"
            if manifest.num_virtual_tokens
            else f"conversations under {version} have no first tokens in common"
        )
        raise Conflict(
            f"{reason}: there is nothing to keep in the KV pool",
            code="nothing_resident",
        )
    check_resident(manifest, handle, principal.quota.max_resident_tokens)
    if engine.config.max_tokens_for(handle.num_tokens, gated=handle.gated) < 1:
        raise DoesNotFit(
            f"the {handle.num_tokens} virtual tokens of "
            f"{manifest.reference} can never fit the KV pool"
        )
    return handle


def warm(
    manifest: Manifest,
    members: Sequence[Manifest],
    principal: Principal,
    *,
    engine: Engine,
    served: ServedModel,
    drain_state: DrainState,
) -> str:
    """Start loading a version, and return where it is now. Raises as ``check_fits``, and
    Unavailable when the engine accepts no more requests."""
    handles = check_fits(manifest, members, principal, engine=engine, served=served)
    if drain_state.closed:
        raise drain_state.refusal()
    if not engine.ready:
        raise Unavailable("the engine is not running", retry_after=1)
    missing = [handle for handle in handles if engine.tier(handle.key) != RESIDENT]
    if not missing:
        return RESIDENT
    state = engine.tier(missing[0].key)
    try:
        for handle in missing:
            engine.preload(handle, max_resident_tokens=principal.quota.max_resident_tokens)
    except QueueFull as full:
        raise from_queue_full(full, drain_state) from None
    return state or QUEUED


def try_warm(
    reference: str,
    principal: Principal,
    *,
    store: PrefixStore,
    engine: Engine,
    served: ServedModel,
    drain_state: DrainState,
) -> None:
    """``warm``, where a failure is only logged. Blocking."""
    try:
        manifest = store.resolve(tenant=principal.tenant, reference=reference, base=served.base)
        members = store.present_members(manifest)
        warm(manifest, members, principal, engine=engine, served=served, drain_state=drain_state)
    except (PrefixdError, StoreError, SQLAlchemyError) as error:
        why = str(error).partition("\n")[0]
        log.info("not warmed", tenant=principal.tenant, prefix=reference, why=why)


def pin_room(config: SchedulerConfig, max_pinned_tokens: int | None) -> PinRoom:
    """The room for all pins together: ``max_pinned_tokens``, else a quarter of the pool."""
    tokens = max_pinned_tokens
    if tokens is None:
        pool = config.num_usable_blocks * config.block_size
        tokens = min(pool, config.max_resident_tokens or pool) // 4
    return PinRoom(tokens, config.block_size, config.state_blocks)
