"""Manifests: what the catalog records of a version, and the queries that read it."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, Select, and_, exists, select

from prefixd.store.artifact.base_spec import BaseSpec
from prefixd.store.artifact.composition import Combine, Member, read_members
from prefixd.store.artifact.kinds import Kind, TextRole
from prefixd.store.artifact.metadata import METADATA_TEXTS
from prefixd.store.artifact.recipe import RECIPE, Recipe, read_recipe
from prefixd.store.artifact.template import TemplateKind
from prefixd.store.catalog.tables import (
    aliases,
    blobs,
    latest_versions,
    pins,
    prefixes,
    versions,
)
from prefixd.store.catalog.version_rows import has_label
from prefixd.store.errors import ArtifactRefused, BaseMismatch, MemberDeleted, UnknownPrefix
from prefixd.store.names import LATEST, MAX_VERSION, Reference

_FINGERPRINT_DIGITS = 12


@dataclass(frozen=True, slots=True)
class Manifest:
    """An immutable version. Only ``aliases`` (the names, with ``latest``, that point at it now),
    ``pinned`` (it stays resident) and ``corrupt`` (its blob was damaged; upload it again) may
    differ the next time it is read.

    ``fingerprint`` is that of the base it was checked against, ``base`` the name that base was
    served under (the first 12 digits of the fingerprint where the name was not recorded),
    ``base_model_name_or_path`` the one its config states, ``creator`` the id of the key that
    published it. ``metadata`` is the upload's without the fields that have their own attribute
    here. ``recipe`` is how to call it, with its ``prompt_template``; ``recipe_revision`` is raised
    by every change of it. ``role`` is that of a text, None for other kinds. ``members`` are those
    of a stack, a blend or an ensemble, and ``combine`` says how the last one combines them.
    ``revision`` is raised by every write that changes this manifest,
    ``prefix_revision`` by every write to the prefix; neither is ever used again, and neither counts
    in a comparison.

    A composition that was not saved has the version 0 and no name.
    """

    tenant: str
    name: str
    version: int
    digest: str
    kind: Kind
    peft_type: str | None
    num_virtual_tokens: int
    dtype: str | None
    size_bytes: int
    fingerprint: str
    base: str
    created_at: datetime
    base_model_name_or_path: str | None
    metadata: Mapping[str, Any]
    aliases: tuple[str, ...]
    creator: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    description: str | None = None
    prompt_template: str | None = None
    recipe: Recipe = field(default_factory=Recipe)
    recipe_revision: int = 1
    role: TextRole | None = None
    members: tuple[Member, ...] = ()
    combine: Combine | None = None
    corrupt: bool = False
    pinned: bool = False
    revision: int = field(default=1, kw_only=True, compare=False)
    prefix_revision: int = field(default=1, kw_only=True, compare=False)

    @property
    def num_positions(self) -> int:
        """Positions that it takes before a request's own tokens. Each member of an ensemble is in
        a sequence of its own."""
        if self.kind is Kind.ENSEMBLE:
            return max(member.num_positions for member in self.members)
        return self.num_virtual_tokens if self.kind.takes_positions else 0

    @property
    def reference(self) -> str:
        """``name@3``; of a composition that was not saved what it is made of."""
        if self.version:
            return f"{self.name}@{self.version}"
        return f"the {self.kind} of {', '.join(member.reference for member in self.members)}"

    @property
    def has_text(self) -> bool:
        """Whether it is a text or a stack with one, which has the opening tokens."""
        kinds = [member.kind for member in self.members] if self.kind is Kind.STACK else [self.kind]
        return Kind.HARD_PROMPT in kinds

    @property
    def places_tokens(self) -> bool:
        """Whether its prompt_template places virtual tokens."""
        return self.recipe.template_kind is TemplateKind.PLACED


@dataclass(frozen=True, slots=True)
class Page:
    """Some manifests in order; ``next_after`` is the name to continue after, None at the end."""

    manifests: tuple[Manifest, ...]
    next_after: str | None


_STORED = tuple(name for name in Manifest.__dataclass_fields__ if name in versions.c)


def versions_of(tenant: str) -> Select[Any]:
    """Every version of a tenant."""
    return (
        select(
            prefixes.c.name,
            prefixes.c.revision.label("prefix_revision"),
            latest_versions.c.version.label("latest_version"),
            versions,
            blobs.c.corrupt_at,
            pins.c.since.label("pinned_since"),
        )
        .join_from(prefixes, versions, versions.c.prefix_id == prefixes.c.id)
        .outerjoin(
            latest_versions,
            and_(
                latest_versions.c.prefix_id == versions.c.prefix_id,
                latest_versions.c.fingerprint == versions.c.fingerprint,
                latest_versions.c.version == versions.c.version,
            ),
        )
        .outerjoin(
            blobs, and_(blobs.c.tenant == versions.c.tenant, blobs.c.digest == versions.c.digest)
        )
        .outerjoin(
            pins,
            and_(
                pins.c.tenant == versions.c.tenant,
                pins.c.prefix_id == versions.c.prefix_id,
                pins.c.version == versions.c.version,
            ),
        )
        .where(prefixes.c.tenant == tenant)
    )


def latest_of(tenant: str, base: BaseSpec | None) -> Select[Any]:
    """The version of each name that ``latest`` means for a base; None: for each of its bases."""
    return versions_of(tenant).where(_is_of(base))


def _is_of(base: BaseSpec | None) -> ColumnElement[bool]:
    column = latest_versions.c.fingerprint
    return column.is_not(None) if base is None else column == base.fingerprint


def list_page(
    connection: Connection,
    tenant: str,
    *,
    base: BaseSpec | None,
    labels: Collection[tuple[str, str]],
    limit: int,
    after: str | None,
) -> Page:
    """The latest versions for a base, or for every base, of ``limit`` names after ``after``; only
    those with all of ``labels``."""
    labelled = [has_label(connection, label, value) for label, value in labels]
    has_latest = exists().where(latest_versions.c.prefix_id == prefixes.c.id, _is_of(base))
    if labelled:
        has_latest = has_latest.where(
            versions.c.prefix_id == latest_versions.c.prefix_id,
            versions.c.version == latest_versions.c.version,
            *labelled,
        )
    names = select(prefixes.c.name).where(prefixes.c.tenant == tenant, has_latest)
    if after is not None:
        names = names.where(prefixes.c.name > after)
    ordered = names.order_by(prefixes.c.name).limit(limit + 1)
    selected = connection.execute(ordered).scalars().all()
    if not selected:
        return Page((), next_after=None)
    last = selected[:limit][-1]
    in_page = prefixes.c.name.between(selected[0], last)
    statement = latest_of(tenant, base).where(in_page, *labelled)
    page = manifests(connection, statement.order_by(prefixes.c.name, versions.c.version.desc()))
    return Page(page, next_after=last if len(selected) > limit else None)


def find(connection: Connection, tenant: str, reference: Reference, *, base: BaseSpec) -> Manifest:
    """The version that a reference means now. ``latest`` is that of ``base``; a number or another
    alias may mean a version of another base: see ``check_base``.

    Raises UnknownPrefix, or BaseMismatch for the ``latest`` of a prefix that has versions of other
    bases only.
    """
    if reference.version is not None:
        return numbered(connection, tenant, reference.name, reference.version)
    named = prefixes.c.name == reference.name
    if reference.alias == LATEST:
        statement = latest_of(tenant, base).where(named)
    else:
        statement = (
            versions_of(tenant)
            .where(named)
            .join(
                aliases,
                and_(
                    aliases.c.prefix_id == versions.c.prefix_id,
                    aliases.c.version == versions.c.version,
                    aliases.c.alias == reference.alias,
                ),
            )
        )
    for manifest in manifests(connection, statement):
        return manifest
    if reference.alias == LATEST:
        check_any_of_base(connection, tenant, reference.name, base=base)
    raise UnknownPrefix(unknown(reference))


def numbered(connection: Connection, tenant: str, name: str, version: int) -> Manifest:
    """One version of any base; raise UnknownPrefix."""
    # A number too large for the column is no version; the driver would raise.
    known = version if 0 <= version <= MAX_VERSION else 0
    statement = versions_of(tenant).where(prefixes.c.name == name, versions.c.version == known)
    for manifest in manifests(connection, statement):
        return manifest
    raise UnknownPrefix(unknown(Reference(name, alias=None, version=version)))


def check_base(manifest: Manifest, base: BaseSpec) -> None:
    """Raise BaseMismatch for a version of another base."""
    if manifest.fingerprint != base.fingerprint:
        raise BaseMismatch(
            f"the prefix {manifest.name}@{manifest.version} belongs to the base model "
            f"'{manifest.base}' (fingerprint {manifest.fingerprint}); the base model served now is "
            f"'{base.name}' (fingerprint {base.fingerprint})"
        )


def check_any_of_base(connection: Connection, tenant: str, name: str, *, base: BaseSpec) -> None:
    """Raise BaseMismatch for a name that has versions of other bases only."""
    newest = versions_of(tenant).where(prefixes.c.name == name).limit(1)
    of_base = newest.where(versions.c.fingerprint == base.fingerprint)
    if connection.execute(of_base).first() is not None:
        return
    for manifest in manifests(connection, newest.order_by(versions.c.version.desc())):
        raise BaseMismatch(
            f"the prefix {name} has no version for the base model served now, '{base.name}' "
            f"(fingerprint {base.fingerprint}); its newest version, {manifest.version}, belongs to "
            f"the base model '{manifest.base}' (fingerprint {manifest.fingerprint})"
        )


def members_of(
    manifests: Sequence[Manifest], weights: Sequence[float | None]
) -> tuple[Member, ...]:
    """Versions as the members of a composition."""
    return tuple(
        Member(each.name, each.version, each.digest, each.kind, weight, each.num_positions)
        for each, weight in zip(manifests, weights, strict=True)
    )


def present_members(
    connection: Connection, tenant: str, members: Sequence[Member]
) -> tuple[Manifest, ...]:
    """The versions that a composition is made of, in order. Raises MemberDeleted, which names all
    that are gone, also those of members that are compositions."""
    present, deleted = _members(connection, tenant, members)
    if deleted:
        names = ", ".join(dict.fromkeys(deleted))
        raise MemberDeleted(
            f"the prefix cannot be used: members of it were deleted ({names}); save it again with "
            "others"
        )
    return tuple(present)


def _members(
    connection: Connection, tenant: str, members: Sequence[Member]
) -> tuple[list[Manifest], list[str]]:
    """The versions of members, and the references of those that are gone, at any depth."""
    present: list[Manifest] = []
    deleted: list[str] = []
    for member in members:
        try:
            version = numbered(connection, tenant, member.name, member.version)
        except UnknownPrefix:
            deleted.append(member.reference)
            continue
        present.append(version)
        deleted += _members(connection, tenant, version.members)[1]
    return present, deleted


def unknown(reference: Reference) -> str:
    """The message for a missing prefix, the same for another tenant's."""
    selector = reference.version if reference.version is not None else reference.alias
    shown = reference.name if selector == LATEST else f"{reference.name}@{selector}"
    return f"no prefix {shown}"


def manifests(connection: Connection, statement: Select[Any]) -> tuple[Manifest, ...]:
    """Manifests of the versions that ``statement``, made by this module, selects; two queries."""
    rows = connection.execute(statement).all()
    names = _alias_names(connection, {(row.prefix_id, row.version) for row in rows})
    return tuple(_manifest(row, aliases_of=names[row.prefix_id, row.version]) for row in rows)


def _alias_names(
    connection: Connection, keys: set[tuple[int, int]]
) -> dict[tuple[int, int], list[str]]:
    names: dict[tuple[int, int], list[str]] = {key: [] for key in keys}
    numbers = [version for _, version in keys]
    statement = select(aliases.c.prefix_id, aliases.c.version, aliases.c.alias).where(
        aliases.c.prefix_id.in_({prefix_id for prefix_id, _ in keys}),
        # A range: a list of all version numbers of a prefix may exceed a statement's limit.
        aliases.c.version.between(min(numbers, default=0), max(numbers, default=0)),
    )
    for prefix_id, version, alias in connection.execute(statement):
        if (prefix_id, version) in names:
            names[prefix_id, version].append(alias)
    return names


def _manifest(row: Row[Any], *, aliases_of: Iterable[str]) -> Manifest:
    fields = {name: getattr(row, name) for name in _STORED}
    # Metadata stored before a field was known, with another type, stays in the free part.
    free = json.loads(row.metadata_json)
    for name in METADATA_TEXTS:
        fields[name] = free.pop(name) if isinstance(free.get(name), str) else None
    del fields["base_fingerprint"]
    labels = free.get("labels")
    if isinstance(labels, dict) and all(isinstance(value, str) for value in labels.values()):
        fields["labels"] = free.pop("labels")
    template = {"prompt_template": fields["prompt_template"]}
    try:
        fields["recipe"] = read_recipe(template | {RECIPE: free.get(RECIPE)})
        free.pop(RECIPE, None)
    except ArtifactRefused:
        fields["recipe"] = read_recipe(template)
    if fields["base"] is None:
        fields["base"] = row.fingerprint[:_FINGERPRINT_DIGITS]
    kind, role = Kind(row.kind), None
    if kind is Kind.HARD_PROMPT:
        role = TextRole(row.role or TextRole.RAW)
    fields["members"], fields["combine"] = read_members(row.members_json)
    latest = () if row.latest_version is None else (LATEST,)
    return Manifest(
        **fields | {"kind": kind, "role": role},
        name=row.name,
        prefix_revision=row.prefix_revision,
        metadata=free,
        aliases=tuple(sorted((*latest, *aliases_of))),
        corrupt=row.corrupt_at is not None,
        pinned=row.pinned_since is not None,
    )
