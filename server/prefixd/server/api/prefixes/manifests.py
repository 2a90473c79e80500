"""A version of a prefix as it is shown."""

from datetime import datetime
from typing import Any, Literal, Self

from pydantic import BaseModel

from prefixd.server.engine.engine import Engine
from prefixd.server.engine.request import PrefixKey
from prefixd.store.store import Manifest


def key_of(manifest: Manifest) -> PrefixKey:
    """What the engine knows a version by."""
    return PrefixKey(tenant=manifest.tenant, digest=manifest.digest)


class PrefixManifest(BaseModel):
    """One immutable version of a prefix; only ``aliases``, ``pinned`` and ``corrupt`` may change.

    ``pinned``: every server keeps it resident. ``creator`` is the id of the key that uploaded it.
    ``corrupt``: its bytes were found damaged, and are not served; upload them again.
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
    pinned: bool
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
            pinned=manifest.pinned,
            corrupt=manifest.corrupt,
        )


class PrefixShown(PrefixManifest):
    """A version, and where the server that answers has it now.

    ``tier`` is ``resident`` (in the KV pool), ``host`` (compiled, in host memory), or on its way
    there: ``fetching``, ``staged``, ``compiling``. Null: nowhere, the first request brings it.
    """

    tier: str | None = None

    @classmethod
    def now(cls, manifest: Manifest, engine: Engine) -> Self:
        """``manifest`` as it is shown at this moment."""
        return cls.of(manifest).model_copy(update={"tier": engine.tier(key_of(manifest))})


class PrefixList(BaseModel):
    """Some prefixes by name; ``next_after`` is what ``after`` takes for more, null at the end."""

    object: Literal["list"] = "list"
    data: list[PrefixShown]
    next_after: str | None = None


class VersionList(BaseModel):
    """Some versions of one prefix, newest first; ``next_before`` asks for older ones, null at the
    end."""

    object: Literal["list"] = "list"
    data: list[PrefixShown]
    next_before: int | None = None
