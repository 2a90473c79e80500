"""/v1/users and /v1/default: the prefixes of a tenant's end users."""

from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field, field_validator
from sqlalchemy import Connection

from prefixd.server.api.body import StrictModel, json_body, json_request, media_type
from prefixd.server.api.catalog_calls import CatalogRoute
from prefixd.server.api.conditions import (
    READ,
    WITH_TAG,
    ConditionsDep,
    not_modified,
    tag_of,
)
from prefixd.server.api.dependencies import (
    Acting,
    BindingsDep,
    BodyLimitsDep,
    BoundsDep,
    DiskDep,
    Reader,
    ServedDep,
    StoreDep,
    Writer,
)
from prefixd.server.api.generate.shapes import refusal
from prefixd.server.api.repeats import Repeatable, RepeatableDep
from prefixd.server.api.served import ServedModel
from prefixd.server.api.users.importing import BindingImport, body_digest
from prefixd.server.api.values import User, WholeNumber
from prefixd.server.errors import BadRequest
from prefixd.server.tenants.bindings import Binding, DefaultPrefix
from prefixd.server.tenants.idempotency import CAUSES, Keep, Replay
from prefixd.server.tenants.principal import Principal
from prefixd.store.catalog.manifests import check_base
from prefixd.store.catalog.reference_locks import lock_references
from prefixd.store.store import PrefixStore

router = APIRouter(prefix="/v1", tags=["users"], route_class=CatalogRoute)


class BindingTarget(StrictModel):
    """The prefix to give a user."""

    prefix: str = Field(
        min_length=1,
        max_length=257,
        description="`name`, `name@3` or `name@alias`; an alias is resolved at each request.",
    )

    @field_validator("prefix", mode="before")
    @classmethod
    def _refuse_composition(cls, value: object) -> object:
        if isinstance(value, dict):
            raise refusal(
                "expected a prefix reference; received an object. Save a stack, blend or ensemble "
                "as a prefix, and bind that"
            )
        return value


class BindingShown(BaseModel):
    """A user and the prefix reference the user is bound to."""

    model_config = ConfigDict(from_attributes=True)

    object: Literal["binding"] = "binding"
    user: str
    prefix: str
    updated_at: datetime


class BindingList(BaseModel):
    """Some bindings by user; pass ``next_after`` as ``after`` for more, null at the end."""

    object: Literal["list"] = "list"
    data: list[BindingShown]
    next_after: str | None = None


class DefaultShown(BaseModel):
    """The prefix of users without a binding."""

    model_config = ConfigDict(from_attributes=True)

    object: Literal["default"] = "default"
    prefix: str


class ImportResponse(BaseModel):
    """The number of bindings in an import."""

    object: Literal["import"] = "import"
    imported: int


def _check(
    store: PrefixStore, served: ServedModel, principal: Principal, reference: str
) -> Callable[[Connection], None]:
    """Raise UnknownPrefix or BaseMismatch for a reference that means no version of the served base;
    else return the check for the transaction that stores the reference."""
    base, tenant = served.base, principal.tenant
    manifest = store.resolve(tenant=tenant, reference=reference, base=base)
    check_base(manifest, base)
    resolved = {reference: (manifest.name, manifest.version)}
    return partial(lock_references, tenant=tenant, resolved=resolved, base=base)


@router.get("/users", response_model=BindingList)
def list_bindings(
    bindings: BindingsDep,
    principal: Reader,
    limit: Annotated[WholeNumber, Query(ge=1, le=1000)] = 100,
    after: Annotated[User | None, Query()] = None,
) -> BindingList:
    """The users that are bound, in order."""
    page, more = bindings.page(principal.tenant, limit=limit, after=after)
    data = [BindingShown.model_validate(binding) for binding in page]
    return BindingList(data=data, next_after=more)


@router.post(
    "/users/bindings:import",
    response_model=ImportResponse,
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/x-ndjson": {
                    "schema": {
                        "type": "string",
                        "description": 'Lines of {"user": …, "prefix": …}.',
                    }
                }
            },
        }
    },
)
async def import_bindings(
    *,
    request: Request,
    store: StoreDep,
    served: ServedDep,
    bindings: BindingsDep,
    limits: BodyLimitsDep,
    bounds: BoundsDep,
    disk: DiskDep,
    principal: Writer,
    actor: Acting,
    repeat: RepeatableDep,
    response: Response,
) -> Any:
    """Bind many users: one JSON object a line, written in batches while the body is received.

    A bad line ends the import with its number; the batches before it stay. Sending the whole file
    again is safe.
    """
    kind = media_type(request)
    if kind not in {"application/x-ndjson", "application/jsonl"}:
        raise BadRequest(
            f"expected the content type application/x-ndjson; received {kind[:80]!a}",
            code="unsupported_media_type",
        )
    importing = BindingImport(
        store=store,
        base=served.base,
        bindings=bindings,
        max_bytes=limits.max_import_bytes,
        disk=disk,
        tenant=principal.tenant,
        actor=actor,
    )
    async with bounds.uploads.hold(principal.tenant):
        calls = request.app.state.catalog.calls
        if await calls.read(repeat.is_known):
            digest = await body_digest(request, limits.max_import_bytes)
            return await calls.read(repeat.find, repeat.digest(digest), response)
        return await _import_once(request, importing, repeat, response)


async def _import_once(
    request: Request, importing: BindingImport, repeat: Repeatable, response: Response
) -> Any:
    def keep(connection: Connection, count: int, digest: str) -> None:
        body = ImportResponse(imported=count).model_dump(mode="json")
        repeat.keep(connection, repeat.digest(digest), Replay(200, body))

    try:
        return ImportResponse(imported=await importing.run(request, at_end=keep))
    except CAUSES:
        earlier = await run_in_threadpool(repeat.find, repeat.digest(importing.digest), response)
        if earlier is None:
            raise
        return earlier


@router.get("/users/{user:path}/prefix", response_model=BindingShown, responses=READ)
def get_binding(
    *,
    user: User,
    response: Response,
    bindings: BindingsDep,
    principal: Reader,
    conditions: ConditionsDep,
) -> BindingShown | Response:
    """The prefix a user is bound to."""
    binding = bindings.get(principal.tenant, user)
    tag = tag_of(binding.revision)
    if conditions.unchanged(tag):
        return not_modified(tag)
    response.headers["ETag"] = tag
    return BindingShown.model_validate(binding)


@router.put(
    "/users/{user:path}/prefix",
    response_model=BindingShown,
    responses=WITH_TAG,
    openapi_extra=json_request(BindingTarget),
)
def put_binding(
    *,
    user: User,
    response: Response,
    store: StoreDep,
    served: ServedDep,
    bindings: BindingsDep,
    principal: Writer,
    actor: Acting,
    conditions: ConditionsDep,
    repeat: RepeatableDep,
    body: Annotated[BindingTarget, Depends(json_body(BindingTarget))],
) -> Any:
    """Bind a user to a prefix, from the next request on."""

    def change(keep: Keep) -> Replay:
        binding = bindings.bind(
            principal.tenant,
            user,
            body.prefix,
            actor=actor,
            check=_check(store, served, principal, body.prefix),
            precondition=conditions.check,
            at_end=lambda connection, written: keep(connection, _stored(BindingShown, written)),
        )
        return _stored(BindingShown, binding)

    return repeat.once_for(body, change, response)


@router.delete("/users/{user:path}/prefix", status_code=204)
def delete_binding(
    user: User,
    bindings: BindingsDep,
    principal: Writer,
    actor: Acting,
    conditions: ConditionsDep,
) -> None:
    """Delete a user's binding: the tenant's default applies then."""
    bindings.unbind(principal.tenant, user, actor=actor, precondition=conditions.check)


@router.get("/default/prefix", response_model=DefaultShown, responses=READ)
def get_default(
    *,
    response: Response,
    bindings: BindingsDep,
    principal: Reader,
    conditions: ConditionsDep,
) -> DefaultShown | Response:
    """The prefix of users without a binding."""
    default = bindings.default(principal.tenant)
    tag = tag_of(default.revision)
    if conditions.unchanged(tag):
        return not_modified(tag)
    response.headers["ETag"] = tag
    return DefaultShown.model_validate(default)


@router.put(
    "/default/prefix",
    response_model=DefaultShown,
    responses=WITH_TAG,
    openapi_extra=json_request(BindingTarget),
)
def put_default(
    *,
    response: Response,
    store: StoreDep,
    served: ServedDep,
    bindings: BindingsDep,
    principal: Writer,
    actor: Acting,
    conditions: ConditionsDep,
    repeat: RepeatableDep,
    body: Annotated[BindingTarget, Depends(json_body(BindingTarget))],
) -> Any:
    """Set the prefix of users without a binding, from the next request on."""

    def change(keep: Keep) -> Replay:
        default = bindings.set_default(
            principal.tenant,
            body.prefix,
            actor=actor,
            check=_check(store, served, principal, body.prefix),
            precondition=conditions.check,
            at_end=lambda connection, written: keep(connection, _stored(DefaultShown, written)),
        )
        return _stored(DefaultShown, default)

    return repeat.once_for(body, change, response)


def _stored(model: type[BaseModel], written: Binding | DefaultPrefix) -> Replay:
    body = model.model_validate(written).model_dump(mode="json")
    return Replay(200, body, tag_of(written.revision))


@router.delete("/default/prefix", status_code=204)
def delete_default(
    bindings: BindingsDep, principal: Writer, actor: Acting, conditions: ConditionsDep
) -> None:
    """Delete the default: users without a binding get the base."""
    bindings.remove_default(principal.tenant, actor=actor, precondition=conditions.check)
