"""Versions of prefixes: as the API shows them, and as the engine takes them."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict

from prefixd.server.api.generate.formatter import MemberUsed
from prefixd.server.api.placement import key_of
from prefixd.server.engine.engine import Engine
from prefixd.store.artifact.composition import Combine
from prefixd.store.artifact.recipe import Input
from prefixd.store.store import Manifest


class ShownExample(BaseModel):
    """A prompt, and an answer that is right."""

    model_config = ConfigDict(from_attributes=True)

    prompt: str
    answer: str


class ShownRecipe(BaseModel):
    """How to call a version; null: its recipe does not say. ``takes`` is ``input``, or what the
    template implies: ``text`` where it stands around the text of a chat's one message."""

    model_config = ConfigDict(from_attributes=True)

    prompt_template: str | None = None
    input: Input | None = None
    takes: Input = Input.CHAT
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    stop: list[str] | None = None
    examples: list[ShownExample] = []


class PrefixManifest(BaseModel):
    """One immutable version of a prefix; only its metadata, its recipe among it, ``aliases``,
    ``pinned`` and ``corrupt`` may change.

    ``recipe_revision`` counts the recipes that it had, from 1. ``role`` is that of a text: ``raw``
    in front of the prompt, or ``system``. ``members`` are those of a stack, a blend or an ensemble,
    and ``combine`` says how an ensemble combines them.

    ``base`` is the served name of the base it was uploaded for, or the first 12 digits of that
    base's ``fingerprint`` where the name was not recorded. ``pinned``: every server keeps it
    resident. ``creator`` is the id of the key that uploaded it. ``corrupt``: its bytes were found
    damaged, and are not served; upload them again.
    """

    model_config = ConfigDict(from_attributes=True)

    object: Literal["prefix"] = "prefix"
    name: str
    version: int
    digest: str
    kind: str
    peft_type: str | None
    role: str | None = None
    members: list[MemberUsed] = []
    combine: Combine | None = None
    num_virtual_tokens: int
    dtype: str | None
    size_bytes: int
    fingerprint: str
    base: str
    created_at: datetime
    base_model_name_or_path: str | None
    creator: str | None
    labels: dict[str, str]
    description: str | None
    prompt_template: str | None
    recipe: ShownRecipe = ShownRecipe()  # a response stored by an earlier server has none
    recipe_revision: int = 1
    metadata: dict[str, Any]
    aliases: list[str]
    pinned: bool
    corrupt: bool


class UploadedPrefix(PrefixManifest):
    """A version that was uploaded, and what is worth knowing about it on this base."""

    warnings: list[str] = []


class Agreement(BaseModel):
    """How often a member of an ensemble agreed with its answers so far: of ``compared`` tokens with
    ``mean_logprob``, and of ``compared`` answers with ``vote``."""

    model_config = ConfigDict(from_attributes=True)

    agreed: int
    compared: int


class MemberShown(MemberUsed):
    """A member; ``agreement`` is of an ensemble's, null before its first answer."""

    agreement: Agreement | None = None


class PrefixShown(PrefixManifest):
    """A version, and where this server has it now.

    ``tier`` is ``resident`` (in the KV pool), ``host`` (compiled, in host memory), or being
    loaded: ``fetching``, ``staged``, ``compiling``. Null: nowhere; the first request loads it.
    """

    tier: str | None = None

    @classmethod
    def now(cls, manifest: Manifest, engine: Engine) -> Self:
        """``manifest`` with its present tier."""
        key = key_of(manifest)
        tier = None if key is None else engine.tier(key)
        return cls.model_validate(manifest).model_copy(update={"tier": tier})


class PrefixDetails(PrefixShown):
    """A version by itself, with the agreement of its members."""

    members: list[MemberShown] = []  # type: ignore[assignment]

    @classmethod
    def of(cls, shown: PrefixShown, agreement: Mapping[int, Any]) -> Self:
        """``shown`` with the ``agreement`` of its members, by their place."""
        details = cls.model_validate(shown.model_dump())
        for place, member in enumerate(details.members):
            if place in agreement:
                member.agreement = Agreement.model_validate(agreement[place])
        return details


class PrefixList(BaseModel):
    """Some prefixes by name; pass ``next_after`` as ``after`` for more, null at the end."""

    object: Literal["list"] = "list"
    data: list[PrefixShown]
    next_after: str | None = None


class VersionList(BaseModel):
    """Some versions of one prefix, newest first; ``next_before`` asks for older ones, null at the
    end."""

    object: Literal["list"] = "list"
    data: list[PrefixShown]
    next_before: int | None = None
