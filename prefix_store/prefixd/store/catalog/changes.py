"""What a catalog transaction takes and returns."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from datetime import datetime

from prefixd.store.artifact.artifact import Summary
from prefixd.store.artifact.base_spec import BaseSpec
from prefixd.store.artifact.envelope import Packed
from prefixd.store.catalog.manifests import Manifest
from prefixd.store.names import BlobKey

Precondition = Callable[[Collection[int]], object]
"""Called in the transaction, under the lock and before the change, with the revisions that stand
for the present state of the resource; with none when it does not exist. What it raises rolls the
transaction back."""


def unconditional(_: Collection[int]) -> None:
    """The precondition of a change that has none."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A version without its number. ``ticket`` is the one its blob was wanted with; see
    ``prefixd.store.catalog.blob_rows``. ``replaces_metadata``: that of a version which these bytes
    have already is replaced."""

    summary: Summary
    packed: Packed
    base: BaseSpec
    metadata_json: str
    replaces_metadata: bool
    creator: str | None
    created_at: datetime
    ticket: str


@dataclass(frozen=True, slots=True)
class Published:
    """The version of a publish; ``created`` is False when the same bytes had one already, and
    ``metadata_changed`` says whether its metadata was replaced by another."""

    manifest: Manifest
    created: bool
    metadata_changed: bool = False


@dataclass(frozen=True, slots=True)
class Removed:
    """A version that was deleted. ``ends_name``: the bare name meant something for the served base,
    and now it does not, or no version of the name is left at all."""

    manifest: Manifest
    ends_name: bool


@dataclass(frozen=True, slots=True)
class Change:
    """The effect of a transaction: blobs that no ``latest``, alias or pin of their tenant refers to
    any more, though a version may still have them; and whether pins changed."""

    orphans: tuple[BlobKey, ...] = ()
    pins: bool = False
