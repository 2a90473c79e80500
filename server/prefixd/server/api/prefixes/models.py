"""/v1/models: what the ``model`` field takes."""

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

from prefixd.server.api.catalog_calls import CatalogRoute
from prefixd.server.api.dependencies import Reader, ServedDep, StoreDep
from prefixd.server.api.prefixes.schemas import ShownRecipe
from prefixd.server.api.served import ServedModel
from prefixd.server.api.values import Reference
from prefixd.server.errors import DoesNotFit, NotFound
from prefixd.store.artifact.kinds import Kind
from prefixd.store.catalog.manifests import check_base
from prefixd.store.errors import InvalidReference, UnknownPrefix
from prefixd.store.store import Manifest

router = APIRouter(prefix="/v1/models", tags=["models"], route_class=CatalogRoute)

MAX_LISTED = 1000
"""OpenAI's listing has no pages; ``GET /v1/prefixes`` has, for those with more prefixes."""


class Model(BaseModel):
    """A name for the ``model`` field: the base (``parent`` null) or a prefix of it, with how to
    call it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    parent: str | None
    max_model_len: int
    recipe: ShownRecipe | None = None
    recipe_revision: int | None = None


class ModelList(BaseModel):
    """The base first, then the caller's prefixes by name."""

    object: Literal["list"] = "list"
    data: list[Model]


def _base(served: ServedModel) -> Model:
    return Model(
        id=served.name,
        created=served.created,
        owned_by="prefixd",
        parent=None,
        max_model_len=served.max_positions,
    )


def _prefix(served: ServedModel, manifest: Manifest, *, name: str) -> Model:
    is_of_input = served.encoder is not None and manifest.kind is Kind.SOFT_PROMPT
    return Model(
        id=name,
        created=int(manifest.created_at.timestamp()),
        owned_by=manifest.tenant,
        parent=served.name,
        max_model_len=served.max_positions - (0 if is_of_input else manifest.num_positions),
        recipe=ShownRecipe.model_validate(manifest.recipe),
        recipe_revision=manifest.recipe_revision,
    )


@router.get("", response_model=ModelList)
def list_models(store: StoreDep, served: ServedDep, principal: Reader) -> ModelList:
    """The base and the caller's prefixes that can run on it (the first 1000 by name)."""
    page = store.list(tenant=principal.tenant, base=served.base, limit=MAX_LISTED)
    prefixes = [_prefix(served, one, name=one.name) for one in page.manifests]
    runnable = [prefix for prefix in prefixes if prefix.max_model_len >= 1]
    return ModelList(data=[_base(served), *runnable])


@router.get("/{model:path}", response_model=Model)
def get_model(model: Reference, store: StoreDep, served: ServedDep, principal: Reader) -> Model:
    """One model: the base's name, a prefix reference, or `base:reference`."""
    if model == served.name:
        return _base(served)
    try:
        reference = model.removeprefix(f"{served.name}:")
        manifest = store.resolve(tenant=principal.tenant, reference=reference, base=served.base)
    except (UnknownPrefix, InvalidReference):
        raise NotFound(
            f"the model {model[:300]!a} does not exist", code="model_not_found", param="model"
        ) from None
    check_base(manifest, served.base)
    shown = _prefix(served, manifest, name=model)
    if shown.max_model_len < 1:
        raise DoesNotFit(
            f"the {manifest.num_virtual_tokens} virtual tokens of the prefix leave no room: the "
            f"base model has {served.max_positions} positions",
            param="model",
        )
    return shown
