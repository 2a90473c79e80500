"""A tenant's weight and whether its KV is reused."""

import math
from collections.abc import Callable

import pytest
from sqlalchemy import Engine

from prefixd.server.errors import BadRequest, NotFound
from prefixd.server.tenants.audit import AuditLog
from prefixd.server.tenants.principal import Actor
from prefixd.server.tenants.registry import Tenants


def test_a_tenant_has_weight_one_and_kv_reuse_by_default(tenants: Tenants) -> None:
    created = tenants.create_tenant("acme")
    assert (created.weight, created.kv_reuse) == (1.0, True)
    assert tenants.tenant("acme") == created
    principal = tenants.authenticate(tenants.create_key(tenant="acme").text)
    assert (principal.weight, principal.kv_reuse) == (1.0, True)
    operators = tenants.bootstrap()
    assert operators is None
    assert tenants.list_tenants()[-1].weight == 1.0


def test_a_key_authenticates_with_the_settings_of_its_tenant(
    tenants: Tenants, open_engine: Callable[[], Engine]
) -> None:
    tenants.create_tenant("acme", settings={"weight": 4.5})
    key = tenants.create_key(tenant="acme").text
    assert tenants.authenticate(key).weight == 4.5
    # A change by another process applies from the next request on.
    changed = Tenants(open_engine()).set_settings("acme", {"kv_reuse": False})
    assert (changed.weight, changed.kv_reuse) == (4.5, False)
    principal = tenants.authenticate(key)
    assert (principal.weight, principal.kv_reuse) == (4.5, False)
    assert tenants.set_settings("acme", {"weight": 0.01}).kv_reuse is False
    assert tenants.set_settings("acme", {}).weight == 0.01


@pytest.mark.parametrize(
    "changes",
    [
        {"weight": 0.0},
        {"weight": -1.0},
        {"weight": 0.0099},
        {"weight": 100.5},
        {"weight": math.nan},
        {"weight": math.inf},
        {"weight": True},
        {"kv_reuse": 1},
        {"priority": 1},
    ],
)
def test_settings_out_of_range_are_rejected(
    tenants: Tenants, changes: dict[str, float | bool]
) -> None:
    tenants.create_tenant("acme")
    with pytest.raises(BadRequest):
        tenants.set_settings("acme", changes)
    with pytest.raises(BadRequest):
        tenants.create_tenant("beta", settings=changes)
    assert tenants.tenant("acme").weight == 1.0
    assert [one.name for one in tenants.list_tenants()] == ["acme"]


def test_changes_of_settings_are_in_the_audit_log(tenants: Tenants, engine: Engine) -> None:
    tenants.create_tenant("acme", quota={"max_bytes": 9}, settings={"weight": 2.0})
    tenants.set_settings("acme", {"kv_reuse": False}, actor=Actor("operator", "k1", "r1"))
    with pytest.raises(NotFound):
        tenants.set_settings("missing", {"weight": 2.0})
    last, first = AuditLog(engine).page(tenant=None, limit=9)[0]
    assert (first.action, first.detail) == ("tenant.create", {"max_bytes": 9, "weight": 2.0})
    assert (last.action, last.subject) == ("tenant.settings", "acme")
    assert (last.detail, last.actor_key) == ({"kv_reuse": False}, "k1")
