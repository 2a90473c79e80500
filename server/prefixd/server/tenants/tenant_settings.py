"""How a tenant is treated beside the others: its share of the queue, and whether KV is reused."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from sqlalchemy import Row

from prefixd.server.errors import BadRequest

LEAST_WEIGHT = 0.01
MOST_WEIGHT = 100.0


@dataclass(frozen=True, slots=True)
class TenantSettings:
    """The fields are columns of the table ``tenants``.

    ``weight`` is the tenant's share of a busy server against other tenants': 2 gets twice as much.
    ``kv_reuse``: its requests may share KV of equal tokens with one another.
    """

    weight: float = 1.0
    kv_reuse: bool = True

    @classmethod
    def of(cls, row: Row[Any]) -> Self:
        """From a row that has the columns of ``tenants``."""
        return cls(**{one.name: getattr(row, one.name) for one in fields(cls)})


SETTINGS = tuple(one.name for one in fields(TenantSettings))


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
