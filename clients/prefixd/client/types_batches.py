"""Responses about files and batches, in OpenAI's shape; times are seconds since 1970."""

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from prefixd.client.types_base import ResponseModel


class File(ResponseModel):
    """A file of the tenant. ``expires_at`` is when it is deleted; None: never."""

    id: str
    bytes: int
    created_at: int
    expires_at: int | None = None
    filename: str
    purpose: str


class FilePage(ResponseModel):
    """Some files, newest first; ``last_id`` is the ``after`` of more, while ``has_more``."""

    files: Annotated[tuple[File, ...], Field(alias="data", strict=False)]
    last_id: str | None = None
    has_more: bool = False


class BatchError(ResponseModel):
    """Why a batch failed; ``line`` is that of its input, from 1, where one is at fault."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchErrors(ResponseModel):
    """Errors of a batch."""

    errors: Annotated[tuple[BatchError, ...], Field(alias="data", strict=False)]


class RequestCounts(ResponseModel):
    """Lines of a batch."""

    total: int
    completed: int
    failed: int


class Batch(ResponseModel):
    """A batch: a file of requests, which the server answers when it has room."""

    id: str
    endpoint: str
    status: str
    input_file_id: str
    completion_window: str
    output_file_id: str | None = None
    error_file_id: str | None = None
    errors: BatchErrors | None = None
    request_counts: RequestCounts
    metadata: Mapping[str, str] | None = None
    created_at: int
    expires_at: int
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None

    @property
    def has_ended(self) -> bool:
        """Whether nothing of it changes any more."""
        return self.status in {"completed", "failed", "expired", "cancelled"}


class BatchPage(ResponseModel):
    """Some batches, newest first; ``last_id`` is the ``after`` of more, while ``has_more``."""

    batches: Annotated[tuple[Batch, ...], Field(alias="data", strict=False)]
    last_id: str | None = None
    has_more: bool = False
