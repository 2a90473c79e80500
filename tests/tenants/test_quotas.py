"""Quotas: values, defaults of new tenants, and the check in the transaction of a change."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Engine, insert

from prefixd.server.errors import QuotaExceeded
from prefixd.server.tenants.bindings import Bindings
from prefixd.server.tenants.idempotency import Idempotency, Replay
from prefixd.server.tenants.principal import COMMAND_LINE
from prefixd.server.tenants.quotas import DEFAULT_QUOTA, NO_LIMITS, QUOTAS, Quota, parse_quota
from prefixd.server.tenants.registry import Tenants
from prefixd.server.tenants.tables import tenants as tenant_rows
from prefixd.store.db.database import writing
from tests.tenants.tenants_clock import Clock

Add = Callable[[int], Any]


def adder(kind: str, engine: Engine, clock: Clock, tenants: Tenants) -> Add:
    """A function that adds the thing with a number to the tenant acme."""
    bindings, idempotency = Bindings(engine, now=clock), Idempotency(engine, now=clock)

    def keep(number: int) -> None:
        with writing(engine) as connection:
            key, replay = f"k{number}", Replay(201, {})
            idempotency.keep(connection, "acme", key, request_digest="d", replay=replay)

    add: dict[str, Add] = {
        "max_users": lambda n: bindings.bind("acme", f"u{n}", "style", actor=COMMAND_LINE),
        "max_keys": lambda _: tenants.create_key(tenant="acme"),
        "max_idempotency_keys": keep,
    }
    return add[kind]


@pytest.mark.parametrize("kind", ["max_users", "max_keys", "max_idempotency_keys"])
def test_one_more_than_the_quota_is_refused(
    kind: str, engine: Engine, clock: Clock, tenants: Tenants
) -> None:
    tenants.create_tenant("acme", quota={kind: 2})
    tenants.create_tenant("beta")
    add = adder(kind, engine, clock, tenants)
    add(1)
    add(2)
    with pytest.raises(QuotaExceeded) as caught:
        add(3)
    message = caught.value.message
    assert "may have 2 " in message
    assert f"({kind})" in message
    assert "it has 2, and 1 more were requested; " in message
    assert "or ask the operator for a higher limit" in message
    assert caught.value.param == kind
    assert tenants.used("acme").used[kind] == 2
    assert tenants.used("beta").used[kind] == 0
    tenants.set_quota("acme", {kind: None})
    add(3)


@pytest.mark.parametrize("kind", ["max_users", "max_keys", "max_idempotency_keys"])
def test_concurrent_changes_do_not_exceed_the_quota_and_do_not_deadlock(
    kind: str, engine: Engine, clock: Clock, tenants: Tenants
) -> None:
    tenants.create_tenant("acme", quota={kind: 5})
    add = adder(kind, engine, clock, tenants)

    def attempt(number: int) -> bool:
        try:
            add(number)
        except QuotaExceeded:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(attempt, range(24))) == 5
    assert tenants.used("acme").used[kind] == 5


def test_a_bound_user_gets_another_prefix_at_the_quota_and_above_it(
    engine: Engine, tenants: Tenants
) -> None:
    tenants.create_tenant("acme", quota={"max_users": 2})
    bindings = Bindings(engine)
    for user in ("ann", "bob"):
        bindings.bind("acme", user, "style", actor=COMMAND_LINE)
    tenants.set_quota("acme", {"max_users": 1})
    bindings.bind("acme", "bob", "other", actor=COMMAND_LINE)
    bindings.bind_many("acme", [("ann", "other")])
    assert [found.prefix for found in bindings.page("acme", limit=9)[0]] == ["other", "other"]
    bindings.unbind("acme", "bob", actor=COMMAND_LINE)
    with pytest.raises(QuotaExceeded):
        bindings.bind("acme", "bob", "style", actor=COMMAND_LINE)


def test_a_batch_of_bindings_is_written_whole_or_not_at_all(
    engine: Engine, tenants: Tenants
) -> None:
    tenants.create_tenant("acme", quota={"max_users": 3})
    bindings = Bindings(engine)
    bindings.bind("acme", "ann", "style", actor=COMMAND_LINE)
    with pytest.raises(QuotaExceeded, match="it has 1, and 3 more were requested"):
        bindings.bind_many("acme", [(user, "other") for user in ("ann", "bob", "cy", "dan")])
    assert [(b.user, b.prefix) for b in bindings.page("acme", limit=9)[0]] == [("ann", "style")]
    bindings.bind_many("acme", [(user, "other") for user in ("ann", "bob", "cy")])


def test_rotate_and_revoke_work_at_the_quota_and_make_room(clock: Clock, tenants: Tenants) -> None:
    tenants.create_tenant("acme", quota={"max_keys": 1})
    first = tenants.create_key(tenant="acme")
    second = tenants.rotate_key(first.record.key_id, overlap=timedelta(hours=1))
    for text in (first.text, second.text):
        assert tenants.authenticate(text).tenant == "acme"
    assert tenants.used("acme").used["max_keys"] == 2
    clock.now += timedelta(hours=2)  # the overlap has ended
    with pytest.raises(QuotaExceeded):
        tenants.create_key(tenant="acme")
    tenants.revoke_key(second.record.key_id)
    tenants.create_key(tenant="acme")
    assert tenants.used("acme").keys == 3


def test_expired_responses_do_not_count(engine: Engine, clock: Clock, tenants: Tenants) -> None:
    tenants.create_tenant("acme", quota={"max_idempotency_keys": 1})
    add = adder("max_idempotency_keys", engine, clock, tenants)
    add(1)
    clock.now += timedelta(hours=24)
    assert tenants.used("acme").used["max_idempotency_keys"] == 0
    add(2)


def test_a_new_tenant_gets_the_defaults_and_one_from_before_has_no_limits(
    engine: Engine, clock: Clock
) -> None:
    with writing(engine) as connection:
        connection.execute(insert(tenant_rows).values(name="old", created_at=clock()))
    tenants = Tenants(engine, now=clock, default_quota=DEFAULT_QUOTA)
    assert DEFAULT_QUOTA.unlimited == ()
    assert tenants.create_tenant("new", quota={"max_keys": 7, "max_users": None}).quota == Quota(
        **{**asdict(DEFAULT_QUOTA), "max_keys": 7, "max_users": None}
    )
    old, new = tenants.tenant("old"), tenants.tenant("new")
    assert (old.quota, old.unlimited) == (NO_LIMITS, QUOTAS)
    assert new.unlimited == ("max_users",)
    key = tenants.bootstrap()
    assert key is not None
    assert tenants.tenant("operator").quota == DEFAULT_QUOTA


def test_parsed_quotas() -> None:
    assert parse_quota("") == {}
    assert parse_quota("max_users=9, max-keys=none,") == {"max_users": 9, "max_keys": None}
    assert parse_quota("none") == dict.fromkeys(QUOTAS)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("max_users", "expected LIMIT=NUMBER or LIMIT=none"),
        ("max_users=", "expected LIMIT=NUMBER or LIMIT=none"),
        ("max_users=-1", "expected LIMIT=NUMBER or LIMIT=none"),
        ("max_users=\u0663", "expected LIMIT=NUMBER or LIMIT=none"),
        ("max_users=1,max_users=2", "received max_users twice"),
        ("max_cats=1", "expected one of max_prefixes"),
        ("requests_per_minute=0", "expected requests_per_minute from 1"),
        (f"max_users={2**63}", "expected max_users from 0"),
    ],
)
def test_quotas_that_cannot_be_parsed_are_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_quota(text)
