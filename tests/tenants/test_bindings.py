"""Bindings, the default, the audit log and idempotency keys in the catalog."""

from datetime import timedelta

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import IntegrityError

from prefixd.server.errors import BadRequest, Conflict, NotFound
from prefixd.server.tenants.audit import Action, AuditLog, record
from prefixd.server.tenants.bindings import Bindings, ChosenBy
from prefixd.server.tenants.idempotency import Idempotency, Replay
from prefixd.server.tenants.principal import Actor
from prefixd.server.tenants.registry import Tenants
from prefixd.server.tenants.tables import KEPT_FOR
from prefixd.store.db.database import reading, writing
from tests.tenants.tenants_clock import Clock

ANN = Actor(tenant="acme", key_id="K1", request_id="req-1")


@pytest.fixture
def bindings(engine: Engine, clock: Clock, tenants: Tenants) -> Bindings:
    tenants.create_tenant("acme")
    tenants.create_tenant("beta")
    return Bindings(engine, now=clock)


def test_a_user_gets_the_bound_prefix_or_the_default_or_none(bindings: Bindings) -> None:
    assert bindings.chosen("acme", "ann") is None
    bindings.set_default("acme", "house", actor=ANN)
    assert bindings.chosen("acme", "ann") == ("house", ChosenBy.DEFAULT)
    bindings.bind("acme", "ann", "voice@prod", actor=ANN)
    assert bindings.chosen("acme", "ann") == ("voice@prod", ChosenBy.USER)
    assert bindings.chosen("acme", "bob") == ("house", ChosenBy.DEFAULT)
    assert bindings.chosen("beta", "ann") is None
    bindings.bind("acme", "ann", "other", actor=ANN)
    assert bindings.get("acme", "ann").prefix == "other"
    bindings.unbind("acme", "ann", actor=ANN)
    bindings.remove_default("acme", actor=ANN)
    assert bindings.chosen("acme", "ann") is None


def test_a_missing_binding_or_default_is_not_found(bindings: Bindings) -> None:
    for act in (
        lambda: bindings.get("acme", "ann"),
        lambda: bindings.unbind("acme", "ann", actor=ANN),
        lambda: bindings.default("acme"),
        lambda: bindings.remove_default("acme", actor=ANN),
    ):
        with pytest.raises(NotFound):
            act()


@pytest.mark.parametrize("user", ["", "a" * 257, "a\x00", "a\nb", "\ud800"])
def test_malformed_users_are_rejected(bindings: Bindings, user: str) -> None:
    with pytest.raises(BadRequest):
        bindings.bind("acme", user, "voice", actor=ANN)
    with pytest.raises(BadRequest):
        bindings.bind_many("acme", [(user, "voice")])
    with pytest.raises(BadRequest):
        bindings.chosen("acme", user)


def test_bindings_are_imported_and_listed_in_pages(bindings: Bindings) -> None:
    users = [f"user-{number:03}" for number in range(25)]
    bindings.bind_many("acme", [(user, "old") for user in users])
    bindings.bind_many("acme", [("user-007", "new"), ("user-007", "newest"), ("é/?", "x")])
    bindings.bind_many("beta", [("theirs", "x")])
    listed, after = [], None
    while True:
        page, after = bindings.page("acme", limit=10, after=after)
        listed += page
        if after is None:
            break
    assert [one.user for one in listed] == [*users, "é/?"]
    assert bindings.get("acme", "user-007").prefix == "newest"


def test_a_binding_is_looked_up_by_primary_key(bindings: Bindings, engine: Engine) -> None:
    """The query plan of both databases reads one row for any number of users."""
    bindings.bind_many("acme", [(f"user-{number}", "x") for number in range(5000)])
    query = "SELECT reference FROM bindings WHERE tenant = 'acme' AND user_id = 'user-7'"
    postgres = engine.dialect.name == "postgresql"
    with writing(engine) as connection:
        connection.execute(text("ANALYZE bindings"))
    with reading(engine) as connection:
        explain = "EXPLAIN" if postgres else "EXPLAIN QUERY PLAN"
        plan = " ".join(str(row) for row in connection.execute(text(f"{explain} {query}")))
    if postgres:
        assert "Index Scan using pk_bindings" in plan
    else:
        assert (
            "SEARCH bindings USING INDEX sqlite_autoindex_bindings_1 (tenant=? AND user_id=?)"
            in plan
        )


def test_every_change_is_in_the_audit_log(
    bindings: Bindings, tenants: Tenants, engine: Engine, clock: Clock
) -> None:
    bindings.bind("acme", "ann", "voice", actor=ANN)
    clock.now += timedelta(seconds=1)
    bindings.unbind("acme", "ann", actor=ANN)
    bindings.set_default("acme", "house", actor=ANN)
    bindings.note_import("acme", 3, actor=ANN)
    tenants.set_quota("acme", {"max_prefixes": 3}, actor=ANN)
    issued = tenants.create_key(tenant="acme", label="ci", actor=ANN)
    successor = tenants.rotate_key(issued.record.key_id, overlap=timedelta(0), actor=ANN)
    tenants.revoke_key(successor.record.key_id)
    entries, more = AuditLog(engine).page(tenant="acme", limit=100)
    assert more is None
    key_id = issued.record.key_id
    assert [(one.action, one.subject) for one in reversed(entries)] == [
        ("tenant.create", "acme"),
        ("binding.set", "ann"),
        ("binding.remove", "ann"),
        ("default.set", "house"),
        ("bindings.import", ""),
        ("tenant.quota", "acme"),
        ("key.create", key_id),
        ("key.rotate", key_id),
        ("key.revoke", successor.record.key_id),
    ]
    bound = entries[-2]
    assert (bound.actor_tenant, bound.actor_key, bound.request_id) == ("acme", "K1", "req-1")
    assert bound.detail == {"prefix": "voice"}
    assert bound.at == clock.now - timedelta(seconds=1)
    assert entries[0].actor_key is None
    for secret in (issued.text, successor.text):
        assert secret.split("_")[2][:16] not in repr(entries)


def test_the_audit_log_has_pages(engine: Engine, bindings: Bindings) -> None:
    log = AuditLog(engine)
    for number in range(5):
        bindings.note_import("acme", number, actor=ANN)
    first, before = log.page(tenant="acme", limit=2)
    rest, end = log.page(tenant="acme", limit=10, before=before)
    assert [one.detail.get("count") for one in (*first, *rest)] == [4, 3, 2, 1, 0, None]
    assert end is None
    assert {one.tenant for one in log.page(tenant=None, limit=10)[0]} == {"acme", "beta"}


def test_an_audit_entry_is_rolled_back_with_its_change(engine: Engine, bindings: Bindings) -> None:
    log = AuditLog(engine)

    def fail() -> None:
        with writing(engine) as connection:
            record(connection, Action.PREFIX_PUBLISH, actor=ANN, tenant="acme", subject="x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [one.action for one in log.page(tenant="acme", limit=9)[0]] == ["tenant.create"]


def test_an_idempotency_key_replays_a_response_for_one_tenant_and_request(
    engine: Engine, bindings: Bindings, clock: Clock
) -> None:
    kept = Idempotency(engine, now=clock)
    replay = Replay(201, {"name": "voice"})

    def keep(tenant: str) -> None:
        with writing(engine) as connection:
            kept.keep(connection, tenant, "k", request_digest="d", replay=replay)

    keep("acme")
    assert kept.find("acme", "k", request_digest="d") == replay
    assert kept.find("beta", "k", request_digest="d") is None
    with pytest.raises(Conflict):
        kept.find("acme", "k", request_digest="e")
    with pytest.raises(IntegrityError):
        keep("acme")
    keep("beta")
    clock.now += KEPT_FOR
    assert kept.find("acme", "k", request_digest="e") is None
    keep("acme")
    assert kept.find("acme", "k", request_digest="d") == replay
