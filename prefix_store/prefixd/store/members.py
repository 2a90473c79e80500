"""Members of a composition that is published: resolved, and checked against each other."""

from collections.abc import Callable, Sequence
from typing import Protocol

from prefixd.store.artifact.artifact import Summary
from prefixd.store.artifact.base_spec import BaseSpec
from prefixd.store.artifact.composition import Combine, Member, check_members
from prefixd.store.artifact.kinds import Kind
from prefixd.store.catalog.manifests import Manifest, check_base, members_of
from prefixd.store.errors import ArtifactRefused, CorruptArtifact

CountStack = Callable[[Sequence[str | int]], int]
"""The virtual tokens of a stack: of texts, joined where they stand next to each other, and of so
many others."""


class Versions(Protocol):
    """The part of the prefix store that knows versions."""

    def resolve(self, *, tenant: str, reference: str, base: BaseSpec) -> Manifest: ...
    def present_members(self, manifest: Manifest) -> tuple[Manifest, ...]: ...
    def stack_parts(self, members: Sequence[Manifest]) -> list[str | int]: ...


def composed_of(
    versions: Versions,
    tenant: str,
    kind: Kind,
    members: Sequence[tuple[str, float | None]],
    *,
    combine: Combine | None,
    base: BaseSpec,
    count_stack: CountStack,
) -> Summary:
    """The composition of references, and of a blend their weights. Raises ArtifactRefused,
    UnknownPrefix, BaseMismatch, CorruptArtifact, MemberDeleted."""
    base.require_kind(kind)
    manifests = [_sound(versions, tenant, reference, base=base) for reference, _ in members]
    check_members(kind, manifests)
    count = sum(manifest.num_virtual_tokens for manifest in manifests)
    if kind is Kind.BLEND:
        count = manifests[0].num_virtual_tokens
    elif kind is Kind.STACK:
        count = count_stack(versions.stack_parts(manifests))
    if kind is not Kind.ENSEMBLE and count > base.max_virtual_tokens:
        raise ArtifactRefused(
            "too_many_virtual_tokens",
            f"expected at most {base.max_virtual_tokens} virtual tokens, and this {kind} has "
            f"{count}",
            param=str(kind),
        )
    resolved = members_of(manifests, [weight for _, weight in members])
    return Summary(kind, None, count, None, None, None, members=resolved, combine=combine)


def check_same(versions: Versions, tenant: str, member: Member, *, base: BaseSpec) -> None:
    """Raise ArtifactRefused where the reference of a member means other bytes here than in the
    stored file that it comes from; UnknownPrefix, BaseMismatch."""
    here = versions.resolve(tenant=tenant, reference=member.reference, base=base)
    if here.digest != member.digest:
        raise ArtifactRefused(
            "unsupported_member",
            f"{member.reference}: expected the digest {member.digest}, as the stored file has; "
            f"here it has {here.digest}",
            param="prefix",
        )


def _sound(versions: Versions, tenant: str, reference: str, *, base: BaseSpec) -> Manifest:
    manifest = versions.resolve(tenant=tenant, reference=reference, base=base)
    check_base(manifest, base)
    if manifest.corrupt:
        raise CorruptArtifact(
            f"the stored bytes of {manifest.reference} are damaged: upload them again"
        )
    versions.present_members(manifest)
    return manifest
