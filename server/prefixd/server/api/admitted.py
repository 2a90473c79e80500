"""A request that was admitted: plain data, from names and bodies to what the engine runs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Self, TypeVar

from prefixd.server.api.answers.parser import AnswerSyntax
from prefixd.server.engine.constraint import Grammar
from prefixd.server.engine.inputs import PLACEHOLDER
from prefixd.server.engine.request import AdmittedRequest, PrefixHandle, PrefixKey
from prefixd.server.tenants.bindings import ChosenBy
from prefixd.store.store import Manifest

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ResolvedMember:
    """A member of an ensemble. ``whole`` are all its virtual tokens; its prompt says which of them
    stand in front (``placement.front_of``)."""

    manifest: Manifest
    whole: PrefixHandle


@dataclass(frozen=True, slots=True)
class ResolvedPrefix:
    """A version of a prefix, or a composition of the request, and why it was chosen. ``ensemble``
    are the members of an ensemble, in order; ``manifest.combine`` says how they are combined.
    ``warnings`` are for the caller."""

    manifest: Manifest
    chosen_by: ChosenBy
    ensemble: tuple[ResolvedMember, ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class AskedGrammar:
    """A grammar, and the field of the request that asks for it."""

    grammar: Grammar
    param: str


@dataclass(frozen=True, slots=True)
class PromptToken:
    """A token of a request's prompt: its id, its place in the prompt that the engine runs, and
    where its text begins. ``previous`` is the token with text before it."""

    token_id: int
    place: int
    previous: int | None
    offset: int


@dataclass(frozen=True, slots=True)
class PromptText:
    """The text of a prompt, and its tokens."""

    text: str
    tokens: tuple[PromptToken, ...]


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request that fits: one ``AdmittedRequest`` for each prompt, all under the same prefix.

    ``model`` is the caller's name for it; ``prefix`` is None for the bare base. Choice
    ``i * n + j`` of the response is sequence ``j`` of request ``i``; ``num_choices`` counts them,
    ``prompt_lengths`` are the tokens of each prompt, without virtual ones. ``unloaded``
    are the embeddings that each request lacks: their place in its prompt, and their key. ``texts``
    are the prompts where the answer shows them, and ``warnings`` are for the caller.
    The prompts begin with the same ``shared_tokens`` tokens, which are counted and charged once.
    ``grammar`` is what all outputs must be in, not compiled yet.
    ``syntax`` says what the text of answers is made of; None: of content alone.
    Of an ensemble each ``num_members`` requests in a row are for one prompt, each under another
    prefix.
    """

    id: str
    model: str
    prefix: ResolvedPrefix | None
    requests: tuple[AdmittedRequest, ...]
    num_choices: int
    prompt_lengths: tuple[int, ...]
    unloaded: tuple[tuple[tuple[int, PrefixKey], ...], ...] = ()
    texts: tuple[PromptText, ...] = ()
    warnings: tuple[str, ...] = ()
    shared_tokens: int = 0
    grammar: AskedGrammar | None = None
    syntax: AnswerSyntax | None = None
    num_members: int = 1

    def in_background(self, *, server_timeout: float | None) -> Self:
        """The same request, of the background class, which waits for as long as it takes: the
        server's own limit of a request's time does not apply, only that of the request."""
        requests = tuple(
            replace(
                request,
                background=True,
                timeout_s=None if request.timeout_s == server_timeout else request.timeout_s,
            )
            for request in self.requests
        )
        return replace(self, requests=requests)

    def explained(self, message: str) -> str:
        """``message`` of a failure, which names a member of a composition by its digest, with the
        member's reference."""
        members = () if self.prefix is None else self.prefix.manifest.members
        for member in members:
            if member.digest in message:
                return message.replace(member.digest, member.reference, 1)
        return message

    @property
    def head(self) -> dict[str, Any]:
        """Fields of the whole response, or of the first chunk of a stream, where they have a
        value."""
        return {"warnings": list(self.warnings)} if self.warnings else {}

    @property
    def prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(self.prompt_lengths)

    @property
    def num_sequences(self) -> int:
        """Answers of the engine: those of all members of an ensemble that votes."""
        return sum(request.n for request in self.requests)

    @property
    def num_rows(self) -> int:
        """Sequences that each answer of the engine takes."""
        return self.requests[0].num_rows

    @property
    def prompts(self) -> list[list[int]]:
        """The token ids of the prompt of each choice, of the first member; embeddings have none."""
        return [
            [token for token in request.source or request.prompt if token != PLACEHOLDER]
            for request in self.requests[:: self.num_members]
            for _ in range(request.n)
        ]

    @property
    def choice_lengths(self) -> list[int]:
        """The length of the prompt of each choice, of all members together."""
        lengths = map(sum, grouped(self.prompt_lengths, self.num_members))
        n = self.requests[0].n
        return [length for length in lengths for _ in range(n)]

    @property
    def charged_tokens(self) -> int:
        """Tokens that the tenant's limits count at admission: virtual ones inside a prompt too,
        since each request computes them."""
        num_shared = self.shared_tokens * (len(self.requests) - 1)
        own = sum(len(request.prompt) for request in self.requests)
        members = chain.from_iterable(request.members for request in self.requests)
        return own + sum(len(member.prompt) for member in members) - num_shared


def grouped(items: Sequence[T], count: int) -> list[Sequence[T]]:
    """``items`` in groups of ``count``."""
    return [items[start : start + count] for start in range(0, len(items), count)]
