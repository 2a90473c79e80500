"""/v1/prefixes/{reference}/warm and /pin: what is in the KV pool before anybody asks for it."""

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Response
from pydantic import BaseModel, Field
from sqlalchemy import Connection

from prefixd.server.api.auth import Acting, Generator, Writer
from prefixd.server.api.body import StrictModel, json_body, json_request
from prefixd.server.api.parts import (
    AuditDep,
    DrainStateDep,
    EngineDep,
    LimiterDep,
    PinRoomDep,
    ServedDep,
    StoreDep,
)
from prefixd.server.api.prefixes.audit_hook import AuditHook
from prefixd.server.api.prefixes.manifests import PrefixManifest
from prefixd.server.api.prefixes.residency import RESIDENT, room_for_pin, warm
from prefixd.server.errors import BadRequest
from prefixd.server.tenants.audit import Action
from prefixd.store.store import Manifest

router = APIRouter(prefix="/v1/prefixes", tags=["prefixes"])


class ChosenVersion(StrictModel):
    """Which version is meant; none: what the reference in the path means now."""

    version: int | None = Field(default=None, ge=1, le=2**31 - 1)


class ResidencyResponse(BaseModel):
    """A version on its way to the pool. ``state`` is ``queued`` or a ``tier``: see PrefixShown."""

    object: Literal["prefix.residency"] = "prefix.residency"
    name: str
    version: int
    digest: str
    state: str


Chosen = Annotated[ChosenVersion, Depends(json_body(ChosenVersion, optional=True))]
_BODY = json_request(ChosenVersion, required=False)


def _meant(reference: str, chosen: ChosenVersion) -> str:
    """One reference out of path and body. Raises BadRequest when both choose."""
    if chosen.version is None:
        return reference
    if "@" in reference:
        raise BadRequest(
            "expected the version either in the path or in the body; received both", param="version"
        )
    return f"{reference}@{chosen.version}"


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
    reference: str,
    response: Response,
    store: StoreDep,
    engine: EngineDep,
    served: ServedDep,
    limiter: LimiterDep,
    drain_state: DrainStateDep,
    principal: Generator,
    chosen: Chosen,
) -> ResidencyResponse:
    """Bring a version into this server's KV pool before a request needs it; returns at once."""
    response.headers.update(limiter.count(principal.tenant, principal.quota))
    found = store.resolve(tenant=principal.tenant, reference=_meant(reference, chosen))
    state = warm(found, principal, engine=engine, served=served, drain_state=drain_state)
    if state == RESIDENT:
        response.status_code = 200
    return ResidencyResponse(
        name=found.name, version=found.version, digest=found.digest, state=state
    )


@router.put("/{reference}/pin", response_model=PrefixManifest, openapi_extra=_BODY)
def pin_prefix(
    *,
    reference: str,
    store: StoreDep,
    engine: EngineDep,
    served: ServedDep,
    audit: AuditDep,
    room: PinRoomDep,
    principal: Writer,
    actor: Acting,
    chosen: Chosen,
) -> PrefixManifest:
    """Have every server keep a version resident, in place of any other pinned version of it."""

    def note(connection: Connection, manifest: Manifest) -> None:
        detail = {"version": manifest.version}
        noted = AuditHook(audit, actor, Action.PIN_SET, principal.tenant, manifest.name, detail)
        noted(connection)

    manifest = store.set_pin(
        tenant=principal.tenant,
        reference=_meant(reference, chosen),
        creator=principal.key_id,
        within=room_for_pin(principal, note, engine=engine, served=served, room=room),
    )
    return PrefixManifest.of(manifest)


@router.delete("/{reference}/pin", status_code=204)
def unpin_prefix(
    reference: str, store: StoreDep, audit: AuditDep, principal: Writer, actor: Acting
) -> None:
    """Let a prefix, by its name, leave the pool as others do."""
    noted = AuditHook(audit, actor, Action.PIN_REMOVE, principal.tenant, reference, {})
    store.remove_pin(tenant=principal.tenant, name=reference, within=noted)
