"""Bounds of a tenant by default: it takes half of the connections at most."""

import pytest

from prefixd.server.serve import bounds
from prefixd.server.serve.settings import Settings


@pytest.mark.parametrize(
    ("descriptors", "chosen", "expected"),
    [(800, {}, 300), (10**6, {}, 1024), (800, {"max_connections": 10}, 5)],
)
def test_a_tenant_has_half_of_the_connections(
    monkeypatch: pytest.MonkeyPatch, descriptors: int, chosen: dict[str, int], expected: int
) -> None:
    monkeypatch.setattr(bounds, "raise_descriptor_limit", lambda: descriptors)
    assert bounds.tenant_bounds(Settings(**chosen)).max_requests == expected  # type: ignore[arg-type]
    assert bounds.tenant_bounds(Settings(max_tenant_requests=7)).max_requests == 7
