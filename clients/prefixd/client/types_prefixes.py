"""Responses about prefixes, their recipes and who uses them."""

from collections.abc import Mapping
from typing import Annotated

from pydantic import AwareDatetime, Field

from prefixd.client.types_base import NullIsDefault, ResponseModel


class PrefixVersion(ResponseModel):
    """Which version of which prefix, and the digest of its bytes."""

    name: str
    version: int
    digest: str

    @property
    def reference(self) -> str:
        """``name@version``, as the ``model`` field takes it."""
        return f"{self.name}@{self.version}"


class Agreement(ResponseModel):
    """How often a member of an ensemble agreed with its answers: of ``compared`` tokens where
    predictions are averaged, of ``compared`` answers where members vote."""

    agreed: int
    compared: int


class Member(ResponseModel):
    """A version that a stack, a blend or an ensemble is made of; ``weight`` is of a blend's,
    ``agreement`` of an ensemble's, once it has answered."""

    reference: str
    digest: str | None = None
    weight: float | None = None
    agreement: Agreement | None = None


class PrefixUsed(ResponseModel):
    """The prefix a generation ran under: exactly which version, by digest.

    ``chosen_by`` is ``model``, ``prefix``, ``user`` (bound) or ``default``. With ``prefix`` there
    is no name, but ``kind`` and ``members``, which saved compositions have too.
    """

    name: str | None = None
    version: int | None = None
    digest: str
    chosen_by: str | None = None
    kind: str | None = None
    members: Annotated[tuple[Member, ...], Field(strict=False), NullIsDefault] = ()
    combine: str | None = None

    @property
    def reference(self) -> str:
        """``name@version``, or the references of the members of a composition without a name."""
        if self.name is None:
            return ",".join(member.reference for member in self.members)
        return f"{self.name}@{self.version}"


class Example(ResponseModel):
    """A prompt, and an answer that is right."""

    prompt: str
    answer: str


class Recipe(ResponseModel):
    """How to call a version; None: its recipe does not say. ``takes`` is ``input``, or what the
    template implies: ``text`` where it stands around the text of a chat's one message."""

    prompt_template: str | None = None
    input: str | None = None
    takes: str = "chat"
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    stop: Annotated[tuple[str, ...] | None, Field(strict=False)] = None
    examples: Annotated[tuple[Example, ...], Field(strict=False), NullIsDefault] = ()

    @property
    def stated(self) -> dict[str, object]:
        """What the recipe says, as a ``recipe.json`` has it."""
        return self.model_dump(mode="json", include={*RECIPE_FIELDS}, exclude_defaults=True)


RECIPE_FIELDS = tuple(name for name in Recipe.model_fields if name != "takes")
"""The fields that a recipe may state."""


class Prefix(PrefixVersion):
    """One immutable version of a prefix: the server's manifest.

    ``role`` is that of a text, ``raw`` or ``system``; ``members`` are those of a stack, a blend or
    an ensemble, and ``combine`` says how the last one combines them. ``recipe`` is how to call it,
    and ``recipe_revision`` counts its changes, from 1.
    ``pinned``: servers keep it resident. ``tier`` is where the responding server holds it now:
    ``resident`` (in the pool), ``host`` (compiled, in host memory), in transit (``fetching``,
    ``staged``, ``compiling``), or None. ``base`` is the name of the base that it belongs to, or
    the first digits of that base's ``fingerprint``. ``etag`` is what ``if_match`` takes; None in
    lists.
    """

    kind: str
    num_virtual_tokens: int
    size_bytes: int
    created_at: AwareDatetime
    # After a validator a JSON array is a list, which a strict tuple would refuse.
    aliases: Annotated[tuple[str, ...], Field(strict=False), NullIsDefault] = ()
    peft_type: str | None = None
    role: str | None = None
    members: Annotated[tuple[Member, ...], Field(strict=False), NullIsDefault] = ()
    combine: str | None = None
    dtype: str | None = None
    base_model_name_or_path: str | None = None
    base: str | None = None
    fingerprint: str | None = None
    labels: Annotated[Mapping[str, str], NullIsDefault] = Field(default_factory=dict)
    description: str | None = None
    prompt_template: str | None = None
    recipe: Annotated[Recipe, NullIsDefault] = Recipe()
    recipe_revision: int = 1
    metadata: Annotated[Mapping[str, object], NullIsDefault] = Field(default_factory=dict)
    pinned: Annotated[bool, NullIsDefault] = False
    tier: str | None = None
    etag: str | None = None


def composition_of(prefix: Prefix) -> dict[str, object]:
    """The members of a composition, as an upload and the field ``prefix`` of a request take
    them."""
    references = [member.reference for member in prefix.members]
    if prefix.kind == "blend":
        return {"blend": {member.reference: member.weight for member in prefix.members}}
    combine = {} if prefix.combine is None else {"combine": prefix.combine}
    return {prefix.kind: references, **combine}


class UploadWarnings(ResponseModel):
    """What the response to an upload says besides the version."""

    warnings: Annotated[tuple[str, ...], Field(strict=False), NullIsDefault] = ()


class Uploaded(ResponseModel):
    """The outcome of an upload. ``created`` is False when the same bytes were already stored.
    ``warnings`` say what is worth knowing of it on the served base."""

    prefix: Prefix
    created: bool
    warnings: tuple[str, ...] = ()


class Warmed(PrefixVersion):
    """A version that is resident or being loaded. ``state`` is ``queued`` or a tier, as of
    ``Prefix.tier``."""

    state: str


class PrefixPage(ResponseModel):
    """Some of the tenant's prefixes; pass ``next_after`` as ``after`` for more, if it is set."""

    prefixes: tuple[Prefix, ...] = Field(validation_alias="data")
    next_after: str | None = None


class VersionPage(ResponseModel):
    """Some versions of a prefix, newest first; pass ``next_before`` as ``before`` for older ones,
    if it is set."""

    versions: tuple[Prefix, ...] = Field(validation_alias="data")
    next_before: int | None = None


class Model(ResponseModel):
    """A name the ``model`` field takes: the base (``parent`` is None) or a prefix of it, with its
    recipe."""

    id: str
    parent: str | None = None
    recipe: Recipe | None = None


class ModelList(ResponseModel):
    """All names the ``model`` field takes."""

    data: tuple[Model, ...]


# ── Bindings ─────────────────────────────────────────────────────────────────────────────────


class Binding(ResponseModel):
    """An end user and the prefix reference the user is bound to. ``etag`` is what ``if_match``
    takes; None in lists."""

    user: str
    prefix: str
    updated_at: AwareDatetime
    etag: str | None = None


class BindingPage(ResponseModel):
    """Some bindings; pass ``next_after`` as ``after`` for more, if it is set."""

    bindings: tuple[Binding, ...] = Field(validation_alias="data")
    next_after: str | None = None


class ImportedBindings(ResponseModel):
    """How many bindings an import set."""

    imported: int


class DefaultPrefix(ResponseModel):
    """The prefix reference of users without a binding."""

    prefix: str
