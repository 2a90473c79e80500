"""Any history of batches: two servers claim, answer, lose and finish them, tenants cancel them, and
time passes, against plain dictionaries."""

import tempfile
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Engine

from prefixd.server.errors import Conflict
from prefixd.server.tenants.batch_records import BatchError, BatchRecord, LineAnswer
from prefixd.server.tenants.batch_state import CANCELLABLE, ENDED, TIME_OF, BatchStatus
from prefixd.server.tenants.batches import LEASE_S, Batches, LeaseLost, NewBatch
from prefixd.server.tenants.principal import Actor
from prefixd.server.tenants.registry import Tenants
from prefixd.store.blobs.blobs import LocalBlobs
from prefixd.store.db.database import open_database
from prefixd.store.file_store import Purpose
from prefixd.store.store import PrefixStore
from tests.migrated import migrated

LINES = 4
ACTOR = Actor("acme", "key")
servers = st.sampled_from(["one", "two"])
lines = st.lists(st.integers(1, LINES), min_size=1, max_size=LINES, unique=True)
outcomes = st.sampled_from([BatchStatus.EXPIRED, BatchStatus.FAILED])
NEXT = {
    BatchStatus.VALIDATING: {
        BatchStatus.IN_PROGRESS,
        BatchStatus.FAILED,
        BatchStatus.EXPIRED,
        BatchStatus.CANCELLING,
    },
    BatchStatus.IN_PROGRESS: {BatchStatus.FINALIZING, BatchStatus.CANCELLING},
    BatchStatus.FINALIZING: {BatchStatus.COMPLETED, BatchStatus.FAILED, BatchStatus.EXPIRED},
    BatchStatus.CANCELLING: {BatchStatus.CANCELLED},
}


class BatchMachine(RuleBasedStateMachine):
    """``held`` says which server may change a batch, and until when; ``answers`` which server's
    answer each line must have."""

    @initialize()
    def begin(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        root = Path(self.folder.name)
        self.engine: Engine = open_database(migrated(root / "catalog.sqlite3"))
        self.now = 1_800_000_000.0
        Tenants(self.engine).create_tenant("acme")
        self.store = PrefixStore(self.engine, LocalBlobs(root / "blobs"))
        self.batches = Batches(
            self.engine,
            now=lambda: datetime.fromtimestamp(self.now, UTC),
            lease_now=lambda: self.now,
        )
        self.text = root / "text"
        self.text.write_text("x")
        self.held: dict[str, tuple[str, float]] = {}
        self.answers: dict[str, dict[int, str]] = {}
        self.status: dict[str, BatchStatus] = {}
        self.begun: set[str] = set()

    def teardown(self) -> None:
        self.engine.dispose()
        self.folder.cleanup()

    def holds(self, server: str, batch_id: str) -> bool:
        """A lease that has expired still counts until another server takes it."""
        return self.held.get(batch_id, ("", 0.0))[0] == server

    def pick(self, data: st.DataObject) -> str | None:
        return data.draw(st.sampled_from(sorted(self.status))) if self.status else None

    @rule()
    def create(self) -> None:
        if len(self.status) == 3:
            return
        blob = self.store.files.write(self.text, tenant="acme")
        with self.store.files.change() as connection:
            file = self.store.files.add(
                connection, blob, purpose=Purpose.BATCH, filename="x", kept=None, creator=None
            )
        new = NewBatch("/v1/completions", file.id, "24h", timedelta(days=1), {})
        batch = self.batches.create(new, actor=ACTOR)
        self.status[batch.id], self.answers[batch.id] = batch.status, {}

    @rule(server=servers)
    def claim(self, server: str) -> None:
        free = [
            batch_id
            for batch_id, status in self.status.items()
            if status not in ENDED and self.held.get(batch_id, ("", 0.0))[1] <= self.now
        ]
        batch = self.batches.claim(server, working_on=Counter())
        assert (batch is None) == (not free)
        if batch is not None:
            assert batch.id in free
            self.held[batch.id] = server, self.now + LEASE_S

    @rule(server=servers)
    def renew(self, server: str) -> None:
        self.batches.renew(server)
        for batch_id, (holder, _) in self.held.items():
            if holder == server:
                self.held[batch_id] = server, self.now + LEASE_S

    @rule(server=servers, data=st.data())
    def release(self, server: str, data: st.DataObject) -> None:
        if batch_id := self.pick(data):
            self.batches.release(server, batch_id)
            if self.holds(server, batch_id):
                del self.held[batch_id]

    @rule(seconds=st.sampled_from([1.0, LEASE_S / 2, LEASE_S + 1]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        if not (batch_id := self.pick(data)):
            return
        allowed = self.status[batch_id] in {*CANCELLABLE, BatchStatus.CANCELLING}
        try:
            self.batches.cancel(batch_id, tenant="acme", actor=ACTOR)
        except Conflict:
            assert not allowed
        else:
            assert allowed

    @rule(server=servers, data=st.data())
    def validate(self, server: str, data: st.DataObject) -> None:
        if batch_id := self.pick(data):
            self.changes(
                server, batch_id, lambda: self.batches.begin(server, batch_id, total=LINES)
            )

    @rule(server=servers, data=st.data(), chosen=lines)
    def answer(self, server: str, data: st.DataObject, chosen: list[int]) -> None:
        if not (batch_id := self.pick(data)):
            return
        given = [LineAnswer(n, failed=n == 1, answer_json=f"{server} {n}") for n in chosen]
        ok = self.changes(server, batch_id, lambda: self.batches.commit(server, batch_id, given))
        running = {BatchStatus.IN_PROGRESS, BatchStatus.CANCELLING}
        if ok and self.status[batch_id] in running and batch_id in self.begun:
            for one in given:
                self.answers[batch_id].setdefault(one.line, one.answer_json)

    @rule(server=servers, data=st.data(), outcome=outcomes)
    def end_early(self, server: str, data: st.DataObject, outcome: BatchStatus) -> None:
        if batch_id := self.pick(data):
            errors = [BatchError("x", "y")]
            self.changes(
                server,
                batch_id,
                lambda: self.batches.end_early(server, batch_id, outcome, errors),
            )

    @rule(server=servers, data=st.data())
    def complete(self, server: str, data: st.DataObject) -> None:
        if not (batch_id := self.pick(data)):
            return
        if len(self.answers[batch_id]) < LINES:
            return  # a bug of the server, which the method asserts
        self.changes(server, batch_id, lambda: self.batches.complete(server, batch_id))

    @rule(server=servers, data=st.data())
    def finish(self, server: str, data: st.DataObject) -> None:
        batch_id = self.pick(data)
        closing = {BatchStatus.FINALIZING, BatchStatus.CANCELLING, *ENDED}
        if not batch_id or self.status[batch_id] not in closing:
            return
        blob = self.store.files.write(self.text, tenant="acme")

        def call() -> BatchRecord:
            return self.batches.finish(
                server, batch_id, store=self.store.files, output=blob, errors=None
            )

        if self.changes(server, batch_id, call):
            shown = self.batches.get(batch_id, tenant="acme")
            assert shown.status in ENDED
            assert shown.output_file_id is not None
            given = {one.line: one.answer_json for one in self.batches.answers(batch_id)}
            assert given == self.answers[batch_id]
            self.batches.remove_answers(batch_id)
            self.answers[batch_id] = {}

    def changes(self, server: str, batch_id: str, call: object) -> bool:
        """Whether the change of a server was accepted, as it must be while it holds the batch."""
        may = self.holds(server, batch_id) and self.status[batch_id] not in ENDED
        try:
            call()  # type: ignore[operator]
        except LeaseLost:
            assert not may
            return False
        assert may
        return True

    @invariant()
    def statuses_follow_the_drawing(self) -> None:
        for batch_id, before in self.status.items():
            batch = self.batches.get(batch_id, tenant="acme")
            assert batch.status is before or batch.status in NEXT.get(before, set())
            if batch.status is not BatchStatus.VALIDATING:
                assert getattr(batch, TIME_OF[batch.status]) is not None
            self.status[batch_id] = batch.status
            if batch.status is BatchStatus.IN_PROGRESS:
                self.begun.add(batch_id)
            if batch.status in ENDED:
                self.held.pop(batch_id, None)
            else:
                assert self.batches.answered(batch_id) == self.answers[batch_id].keys()
                counted = batch.completed + batch.failed
                assert counted == len(self.answers[batch_id]) <= batch.total


def test_any_history_of_batches() -> None:
    run_state_machine_as_test(
        BatchMachine, settings=settings(max_examples=15, stateful_step_count=30, deadline=None)
    )
