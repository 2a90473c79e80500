"""Garbage collection: the second phase of a delete removes the blobs that no version has."""

import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice
from logging import getLogger

from prefixd.store.blobs.blobs import Blobs
from prefixd.store.catalog.blob_rows import BlobRows
from prefixd.store.names import BlobKey

DEFAULT_GRACE = timedelta(days=1)
"""How long a blob stays after it was last referenced or wanted: longer than a request that was
admitted just before a delete, and than the difference between the clocks of replicas."""

_IN_FLIGHT = timedelta(days=1)
"""No upload takes as long, regardless of the grace: an older file is an interrupted upload."""

TIDY_EVERY_S = 5.0
"""How soon what an interrupted upload has left is removed."""

_BATCH = 500
_log = getLogger("prefixd.store")


@dataclass(frozen=True, slots=True)
class GcResult:
    """Blobs and bytes that one collection removed, or with ``dry_run`` would have; blobs it spared
    as resident, and those it adopted."""

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
    """Remove the blobs that were neither referenced nor wanted for ``grace`` and are not
    ``resident``.

    ``adopt`` first lists all blobs and adds rows for those without one, as after restoring a
    backup; their grace begins now.
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
    listing: Iterator[tuple[BlobKey, int]],
) -> Iterator[list[tuple[BlobKey, int]]]:
    while batch := list(islice(listing, _BATCH)):
        yield batch


class Sweeper:
    """Runs ``sweep`` every ``interval_s`` seconds, and ``tidy``, which is cheap, at once and every
    ``tidy_every_s``, in its own thread, until it is stopped.

    One that fails is logged; the next one runs as usual.
    """

    def __init__(
        self,
        sweep: Callable[[], GcResult],
        *,
        interval_s: float,
        tidy: Callable[[], object] = lambda: None,
        tidy_every_s: float = TIDY_EVERY_S,
    ) -> None:
        self._sweep = sweep
        self._tidy = tidy
        self._interval_s = interval_s
        self._tidy_every_s = tidy_every_s
        self._is_tidy = True
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="prefixd-sweep", daemon=True)

    def start(self) -> None:
        """Start the thread; the first sweep runs after one interval."""
        self._thread.start()

    def stop(self) -> None:
        """Stop the thread, after a sweep in progress."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        next_sweep = time.monotonic() + self._interval_s
        while True:
            self._tidy_now()
            pause_s = min(self._tidy_every_s, next_sweep - time.monotonic())
            if self._stop.wait(max(0.0, pause_s)):
                return
            if time.monotonic() >= next_sweep:
                self._sweep_now()
                next_sweep = time.monotonic() + self._interval_s

    def _tidy_now(self) -> None:
        """Logs the first failure in a row."""
        try:
            self._tidy()
        except Exception:  # noqa: BLE001 - as for a sweep
            if self._is_tidy:
                _log.exception("interrupted uploads were not removed")
            self._is_tidy = False
        else:
            self._is_tidy = True

    def _sweep_now(self) -> None:
        try:
            result = self._sweep()
        except Exception:  # noqa: BLE001 - the sweeper survives an unavailable database
            _log.exception("collecting blobs failed")
        else:
            if result.blobs:
                _log.info("collected %d blobs of %d bytes", result.blobs, result.bytes)
