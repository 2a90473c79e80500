"""What the store knows and tells of a version."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from prefixd.store.artifact.peft_config import Kind


@dataclass(frozen=True, slots=True)
class Manifest:
    """An immutable version. Only ``aliases`` (the names, with ``latest``, that point at it now),
    ``pinned`` (it shall stay resident) and ``corrupt`` (its blob was found changed; upload it
    again) may differ the next time it is read.

    ``fingerprint`` is that of the base it was judged against, ``base_model_name_or_path`` what its
    config claims, ``creator`` the id of the key that published it. ``metadata`` is what the upload
    gave beside the fields that have a place of their own here.
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
    created_at: datetime
    base_model_name_or_path: str | None
    metadata: Mapping[str, Any]
    aliases: tuple[str, ...]
    creator: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    description: str | None = None
    prompt_template: str | None = None
    corrupt: bool = False
    pinned: bool = False


@dataclass(frozen=True, slots=True)
class Published:
    """The version that a publish made, or found: then ``created`` is False."""

    manifest: Manifest
    created: bool


@dataclass(frozen=True, slots=True)
class Page:
    """Some manifests in order; ``next_after`` asks for the following ones, None at the end."""

    manifests: tuple[Manifest, ...]
    next_after: str | None
