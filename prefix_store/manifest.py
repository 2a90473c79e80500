"""What the store knows and tells of a version."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from prefix_store.errors import ArtifactRefused
from prefix_store.peft_config import Kind
from prefix_store.strict_json import StrictJsonError, canonical, parse_object

MAX_METADATA_BYTES = 16 * 1024


@dataclass(frozen=True, slots=True)
class Manifest:
    """An immutable version. Only ``aliases`` may differ the next time it is read: the names, with
    ``latest``, that point at it now. ``fingerprint`` is that of the base it was judged against,
    ``base_model_name_or_path`` what its config claims."""

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


def encode_metadata(metadata: Mapping[str, Any] | None) -> str:
    """Free metadata as one line of JSON; raise ArtifactRefused ``malformed_metadata``."""
    try:
        raw = canonical(dict(metadata or {}))
        if len(raw) > MAX_METADATA_BYTES:
            raise ArtifactRefused(
                "malformed_metadata",
                f"expected metadata of at most {MAX_METADATA_BYTES} bytes as JSON, got {len(raw)}",
                param="metadata",
            )
        parse_object(raw)
    except (StrictJsonError, TypeError, ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, StrictJsonError) else "it is not JSON"
        raise ArtifactRefused(
            "malformed_metadata",
            f"expected metadata to be a JSON object: {reason}",
            param="metadata",
        ) from None
    return raw.decode("ascii")
