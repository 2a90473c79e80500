"""The files of a batch, from its input and from the answers that were committed."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO

from prefixd.server.api.batches.lines import numbered, parse_line, unanswered
from prefixd.server.tenants.batch_records import BatchError, BatchRecord
from prefixd.server.tenants.batch_state import BatchStatus
from prefixd.server.tenants.batches import Batches
from prefixd.store.catalog.blob_rows import BlobCollected
from prefixd.store.errors import CorruptArtifact, UnknownFile, UnknownPrefix
from prefixd.store.file_store import WrittenBlob
from prefixd.store.files import UPLOAD_PREFIX, file_in_progress
from prefixd.store.store import PrefixStore

LOST_INPUT = (UnknownFile, UnknownPrefix, CorruptArtifact)
"""The input was deleted, or its bytes changed."""

_ATTEMPTS = 3
_NOT_RUN = {
    BatchStatus.EXPIRED: BatchError(
        "batch_expired", "the completion window passed before this line ran"
    ),
    BatchStatus.CANCELLED: BatchError(
        "batch_cancelled", "the batch was cancelled before this line ran"
    ),
}


@dataclass(frozen=True, slots=True)
class Assembly:
    """Writes the output and the error file of a batch, in the order of its input, and ends it.
    Blocking. ``folder`` must exist; ``max_bytes`` is the longest line that is valid."""

    batches: Batches
    store: PrefixStore
    folder: Path
    max_bytes: int
    files_kept: timedelta | None

    def input_of(self, batch: BatchRecord) -> Path:
        """A local file with the input, verified now. Raises LOST_INPUT, BlobsUnavailable."""
        file = self.store.files.get(batch.input_file_id, tenant=batch.tenant)
        return self.store.fetch(tenant=batch.tenant, digest=file.digest)

    def finish(self, holder: str, batch: BatchRecord) -> BatchRecord:
        """Raises LeaseLost, BlobsUnavailable."""
        for attempt in range(_ATTEMPTS):
            with suppress(BlobCollected):
                return self._finish(holder, batch)
            del attempt
        raise BlobCollected

    def _finish(self, holder: str, batch: BatchRecord) -> BatchRecord:
        with _new(self.folder) as output, _new(self.folder) as errors:
            not_run = 0
            for file, text, ran in self._entries(batch, output, errors):
                file.write(text.encode() + b"\n")
                not_run += not ran
            return self.batches.finish(
                holder,
                batch.id,
                store=self.store.files,
                output=self._written(output, batch),
                errors=self._written(errors, batch),
                num_unanswered=not_run,
                kept=self.files_kept,
            )

    def _written(self, file: BinaryIO, batch: BatchRecord) -> WrittenBlob | None:
        """None for an empty file."""
        file.flush()
        if not file.tell():
            return None
        return self.store.files.write(Path(file.name), tenant=batch.tenant)

    def _entries(
        self, batch: BatchRecord, output: BinaryIO, errors: BinaryIO
    ) -> Iterator[tuple[BinaryIO, str, bool]]:
        """Each line of either file, and whether it ran."""
        answers = self.batches.answers(batch.id)
        lines = self._not_run(batch)
        answer, line = next(answers, None), next(lines, None)
        while answer is not None or line is not None:
            if answer is not None and (line is None or answer.line <= line[0]):
                if line is not None and line[0] == answer.line:
                    line = next(lines, None)
                yield (errors if answer.failed else output), answer.answer_json, True
                answer = next(answers, None)
            elif line is not None:
                yield errors, line[1], False
                line = next(lines, None)

    def _not_run(self, batch: BatchRecord) -> Iterator[tuple[int, str]]:
        """The entry of each line of the input as if it had not run; none for a batch that is
        complete, or of which no line was allowed to run."""
        if batch.outcome is BatchStatus.COMPLETED or not batch.total:
            return
        assert batch.outcome is not None
        error = _NOT_RUN.get(batch.outcome) or batch.errors[0]
        try:
            path = self.input_of(batch)
        except LOST_INPUT:
            return
        with path.open("rb") as file:
            for number, raw in numbered(file):
                line = parse_line(number, raw, endpoint=batch.endpoint)
                yield number, unanswered(batch.id, number, line.custom_id, error=error)


@contextmanager
def _new(folder: Path) -> Iterator[BinaryIO]:
    with file_in_progress(folder, prefix=UPLOAD_PREFIX) as (path, _), path.open("wb") as file:
        yield file
