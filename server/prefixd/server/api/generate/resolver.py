"""Which prefix a request runs under: named by its model, bound to its user, or the default."""

from dataclasses import dataclass

from prefixd.server.api.admitted import ResolvedPrefix
from prefixd.server.api.served import ServedModel
from prefixd.server.errors import Conflict, EngineFailure, NotFound
from prefixd.server.tenants.bindings import Bindings, ChosenBy
from prefixd.store.catalog.manifests import check_base
from prefixd.store.errors import BaseMismatch, InvalidReference, UnknownPrefix
from prefixd.store.store import Manifest, PrefixStore


@dataclass(frozen=True, slots=True)
class PrefixResolver:
    """Resolves references in the store and users in the bindings. Blocking."""

    served: ServedModel
    store: PrefixStore
    bindings: Bindings

    def is_base(self, model: str, user: str | None) -> bool:
        """Whether the request runs on the bare base, as far as is known without the catalog."""
        return model == self.served.name and user is None

    def resolve(self, tenant: str, model: str, user: str | None) -> ResolvedPrefix | None:
        """The prefix of a request; None for the bare base.

        Raises NotFound for a prefix that does not exist, which is never answered by the base;
        Conflict for a prefix of another base; EngineFailure for one that is known to be damaged.
        """
        if self.is_base(model, user):
            return None
        base = self.served.name
        if model != base:
            reference, chosen_by = model.removeprefix(f"{base}:"), ChosenBy.MODEL
        elif user is not None and (bound := self.bindings.chosen(tenant, user)) is not None:
            reference, chosen_by = bound
        else:
            return None
        param = "model" if chosen_by is ChosenBy.MODEL else "user"
        try:
            manifest = self.store.resolve(tenant=tenant, reference=reference, base=self.served.base)
            check_base(manifest, self.served.base)
        except (UnknownPrefix, InvalidReference):
            raise self._not_found(model, reference, chosen_by) from None
        except BaseMismatch as error:
            raise Conflict(error.message, code="base_mismatch", param=param) from None
        check_intact(manifest, param=param)
        return ResolvedPrefix(manifest, chosen_by)

    def _not_found(self, model: str, reference: str, chosen_by: ChosenBy) -> NotFound:
        if chosen_by is ChosenBy.MODEL:
            base = self.served.name
            return NotFound(
                f"the model {model[:300]!a} does not exist: expected {base!a}, a prefix "
                f"reference (name, name@3, name@alias) or {base!a}:reference",
                code="model_not_found",
                param="model",
            )
        owner = "this user's" if chosen_by is ChosenBy.USER else "the tenant's default"
        return NotFound(
            f"{owner} prefix {reference!a} does not exist any more: bind another one",
            code="bound_prefix_not_found",
            param="user",
        )


def check_intact(manifest: Manifest, *, param: str | None = None) -> None:
    """Raise EngineFailure for a version that is known to be damaged."""
    if manifest.corrupt:
        raise EngineFailure(
            f"the stored bytes of {manifest.name}@{manifest.version} are damaged and not "
            "served: upload them again",
            code="corrupt_prefix",
            param=param,
        )
