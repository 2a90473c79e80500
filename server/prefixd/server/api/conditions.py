"""Preconditions of RFC 9110: the headers If-Match and If-None-Match, compared with entity tags.

The tag of a catalog row is its revision, such as ``W/"7"``: weak, because the body also says where
the prefix is resident. For rows both headers compare by the weak comparison, so that a client can
send a tag as it received it. A stored file has a strong tag, its digest.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Header, Request, Response

from prefixd.server.errors import BadRequest, PreconditionFailed
from prefixd.store.store import Manifest

_TAG = r'(?:W/)?"[\x21\x23-\x7e\x80-\xff]*"'
_TAGS = re.compile(rf"[ \t,]*{_TAG}(?:[ \t]*,[ \t,]*{_TAG})*[ \t,]*")
TAGS_PATTERN = rf"^(?:[ \t]*\*[ \t]*|{_TAGS.pattern})$"
"""What the two headers may have, for the OpenAPI document."""
_SHOWN = 80
_CORRUPT = "-corrupt"


@dataclass(frozen=True, slots=True)
class TagList:
    """The value of one of the headers: entity tags, or ``*`` with none."""

    text: str
    tags: frozenset[str]

    def matches(self, current: Collection[str]) -> bool:
        """Whether any of the current tags, none for a missing resource, is listed; exactly."""
        return bool(current) if not self.tags else not self.tags.isdisjoint(current)

    def matches_weakly(self, current: Collection[str]) -> bool:
        """As ``matches``, without the difference between weak and strong tags."""
        opaque = {tag.removeprefix("W/") for tag in self.tags}
        return TagList(self.text, frozenset(opaque)).matches(
            [tag.removeprefix("W/") for tag in current]
        )


@dataclass(frozen=True, slots=True)
class Conditions:
    """The preconditions of one request."""

    if_match: TagList | None
    if_none_match: TagList | None

    def check(self, revisions: Collection[int]) -> None:
        """The precondition of a write, to be called in its transaction: see
        ``prefixd.store.catalog.changes.Precondition``. Raises PreconditionFailed."""
        current = [tag for revision in revisions for tag in _tags_of(revision)]
        shown = current[0] if current else None
        if self.if_match is not None and not self.if_match.matches_weakly(current):
            raise _changed(self.if_match, shown)
        if self.if_none_match is not None and self.if_none_match.matches_weakly(current):
            raise _exists(self.if_none_match, shown)

    def unchanged(self, tag: str) -> bool:
        """Whether a GET of what has ``tag`` now is answered with 304. Raises PreconditionFailed."""
        if self.if_match is not None:
            is_weak = tag.startswith("W/")
            matches = self.if_match.matches_weakly if is_weak else self.if_match.matches
            if not matches([tag]):
                raise _changed(self.if_match, tag)
        return self.if_none_match is not None and self.if_none_match.matches_weakly([tag])


def tag_of(revision: int, *, corrupt: bool = False) -> str:
    """The entity tag of a catalog row. Damage to the bytes is no write to the row, so it has its
    own tag."""
    return f'W/"{revision}{_CORRUPT if corrupt else ""}"'


def _tags_of(revision: int) -> tuple[str, str]:
    return tag_of(revision), tag_of(revision, corrupt=True)


def version_tag(manifest: Manifest) -> str:
    """The tag of a version, and of an alias that means it."""
    return tag_of(manifest.revision, corrupt=manifest.corrupt)


def prefix_tag(manifest: Manifest) -> str:
    """The tag of a prefix, shown as this version."""
    return tag_of(manifest.prefix_revision, corrupt=manifest.corrupt)


def not_modified(tag: str) -> Response:
    """The response 304 for what has ``tag``."""
    return Response(status_code=304, headers={"ETag": tag})


def _changed(expected: TagList, current: str | None) -> PreconditionFailed:
    state = "it does not exist" if current is None else f"it has the tag {current} now"
    return PreconditionFailed(
        f"expected the resource to match If-Match: {expected.text[:_SHOWN]!a}; {state}",
        param="If-Match",
    )


def _exists(expected: TagList, current: str | None) -> PreconditionFailed:
    return PreconditionFailed(
        f"expected no resource that matches If-None-Match: {expected.text[:_SHOWN]!a}; "
        f"it has the tag {current} now",
        param="If-None-Match",
    )


def _parsed(request: Request, name: str) -> TagList | None:
    lines = request.headers.getlist(name)
    if not lines:
        return None
    text = ",".join(lines)
    if text.strip(" \t") == "*":
        return TagList("*", frozenset())
    if _TAGS.fullmatch(text) is None:
        raise BadRequest(
            f'expected {name} to be * or entity tags such as W/"7", separated by commas; '
            f"received {text[:_SHOWN]!a}",
            code="invalid_precondition",
            param=name,
        )
    return TagList(text, frozenset(re.findall(_TAG, text)))


async def _conditions(
    request: Request,
    if_match: Annotated[
        str | None, Header(description="Only if the resource has one of these ETags, or exists: *.")
    ] = None,
    if_none_match: Annotated[
        str | None,
        Header(description="Only if it has none of these ETags, or does not exist: *."),
    ] = None,
) -> Conditions:
    del if_match, if_none_match  # for the OpenAPI document; a header may come in several lines
    return Conditions(_parsed(request, "If-Match"), _parsed(request, "If-None-Match"))


ConditionsDep = Annotated[Conditions, Depends(_conditions)]

_ETAG = {"ETag": {"description": "The tag for conditional requests.", "schema": {"type": "string"}}}
WITH_TAG: dict[int | str, dict[str, Any]] = {200: {"headers": _ETAG}}
"""The OpenAPI entry of a write whose response has a tag."""

READ: dict[int | str, dict[str, Any]] = {
    **WITH_TAG,
    304: {"description": "It still has a tag of If-None-Match.", "headers": _ETAG},
}
"""The OpenAPI entry of a conditional GET."""
