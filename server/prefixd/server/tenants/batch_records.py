"""Batches and the answers to their lines, as plain data."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

from sqlalchemy import Row

from prefixd.server.tenants.batch_state import ENDED, BatchStatus


@dataclass(frozen=True, slots=True)
class BatchError:
    """Why a batch failed: ``line`` is that of the input file, from 1, where one is at fault."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


@dataclass(frozen=True, slots=True)
class LineAnswer:
    """The answer to a line: one line of the output file, or of the error file if it ``failed``."""

    line: int
    failed: bool
    answer_json: str


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """A batch as stored. ``outcome`` is the status that it gets when its files are written; the
    counts are of lines."""

    id: str
    tenant: str
    key_id: str
    endpoint: str
    input_file_id: str
    completion_window: str
    metadata: Mapping[str, str]
    output_expires_after: int | None
    status: BatchStatus
    created_at: datetime
    expires_at: datetime
    outcome: BatchStatus | None = None
    errors: tuple[BatchError, ...] = ()
    output_file_id: str | None = None
    error_file_id: str | None = None
    total: int = 0
    completed: int = 0
    failed: int = 0
    in_progress_at: datetime | None = None
    finalizing_at: datetime | None = None
    completed_at: datetime | None = None
    failed_at: datetime | None = None
    expired_at: datetime | None = None
    cancelling_at: datetime | None = None
    cancelled_at: datetime | None = None

    @property
    def has_ended(self) -> bool:
        """Whether nothing of it changes any more."""
        return self.status in ENDED


_PARSED = {"metadata", "errors", "status", "outcome"}


def batch_record(row: Row[Any]) -> BatchRecord:
    """From a row of ``batches``."""
    names = [field.name for field in fields(BatchRecord) if field.name not in _PARSED]
    return BatchRecord(
        **{name: getattr(row, name) for name in names},
        status=BatchStatus(row.status),
        outcome=None if row.outcome is None else BatchStatus(row.outcome),
        metadata=json.loads(row.metadata_json),
        errors=tuple(BatchError(**error) for error in json.loads(row.errors_json)),
    )
