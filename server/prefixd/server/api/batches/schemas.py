"""Bodies of /v1/batches, in OpenAI's shape."""

import re
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from prefixd.server.api.batch_options import ENDPOINTS
from prefixd.server.api.body import StrictModel
from prefixd.server.api.files.schemas import LEAST_KEPT_S, MOST_KEPT_S
from prefixd.server.errors import BadRequest
from prefixd.server.tenants.batch_records import BatchRecord
from prefixd.store.file_store import FILE_ID

BATCH_ID = "batch_[0-9a-f]{32}"
"""The regular expression of the ids of batches."""

WINDOW = "[1-9][0-9]{0,3}[mhd]"
"""The regular expression of completion windows."""

MOST_WINDOW = timedelta(days=14)

_UNITS = {"m": "minutes", "h": "hours", "d": "days"}

MetadataKey = Annotated[str, Field(min_length=1, max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]


class OutputExpiry(StrictModel):
    """When the files that a batch writes are deleted, after their creation."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=LEAST_KEPT_S, le=MOST_KEPT_S)


class NewBatchRequest(StrictModel):
    """A batch to create."""

    input_file_id: str = Field(pattern=f"^{FILE_ID}$", description="A file of purpose `batch`.")
    endpoint: str = Field(description=f"The `url` of all lines: {', '.join(ENDPOINTS)}.")
    completion_window: str = Field(
        description="How long its lines may run: `24h`, or minutes, hours or days such as `30m`, "
        "up to 14 days. Then it expires."
    )
    metadata: dict[MetadataKey, MetadataValue] | None = Field(default=None, max_length=16)
    output_expires_after: OutputExpiry | None = None

    def window(self) -> timedelta:
        """The completion window. Raises BadRequest."""
        text = self.completion_window
        if re.fullmatch(WINDOW, text):
            window = timedelta(**{_UNITS[text[-1]]: int(text[:-1])})
            if window <= MOST_WINDOW:
                return window
        raise BadRequest(
            "expected a completion window such as 24h, 30m or 7d, of at most 14d; received "
            f"{text[:80]!a}",
            param="completion_window",
        )

    def check_endpoint(self) -> None:
        """Raise BadRequest for another endpoint."""
        if self.endpoint not in ENDPOINTS:
            raise BadRequest(
                f"expected one of {', '.join(ENDPOINTS)}; received {self.endpoint[:80]!a}",
                param="endpoint",
            )


class BatchErrorShown(BaseModel):
    """An error of a line of the input, or of the batch."""

    code: str
    line: int | None
    message: str
    param: str | None


class BatchErrors(BaseModel):
    """Why a batch failed."""

    object: Literal["list"] = "list"
    data: list[BatchErrorShown]


class RequestCounts(BaseModel):
    """Lines of a batch; those that never ran count as failed when it has ended."""

    total: int
    completed: int
    failed: int


class BatchShown(BaseModel):
    """A batch; times in seconds since 1970."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: BatchErrors | None
    input_file_id: str
    completion_window: str
    status: str
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, str] | None

    @classmethod
    def of(cls, batch: BatchRecord) -> "BatchShown":
        """From the catalog."""
        shown: dict[str, Any] = {
            name: getattr(batch, name) for name in cls.model_fields if hasattr(batch, name)
        }
        for name, value in shown.items():
            if isinstance(value, datetime):
                shown[name] = int(value.timestamp())
        errors = [BatchErrorShown(**asdict(error)) for error in batch.errors]
        counts = RequestCounts(total=batch.total, completed=batch.completed, failed=batch.failed)
        return cls.model_validate(
            {
                **shown,
                "status": batch.status.value,
                "errors": BatchErrors(data=errors) if errors else None,
                "request_counts": counts,
                "metadata": dict(batch.metadata) or None,
            }
        )


class BatchList(BaseModel):
    """Some batches, newest first; pass ``last_id`` as ``after`` for more, while ``has_more``."""

    object: Literal["list"] = "list"
    data: list[BatchShown]
    first_id: str | None
    last_id: str | None
    has_more: bool
