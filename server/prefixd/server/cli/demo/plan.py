"""What the demo sends: which tenant gets which example prefix, and who is asked what. Pure."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ValidationError

from prefixd.client.errors import ClientError
from prefixd.client.protocol import Message

# Two tenants with different sets, so that what one may not see is visible.
SUPPORT, FRIENDS = "acme-support", "penpals"
_OF_SUPPORT = frozenset({"triage", "handbook", "sentiment", "json-answers"})


@dataclass(frozen=True, slots=True)
class Example:
    """One example prefix on disk, and prompts that show what it does."""

    name: str
    folder: Path
    summary: str
    max_tokens: int
    prompts: tuple[tuple[Message, ...], ...]

    @property
    def tenant(self) -> str:
        """Whose prefix it is in the demo."""
        return SUPPORT if self.name in _OF_SUPPORT else FRIENDS

    @property
    def text(self) -> Path | None:
        """The file of a hard prompt; None for a trained prefix."""
        path = self.folder / "prefix.txt"
        return path if path.is_file() else None


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: ``prefix`` None asks the bare base."""

    tenant: str
    prefix: str | None
    messages: tuple[Message, ...]
    max_tokens: int

    @property
    def question(self) -> str:
        """The last message: what the answers are compared by."""
        return self.messages[-1]["content"]


class _Entry(BaseModel):
    name: str
    path: str
    summary: str
    max_tokens: int
    prompts: list[tuple[Message, ...]]


class _Listing(BaseModel):
    prefixes: list[_Entry]


def read_examples(folder: Path) -> list[Example]:
    """The examples that ``prefixes.json`` in ``folder`` lists; ``ClientError`` for others."""
    path = folder / "prefixes.json"
    try:
        listing = _Listing.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ClientError(f"{path} is not a list of examples: {error}") from None
    return [
        Example(
            name=entry.name,
            folder=folder / entry.path,
            summary=entry.summary,
            max_tokens=entry.max_tokens,
            prompts=tuple(entry.prompts),
        )
        for entry in listing.prefixes
    ]


def asks(examples: Sequence[Example]) -> list[Ask]:
    """Every prompt under its prefix, and each example's first one under the bare base as well.

    Prefixes are dealt in turn, so requests that arrive together carry different ones.
    """
    longest = max((len(example.prompts) for example in examples), default=0)
    under_prefix = [
        Ask(example.tenant, example.name, example.prompts[turn], example.max_tokens)
        for turn in range(longest)
        for example in examples
        if turn < len(example.prompts)
    ]
    bare: dict[str, Ask] = {}
    for example in examples:
        ask = Ask(example.tenant, None, example.prompts[0], example.max_tokens)
        bare.setdefault(json.dumps(ask.messages), ask)
    return [*under_prefix, *bare.values()]


def by_question(requests: Sequence[Ask]) -> list[list[int]]:
    """Indices of ``requests`` grouped by conversation, the bare base first in each group."""
    groups: dict[str, list[int]] = {}
    for index, ask in enumerate(requests):
        groups.setdefault(json.dumps(ask.messages), []).append(index)
    return [
        sorted(group, key=lambda index: requests[index].prefix is not None)
        for group in groups.values()
    ]


def metric(page: str, name: str) -> float:
    """The unlabelled sample ``name`` on a Prometheus text page. ``KeyError`` when it is absent."""
    for line in page.splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return float(value)
    raise KeyError(f"/metrics shows no {name}")
