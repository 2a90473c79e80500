"""Rows that are kept for a time are removed in batches, on both databases."""

from datetime import timedelta

import pytest
from sqlalchemy import Engine, func, select

from prefixd.server.tenants import retention
from prefixd.server.tenants.audit import Action, record
from prefixd.server.tenants.idempotency import Idempotency, Replay
from prefixd.server.tenants.principal import COMMAND_LINE
from prefixd.server.tenants.registry import Tenants
from prefixd.server.tenants.tables import audit_log, idempotency_keys
from prefixd.store.db.database import reading, writing
from tests.tenants.tenants_clock import Clock


def count(engine: Engine, table: object) -> int:
    with reading(engine) as connection:
        rows = select(func.count()).select_from(table)  # type: ignore[arg-type]  # a table
        return int(connection.execute(rows).scalar_one())


def add_entries(engine: Engine, clock: Clock, number: int) -> None:
    with writing(engine) as connection:
        for _ in range(number):
            actor = {"actor": COMMAND_LINE, "tenant": "acme", "subject": ""}
            record(connection, Action.PIN_SET, at=clock(), **actor)  # type: ignore[arg-type]


def test_responses_of_all_tenants_are_removed_after_a_day(
    engine: Engine, clock: Clock, tenants: Tenants, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "BATCH", 3)
    kept = Idempotency(engine, now=clock)
    for name in ("acme", "beta"):
        tenants.create_tenant(name)
        with writing(engine) as connection:
            for number in range(4):
                replay = Replay(201, {})
                kept.keep(connection, name, f"k{number}", request_digest="d", replay=replay)
    clock.now += timedelta(hours=23)
    with writing(engine) as connection:
        kept.keep(connection, "acme", "young", request_digest="d", replay=Replay(201, {}))
    assert retention.remove_expired(engine, audit_kept=None, now=clock()).idempotency_keys == 0
    clock.now += timedelta(hours=1)
    assert retention.remove_expired(engine, audit_kept=None, now=clock()).idempotency_keys == 8
    assert count(engine, idempotency_keys) == 1


def test_audit_entries_are_removed_after_their_retention_and_without_one_never(
    engine: Engine, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "BATCH", 3)
    add_entries(engine, clock, 7)
    clock.now += timedelta(days=400)
    add_entries(engine, clock, 2)
    assert retention.remove_expired(engine, audit_kept=None, now=clock()).audit_entries == 0
    removed = retention.remove_expired(engine, audit_kept=timedelta(days=400), now=clock())
    assert removed.audit_entries == 7
    assert count(engine, audit_log) == 2
