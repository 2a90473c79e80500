"""The members of stacks, blends and ensembles: resolved once, as any prefix is.

A composition of a request becomes a manifest without a name, so that nothing behind it needs to
know where it came from; one that was saved has its members in its own manifest, and is refused when
one of them was deleted.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from prefixd.server.api.admitted import ResolvedMember, ResolvedPrefix
from prefixd.server.api.generate.compositions import NamedComposition
from prefixd.server.api.placement import whole_key, whole_of
from prefixd.server.api.served import ServedModel
from prefixd.server.engine.request import PrefixKey
from prefixd.server.errors import BadRequest, Conflict, EngineFailure, NotFound
from prefixd.server.tenants.bindings import ChosenBy
from prefixd.store.artifact.composition import check_members, composition_digest
from prefixd.store.artifact.kinds import Kind
from prefixd.store.artifact.recipe import Recipe
from prefixd.store.catalog.manifests import check_base, members_of
from prefixd.store.errors import (
    ArtifactRefused,
    BaseMismatch,
    InvalidReference,
    MemberDeleted,
    UnknownPrefix,
)
from prefixd.store.store import Manifest, PrefixStore

_KEPT_COUNTS = 4096
_PARAM = "prefix"


@dataclass(frozen=True, slots=True)
class MemberResolver:
    """Resolves compositions in the store. Blocking."""

    served: ServedModel
    store: PrefixStore
    counts: "StackCounts"

    def named(self, tenant: str, composition: NamedComposition) -> ResolvedPrefix:
        """The prefix that a request composes. Raises NotFound for a member that does not exist,
        BadRequest for one that cannot be a member, Conflict for one of another base or without
        members of its own, EngineFailure for one that is known to be damaged."""
        kind, base = composition.kind, self.served.base
        manifests = [self._member(tenant, reference) for reference, _ in composition.members]
        self.check_kinds(kind, manifests)
        weights = [weight for _, weight in composition.members]
        members = members_of(manifests, weights)
        # Of an ensemble nothing is compiled; its digest is for responses and the log.
        of_ensemble = composition_digest(kind, [each.digest for each in members], ())
        key = whole_key(tenant, of_ensemble, kind, members)
        recipe, warnings = shared_recipe(manifests)
        manifest = Manifest(
            tenant=tenant,
            name="",
            version=0,
            digest=key.digest,
            kind=kind,
            peft_type=None,
            num_virtual_tokens=self.counts.of(key, kind, manifests),
            dtype=None,
            size_bytes=0,
            fingerprint=base.fingerprint,
            base=base.name,
            created_at=datetime.now(UTC),
            base_model_name_or_path=None,
            metadata={},
            aliases=(),
            prompt_template=recipe.prompt_template,
            recipe=recipe,
            members=members,
            combine=composition.combine,
        )
        return self._resolved(manifest, ChosenBy.PREFIX, manifests, warnings)

    def saved(self, manifest: Manifest, chosen_by: ChosenBy, *, param: str) -> ResolvedPrefix:
        """A version, with its members if it is a composition. Raises Conflict where some of them
        were deleted, EngineFailure where one is known to be damaged."""
        if not manifest.kind.is_composed:
            return ResolvedPrefix(manifest, chosen_by)
        manifests = self._present(manifest, param=param)
        key = whole_of(manifest).key
        count = self.counts.of(key, manifest.kind, manifests)  # an earlier server may count others
        manifest = replace(manifest, num_virtual_tokens=count)
        return self._resolved(manifest, chosen_by, manifests)

    def check_kinds(self, kind: Kind, manifests: Sequence[Manifest]) -> None:
        """Raise BadRequest for versions that cannot be members."""
        try:
            self.served.base.require_kind(kind)
            check_members(kind, manifests)
        except ArtifactRefused as refused:
            raise BadRequest(refused.message, code=refused.code, param=_PARAM) from None

    def _member(self, tenant: str, reference: str) -> Manifest:
        try:
            manifest = self.store.resolve(tenant=tenant, reference=reference, base=self.served.base)
            check_base(manifest, self.served.base)
        except (UnknownPrefix, InvalidReference):
            raise NotFound(
                f"the prefix {reference!a} does not exist: expected name, name@3 or name@alias",
                code="prefix_not_found",
                param=_PARAM,
            ) from None
        except BaseMismatch as error:
            raise Conflict(error.message, code="base_mismatch", param=_PARAM) from None
        check_intact(manifest, param=_PARAM)
        self._present(manifest, param=_PARAM)
        return manifest

    def _present(self, manifest: Manifest, *, param: str) -> tuple[Manifest, ...]:
        try:
            members = self.store.present_members(manifest)
        except MemberDeleted as error:
            raise Conflict(error.message, code="member_deleted", param=param) from None
        for member in members:
            check_intact(member, param=param)
        return members

    def _resolved(
        self,
        manifest: Manifest,
        chosen_by: ChosenBy,
        manifests: Sequence[Manifest],
        warnings: tuple[str, ...] = (),
    ) -> ResolvedPrefix:
        ensemble: tuple[ResolvedMember, ...] = ()
        if manifest.kind is Kind.ENSEMBLE:
            ensemble = tuple(ResolvedMember(member, whole_of(member)) for member in manifests)
        return ResolvedPrefix(manifest, chosen_by, ensemble, warnings)


@dataclass(slots=True)
class StackCounts:
    """The virtual tokens of compositions. Those of stacks with texts are counted on the joined
    texts, and kept. Methods may be called from any thread."""

    served: ServedModel
    store: PrefixStore
    _counts: "OrderedDict[PrefixKey, int]" = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def of(self, key: PrefixKey, kind: Kind, members: Sequence[Manifest]) -> int:
        """Virtual tokens of a composition. Blocking where texts are read. Raises as the store."""
        if kind is Kind.BLEND:
            return members[0].num_virtual_tokens
        if kind is not Kind.STACK or not any(member.has_text for member in members):
            return sum(member.num_virtual_tokens for member in members)
        with self._lock:
            known = self._counts.get(key)
            if known is not None:
                self._counts.move_to_end(key)
                return known
        parts = self.store.stack_parts(members)
        count = self.served.count_stack_tokens(parts)
        with self._lock:
            self._counts[key] = count
            while len(self._counts) > _KEPT_COUNTS:
                self._counts.popitem(last=False)
        return count


def shared_recipe(manifests: Sequence[Manifest]) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe of the members that have one, if it is the same; and what to say if it is not."""
    stated = [manifest for manifest in manifests if manifest.recipe != Recipe()]
    recipes = [replace(manifest.recipe, examples=()) for manifest in stated]
    if not recipes:
        return Recipe(), ()
    if any(recipe != recipes[0] for recipe in recipes):
        names = ", ".join(dict.fromkeys(manifest.reference for manifest in stated))
        return Recipe(), (f"no recipe is applied: those of {names} differ",)
    return recipes[0], ()


def check_intact(manifest: Manifest, *, param: str | None = None) -> None:
    """Raise EngineFailure for a version that is known to be damaged."""
    if manifest.corrupt:
        raise EngineFailure(
            f"the stored bytes of {manifest.reference} are damaged and not served: upload them "
            "again",
            code="corrupt_prefix",
            param=param,
        )
