"""Tenants and API keys in the catalog."""

from collections.abc import Callable
from datetime import timedelta

import pytest
from sqlalchemy import Engine, text

from prefixd.server.errors import BadRequest, Conflict, NotAuthenticated, NotFound
from prefixd.server.tenants import key_text as keys
from prefixd.server.tenants.registry import Principal, Scope, Tenants
from prefixd.store.db.database import reading
from tests.tenants.tenants_clock import Clock


def test_a_key_authenticates_as_its_tenant_and_scopes(tenants: Tenants) -> None:
    tenants.create_tenant("acme")
    issued = tenants.create_key(tenant="acme", scopes=[Scope.READ, Scope.ADMIN])
    assert tenants.authenticate(issued.text) == Principal(
        tenant="acme", key_id=issued.record.key_id, scopes=frozenset({Scope.READ, Scope.ADMIN})
    )


def test_the_default_scopes_are_all_except_admin(tenants: Tenants) -> None:
    tenants.create_tenant("acme")
    issued = tenants.create_key(tenant="acme")
    assert issued.record.scopes == (Scope.READ, Scope.GENERATE, Scope.WRITE)


def test_all_invalid_keys_get_the_same_message(tenants: Tenants, clock: Clock) -> None:
    tenants.create_tenant("acme")
    revoked = tenants.create_key(tenant="acme")
    tenants.revoke_key(revoked.record.key_id)
    expired = tenants.create_key(tenant="acme", expires_at=clock.now + timedelta(hours=1))
    clock.now += timedelta(hours=1)
    messages = set()
    for candidate in (revoked.text, expired.text, keys.generate().text, "nonsense", ""):
        with pytest.raises(NotAuthenticated) as error_info:
            tenants.authenticate(candidate)
        messages.add(str(error_info.value))
        assert not candidate or candidate not in str(error_info.value)
    assert len(messages) == 1


def test_a_key_with_a_known_id_and_another_secret_is_rejected(tenants: Tenants) -> None:
    tenants.create_tenant("acme")
    issued = tenants.create_key(tenant="acme")
    body = f"pfx_{issued.record.key_id}_{'A' * 43}"
    forged = body + keys._checksum(body)
    parsed = keys.parse(forged)
    assert parsed is not None
    assert parsed.key_id == issued.record.key_id
    with pytest.raises(NotAuthenticated):
        tenants.authenticate(forged)


def test_a_key_expires_at_its_time(tenants: Tenants, clock: Clock) -> None:
    tenants.create_tenant("acme")
    issued = tenants.create_key(tenant="acme", expires_at=clock.now + timedelta(hours=1))
    clock.now += timedelta(minutes=59)
    assert tenants.authenticate(issued.text).tenant == "acme"
    clock.now += timedelta(minutes=1)
    with pytest.raises(NotAuthenticated):
        tenants.authenticate(issued.text)


def test_a_key_revoked_by_another_process_is_rejected_at_the_next_request(
    tenants: Tenants, open_engine: Callable[[], Engine]
) -> None:
    tenants.create_tenant("acme")
    issued = tenants.create_key(tenant="acme")
    assert tenants.authenticate(issued.text)
    other = open_engine()
    first = Tenants(other).revoke_key(issued.record.key_id)
    second = Tenants(other).revoke_key(issued.record.key_id)
    assert first.revoked_at is not None
    assert first.revoked_at == second.revoked_at
    with pytest.raises(NotAuthenticated):
        tenants.authenticate(issued.text)


def test_the_catalog_stores_no_secret(tenants: Tenants, engine: Engine) -> None:
    tenants.create_tenant("acme")
    issued = tenants.create_key(tenant="acme", label="ci")
    with reading(engine) as connection:
        row = connection.execute(text("select * from api_keys")).one()
    secret = issued.text.split("_")[2]
    assert not any(secret[:20] in str(value) for value in row)
    assert issued.text not in repr(issued)


def test_tenants_and_keys_are_listed(tenants: Tenants) -> None:
    for name in ("beta", "acme"):
        tenants.create_tenant(name)
    one = tenants.create_key(tenant="acme", label="one")
    two = tenants.create_key(tenant="beta", label="two")
    assert [t.name for t in tenants.list_tenants()] == ["acme", "beta"]
    assert tenants.list_keys("acme") == [one.record]
    assert {k.key_id for k in tenants.list_keys()} == {one.record.key_id, two.record.key_id}


def test_resident_caps_lists_tenants_with_a_limit(tenants: Tenants) -> None:
    for name, cap in (("acme", 9), ("beta", None), ("gamma", 0)):
        tenants.create_tenant(name, quota={"max_resident_tokens": cap})
    assert tenants.resident_caps({"acme", "beta", "missing"}) == {"acme": 9}
    assert tenants.resident_caps({"gamma"}) == {"gamma": 0}
    assert tenants.resident_caps(()) == {}


@pytest.mark.parametrize("name", ["", "-a", "a b", "a/b", "..", "ä", "a" * 65, "a\n"])
def test_malformed_tenant_names_are_rejected(tenants: Tenants, name: str) -> None:
    with pytest.raises(BadRequest):
        tenants.create_tenant(name)


def test_existing_tenants_conflict_and_missing_ones_are_not_found(tenants: Tenants) -> None:
    tenants.create_tenant("acme")
    with pytest.raises(Conflict):
        tenants.create_tenant("acme")
    with pytest.raises(NotFound):
        tenants.create_key(tenant="missing")
    with pytest.raises(NotFound):
        tenants.revoke_key("nothing")
    with pytest.raises(BadRequest):
        tenants.create_key(tenant="acme", scopes=[])
    with pytest.raises(BadRequest):
        tenants.create_key(tenant="acme", label="a\nb")
