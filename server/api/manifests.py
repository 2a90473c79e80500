"""A version of a prefix as it is shown."""

from datetime import datetime
from typing import Any, Literal, Self

from pydantic import BaseModel

from prefix_store.store import Manifest


class PrefixManifest(BaseModel):
    """One immutable version of a prefix; only ``aliases`` may change.

    ``creator`` is the id of the key that uploaded it. ``corrupt``: its bytes were found damaged,
    and are not served; upload them again.
    """

    object: Literal["prefix"] = "prefix"
    name: str
    version: int
    digest: str
    kind: str
    peft_type: str | None
    num_virtual_tokens: int
    dtype: str | None
    size_bytes: int
    fingerprint: str
    created_at: datetime
    base_model_name_or_path: str | None
    creator: str | None
    labels: dict[str, str]
    description: str | None
    prompt_template: str | None
    metadata: dict[str, Any]
    aliases: list[str]
    corrupt: bool

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        """``manifest`` as it is shown."""
        return cls(
            name=manifest.name,
            version=manifest.version,
            digest=manifest.digest,
            kind=manifest.kind.value,
            peft_type=manifest.peft_type,
            num_virtual_tokens=manifest.num_virtual_tokens,
            dtype=manifest.dtype,
            size_bytes=manifest.size_bytes,
            fingerprint=manifest.fingerprint,
            created_at=manifest.created_at,
            base_model_name_or_path=manifest.base_model_name_or_path,
            creator=manifest.creator,
            labels=dict(manifest.labels),
            description=manifest.description,
            prompt_template=manifest.prompt_template,
            metadata=dict(manifest.metadata),
            aliases=list(manifest.aliases),
            corrupt=manifest.corrupt,
        )


class PrefixList(BaseModel):
    """Some prefixes by name; ``next_after`` is what ``after`` takes for more, null at the end."""

    object: Literal["list"] = "list"
    data: list[PrefixManifest]
    next_after: str | None = None
