"""Quotas and settings of a tenant: their names, values and defaults.

Without SQLAlchemy, so that the settings can check the defaults on any installation.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

from prefixd.server.errors import BadRequest

LEAST_WEIGHT = 0.01
MOST_WEIGHT = 100.0

_LARGEST = 2**63 - 1


@dataclass(frozen=True, slots=True)
class Quota:
    """Limits of one tenant; None is no limit. The fields are columns of the table ``tenants``."""

    max_prefixes: int | None = None
    max_versions: int | None = None
    max_aliases: int | None = None
    max_bytes: int | None = None
    max_users: int | None = None
    max_keys: int | None = None
    max_idempotency_keys: int | None = None
    max_virtual_tokens: int | None = None
    max_resident_tokens: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    other_requests_per_minute: int | None = None
    max_concurrent_requests: int | None = None
    max_files: int | None = None
    max_file_bytes: int | None = None
    max_batch_lines: int | None = None
    max_open_batches: int | None = None

    @classmethod
    def of(cls, row: Any) -> Self:
        """From a row that has the columns of ``tenants``."""
        return cls(**{field.name: getattr(row, field.name) for field in fields(cls)})

    @property
    def is_metered(self) -> bool:
        """Whether requests must be counted."""
        rates = (self.requests_per_minute, self.tokens_per_minute, self.max_concurrent_requests)
        return any(rate is not None for rate in rates)

    @property
    def unlimited(self) -> tuple[str, ...]:
        """The quotas without a limit, by name."""
        return tuple(name for name, limit in asdict(self).items() if limit is None)


NO_LIMITS = Quota()
QUOTAS = tuple(field.name for field in fields(Quota))
_RATES = frozenset(
    {
        "requests_per_minute",
        "tokens_per_minute",
        "other_requests_per_minute",
        "max_concurrent_requests",
    }
)

DEFAULT_QUOTA = Quota(
    max_prefixes=10_000,
    max_versions=50_000,
    max_aliases=50_000,
    max_bytes=10 * 2**30,
    max_users=100_000,
    max_keys=1_000,
    max_idempotency_keys=50_000,
    max_virtual_tokens=65_536,
    max_resident_tokens=1_048_576,
    requests_per_minute=10_000,
    tokens_per_minute=10_000_000,
    other_requests_per_minute=10_000,
    max_concurrent_requests=512,
    max_files=10_000,
    max_file_bytes=10 * 2**30,
    max_batch_lines=50_000,
    max_open_batches=100,
)
"""Limits of a tenant that is created, unless the operator says otherwise: far above ordinary use,
and low enough that one tenant cannot fill a database or a disk."""


def parse_quota(text: str) -> dict[str, int | None]:
    """The limits in ``max_users=1000,max_keys=none``; ``none`` alone lifts all of them. Raises
    ValueError, with one sentence."""
    if text.strip() == "none":
        return dict.fromkeys(QUOTAS)
    changes: dict[str, int | None] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, value = parse_limit(part)
        if name in changes:
            raise ValueError(f"expected each limit once; received {name} twice")
        changes[name] = value
    try:
        return checked_quota(changes)
    except BadRequest as error:
        raise ValueError(error.message) from None


def parse_limit(text: str) -> tuple[str, int | None]:
    """The name and the value in ``max_users=1000`` or ``max_users=none``. Raises ValueError."""
    name, _, value = text.partition("=")
    if value == "none":
        return name.replace("-", "_"), None
    if not (value.isascii() and value.isdigit()):
        raise ValueError(
            f"expected LIMIT=NUMBER or LIMIT=none, such as max_prefixes=100; received {text[:80]!a}"
        )
    return name.replace("-", "_"), int(value)


def checked_quota(changes: Mapping[str, int | None]) -> dict[str, int | None]:
    """``changes`` by name. Raises BadRequest for an unknown name or a value out of range."""
    for name, value in changes.items():
        if name not in QUOTAS:
            raise BadRequest(f"expected one of {', '.join(QUOTAS)}; received {name[:80]!a}")
        lowest = 1 if name in _RATES else 0
        if value is not None and not lowest <= value <= _LARGEST:
            raise BadRequest(
                f"expected {name} from {lowest}, or none for no limit; received {value}", param=name
            )
    return dict(changes)


@dataclass(frozen=True, slots=True)
class TenantSettings:
    """Settings of one tenant. The fields are columns of the table ``tenants``.

    ``weight`` is the tenant's share of a busy server: 2 gets twice as much as 1. ``kv_reuse``: its
    requests may share KV of equal tokens with each other.
    """

    weight: float = 1.0
    kv_reuse: bool = True


SETTINGS = tuple(field.name for field in fields(TenantSettings))


def checked_settings(changes: Mapping[str, float | bool]) -> dict[str, float | bool]:
    """``changes`` by name. Raises BadRequest for an unknown name or a value out of range."""
    for name, value in changes.items():
        if name not in SETTINGS:
            raise BadRequest(f"expected one of {', '.join(SETTINGS)}; received {name[:80]!a}")
        if name == "kv_reuse" and not isinstance(value, bool):
            raise BadRequest(f"expected kv_reuse to be true or false; received {value}", param=name)
        if name == "weight" and not _is_weight(value):
            raise BadRequest(
                f"expected a weight from {LEAST_WEIGHT:g} to {MOST_WEIGHT:g}; received {value}",
                param=name,
            )
    return dict(changes)


def _is_weight(value: float) -> bool:
    # JSON's true is Python's 1, and NaN is in no range.
    return not isinstance(value, bool) and LEAST_WEIGHT <= value <= MOST_WEIGHT
