"""Batches in the catalog: what a tenant may change, and what the server that holds one may.

One server at a time works on a batch: it holds a lease, which it renews and which expires when its
process was killed. Each of its changes requires the lease, in the transaction of the change. So a
server that was thought to be dead cannot commit an answer to a line that another one has answered.
"""

import json
import secrets
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Engine,
    and_,
    delete,
    exists,
    insert,
    literal,
    or_,
    select,
    tuple_,
    update,
)

from prefixd.server.errors import BadRequest, Conflict, NotFound
from prefixd.server.tenants.audit import Action, record
from prefixd.server.tenants.batch_records import BatchError, BatchRecord, LineAnswer, batch_record
from prefixd.server.tenants.batch_state import CANCELLABLE, ENDED, OPEN, TIME_OF, BatchStatus
from prefixd.server.tenants.principal import Actor
from prefixd.server.tenants.shared_clock import shared_now
from prefixd.server.tenants.tables import batch_answers, batches
from prefixd.server.tenants.usage import check_quota
from prefixd.store.db.database import reading, utc_now, writing
from prefixd.store.errors import UnknownFile
from prefixd.store.file_store import FileRecord, FileStore, Purpose, WrittenBlob, find

LEASE_S = 60.0
"""How long a batch is held after its lease was last renewed, in seconds."""

PER_TENANT = 2
"""Batches of one tenant that a server works on at a time."""

_CANDIDATES = 1000
_PAGE = 500


class LeaseLost(Exception):
    """Another server holds the batch now, or it is gone."""


@dataclass(frozen=True, slots=True)
class NewBatch:
    """A batch to create; ``window`` is what its ``completion_window`` says."""

    endpoint: str
    input_file_id: str
    completion_window: str
    window: timedelta
    metadata: Mapping[str, str]
    output_expires_after: int | None = None


class Batches:
    """Batches of all tenants. Blocking calls on the catalog; safe to share between threads and
    processes. Another tenant's batch and a missing one raise the same NotFound.

    ``now`` is the clock of what is shown, ``lease_now`` replaces the clock of the leases, which
    expire after ``lease_s`` seconds.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        now: Callable[[], datetime] = utc_now,
        lease_now: Callable[[], float] | None = None,
        lease_s: float = LEASE_S,
    ) -> None:
        self.lease_s = lease_s
        self._engine = engine
        self._now = now
        self._lease_now = lease_now

    def create(
        self,
        new: NewBatch,
        *,
        actor: Actor,
        at_end: Callable[[Connection, BatchRecord], object] = lambda *_: None,
    ) -> BatchRecord:
        """Add a batch of the actor's tenant and key. ``at_end`` runs in its transaction. Raises
        NotFound, BadRequest for a file that is no input, QuotaExceeded."""
        assert actor.tenant is not None
        assert actor.key_id is not None
        now = self._now()
        created = BatchRecord(
            id=f"batch_{secrets.token_hex(16)}",
            tenant=actor.tenant,
            key_id=actor.key_id,
            endpoint=new.endpoint,
            input_file_id=new.input_file_id,
            completion_window=new.completion_window,
            metadata=new.metadata,
            output_expires_after=new.output_expires_after,
            status=BatchStatus.VALIDATING,
            created_at=now,
            expires_at=now + new.window,
        )
        with writing(self._engine) as connection:
            file = _input(connection, new.input_file_id, tenant=actor.tenant)
            if file.purpose != Purpose.BATCH:
                raise BadRequest(
                    f"expected a file with the purpose '{Purpose.BATCH}'; {file.id} has the "
                    f"purpose '{file.purpose}'",
                    param="input_file_id",
                )
            connection.execute(insert(batches).values(_row(created)))
            # The output cannot be refused later.
            added = {"max_open_batches": 1, "max_file_bytes": 1}
            check_quota(connection, actor.tenant, added, now=now)
            _audit(connection, Action.BATCH_CREATE, created, actor, now)
            at_end(connection, created)
        return created

    def get(self, batch_id: str, *, tenant: str) -> BatchRecord:
        """One batch. Raises NotFound."""
        with reading(self._engine) as connection:
            return _find(connection, batch_id, tenant=tenant)

    def page(self, *, tenant: str, limit: int, after: str | None = None) -> list[BatchRecord]:
        """Batches, newest first, at most ``limit`` behind the batch ``after``. Raises NotFound for
        an ``after`` that does not exist."""
        query = select(batches).where(batches.c.tenant == tenant).limit(limit)
        query = query.order_by(batches.c.created_at.desc(), batches.c.id.desc())
        with reading(self._engine) as connection:
            if after is not None:
                last = _find(connection, after, tenant=tenant)
                place = tuple_(batches.c.created_at, batches.c.id)
                query = query.where(place < (last.created_at, last.id))
            return [batch_record(row) for row in connection.execute(query)]

    def cancel(self, batch_id: str, *, tenant: str, actor: Actor) -> BatchRecord:
        """Have a batch end; cancelling it again changes nothing. Raises NotFound, Conflict for one
        that has ended or is about to."""
        now = self._now()
        with writing(self._engine) as connection:
            batch = _find(connection, batch_id, tenant=tenant, locked=True)
            if batch.status is BatchStatus.CANCELLING:
                return batch
            if batch.status not in CANCELLABLE:
                raise Conflict(
                    f"a batch can be cancelled while it is {' or '.join(CANCELLABLE)}; {batch.id} "
                    f"is {batch.status}",
                    code="batch_ended",
                )
            _set(
                connection,
                batch,
                BatchStatus.CANCELLING,
                now,
                outcome=BatchStatus.CANCELLED.value,
            )
            _audit(connection, Action.BATCH_CANCEL, batch, actor, now)
            return _find(connection, batch_id, tenant=tenant)

    def check_unused(self, connection: Connection, file_id: str) -> None:
        """Raise Conflict for the input of a batch that has not ended, in a transaction that has
        locked the file."""
        using = select(batches.c.id).where(
            batches.c.input_file_id == file_id, batches.c.status.in_(OPEN)
        )
        batch = connection.execute(using.limit(1)).scalar()
        if batch is not None:
            raise Conflict(
                f"{file_id} is the input of {batch}, which has not ended: wait until it has, or "
                "cancel it",
                code="file_in_use",
            )

    def claim(self, holder: str, *, working_on: Counter[str]) -> BatchRecord | None:
        """Take the lease of the oldest batch that no server holds, for ``holder``; first one of a
        tenant that it has none of, and none of a tenant of which it has PER_TENANT. ``working_on``
        counts the batches of each tenant that it has."""
        query = (
            select(batches.c.id, batches.c.tenant)
            .where(batches.c.status.in_(OPEN), self._is_free(self._at()))
            .order_by(batches.c.created_at, batches.c.id)
            .limit(_CANDIDATES)
        )
        with reading(self._engine) as connection:
            rows = connection.execute(query).all()
        free = [row for row in rows if working_on[row.tenant] < PER_TENANT]
        for row in sorted(free, key=lambda row: working_on[row.tenant]):
            with writing(self._engine) as connection:
                now = self._at()
                still_free = and_(
                    batches.c.id == row.id, batches.c.status.in_(OPEN), self._is_free(now)
                )
                claiming = update(batches).where(still_free)
                claimed = connection.execute(
                    claiming.values(holder=holder, leased_until=now + self.lease_s)
                )
                if claimed.rowcount:
                    return _find(connection, row.id)
        return None

    def renew(self, holder: str) -> None:
        """Extend the leases that ``holder`` has."""
        with writing(self._engine) as connection:
            connection.execute(
                update(batches)
                .where(batches.c.holder == holder)
                .values(leased_until=self._at() + self.lease_s)
            )

    def held(self, holder: str) -> dict[str, BatchStatus]:
        """The batches that ``holder`` holds, by id."""
        query = select(batches.c.id, batches.c.status).where(
            batches.c.holder == holder, batches.c.status.in_(OPEN)
        )
        with reading(self._engine) as connection:
            return {row.id: BatchStatus(row.status) for row in connection.execute(query)}

    def release(self, holder: str, batch_id: str) -> None:
        """Let another server take the batch, if ``holder`` holds it."""
        with writing(self._engine) as connection:
            mine = and_(batches.c.id == batch_id, batches.c.holder == holder)
            connection.execute(update(batches).where(mine).values(holder=None, leased_until=None))

    def begin(self, holder: str, batch_id: str, *, total: int) -> BatchRecord:
        """The input is valid and has ``total`` lines: they may run. Raises LeaseLost."""
        with writing(self._engine) as connection:
            batch = self._held(connection, holder, batch_id)
            if batch.status is BatchStatus.VALIDATING:
                _set(connection, batch, BatchStatus.IN_PROGRESS, self._now(), total=total)
            return _find(connection, batch_id)

    def end_early(
        self,
        holder: str,
        batch_id: str,
        outcome: BatchStatus,
        errors: Sequence[BatchError] = (),
    ) -> BatchRecord:
        """Run no more lines: the batch ends as ``outcome`` when its files are written, or at once
        where no line was allowed to run. Nothing changes for one that is being cancelled. Raises
        LeaseLost."""
        with writing(self._engine) as connection:
            batch, now = self._held(connection, holder, batch_id), self._now()
            errors_json = json.dumps([asdict(error) for error in errors])
            if batch.status is BatchStatus.VALIDATING:
                free = {"holder": None, "leased_until": None}
                _set(connection, batch, outcome, now, errors_json=errors_json, **free)
                _audit_end(connection, batch, outcome, now)
            elif batch.status is BatchStatus.IN_PROGRESS:
                _set(
                    connection,
                    batch,
                    BatchStatus.FINALIZING,
                    now,
                    outcome=outcome.value,
                    errors_json=errors_json,
                )
            return _find(connection, batch_id)

    def commit(self, holder: str, batch_id: str, answers: Sequence[LineAnswer]) -> BatchRecord:
        """Add the answers of lines, all or none, to a batch that is in progress or being cancelled.
        A line that has one keeps it: a commit may be repeated. Raises LeaseLost."""
        with writing(self._engine) as connection:
            batch = self._held(connection, holder, batch_id)
            running = batch.status in {BatchStatus.IN_PROGRESS, BatchStatus.CANCELLING}
            if running and batch.total:  # one that was cancelled before it began has no lines
                new = _without_answer(connection, batch_id, answers)
                rows = [{"batch": batch_id, **asdict(answer)} for answer in new]
                if rows:
                    connection.execute(insert(batch_answers), rows)
                failed = sum(answer.failed for answer in new)
                connection.execute(
                    update(batches)
                    .where(batches.c.id == batch_id)
                    .values(
                        completed=batches.c.completed + (len(new) - failed),
                        failed=batches.c.failed + failed,
                    )
                )
            return _find(connection, batch_id)

    def seconds_left(self, batch: BatchRecord) -> float:
        """How long the lines of a batch may still run."""
        return (batch.expires_at - self._now()).total_seconds()

    def answered(self, batch_id: str) -> set[int]:
        """The lines that have an answer."""
        query = select(batch_answers.c.line).where(batch_answers.c.batch == batch_id)
        with reading(self._engine) as connection:
            return set(connection.scalars(query))

    def answers(self, batch_id: str) -> Iterator[LineAnswer]:
        """All answers, in the order of the lines. Holds one page of them at a time."""
        query = (
            select(batch_answers.c.line, batch_answers.c.failed, batch_answers.c.answer_json)
            .where(batch_answers.c.batch == batch_id)
            .order_by(batch_answers.c.line)
            .limit(_PAGE)
        )
        last = 0
        while True:
            with reading(self._engine) as connection:
                rows = connection.execute(query.where(batch_answers.c.line > last)).all()
            for row in rows:
                yield LineAnswer(line=row.line, failed=row.failed, answer_json=row.answer_json)
            if len(rows) < _PAGE:
                return
            last = rows[-1].line

    def finish(
        self,
        holder: str,
        batch_id: str,
        *,
        store: FileStore,
        output: WrittenBlob | None,
        errors: WrittenBlob | None,
        num_unanswered: int = 0,
        kept: timedelta | None = None,
    ) -> BatchRecord:
        """Add the files of a batch and end it as was decided. ``num_unanswered`` lines of the error
        file never ran; files are kept for ``kept`` (None: without an end) unless the batch says
        otherwise. Raises LeaseLost, BlobCollected."""
        with writing(self._engine) as connection:
            batch, now = self._held(connection, holder, batch_id), self._now()
            if batch.outcome is None:
                raise AssertionError(f"a batch without an outcome has no files: {batch}")
            if batch.output_expires_after is not None:
                kept = timedelta(seconds=batch.output_expires_after)
            ids = {
                f"{kind}_file_id": store.add(
                    connection,
                    blob,
                    purpose=Purpose.BATCH_OUTPUT,
                    filename=f"{batch_id}_{kind}.jsonl",
                    kept=kept,
                    creator=batch.key_id,
                ).id
                for kind, blob in (("output", output), ("error", errors))
                if blob is not None
            }
            free = {"holder": None, "leased_until": None}
            failed = batch.failed + num_unanswered
            _set(connection, batch, batch.outcome, now, failed=failed, **ids, **free)
            _audit_end(connection, batch, batch.outcome, now)
            return _find(connection, batch_id)

    def complete(self, holder: str, batch_id: str) -> BatchRecord:
        """All lines have answers. Raises LeaseLost."""
        with writing(self._engine) as connection:
            batch = self._held(connection, holder, batch_id)
            if batch.status is BatchStatus.IN_PROGRESS:
                if batch.completed + batch.failed != batch.total:
                    raise AssertionError(f"lines without an answer: {batch}")
                outcome = BatchStatus.COMPLETED.value
                _set(connection, batch, BatchStatus.FINALIZING, self._now(), outcome=outcome)
            return _find(connection, batch_id)

    def remove_answers(self, batch_id: str | None = None) -> int:
        """Delete the answers of batches that have ended, which are in files: of one batch, or of
        all; how many."""
        ended = exists().where(batches.c.id == batch_answers.c.batch, batches.c.status.in_(ENDED))
        place = tuple_(batch_answers.c.batch, batch_answers.c.line)
        some = select(batch_answers.c.batch, batch_answers.c.line).where(ended).limit(_PAGE)
        if batch_id is not None:
            some = some.where(batch_answers.c.batch == batch_id)
        removed = 0
        while True:
            with writing(self._engine) as connection:
                count = connection.execute(delete(batch_answers).where(place.in_(some))).rowcount
            removed += count
            if count < _PAGE:
                return removed

    def _held(self, connection: Connection, holder: str, batch_id: str) -> BatchRecord:
        """The batch, locked. Raises LeaseLost."""
        mine = and_(batches.c.id == batch_id, batches.c.holder == holder)
        row = connection.execute(select(batches).where(mine).with_for_update()).first()
        if row is None or row.status in ENDED:
            raise LeaseLost
        return batch_record(row)

    def _is_free(self, now: ColumnElement[float]) -> ColumnElement[bool]:
        """No server holds it: its lease has expired, or is from a clock that was set back since."""
        until = batches.c.leased_until
        return or_(until.is_(None), until <= now, until > now + literal(2 * self.lease_s))

    def _at(self) -> ColumnElement[float]:
        return shared_now(self._engine, self._lease_now)


def _input(connection: Connection, file_id: str, *, tenant: str) -> FileRecord:
    """The file of a new batch, locked: one in use cannot be deleted."""
    try:
        return find(connection, file_id, tenant=tenant, locked=True)
    except UnknownFile as error:
        raise NotFound(error.message, code="file_not_found", param="input_file_id") from None


def _find(
    connection: Connection, batch_id: str, *, tenant: str | None = None, locked: bool = False
) -> BatchRecord:
    query = select(batches).where(batches.c.id == batch_id)
    if tenant is not None:
        query = query.where(batches.c.tenant == tenant)
    row = connection.execute(query.with_for_update() if locked else query).first()
    if row is None:
        raise NotFound(f"no batch {batch_id[:80]!a}", code="batch_not_found", param="batch_id")
    return batch_record(row)


def _without_answer(
    connection: Connection, batch_id: str, answers: Sequence[LineAnswer]
) -> list[LineAnswer]:
    lines = [answer.line for answer in answers]
    query = select(batch_answers.c.line).where(
        batch_answers.c.batch == batch_id, batch_answers.c.line.in_(lines)
    )
    known = set(connection.scalars(query))
    return [answer for answer in answers if answer.line not in known]


def _set(
    connection: Connection, batch: BatchRecord, status: BatchStatus, now: datetime, **values: Any
) -> None:
    changed = {"status": status.value, TIME_OF[status]: now, **values}
    connection.execute(update(batches).where(batches.c.id == batch.id).values(changed))


def _row(batch: BatchRecord) -> dict[str, Any]:
    row = {column.name: getattr(batch, column.name, None) for column in batches.columns}
    row["metadata_json"] = json.dumps(dict(batch.metadata))
    row["errors_json"] = "[]"
    return row


def _audit(
    connection: Connection, action: Action, batch: BatchRecord, actor: Actor, now: datetime
) -> None:
    detail = {"endpoint": batch.endpoint, "input_file_id": batch.input_file_id}
    record(
        connection,
        action,
        at=now,
        actor=actor,
        tenant=batch.tenant,
        subject=batch.id,
        detail=detail,
    )


def _audit_end(
    connection: Connection, batch: BatchRecord, outcome: BatchStatus, now: datetime
) -> None:
    record(
        connection,
        Action.BATCH_END,
        at=now,
        actor=Actor(tenant=batch.tenant, key_id=batch.key_id),
        tenant=batch.tenant,
        subject=batch.id,
        detail={"status": outcome.value},
    )
