"""Blobs: written whole or not at all, durable in the right order, verified on every load."""

import hashlib
import os
from pathlib import Path

import pytest

from prefix_store.blobs import LocalBlobs
from prefix_store.errors import CorruptArtifact, InvalidReference, UnknownPrefix

CONTENT = b"a prefix"
DIGEST = hashlib.sha256(CONTENT).hexdigest()


def put(blobs: LocalBlobs, tenant: str = "acme", content: bytes = CONTENT) -> None:
    with blobs.staging() as staged:
        staged.write_bytes(content)
        blobs.put(staged, tenant=tenant, digest=DIGEST)


def files(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_a_blob_lies_under_its_tenant_and_digest_and_nothing_else_is_left(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path)
    put(blobs)
    put(blobs, tenant="umbrella")
    put(blobs)
    expected = [f"{tenant}/{DIGEST[:2]}/{DIGEST}" for tenant in ("acme", "umbrella")]
    assert files(tmp_path) == expected
    assert blobs.fetch(tenant="acme", digest=DIGEST).read_bytes() == CONTENT


def test_an_interrupted_write_leaves_nothing_behind(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path)

    def interrupted() -> None:
        with blobs.staging() as staged:
            staged.write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert files(tmp_path) == []


def test_there_is_no_blob_of_another_tenant(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path)
    put(blobs)
    with pytest.raises(UnknownPrefix) as foreign:
        blobs.fetch(tenant="umbrella", digest=DIGEST)
    missing = "0" * 64
    with pytest.raises(UnknownPrefix) as unknown:
        blobs.fetch(tenant="umbrella", digest=missing)
    assert foreign.value.message == unknown.value.message.replace(missing, DIGEST)


@pytest.mark.parametrize("content", [b"", b"a prefiX", CONTENT + b"!"])
def test_a_changed_blob_is_never_returned_and_healed_by_its_upload(
    tmp_path: Path, content: bytes
) -> None:
    blobs = LocalBlobs(tmp_path)
    put(blobs)
    blobs.fetch(tenant="acme", digest=DIGEST).write_bytes(content)
    with pytest.raises(CorruptArtifact, match=DIGEST):
        blobs.fetch(tenant="acme", digest=DIGEST)
    put(blobs)
    assert blobs.fetch(tenant="acme", digest=DIGEST).read_bytes() == CONTENT


def test_a_sound_blob_is_never_overwritten(tmp_path: Path) -> None:
    blobs = LocalBlobs(tmp_path)
    put(blobs)
    before = blobs.fetch(tenant="acme", digest=DIGEST).stat().st_ino
    put(blobs)
    assert blobs.fetch(tenant="acme", digest=DIGEST).stat().st_ino == before


@pytest.mark.parametrize("tenant", ["", ".", "..", ".tmp", "a/b", "../x", "a\0b", "a\n", "é"])
def test_a_tenant_id_never_leads_elsewhere(tmp_path: Path, tenant: str) -> None:
    blobs = LocalBlobs(tmp_path / "blobs")
    with pytest.raises(InvalidReference):
        put(blobs, tenant=tenant)
    with pytest.raises(InvalidReference):
        blobs.fetch(tenant=tenant, digest=DIGEST)


@pytest.mark.parametrize("digest", ["", "../../etc/passwd", DIGEST.upper(), DIGEST + "\n"])
def test_a_digest_never_leads_elsewhere(tmp_path: Path, digest: str) -> None:
    with pytest.raises(UnknownPrefix):
        LocalBlobs(tmp_path).fetch(tenant="acme", digest=digest)


def test_every_new_name_is_made_durable_after_it_is_made(
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
    assert files(tmp_path) == [f"new/blobs/acme/{DIGEST[:2]}/{DIGEST}"]
