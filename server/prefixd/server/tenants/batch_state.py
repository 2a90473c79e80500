"""The life of a batch.

::

    validating ──> in_progress ──> finalizing ──> completed
        │  │            │  │            ├───────> failed      its key no longer works
        │  └──> failed  │  │            └───────> expired     its completion window has passed
        │               │  └──> the same, when it cannot go on
        └──> cancelling <──┘
                 └──> cancelled

An end is decided once, as ``outcome``, and reached when the files of the batch are written.
"""

from enum import StrEnum


class BatchStatus(StrEnum):
    """OpenAI's words."""

    VALIDATING = "validating"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    COMPLETED = "completed"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


OPEN = (
    BatchStatus.VALIDATING,
    BatchStatus.IN_PROGRESS,
    BatchStatus.FINALIZING,
    BatchStatus.CANCELLING,
)
ENDED = (
    BatchStatus.COMPLETED,
    BatchStatus.FAILED,
    BatchStatus.EXPIRED,
    BatchStatus.CANCELLED,
)
CANCELLABLE = (BatchStatus.VALIDATING, BatchStatus.IN_PROGRESS)

TIME_OF = {
    BatchStatus.IN_PROGRESS: "in_progress_at",
    BatchStatus.FINALIZING: "finalizing_at",
    BatchStatus.COMPLETED: "completed_at",
    BatchStatus.FAILED: "failed_at",
    BatchStatus.EXPIRED: "expired_at",
    BatchStatus.CANCELLING: "cancelling_at",
    BatchStatus.CANCELLED: "cancelled_at",
}
"""The column with the time at which a batch got a status."""
