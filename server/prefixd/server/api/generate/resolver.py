"""Which prefix a request runs under, and why: named by its model, bound to its user, by default.

A reference becomes a digest here, once. Nothing below admission knows names, so an alias or a
binding that moves later changes nothing about a request that was admitted.
"""

from dataclasses import dataclass

from prefixd.server.api.served import ServedModel
from prefixd.server.errors import Conflict, EngineFailure, NotFound
from prefixd.server.tenants.bindings import Bindings, ChosenBy
from prefixd.store.errors import InvalidReference, UnknownPrefix
from prefixd.store.store import Manifest, PrefixStore


@dataclass(frozen=True, slots=True)
class ResolvedPrefix:
    """A version and why it was chosen; both None for the bare base."""

    manifest: Manifest | None = None
    chosen_by: ChosenBy | None = None


@dataclass(frozen=True, slots=True)
class PrefixResolver:
    """Resolves names against the store and users against the bindings. Blocking."""

    served: ServedModel
    store: PrefixStore
    bindings: Bindings

    def choose(self, tenant: str, model: str, user: str | None) -> ResolvedPrefix:
        """Raises NotFound for what does not exist, never falling back to the base; Conflict for
        a prefix of another base; EngineFailure for one that is known to be damaged."""
        base = self.served.name
        if model != base:
            found = self._find(tenant, model.removeprefix(f"{base}:"))
            if found is None:
                raise NotFound(
                    f"the model {model[:300]!a} does not exist: expected {base!a}, a prefix "
                    f"reference (name, name@3, name@alias) or {base!a}:reference",
                    code="model_not_found",
                    param="model",
                )
            return self._checked(found, ChosenBy.MODEL)
        chosen = None if user is None else self.bindings.chosen(tenant, user)
        if chosen is None:
            return ResolvedPrefix()
        reference, why = chosen
        found = self._find(tenant, reference)
        if found is None:
            whose = "this user's" if why is ChosenBy.USER else "the tenant's default"
            raise NotFound(
                f"{whose} prefix {reference!a} does not exist any more: bind another one",
                code="bound_prefix_not_found",
                param="user",
            )
        return self._checked(found, why)

    def _find(self, tenant: str, reference: str) -> Manifest | None:
        try:
            return self.store.resolve(tenant=tenant, reference=reference)
        except (UnknownPrefix, InvalidReference):
            return None

    def _checked(self, manifest: Manifest, why: ChosenBy) -> ResolvedPrefix:
        check_served(manifest, self.served, param="model" if why is ChosenBy.MODEL else "user")
        return ResolvedPrefix(manifest, why)


def check_served(manifest: Manifest, served: ServedModel, *, param: str | None = None) -> None:
    """Raise Conflict for a prefix of another base, EngineFailure for one known to be damaged."""
    if manifest.fingerprint != served.base.fingerprint:
        raise Conflict(
            f"the prefix {manifest.name}@{manifest.version} was uploaded for another base "
            f"model ({manifest.fingerprint}) than the one served now "
            f"({served.base.fingerprint})",
            code="base_mismatch",
            param=param,
        )
    if manifest.corrupt:
        raise EngineFailure(
            f"the stored bytes of {manifest.name}@{manifest.version} are damaged and not "
            "served: upload them again",
            code="corrupt_prefix",
            param=param,
        )
