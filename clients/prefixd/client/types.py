"""What the server answers, as frozen dataclasses. Fields this client does not know are ignored."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Self

from prefixd.client.wire import as_object, maybe, moment, objects, read, strings


@dataclass(frozen=True, slots=True)
class PrefixVersion:
    """Which version of which prefix, and the digest of its bytes."""

    name: str
    version: int
    digest: str

    @property
    def reference(self) -> str:
        """``name@version``, as the ``model`` field takes it."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True, slots=True)
class PrefixUsed(PrefixVersion):
    """The prefix a generation ran under: exactly which version, by digest.

    ``chosen_by`` is ``model``, ``user`` (bound) or ``default``.
    """

    chosen_by: str | None = None

    @classmethod
    def from_wire(cls, source: Mapping[str, object]) -> Self:
        """From the ``prefix`` object of a generation."""
        return cls(
            name=read(source, "name", str),
            version=read(source, "version", int),
            digest=read(source, "digest", str),
            chosen_by=maybe(source, "chosen_by", str),
        )


@dataclass(frozen=True, slots=True)
class Prefix(PrefixVersion):
    """One immutable version of a prefix: the server's manifest.

    ``pinned``: servers keep it resident. ``tier`` says where the server that answered has it now:
    ``resident`` (in the pool), ``host`` (compiled, in its memory), on its way (``fetching``,
    ``staged``, ``compiling``), or None.
    """

    kind: str
    num_virtual_tokens: int
    size_bytes: int
    created_at: datetime
    aliases: tuple[str, ...] = ()
    peft_type: str | None = None
    dtype: str | None = None
    base_model_name_or_path: str | None = None
    metadata: Mapping[str, object] = field(default_factory=dict)
    pinned: bool = False
    tier: str | None = None

    @classmethod
    def from_wire(cls, source: Mapping[str, object]) -> Self:
        """From a manifest object."""
        return cls(
            name=read(source, "name", str),
            version=read(source, "version", int),
            digest=read(source, "digest", str),
            kind=read(source, "kind", str),
            num_virtual_tokens=read(source, "num_virtual_tokens", int),
            size_bytes=read(source, "size_bytes", int),
            created_at=moment(source, "created_at"),
            aliases=strings(source, "aliases"),
            peft_type=maybe(source, "peft_type", str),
            dtype=maybe(source, "dtype", str),
            base_model_name_or_path=maybe(source, "base_model_name_or_path", str),
            metadata=maybe(source, "metadata", dict) or {},
            pinned=maybe(source, "pinned", bool) or False,
            tier=maybe(source, "tier", str),
        )


@dataclass(frozen=True, slots=True)
class Uploaded:
    """The outcome of an upload. ``created`` is False when the same bytes were already there."""

    prefix: Prefix
    created: bool


@dataclass(frozen=True, slots=True)
class Warmed(PrefixVersion):
    """A version that is being made resident, and where it is: ``resident``, ``queued`` or one of
    the other tiers."""

    state: str

    @classmethod
    def from_wire(cls, source: Mapping[str, object]) -> Self:
        """From the answer to a ``warm``."""
        return cls(
            name=read(source, "name", str),
            version=read(source, "version", int),
            digest=read(source, "digest", str),
            state=read(source, "state", str),
        )


@dataclass(frozen=True, slots=True)
class PrefixPage:
    """Some of the tenant's prefixes; pass ``next_after`` as ``after`` for more, if it is set."""

    prefixes: tuple[Prefix, ...]
    next_after: str | None


@dataclass(frozen=True, slots=True)
class VersionPage:
    """Some versions of a prefix, newest first; pass ``next_before`` as ``before`` for older ones,
    if it is set."""

    versions: tuple[Prefix, ...]
    next_before: int | None


@dataclass(frozen=True, slots=True)
class Binding:
    """An end user and the prefix reference the user is bound to."""

    user: str
    prefix: str
    updated_at: datetime

    @classmethod
    def from_wire(cls, source: Mapping[str, object]) -> Self:
        """From a binding object."""
        return cls(
            user=read(source, "user", str),
            prefix=read(source, "prefix", str),
            updated_at=moment(source, "updated_at"),
        )


@dataclass(frozen=True, slots=True)
class BindingPage:
    """Some bindings; pass ``next_after`` as ``after`` for more, if it is set."""

    bindings: tuple[Binding, ...]
    next_after: str | None


@dataclass(frozen=True, slots=True)
class Model:
    """A name the ``model`` field takes: the base (``parent`` is None) or a prefix of it."""

    id: str
    parent: str | None

    @classmethod
    def from_wire(cls, source: Mapping[str, object]) -> Self:
        """From an entry of ``GET /v1/models``."""
        return cls(id=read(source, "id", str), parent=maybe(source, "parent", str))


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens counted by the server. Virtual tokens of the prefix are not among them.

    ``cached_tokens`` of the prompt were not computed: their KV was there (KV reuse).
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @classmethod
    def from_wire(cls, source: Mapping[str, object]) -> Self:
        """From a ``usage`` object."""
        details = as_object(source.get("prompt_tokens_details") or {})
        return cls(
            cached_tokens=maybe(details, "cached_tokens", int) or 0,
            prompt_tokens=read(source, "prompt_tokens", int),
            completion_tokens=read(source, "completion_tokens", int),
        )


@dataclass(frozen=True, slots=True)
class Choice:
    """One generated answer. ``finish_reason`` is ``stop`` or ``length``."""

    index: int
    text: str
    finish_reason: str | None
    logprobs: Mapping[str, object] | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished generation, of either endpoint: a chat answer's content is its ``text``."""

    id: str
    model: str
    choices: tuple[Choice, ...]
    usage: Usage | None
    prefix: PrefixUsed | None
    request_id: str | None

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].text


@dataclass(frozen=True, slots=True)
class CompletionChunk:
    """A piece of a streamed generation; ``usage`` comes with the last one alone."""

    text: str
    index: int = 0
    finish_reason: str | None = None
    usage: Usage | None = None


def manifests(source: Mapping[str, object]) -> tuple[Prefix, ...]:
    """The prefixes in a listing's ``data``."""
    return tuple(Prefix.from_wire(entry) for entry in objects(source, "data"))
