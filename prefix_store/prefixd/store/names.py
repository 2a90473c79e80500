"""Names, aliases and references: checked once, into a stronger type."""

import re
from dataclasses import dataclass

from prefixd.store.errors import InvalidReference, quoted

LATEST = "latest"
"""The alias that moves by itself: what was put last under a name."""

MAX_VERSION = 2**31 - 1
"""Largest version number a catalog column holds."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_RULE = "1 to 128 of A-Z a-z 0-9 . _ - and begin with a letter or digit"


@dataclass(frozen=True, slots=True)
class Reference:
    """``name``, ``name@3`` or ``name@alias``, taken apart; a bare name means ``latest``."""

    name: str
    alias: str | None = LATEST
    version: int | None = None


def check_name(name: str) -> str:
    """Return ``name`` or raise InvalidReference."""
    if _NAME.fullmatch(name) is None:
        raise InvalidReference(f"a prefix name must be {_RULE}; got {quoted(name)}")
    return name


def check_alias(alias: str) -> str:
    """Return ``alias`` when it may be set by hand, or raise InvalidReference."""
    if _NAME.fullmatch(alias) is None:
        raise InvalidReference(f"an alias must be {_RULE}; got {quoted(alias)}")
    if alias.isdigit():
        raise InvalidReference(
            f"an alias must not be all digits, which would read as a version; got {quoted(alias)}"
        )
    if alias == LATEST:
        raise InvalidReference("the alias 'latest' moves by itself and cannot be set or removed")
    return alias


def check_tenant(tenant: str) -> str:
    """Return ``tenant`` when it is safe as the name of a directory, or raise InvalidReference."""
    if _NAME.fullmatch(tenant) is None:
        raise InvalidReference(f"a tenant id must be {_RULE}; got {quoted(tenant)}")
    return tenant


def parse_reference(reference: str) -> Reference:
    """Take ``name``, ``name@3`` or ``name@alias`` apart; raise InvalidReference when malformed."""
    name, at, selector = reference.partition("@")
    check_name(name)
    if not at:
        return Reference(name)
    if _NAME.fullmatch(selector) is None:
        raise InvalidReference(
            f"after @ comes a version number or an alias ({_RULE}); got {quoted(selector)}"
        )
    if selector.isdigit():
        return Reference(name, alias=None, version=int(selector))
    return Reference(name, alias=selector)
