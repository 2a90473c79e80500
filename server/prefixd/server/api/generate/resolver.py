"""Which prefix a request runs under: named by its model or composed by it, bound to its user, or
the default."""

from dataclasses import dataclass

from prefixd.server.api.admitted import ResolvedPrefix
from prefixd.server.api.generate.compositions import ComposedPrefix
from prefixd.server.api.generate.members import MemberResolver, check_intact
from prefixd.server.api.served import ServedModel
from prefixd.server.errors import BadRequest, Conflict, NotFound
from prefixd.server.tenants.bindings import Bindings, ChosenBy
from prefixd.store.catalog.manifests import check_base
from prefixd.store.errors import BaseMismatch, InvalidReference, UnknownPrefix
from prefixd.store.store import PrefixStore


@dataclass(frozen=True, slots=True)
class PrefixResolver:
    """Resolves references in the store and users in the bindings. Blocking."""

    served: ServedModel
    store: PrefixStore
    bindings: Bindings
    members: MemberResolver

    def is_base(self, model: str, user: str | None, composed: ComposedPrefix | None) -> bool:
        """Whether the request runs on the bare base, as far as is known without the catalog."""
        return model == self.served.name and user is None and composed is None

    def resolve(
        self, tenant: str, model: str, user: str | None, composed: ComposedPrefix | None = None
    ) -> ResolvedPrefix | None:
        """The prefix of a request; None for the bare base. One that the request composes wins over
        that of its user.

        Raises NotFound for a prefix that does not exist, which is never answered by the base;
        Conflict for a prefix of another base, and for a composition whose members were deleted;
        EngineFailure for one that is known to be damaged; BadRequest for what cannot be composed.
        """
        if composed is not None:
            if model != self.served.name:
                raise BadRequest(
                    f"expected the base {self.served.name!a} as 'model' of a request with "
                    f"'prefix'; received {model[:300]!a}",
                    param="model",
                )
            return self.members.named(tenant, composed.composition)
        if self.is_base(model, user, composed):
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
        return self.members.saved(manifest, chosen_by, param=param)

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
