"""Collecting: the second phase of delete, which removes blobs that no version has any more."""

import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice
from logging import getLogger

from prefixd.store.blobs.blobs import Blobs
from prefixd.store.catalog.blob_rows import BlobRows
from prefixd.store.digest import BlobKey

DEFAULT_GRACE = timedelta(days=1)
"""How long a blob stays after the last thing that had or wanted it. It outlasts a request that
was admitted just before a delete, and the clocks of replicas that disagree."""

_IN_FLIGHT = timedelta(days=1)
"""No upload takes as long, whatever the grace: an older file was left by a killed one."""

_BATCH = 500
_log = getLogger("prefixd.store")


@dataclass(frozen=True, slots=True)
class GcResult:
    """What one collection did, or with ``dry_run`` would have done."""

    blobs: int = 0
    bytes: int = 0
    resident: int = 0
    adopted: int = 0


def collect(
    rows: BlobRows,
    blobs: Blobs,
    *,
    now: datetime,
    grace: timedelta,
    resident: Collection[BlobKey] = (),
    adopt: bool = False,
    dry_run: bool = False,
) -> GcResult:
    """Remove the blobs that nothing has had or wanted for ``grace`` and that are not ``resident``.

    ``adopt`` lists all blobs first and takes in those the catalog does not know, as a restored
    back-up leaves them; they begin their grace.
    """
    before = now - grace
    in_use = frozenset(resident)
    adopted = 0
    if not dry_run:
        rows.touch(in_use, now=now)
        if adopt:
            adopted = sum(rows.adopt(batch, now=now) for batch in _batches(blobs.walk()))
    removed, size, spared = 0, 0, 0
    for key, size_bytes in rows.unreferenced(before=before):
        if key in in_use:
            spared += 1
        elif dry_run or _remove(rows, blobs, key, before=before):
            removed += 1
            size += size_bytes
    if not dry_run:
        blobs.tidy(before=min(before, now - _IN_FLIGHT))
    return GcResult(blobs=removed, bytes=size, resident=spared, adopted=adopted)


def _remove(rows: BlobRows, blobs: Blobs, key: BlobKey, *, before: datetime) -> bool:
    return rows.collect(
        key,
        before=before,
        remove=lambda: blobs.delete(tenant=key.tenant, digest=key.digest),
    )


def _batches(
    found: Iterator[tuple[BlobKey, int]],
) -> Iterator[list[tuple[BlobKey, int]]]:
    while batch := list(islice(found, _BATCH)):
        yield batch


class Sweeper:
    """Runs ``sweep`` now and then in a thread of its own, until it is stopped.

    A sweep that fails is logged and tried again the next time.
    """

    def __init__(self, sweep: Callable[[], GcResult], *, interval_s: float) -> None:
        self._sweep = sweep
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefixd-sweep", daemon=True)

    def start(self) -> None:
        """Begin; the first sweep comes after one interval."""
        self._thread.start()

    def stop(self) -> None:
        """End, after the sweep that runs now."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._interval_s):
            try:
                done = self._sweep()
            except Exception:  # noqa: BLE001 - a database that is away for a while ends no sweeper
                _log.exception("collecting blobs failed")
            else:
                if done.blobs:
                    _log.info("collected %d blobs of %d bytes", done.blobs, done.bytes)
