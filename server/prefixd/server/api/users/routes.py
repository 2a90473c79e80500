"""/v1/users and /v1/default: which prefix a tenant's end users get."""

from datetime import datetime
from typing import Annotated, Literal, Self

from fastapi import APIRouter, Depends, Query, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, Field

from prefixd.server.api.auth import Acting, Reader, Writer
from prefixd.server.api.body import StrictModel, json_body, json_request, media_type
from prefixd.server.api.parts import BindingsDep, BodyLimitsDep, StoreDep
from prefixd.server.api.users.importing import BindingImport
from prefixd.server.errors import BadRequest
from prefixd.server.tenants.bindings import Binding

router = APIRouter(prefix="/v1", tags=["users"])


class BindingTarget(StrictModel):
    """Which prefix a user shall have."""

    prefix: str = Field(
        min_length=1,
        max_length=257,
        description="`name`, `name@3` or `name@alias`; an alias is resolved at each request.",
    )


class BindingShown(BaseModel):
    """A user and the reference the user is bound to."""

    object: Literal["binding"] = "binding"
    user: str
    prefix: str
    updated_at: datetime

    @classmethod
    def of(cls, binding: Binding) -> Self:
        """``binding`` as it is shown."""
        return cls(user=binding.user, prefix=binding.reference, updated_at=binding.updated_at)


class BindingList(BaseModel):
    """Some bindings by user; ``next_after`` is what ``after`` takes for more, null at the end."""

    object: Literal["list"] = "list"
    data: list[BindingShown]
    next_after: str | None = None


class DefaultShown(BaseModel):
    """The prefix of users without a binding."""

    object: Literal["default"] = "default"
    prefix: str


class Imported(BaseModel):
    """How many lines of an import were bindings."""

    object: Literal["import"] = "import"
    imported: int


@router.get("/users", response_model=BindingList)
def list_bindings(
    bindings: BindingsDep,
    principal: Reader,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    after: Annotated[str | None, Query(max_length=256)] = None,
) -> BindingList:
    """The users that are bound, in order."""
    found, more = bindings.page(principal.tenant, limit=limit, after=after)
    return BindingList(data=[BindingShown.of(one) for one in found], next_after=more)


@router.post(
    "/users/bindings:import",
    response_model=Imported,
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
    bindings: BindingsDep,
    limits: BodyLimitsDep,
    principal: Writer,
    actor: Acting,
) -> Imported:
    """Bind many users: one JSON object a line, written in batches as they come.

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
        bindings=bindings,
        max_bytes=limits.max_import_bytes,
        tenant=principal.tenant,
        actor=actor,
    )
    return Imported(imported=await importing.run(request))


@router.get("/users/{user:path}/prefix", response_model=BindingShown)
def get_binding(user: str, bindings: BindingsDep, principal: Reader) -> BindingShown:
    """The prefix a user is bound to."""
    return BindingShown.of(bindings.get(principal.tenant, user))


@router.put(
    "/users/{user:path}/prefix",
    response_model=BindingShown,
    openapi_extra=json_request(BindingTarget),
)
async def put_binding(
    *,
    user: str,
    store: StoreDep,
    bindings: BindingsDep,
    principal: Writer,
    actor: Acting,
    body: Annotated[BindingTarget, Depends(json_body(BindingTarget))],
) -> BindingShown:
    """Let a user have a prefix, from the next request on."""

    def bind() -> Binding:
        store.resolve(tenant=principal.tenant, reference=body.prefix)  # raises for an unknown one
        return bindings.bind(principal.tenant, user, body.prefix, actor=actor)

    return BindingShown.of(await run_in_threadpool(bind))


@router.delete("/users/{user:path}/prefix", status_code=204)
def delete_binding(user: str, bindings: BindingsDep, principal: Writer, actor: Acting) -> None:
    """Forget a user's binding: the default answers then."""
    bindings.unbind(principal.tenant, user, actor=actor)


@router.get("/default/prefix", response_model=DefaultShown)
def get_default(bindings: BindingsDep, principal: Reader) -> DefaultShown:
    """The prefix of users without a binding."""
    return DefaultShown(prefix=bindings.default(principal.tenant))


@router.put(
    "/default/prefix", response_model=DefaultShown, openapi_extra=json_request(BindingTarget)
)
async def put_default(
    store: StoreDep,
    bindings: BindingsDep,
    principal: Writer,
    actor: Acting,
    body: Annotated[BindingTarget, Depends(json_body(BindingTarget))],
) -> DefaultShown:
    """Let users without a binding have a prefix, from the next request on."""

    def set_it() -> None:
        store.resolve(tenant=principal.tenant, reference=body.prefix)  # raises for an unknown one
        bindings.set_default(principal.tenant, body.prefix, actor=actor)

    await run_in_threadpool(set_it)
    return DefaultShown(prefix=body.prefix)


@router.delete("/default/prefix", status_code=204)
def delete_default(bindings: BindingsDep, principal: Writer, actor: Acting) -> None:
    """No default any more: users without a binding get the base."""
    bindings.set_default(principal.tenant, None, actor=actor)
