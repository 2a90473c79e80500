"""The server's responses as frozen pydantic models. Fields unknown to this client are ignored."""

from collections.abc import Mapping
from typing import Annotated

from pydantic import (
    AfterValidator,
    AliasChoices,
    AliasPath,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    model_validator,
)
from pydantic_core import PydanticUseDefault


class ResponseModel(BaseModel):
    """Base of all models: immutable, and no value is converted to another type."""

    model_config = ConfigDict(frozen=True, strict=True, populate_by_name=True)


def _default_if_null(value: object) -> object:
    if value is None:
        raise PydanticUseDefault
    return value


NullIsDefault = BeforeValidator(_default_if_null)


# ── Prefixes ─────────────────────────────────────────────────────────────────────────────────


class PrefixVersion(ResponseModel):
    """Which version of which prefix, and the digest of its bytes."""

    name: str
    version: int
    digest: str

    @property
    def reference(self) -> str:
        """``name@version``, as the ``model`` field takes it."""
        return f"{self.name}@{self.version}"


class PrefixUsed(PrefixVersion):
    """The prefix a generation ran under: exactly which version, by digest.

    ``chosen_by`` is ``model``, ``user`` (bound) or ``default``.
    """

    chosen_by: str | None = None


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


class Prefix(PrefixVersion):
    """One immutable version of a prefix: the server's manifest.

    ``role`` is that of a text, ``raw`` or ``system``. ``recipe`` is how to call it,
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


# ── Generation ───────────────────────────────────────────────────────────────────────────────


class Usage(ResponseModel):
    """Tokens counted by the server, without the virtual tokens of the prefix.

    ``cached_tokens`` of the prompt were not computed: KV reuse supplied their KV.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: Annotated[int, NullIsDefault] = Field(
        default=0,
        validation_alias=AliasChoices(
            "cached_tokens", AliasPath("prompt_tokens_details", "cached_tokens")
        ),
    )


class ChatMessage(ResponseModel):
    """The ``message`` or ``delta`` of a chat choice; the first delta has the role alone."""

    content: Annotated[str, NullIsDefault] = ""


class _GeneratedText(ResponseModel):
    index: int
    text: str
    finish_reason: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _text_of_chat(cls, fields: object) -> object:
        # The chat endpoint sends the text as `message` (whole) or `delta` (streamed).
        if isinstance(fields, Mapping):
            for key in ("message", "delta"):
                if key in fields:
                    return {**fields, "text": ChatMessage.model_validate(fields[key]).content}
        return fields


class Choice(_GeneratedText):
    """One generated text. ``finish_reason`` is ``stop`` or ``length``."""

    logprobs: Mapping[str, object] | None = None


class CompletionChunk(_GeneratedText):
    """A piece of a streamed generation; only the last one has ``usage``.

    The server uses "chunk" for a piece of a prompt in a prefill.
    """

    usage: Usage | None = None


def _by_index(choices: tuple[Choice, ...]) -> tuple[Choice, ...]:
    return tuple(sorted(choices, key=lambda choice: choice.index))


class Completion(ResponseModel):
    """A finished generation of either endpoint; the content of a chat message is its ``text``.
    ``warnings`` say what was likely not meant."""

    id: str
    model: str
    choices: Annotated[tuple[Choice, ...], Field(min_length=1), AfterValidator(_by_index)]
    usage: Usage | None = None
    prefix: PrefixUsed | None = None
    warnings: Annotated[tuple[str, ...], Field(strict=False), NullIsDefault] = ()
    request_id: str | None = None

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].text


# ── Administration ───────────────────────────────────────────────────────────────────────────


class Tenant(ResponseModel):
    """A tenant; ``quota`` holds its limits by name, None for no limit, and ``unlimited`` the names
    of those. ``used`` and ``keys`` are what it has; only ``show_tenant`` returns them."""

    name: str
    created_at: AwareDatetime
    default_prefix: str | None = None
    weight: float
    kv_reuse: bool
    quota: Mapping[str, object]
    unlimited: Annotated[tuple[str, ...], Field(strict=False), NullIsDefault] = ()
    used: Mapping[str, object] | None = None
    keys: int | None = None


class Key(ResponseModel):
    """An API key. Only the response that issues it has its ``secret``.

    ``state`` is ``active``, ``replaced``, ``expired`` or ``revoked``.
    """

    key_id: str
    tenant: str
    label: str
    scopes: Annotated[tuple[str, ...], Field(strict=False), NullIsDefault] = ()
    state: str
    created_at: AwareDatetime
    expires_at: AwareDatetime | None = None
    replaced_by: str | None = None
    secret: str | None = Field(default=None, validation_alias="key", repr=False)


class AuditEntry(ResponseModel):
    """One recorded change. ``actor_key`` None means the command line on the catalog."""

    id: int
    at: AwareDatetime
    tenant: str
    action: str
    subject: str
    actor_tenant: str | None = None
    actor_key: str | None = None
    request_id: str | None = None
    detail: Mapping[str, object]


class TenantPage(ResponseModel):
    """Some tenants by name; pass ``next_after`` as ``after`` for more, if it is set."""

    tenants: tuple[Tenant, ...] = Field(validation_alias="data")
    next_after: str | None = None


class KeyPage(ResponseModel):
    """Some keys, oldest first; pass ``next_after`` as ``after`` for more, if it is set."""

    keys: tuple[Key, ...] = Field(validation_alias="data")
    next_after: str | None = None


class AuditPage(ResponseModel):
    """Some entries, newest first; pass ``next_before`` as ``before`` for more, if it is set."""

    entries: tuple[AuditEntry, ...] = Field(validation_alias="data")
    next_before: int | None = None
