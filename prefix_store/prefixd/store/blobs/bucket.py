"""Requests to an S3 bucket, each within bounds: none waits for a bucket that does not respond.

::

    closed --a request fails, and none succeeded since it began--> open
      ^                                                             |
      +-----------------the trial request succeeds------------------+

While the circuit is open, one request at a time is a trial, at most one in ``_TRIAL_EVERY_S``; all
others fail at once, so that threads are free for what needs no bucket.
"""

import asyncio
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PermissionDeniedError
from obstore.store import S3Store

from prefixd.store.errors import BLOBS_UNAVAILABLE, BlobStoreRefused, BlobsUnavailable

if TYPE_CHECKING:  # its stubs only
    from obstore import ObjectMeta

MIN_BYTES_PER_S = 64 * 1024
"""A download that is slower than this, after the timeout, counts as one without progress."""

MIN_UPLOAD_BYTES_PER_S = 512 * 1024
"""The same for a part of an upload."""

_PARTS = 1  # at a time: on a slow line, two would take twice as long each
_PART_BYTES = 5 * 1024 * 1024
_SMALL_BYTES = 64 * 1024  # sent within the timeout on any line
_ABSENT = ".staging/absent"
_TRIAL_EVERY_S = 0.5
_NO_LIMIT = timedelta(days=1)  # of a whole transfer: it lasts while it makes progress
_log = getLogger("prefixd.store")


class Circuit:
    """Whether requests are sent. Safe to share between threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open = False
        self._trial = False
        self._tried_at = 0.0
        self._succeeded_at = 0.0
        self.failures = 0

    @contextmanager
    def request(self) -> Iterator[None]:
        """Send one request. Raises BlobsUnavailable at once while the circuit is open."""
        began = time.monotonic()
        trial = self._admit(began)
        try:
            yield
        except BlobsUnavailable:
            self._failed(began, trial=trial)
            raise
        except BaseException:
            self.succeeded(trial=trial)  # the bucket has responded, or was not at fault
            raise
        else:
            self.succeeded(trial=trial)

    def succeeded(self, *, trial: bool = False) -> None:
        """The bucket has responded."""
        with self._lock:
            self._succeeded_at, self._open = time.monotonic(), False
            self._trial = self._trial and not trial

    def _admit(self, now: float) -> bool:
        """Whether the request is a trial; raise BlobsUnavailable when it may not be sent."""
        with self._lock:
            if not self._open:
                return False
            if self._trial or now - self._tried_at < _TRIAL_EVERY_S:
                raise BlobsUnavailable(BLOBS_UNAVAILABLE)
            self._trial, self._tried_at = True, now
            return True

    def _failed(self, began: float, *, trial: bool) -> None:
        with self._lock:
            self.failures += 1
            self._trial = self._trial and not trial
            if self._succeeded_at < began:
                self._open, self._tried_at = True, time.monotonic()


class Bucket:
    """Objects under one prefix of a bucket.

    ``url`` is ``s3://bucket/prefix``; endpoint, region and credentials come from the usual
    ``AWS_*`` variables. Every method raises BlobsUnavailable when the bucket fails or makes no
    progress for ``timeout_s``; FileNotFoundError and AlreadyExistsError are its answers. Raises
    BlobStoreRefused for a URL that cannot be used.
    """

    def __init__(self, url: str, *, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._store = _open(url, timeout_s)
        # The timeout covers sending the body too, so that of a long body allows for a slow line.
        self._uploads = _open(url, timeout_s + _PART_BYTES / MIN_UPLOAD_BYTES_PER_S)
        self.circuit = Circuit()

    def create(self, path: str, content: bytes) -> None:
        """Create an object. Raises AlreadyExistsError."""
        with self._request():
            if len(content) <= _SMALL_BYTES:
                obstore.put(self._store, path, content, mode="create")
            else:
                self._upload(path, content, mode="create")

    def put(self, path: str, source: Path) -> None:
        """Create or replace an object; a large one in parts, so that it is not in memory."""
        with self._request():
            self._upload(path, source, chunk_size=_PART_BYTES, max_concurrency=_PARTS)

    def copy(self, path: str, target: str, *, overwrite: bool = True) -> None:
        """Copy an object. Raises FileNotFoundError, and without ``overwrite``
        AlreadyExistsError."""
        with self._request():
            obstore.copy(self._store, path, target, overwrite=overwrite)

    def delete(self, path: str) -> None:
        """Delete an object. Raises FileNotFoundError with some buckets."""
        with self._request():
            obstore.delete(self._store, path)

    def list(self, prefix: str | None = None) -> "Iterator[ObjectMeta]":
        """All objects whose path begins with ``prefix``."""
        with self._request():
            for page in obstore.list(self._store, prefix=prefix):
                self.circuit.succeeded()
                yield from page

    def chunks(self, path: str) -> Iterator[bytes]:
        """The bytes of an object, as they arrive. Raises FileNotFoundError."""
        with self._request():
            began, size = time.monotonic(), 0
            # Unbuffered, so that a slow download is seen.
            for chunk in obstore.get(self._store, path).stream(min_chunk_size=1):
                size += len(chunk)
                allowed_s = self._timeout_s + size / MIN_BYTES_PER_S
                if time.monotonic() - began > allowed_s:
                    _log.error("the bucket failed: a download sends %d bytes too slowly", size)
                    raise BlobsUnavailable(BLOBS_UNAVAILABLE)
                yield chunk

    def _upload(self, path: str, content: bytes | Path, **options: Any) -> None:
        """Upload while the bucket responds to other requests: the client does not say how much of
        a body has been sent."""

        async def watched() -> None:
            upload = obstore.put_async(self._uploads, path, content, **options)
            task = asyncio.ensure_future(upload)
            while not (await asyncio.wait({task}, timeout=self._timeout_s / 4))[0]:
                with suppress(FileNotFoundError, PermissionDeniedError):
                    await obstore.head_async(self._store, _ABSENT)
            task.result()

        asyncio.run(watched())

    @contextmanager
    def _request(self) -> Iterator[None]:
        """The reason of a failure, which names the endpoint, is logged only."""
        with self.circuit.request():
            try:
                yield
            except AlreadyExistsError:
                raise
            except BaseError as error:
                _log.error("the bucket failed: %s", first_line(error))
                raise BlobsUnavailable(BLOBS_UNAVAILABLE) from error


def first_line(error: BaseException) -> str:
    """The first line of an error of the S3 client: the others have its internals."""
    return str(error).partition("\n")[0]


def _open(url: str, timeout_s: float) -> S3Store:
    timeout = timedelta(seconds=timeout_s)
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    try:
        return S3Store.from_url(
            url,
            config={"copy_if_not_exists": "multipart"},
            client_options={
                # Plain HTTP only where the operator configured it.
                "allow_http": endpoint.startswith("http://"),
                "connect_timeout": timeout,
                "read_timeout": timeout,
                "timeout": _NO_LIMIT,
            },
            # An error is retried for a moment. A timeout is not: it has taken longer.
            retry_config={
                "max_retries": 3,
                "retry_timeout": timeout / 4,
                "backoff": {"init_backoff": timedelta(milliseconds=50)},
            },
        )
    except (BaseError, ValueError) as error:
        raise BlobStoreRefused(f"cannot open the blobs at {url}: {error}") from error
