"""Rotation with overlap, the first key, and keys that are another tenant's."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from sqlalchemy import Engine, event

from prefixd.server.errors import BadRequest, Conflict, NotAuthenticated, NotFound
from prefixd.server.tenants.audit import AuditLog
from prefixd.server.tenants.registry import OPERATOR_TENANT, Scope, Tenants
from prefixd.store.db.database import writing_relaxed
from tests.tenants.tenants_clock import Clock

HOUR = timedelta(hours=1)


def test_a_lookup_is_one_statement(tenants: Tenants, engine: Engine) -> None:
    """Every request makes one: it begins no transaction, also after one that commits relaxed."""
    tenants.create_tenant("acme")
    key = tenants.create_key(tenant="acme")
    with writing_relaxed(engine):
        pass
    statements: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        statements.append(statement)

    event.listen(engine, "before_cursor_execute", note)
    assert tenants.authenticate(key.text).tenant == "acme"
    assert len(statements) == 1
    assert statements[0].startswith("SELECT")


def test_a_rotated_key_stays_valid_for_the_overlap(tenants: Tenants, clock: Clock) -> None:
    tenants.create_tenant("acme")
    old = tenants.create_key(tenant="acme", scopes=[Scope.READ, Scope.WRITE], label="ci")
    clock.now += HOUR
    new = tenants.rotate_key(old.record.key_id, overlap=HOUR)
    assert (new.record.scopes, new.record.label) == (old.record.scopes, "ci")
    assert tenants.authenticate(old.text).key_id == old.record.key_id
    assert tenants.authenticate(new.text).key_id == new.record.key_id
    (listed, _) = tenants.list_keys("acme")
    assert listed.state(clock.now) == "replaced"
    assert listed.replaced_by == new.record.key_id
    clock.now += HOUR
    with pytest.raises(NotAuthenticated):
        tenants.authenticate(old.text)
    assert tenants.authenticate(new.text)


def test_a_rotation_does_not_extend_the_old_key_and_gives_the_new_one_its_full_lifetime(
    tenants: Tenants, clock: Clock
) -> None:
    tenants.create_tenant("acme")
    old = tenants.create_key(tenant="acme", expires_at=clock.now + 3 * HOUR)
    clock.now += 2 * HOUR
    new = tenants.rotate_key(old.record.key_id, overlap=24 * HOUR)
    assert tenants.list_keys("acme")[0].expires_at == old.record.expires_at
    assert new.record.expires_at == clock.now + 3 * HOUR


def test_replaced_revoked_expired_and_unknown_keys_cannot_be_rotated(
    tenants: Tenants, clock: Clock
) -> None:
    tenants.create_tenant("acme")
    rotated, revoked, expired = (
        tenants.create_key(tenant="acme", expires_at=clock.now + HOUR).record.key_id
        for _ in range(3)
    )
    tenants.rotate_key(rotated, overlap=HOUR)
    tenants.revoke_key(revoked)
    for key_id, state in ((rotated, "replaced"), (revoked, "revoked")):
        with pytest.raises(Conflict, match=state):
            tenants.rotate_key(key_id, overlap=HOUR)
    clock.now += HOUR
    with pytest.raises(Conflict, match="expired"):
        tenants.rotate_key(expired, overlap=HOUR)
    with pytest.raises(NotFound):
        tenants.rotate_key("nothing", overlap=HOUR)
    with pytest.raises(BadRequest):
        tenants.rotate_key(expired, overlap=-HOUR)


def test_a_key_of_another_tenant_gives_the_same_error_as_an_unknown_key(tenants: Tenants) -> None:
    for name in ("acme", "beta"):
        tenants.create_tenant(name)
    key_id = tenants.create_key(tenant="acme").record.key_id
    for act in (
        lambda one: tenants.rotate_key(one, overlap=HOUR, owner="beta"),
        lambda one: tenants.revoke_key(one, owner="beta"),
    ):
        messages = set()
        for one in (key_id, "A" * 12):
            with pytest.raises(NotFound) as refused:
                act(one)
            messages.add(refused.value.message.replace(one, "X"))
        assert len(messages) == 1
    assert tenants.list_keys("beta", after=key_id) == []
    assert tenants.list_keys("acme")[0].revoked_at is None


def test_keys_are_listed_in_pages(tenants: Tenants, clock: Clock) -> None:
    tenants.create_tenant("acme")
    key_ids = []
    for _ in range(5):
        key_ids.append(tenants.create_key(tenant="acme").record.key_id)
        clock.now += HOUR
    first = tenants.list_keys("acme", limit=2)
    rest = tenants.list_keys("acme", after=first[-1].key_id)
    assert [key.key_id for key in (*first, *rest)] == key_ids


def test_bootstrap_issues_the_operators_key_once(tenants: Tenants) -> None:
    issued = tenants.bootstrap()
    assert issued is not None
    principal = tenants.authenticate(issued.text)
    assert principal.tenant == OPERATOR_TENANT
    assert principal.scopes == frozenset(Scope)
    assert principal.is_operator
    assert tenants.bootstrap() is None
    tenants.revoke_key(issued.record.key_id)
    assert tenants.bootstrap() is None


def test_bootstrap_issues_no_key_when_one_exists(tenants: Tenants) -> None:
    tenants.create_tenant("acme")
    tenants.create_key(tenant="acme")
    assert tenants.bootstrap() is None


def test_only_admin_keys_of_the_operator_tenant_are_operators(tenants: Tenants) -> None:
    tenants.create_tenant("acme")
    tenants.create_tenant(OPERATOR_TENANT)
    for tenant, scope in (("acme", Scope.ADMIN), (OPERATOR_TENANT, Scope.WRITE)):
        issued = tenants.create_key(tenant=tenant, scopes=[scope])
        assert not tenants.authenticate(issued.text).is_operator


def test_of_concurrent_bootstraps_exactly_one_issues_a_key(
    open_engine: Callable[[], Engine],
) -> None:
    replicas = [Tenants(open_engine()) for _ in range(6)]
    with ThreadPoolExecutor(len(replicas)) as pool:
        results = list(pool.map(lambda one: one.bootstrap(), replicas))
    assert sum(issued is not None for issued in results) == 1
    assert len(replicas[0].list_keys()) == 1


def test_a_key_of_the_operator_makes_that_tenant_and_no_other(tenants: Tenants) -> None:
    with pytest.raises(NotFound, match=r"no tenant 'other': create it first"):
        tenants.create_key(tenant="other")
    assert "other" not in {tenant.name for tenant in tenants.list_tenants()}
    assert "operator" not in {tenant.name for tenant in tenants.list_tenants()}
    for _ in range(2):
        issued = tenants.create_key(tenant="operator", scopes=[Scope.ADMIN])
        assert tenants.authenticate(issued.text).is_operator
    assert [tenant.name for tenant in tenants.list_tenants()].count("operator") == 1
    entries, _ = AuditLog(tenants._engine).page(tenant="operator", limit=10)
    actions = [entry.action for entry in reversed(entries)]
    assert actions == ["tenant.create", "key.create", "key.create"]
