"""Blobs: one contract, held by both drivers. Complete or absent, verified on every load."""

import hashlib
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import obstore
import pytest
from obstore.store import S3Store

from prefixd.store.blobs import s3 as s3_blobs
from prefixd.store.blobs.blobs import Blobs, LocalBlobs, open_blobs
from prefixd.store.errors import (
    BlobStoreRefused,
    BlobsUnavailable,
    CorruptArtifact,
    InvalidReference,
    UnknownPrefix,
)
from prefixd.store.names import BlobKey
from tests.real_services import S3_ENVIRONMENT, S3_TIMEOUT_S, make_bucket, running_s3

CONTENT = b"a prefix"
DIGEST = hashlib.sha256(CONTENT).hexdigest()
KEY = BlobKey("acme", DIGEST)


class Place:
    """Where a driver keeps its blobs, accessed without the driver."""

    def __init__(self, root: Path, url: str | None) -> None:
        self.root = root
        self.url = url
        self.bucket: S3Store | None = None
        if url:
            self.bucket = S3Store.from_url(url, client_options={"allow_http": True})

    def open(self) -> Blobs:
        return open_blobs(self.url, self.root, timeout_s=S3_TIMEOUT_S)

    def names(self) -> list[str]:
        if self.bucket:
            return sorted(entry["path"] for page in obstore.list(self.bucket) for entry in page)
        blobs = self.root / "blobs"
        return sorted(str(p.relative_to(blobs)) for p in blobs.rglob("*") if p.is_file())

    def write(self, name: str, content: bytes) -> None:
        if self.bucket:
            obstore.put(self.bucket, name, content)
            (self.root / "blob-copies" / name).unlink(missing_ok=True)
        else:
            (self.root / "blobs" / name).write_bytes(content)


@pytest.fixture(params=["files", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    url = None if request.param == "files" else request.getfixturevalue("s3_url")
    return Place(tmp_path, url)


@pytest.fixture
def blobs(place: Place) -> Blobs:
    return place.open()


def put(blobs: Blobs, tenant: str = "acme", content: bytes = CONTENT) -> str:
    digest = hashlib.sha256(content).hexdigest()
    with blobs.staging() as staged:
        staged.write_bytes(content)
        blobs.put(staged, tenant=tenant, digest=digest)
    return digest


def test_a_blob_is_stored_by_tenant_and_digest_without_other_files(
    place: Place, blobs: Blobs
) -> None:
    put(blobs)
    put(blobs, tenant="umbrella")
    put(blobs)
    assert place.names() == [f"{tenant}/{DIGEST[:2]}/{DIGEST}" for tenant in ("acme", "umbrella")]
    assert blobs.fetch(tenant="acme", digest=DIGEST).read_bytes() == CONTENT
    assert sorted(blobs.walk()) == [(KEY, 8), (BlobKey("umbrella", DIGEST), 8)]


def test_blobs_survive_a_restart(place: Place, tmp_path: Path) -> None:
    put(place.open())
    other = place.open() if place.url is None else open_blobs(place.url, tmp_path / "replica")
    assert other.fetch(tenant="acme", digest=DIGEST).read_bytes() == CONTENT


def test_an_interrupted_write_leaves_no_files(place: Place, blobs: Blobs) -> None:
    def interrupted() -> Path:
        with blobs.staging() as staged:
            staged.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert place.names() == []
    assert not [path for path in place.root.rglob("*") if path.is_file()]


def test_a_blob_of_another_tenant_is_not_found(blobs: Blobs) -> None:
    put(blobs)
    with pytest.raises(UnknownPrefix) as foreign:
        blobs.fetch(tenant="umbrella", digest=DIGEST)
    missing = "0" * 64
    with pytest.raises(UnknownPrefix) as unknown:
        blobs.fetch(tenant="umbrella", digest=missing)
    assert foreign.value.message == unknown.value.message.replace(missing, DIGEST)


@pytest.mark.parametrize("content", [b"", b"a prefiX", CONTENT + b"!"])
def test_a_changed_blob_is_never_returned_and_a_new_upload_repairs_it(
    place: Place, blobs: Blobs, content: bytes
) -> None:
    put(blobs)
    place.write(KEY.place, content)
    with pytest.raises(CorruptArtifact, match=DIGEST):
        blobs.fetch(tenant="acme", digest=DIGEST)
    blobs.quarantine(tenant="acme", digest=DIGEST)
    put(blobs)
    assert blobs.fetch(tenant="acme", digest=DIGEST).read_bytes() == CONTENT
    assert place.names() == [f".quarantine/{KEY.place}", KEY.place]
    assert list(blobs.walk()) == [(KEY, 8)]


def test_a_deleted_blob_is_not_found_and_can_be_uploaded_again(place: Place, blobs: Blobs) -> None:
    put(blobs)
    for _ in range(2):
        blobs.delete(tenant="acme", digest=DIGEST)
        blobs.quarantine(tenant="acme", digest=DIGEST)
        with pytest.raises(UnknownPrefix):
            blobs.fetch(tenant="acme", digest=DIGEST)
    assert place.names() == []
    put(blobs)
    assert blobs.fetch(tenant="acme", digest=DIGEST).read_bytes() == CONTENT


def test_files_of_interrupted_uploads_are_removed_and_blobs_are_kept(
    place: Place, blobs: Blobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(blobs)
    with blobs.staging() as running:
        running.write_bytes(b"half")
        names = [str(running.with_name("left"))]
        Path(names[0]).write_bytes(b"half")
        if place.url:
            place.write(".staging/1f", b"half")
            assert list(blobs.interrupted()) == names  # it may still get its name
            monkeypatch.setattr(s3_blobs, "STAGED_LIFETIME", timedelta(minutes=-1))
            names += [f"{place.url}/.staging/1f"]
        assert list(blobs.interrupted()) == names
        blobs.tidy(before=datetime.now(UTC) - timedelta(minutes=1))
        assert list(blobs.interrupted()) == []
        assert running.exists()
        assert not Path(names[0]).exists()
    assert place.names() == [KEY.place]
    assert blobs.fetch(tenant="acme", digest=DIGEST).read_bytes() == CONTENT


def test_local_copies_that_were_not_used_are_removed(s3_url: str, tmp_path: Path) -> None:
    blobs = open_blobs(s3_url, tmp_path)
    put(blobs)
    copy = blobs.fetch(tenant="acme", digest=DIGEST)
    blobs.tidy(before=datetime.now(UTC) - timedelta(minutes=1))
    assert copy.exists()
    blobs.tidy(before=datetime.now(UTC) + timedelta(minutes=1))
    assert not copy.exists()


@pytest.mark.parametrize("tenant", ["", ".", "..", ".tmp", "a/b", "../x", "a\0b", "a\n", "é"])
def test_a_tenant_id_cannot_escape_the_blob_folder(place: Place, blobs: Blobs, tenant: str) -> None:
    with pytest.raises(InvalidReference):
        put(blobs, tenant=tenant)
    for act in (blobs.fetch, blobs.delete, blobs.quarantine):
        with pytest.raises(InvalidReference):
            act(tenant=tenant, digest=DIGEST)
    assert place.names() == []


@pytest.mark.parametrize("digest", ["", "../../etc/passwd", DIGEST.upper(), DIGEST + "\n"])
def test_a_digest_cannot_escape_the_blob_folder(blobs: Blobs, digest: str) -> None:
    for act in (blobs.fetch, blobs.delete, blobs.quarantine):
        with pytest.raises(UnknownPrefix):
            act(tenant="acme", digest=digest)


def test_a_valid_file_is_never_overwritten(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path)
    put(blobs)
    before = blobs.fetch(tenant="acme", digest=DIGEST).stat().st_ino
    put(blobs)
    assert blobs.fetch(tenant="acme", digest=DIGEST).stat().st_ino == before


def test_every_new_file_name_is_synced_after_it_is_created(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name is durable once its directory is synced after it appeared in it."""
    volatile: set[Path] = set()
    fsync, link, mkdir = os.fsync, os.link, Path.mkdir

    def recording_fsync(descriptor: int) -> None:
        synced = Path(f"/proc/self/fd/{descriptor}").readlink()
        volatile.difference_update({path for path in volatile if path.parent == synced})
        fsync(descriptor)

    def recording_link(source: Path, target: Path) -> None:
        link(source, target)
        volatile.add(target)

    def recording_mkdir(path: Path, **options: object) -> None:
        mkdir(path, **options)  # type: ignore[arg-type]
        volatile.add(path)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "link", recording_link)
    monkeypatch.setattr(Path, "mkdir", recording_mkdir)
    blobs = LocalBlobs(tmp_path / "new" / "blobs")
    assert volatile == set()
    put(blobs)
    assert volatile == set()


@pytest.mark.parametrize("size", [s3_blobs.SINGLE_PUT_BYTES, s3_blobs.SINGLE_PUT_BYTES + 1])
def test_a_large_blob_is_uploaded_in_parts_with_the_same_condition(
    s3_url: str, tmp_path: Path, size: int
) -> None:
    place = Place(tmp_path, s3_url)
    blobs = place.open()
    content = os.urandom(size)
    digest = put(blobs, content=content)
    name = BlobKey("acme", digest).place
    assert place.names() == [name]
    place.write(name, b"what another client created first")
    with blobs.staging() as staged:
        staged.write_bytes(content)
        blobs._create(staged, name)  # type: ignore[attr-defined]
    assert place.bucket is not None
    assert obstore.head(place.bucket, name)["size"] < 50
    assert place.names() == [name]
    put(blobs, content=content)
    assert blobs.fetch(tenant="acme", digest=digest).read_bytes() == content


def test_folder_in_place_of_a_local_copy_does_not_prevent_a_delete(
    s3_url: str, tmp_path: Path
) -> None:
    blobs = open_blobs(s3_url, tmp_path)
    digest = put(blobs)
    copy = blobs.fetch(tenant="acme", digest=digest)
    copy.unlink()
    copy.mkdir()
    blobs.delete(tenant="acme", digest=digest)
    assert list(blobs.walk()) == []
    assert not copy.exists()


def test_a_changed_local_copy_is_fetched_again(s3_url: str, tmp_path: Path) -> None:
    blobs = open_blobs(s3_url, tmp_path)
    put(blobs)
    blobs.fetch(tenant="acme", digest=DIGEST).write_bytes(b"changed")
    assert blobs.fetch(tenant="acme", digest=DIGEST).read_bytes() == CONTENT


def test_a_bucket_that_ignores_if_none_match_is_rejected(
    careless_s3: Callable[[], str], tmp_path: Path
) -> None:
    with pytest.raises(BlobStoreRefused, match="ignores If-None-Match"):
        open_blobs(careless_s3(), tmp_path)


def test_a_missing_bucket_is_rejected(s3_url: str, tmp_path: Path) -> None:
    with pytest.raises(BlobStoreRefused, match=r"s3://absent/x cannot be used.*not found"):
        open_blobs("s3://absent/x", tmp_path)


@pytest.mark.parametrize("url", ["file:///tmp/x", "gs://bucket", "bucket"])
def test_other_blob_urls_are_rejected(url: str, tmp_path: Path) -> None:
    with pytest.raises(BlobStoreRefused, match="s3://bucket/prefix"):
        open_blobs(url, tmp_path)


def test_an_unavailable_bucket_raises_one_error_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with running_s3() as endpoint:
        for variable, value in {**S3_ENVIRONMENT, "AWS_ENDPOINT_URL": endpoint}.items():
            monkeypatch.setenv(variable, value)
        make_bucket(endpoint, "bucket-away")
        blobs = open_blobs("s3://bucket-away/prefixes", tmp_path)

    def put() -> None:
        with blobs.staging() as staged:
            staged.write_bytes(CONTENT)
            blobs.put(staged, tenant="acme", digest=DIGEST)

    for act in (
        put,
        lambda: blobs.fetch(tenant="acme", digest=DIGEST),
        lambda: blobs.delete(tenant="acme", digest=DIGEST),
        lambda: list(blobs.walk()),
    ):
        with pytest.raises(BlobsUnavailable) as away:
            act()
        assert "cannot be reached" in away.value.message
        assert endpoint not in away.value.message
    assert endpoint in caplog.text
