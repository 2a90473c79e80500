"""What the demo sends: the tenant of each example prefix, and the requests. Pure."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ValidationError

from prefixd.client.errors import ClientError

Message = dict[str, str]

# Two tenants with different prefixes, to show that neither sees the other's.
SUPPORT, FRIENDS = "acme-support", "penpals"
_SUPPORT_PREFIXES = frozenset({"triage", "handbook", "sentiment", "verdict", "json-answers"})


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
        """The tenant that owns the prefix in the demo."""
        return SUPPORT if self.name in _SUPPORT_PREFIXES else FRIENDS

    @property
    def text_file(self) -> Path | None:
        """The file of a hard prompt; None for a trained prefix."""
        path = self.folder / "prefix.txt"
        return path if path.is_file() else None


@dataclass(frozen=True, slots=True)
class DemoRequest:
    """One request: ``prefix`` None is the bare base."""

    tenant: str
    prefix: str | None
    messages: tuple[Message, ...]
    max_tokens: int

    @property
    def question(self) -> str:
        """The last message."""
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
    """The examples that ``prefixes.json`` in ``folder`` lists. Raises ``ClientError`` for a
    malformed list."""
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


def plan_requests(examples: Sequence[Example]) -> list[DemoRequest]:
    """Every prompt under its prefix, and each example's first one under the bare base as well.

    Prefixes alternate, so that requests that arrive together carry different ones.
    """
    longest = max((len(example.prompts) for example in examples), default=0)
    under_prefix = [
        DemoRequest(example.tenant, example.name, example.prompts[turn], example.max_tokens)
        for turn in range(longest)
        for example in examples
        if turn < len(example.prompts)
    ]
    bare: dict[str, DemoRequest] = {}
    for example in examples:
        request = DemoRequest(example.tenant, None, example.prompts[0], example.max_tokens)
        bare.setdefault(json.dumps(request.messages), request)
    return [*under_prefix, *bare.values()]


def by_question(requests: Sequence[DemoRequest]) -> list[list[int]]:
    """Indices of ``requests`` grouped by conversation, the bare base first in each group."""
    groups: dict[str, list[int]] = {}
    for index, request in enumerate(requests):
        groups.setdefault(json.dumps(request.messages), []).append(index)
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
