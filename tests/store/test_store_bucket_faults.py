"""A bucket that hangs, is slow, answers 503 or cuts bodies: every call ends while the fault lasts,
and after it everything works."""

import hashlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest

from prefixd.store.blobs.blobs import Blobs, open_blobs
from prefixd.store.blobs.bucket import MIN_BYTES_PER_S, Circuit
from prefixd.store.errors import BLOBS_UNAVAILABLE, BlobStoreRefused, BlobsUnavailable
from tests.faulty_bucket import Fault, FaultyBucket, faulty_bucket

CONTENT = os.urandom(40_000)
LARGE = os.urandom(9 * 1024 * 1024)  # uploaded in parts
TIMEOUT_S = 0.4
ENDS_WITHIN_S = 30.0
"""Far more than the timeout, and far less than the fault lasts without one."""

T = TypeVar("T")


@pytest.fixture
def bucket(
    s3_url: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FaultyBucket]:
    del s3_url
    with faulty_bucket(s3_endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy


@pytest.fixture
def blobs(bucket: FaultyBucket, s3_url: str, tmp_path: Path) -> Blobs:
    del bucket
    return succeeds(lambda: open_blobs(s3_url, tmp_path, timeout_s=TIMEOUT_S))


def put(blobs: Blobs, content: bytes = CONTENT) -> str:
    digest = hashlib.sha256(content).hexdigest()
    with blobs.staging() as staged:
        staged.write_bytes(content)
        blobs.put(staged, tenant="acme", digest=digest)
    return digest


def put_without_copy(blobs: Blobs, content: bytes = CONTENT) -> str:
    """Put a blob, and remove the local copy."""
    digest = succeeds(lambda: put(blobs, content))
    blobs.fetch(tenant="acme", digest=digest).unlink()
    return digest


def fetch(blobs: Blobs, digest: str) -> bytes:
    return blobs.fetch(tenant="acme", digest=digest).read_bytes()


def fetch_again(blobs: Blobs, digest: str) -> bytes:
    """Fetch a blob of which there is no local copy."""
    succeeds(lambda: blobs.fetch(tenant="acme", digest=digest)).unlink()
    return succeeds(lambda: fetch(blobs, digest))


def ends_unavailable(*acts: Callable[[], object]) -> None:
    """Each of ``acts``, called at the same time, raises BlobsUnavailable while the fault lasts."""
    with ThreadPoolExecutor(len(acts)) as pool:
        for future in [pool.submit(act) for act in acts]:
            assert isinstance(future.exception(ENDS_WITHIN_S), BlobsUnavailable)


def succeeds(act: Callable[[], T]) -> T:
    """What ``act`` returns, within a minute: the timeout is so short that a busy machine exceeds
    it, and after a fault the circuit lets trial requests pass."""
    pause, deadline = threading.Event(), time.monotonic() + 60
    while True:
        try:
            return act()
        except (BlobsUnavailable, BlobStoreRefused):
            assert time.monotonic() < deadline
            pause.wait(0.05)


@pytest.mark.parametrize(
    ("fault", "limit"),
    [
        (Fault.HANG, 0),
        (Fault.HANG, 20_000),
        (Fault.UNAVAILABLE, 0),
        (Fault.CUT_RESPONSE, 10),
        (Fault.CUT_RESPONSE, 1_000),
        (Fault.CUT_REQUEST, 20_000),
    ],
)
def test_calls_end_while_the_bucket_fails_and_succeed_after_it(
    bucket: FaultyBucket, blobs: Blobs, fault: Fault, limit: int
) -> None:
    digest = succeeds(lambda: put(blobs))
    copy = blobs.fetch(tenant="acme", digest=digest)
    copy.rename(copy.with_suffix(".kept"))
    bucket.limit, bucket.fault = limit, fault
    if fault is not Fault.CUT_REQUEST:
        ends_unavailable(lambda: blobs.fetch(tenant="acme", digest=digest))
    if not limit:
        ends_unavailable(lambda: blobs.delete(tenant="acme", digest=digest))
        ends_unavailable(lambda: list(blobs.walk()))
    ends_unavailable(lambda: put(blobs, b"new" + CONTENT))
    copy.with_suffix(".kept").rename(copy)
    assert blobs.fetch(tenant="acme", digest=digest) == copy  # a local copy needs no bucket
    bucket.fault = Fault.NONE
    succeeds(lambda: put(blobs, b"new" + CONTENT))
    assert fetch_again(blobs, digest) == CONTENT


def test_download_that_is_cut_is_continued(bucket: FaultyBucket, blobs: Blobs) -> None:
    digest = put_without_copy(blobs)
    bucket.limit, bucket.fault = 25_000, Fault.CUT_RESPONSE
    assert succeeds(lambda: fetch(blobs, digest)) == CONTENT


def test_large_upload_to_a_bucket_that_hangs_ends(bucket: FaultyBucket, blobs: Blobs) -> None:
    bucket.limit, bucket.fault = 6 * 1024 * 1024, Fault.HANG
    ends_unavailable(lambda: put(blobs, LARGE))
    bucket.fault = Fault.NONE
    digest = succeeds(lambda: put(blobs, LARGE))
    assert fetch_again(blobs, digest) == LARGE


def test_slow_download_goes_on_while_it_makes_progress(bucket: FaultyBucket, blobs: Blobs) -> None:
    digest = put_without_copy(blobs)
    bucket.piece, bucket.pause_s, bucket.fault = len(CONTENT) // 6, TIMEOUT_S / 3, Fault.SLOW
    start = time.monotonic()
    assert succeeds(lambda: fetch(blobs, digest)) == CONTENT
    assert time.monotonic() - start > TIMEOUT_S


@pytest.mark.parametrize(
    ("content", "pause_s"), [(LARGE[:300_000], 0.4), (LARGE, 0.015)], ids=["one request", "parts"]
)
def test_slow_upload_goes_on_while_the_bucket_responds(
    bucket: FaultyBucket, s3_url: str, tmp_path: Path, content: bytes, pause_s: float
) -> None:
    blobs = succeeds(lambda: open_blobs(s3_url, tmp_path, timeout_s=1.0))
    bucket.piece, bucket.pause_s, bucket.fault = 32 * 1024, pause_s, Fault.SLOW_REQUEST
    start = time.monotonic()
    digest = succeeds(lambda: put(blobs, content))
    assert time.monotonic() - start > 1.0
    bucket.fault = Fault.NONE
    assert fetch_again(blobs, digest) == content


def test_download_in_trickles_ends(bucket: FaultyBucket, blobs: Blobs) -> None:
    """No read of it takes long, but all together would take minutes."""
    digest = put_without_copy(blobs)
    bucket.piece, bucket.pause_s, bucket.fault = 16, TIMEOUT_S / 8, Fault.SLOW
    assert bucket.piece / bucket.pause_s * 100 < MIN_BYTES_PER_S
    ends_unavailable(lambda: fetch(blobs, digest))


def test_calls_fail_at_once_while_the_bucket_is_known_to_fail(
    bucket: FaultyBucket, blobs: Blobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One call waits for the timeout at a time, not all of them, so that threads stay free."""
    digest = put_without_copy(blobs)
    bucket.fault, before = Fault.HANG, blobs.num_failures
    with monkeypatch.context() as patch:
        patch.setattr("prefixd.store.blobs.bucket._TRIAL_EVERY_S", 3600.0)  # no trial requests
        ends_unavailable(lambda: fetch(blobs, digest))
        ends_unavailable(*[lambda: fetch(blobs, digest)] * 20)
        for _ in range(20):
            ends_unavailable(lambda: fetch(blobs, digest))
    assert blobs.num_failures - before == 1  # the others were not sent
    bucket.fault = Fault.NONE
    assert succeeds(lambda: fetch(blobs, digest)) == CONTENT


def test_one_request_at_a_time_is_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefixd.store.blobs.bucket._TRIAL_EVERY_S", 0.0)
    circuit = Circuit()
    for _ in range(2):  # the second one is a trial that fails
        with pytest.raises(BlobsUnavailable), circuit.request():
            raise BlobsUnavailable(BLOBS_UNAVAILABLE)
    assert circuit.failures == 2
    with circuit.request():
        with pytest.raises(BlobsUnavailable):
            circuit.request().__enter__()
        assert circuit.failures == 2
    with circuit.request(), circuit.request():  # the trial has succeeded
        pass
