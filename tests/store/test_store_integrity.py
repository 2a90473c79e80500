"""The check of catalog and blobs: each problem is named, and a busy store has none."""

import errno
import os
import threading
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Row, select

from prefixd.store import files
from prefixd.store.blobs import blobs as local_blobs
from prefixd.store.blobs import s3 as s3_blobs
from prefixd.store.catalog.tables import prefixes
from prefixd.store.files import file_in_progress, interrupted
from prefixd.store.integrity import Finding, Problem, StoreIntegrity, pages
from prefixd.store.names import BlobKey, irregular
from tests.store import store_changes as changes
from tests.store.store_artifacts import BASE
from tests.store.store_home import Home

NOW = timedelta(seconds=-60)
"""A grace that has always passed."""


def check(home: Home) -> list[Finding]:
    return list(integrity(home).findings())


def integrity(home: Home) -> StoreIntegrity:
    return StoreIntegrity(home.database, home.blobs, upload_dir=home.path / "uploads")


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefixd.store.integrity._PAGE", 2)


def filled(home: Home) -> BlobKey:
    """Versions under several names, with an alias and a pin; the blob of ``support``."""
    for number in range(3):
        home.put_text(f"text {number}", f"name-{number}")
    manifest = home.put("support").manifest
    home.put("twin")
    with home.store.change("acme") as tx:
        tx.set_alias("support", "prod", version=1, base=BASE)
        tx.set_pin("support@1", base=BASE)
    home.put_text("deleted", "deleted")
    changes.delete(home.store, tenant="acme", name="deleted")
    return BlobKey("acme", manifest.digest)


def tamper(home: Home, *statements: str) -> None:
    """Change rows without the foreign keys that would prevent it."""
    with closing(home.database.raw_connection()) as connection:
        cursor = connection.cursor()
        postgres = home.database.dialect.name == "postgresql"
        cursor.execute(
            "SET session_replication_role = replica" if postgres else "PRAGMA foreign_keys=OFF"
        )
        for statement in statements:
            cursor.execute(statement)
        if postgres:
            connection.commit()
        connection.detach()


def subjects(findings: list[Finding], problem: Problem) -> list[str]:
    """What has ``problem``; no finding is another one, and all name the tenant."""
    assert {(finding.problem, finding.tenant) for finding in findings} <= {(problem, "acme")}
    return sorted(finding.subject for finding in findings)


def test_an_intact_store_has_no_findings_and_everything_is_counted(home: Home) -> None:
    filled(home)
    checked = integrity(home)
    assert list(checked.findings()) == []
    sizes = sum(size for _, size in home.blobs.walk())
    deleted = len("deleted")  # its blob has no version, so it is listed and not read
    assert checked.counts["versions"] == 5
    assert checked.counts["blobs"] == 5
    assert sizes - 200 - deleted < checked.counts["bytes"] < sizes
    assert checked.counts["quarantined"] == 0


def test_missing_blob_is_found_for_each_version(home: Home) -> None:
    key = filled(home)
    home.blobs.delete(tenant=key.tenant, digest=key.digest)
    assert subjects(check(home), Problem.BLOB_MISSING) == ["support@1", "twin@1"]


def test_changed_blob_is_found_until_it_is_uploaded_again(home: Home) -> None:
    key = filled(home)
    home.damage(key.place, b"changed")
    findings = check(home)
    assert subjects(findings, Problem.BLOB_CORRUPT) == ["support@1", "twin@1"]
    assert all(key.digest in finding.detail for finding in findings)
    with pytest.raises(Exception, match="upload it again"):
        home.store.fetch(tenant=key.tenant, digest=key.digest)
    home.put("support")
    checked = integrity(home)
    assert list(checked.findings()) == []
    assert checked.counts["quarantined"] == 1


def test_a_finding_says_once_what_to_do_about_an_irregular_file(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = filled(home)

    def measure(*, tenant: str, digest: str) -> tuple[int, str]:
        raise irregular(digest)

    monkeypatch.setattr(home.blobs, "measure", measure)
    detail = next(one.detail for one in check(home) if key.digest in one.detail)
    assert detail.count("upload it again") == detail.count(key.digest) == 1


def test_quarantined_blob_is_found_although_its_bytes_are_right_again(home: Home) -> None:
    key = filled(home)
    home.store._rows.mark_corrupt(key, now=home.clock())
    findings = check(home)
    assert subjects(findings, Problem.BLOB_CORRUPT) == ["support@1", "twin@1"]
    assert "quarantine" in findings[0].detail


def test_wrong_size_in_the_catalog_is_found(home: Home) -> None:
    filled(home)
    tamper(
        home,
        "UPDATE versions SET size_bytes = 7 WHERE prefix_id IN "
        "(SELECT id FROM prefixes WHERE name = 'twin')",
    )
    (finding,) = check(home)
    assert (finding.problem, finding.subject) == (Problem.BLOB_SIZE, "twin@1")
    assert "expected 7 bytes" in finding.detail


def test_version_whose_blob_has_no_row_is_found(home: Home) -> None:
    key = filled(home)
    tamper(home, f"DELETE FROM blobs WHERE digest = '{key.digest}'")
    findings = check(home)
    assert {(finding.problem, finding.subject) for finding in findings} == {
        (Problem.ROW_MISSING, "support@1"),
        (Problem.ROW_MISSING, "twin@1"),
        (Problem.BLOB_WITHOUT_ROW, f"the blob {key.digest}"),
    }


def test_blob_without_a_row_is_found_and_removed_by_a_collection(home: Home) -> None:
    filled(home)
    tamper(home, "DELETE FROM blobs WHERE unreferenced_at IS NOT NULL")
    (subject,) = subjects(check(home), Problem.BLOB_WITHOUT_ROW)
    assert subject.startswith("the blob ")
    home.store.collect(grace=NOW, adopt=True)
    assert check(home) == []


@pytest.mark.parametrize(
    ("table", "subject"),
    [
        ("aliases", "the alias 'prod' of support"),
        ("pins", "the pin of support"),
        ("latest_versions", f"the latest version for the base {BASE.fingerprint} of support"),
    ],
)
def test_name_without_a_target_is_found(home: Home, table: str, subject: str) -> None:
    filled(home)
    support = "prefix_id IN (SELECT id FROM prefixes WHERE name = 'support')"
    tamper(home, f"UPDATE {table} SET version = 9 WHERE {support}")
    findings = check(home)
    assert subjects(findings, Problem.TARGET_MISSING) == [subject]
    assert "version 9" in findings[0].detail


def test_latest_of_another_base_is_found(home: Home) -> None:
    filled(home)
    tamper(
        home,
        "UPDATE versions SET fingerprint = 'other' WHERE prefix_id IN "
        "(SELECT id FROM prefixes WHERE name = 'twin')",
    )
    (subject,) = subjects(check(home), Problem.TARGET_MISSING)
    assert subject.endswith("of twin")


def test_interrupted_uploads_are_found_and_running_ones_are_not(home: Home) -> None:
    filled(home)
    uploads = home.path / "uploads"
    uploads.mkdir()
    staging = home.blobs._staging  # type: ignore[attr-defined]
    left = [uploads / "upload-1", staging / "1f"]
    with home.blobs.staging() as staged, file_in_progress(uploads, prefix="upload-"):
        staged.write_bytes(b"half")
        assert check(home) == []
        for path in left:
            path.write_bytes(b"half")
        (uploads / "notes").write_bytes(b"no upload")
        found = check(home)
    assert {finding.problem for finding in found} == {Problem.INTERRUPTED_UPLOAD}
    assert sorted(finding.subject for finding in found) == sorted(map(str, left))
    home.store.collect()
    assert [finding.subject for finding in check(home)] == [str(uploads / "upload-1")]


def test_upload_that_has_just_begun_is_not_found(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no lock when it is listed first."""
    filled(home)
    staging = home.blobs._staging  # type: ignore[attr-defined]
    (staging / "new").write_bytes(b"")
    listings = [[staging / "new"], []]
    for module in (s3_blobs, local_blobs):
        monkeypatch.setattr(module, "interrupted", lambda _: iter(listings.pop(0)))
    assert check(home) == []
    assert listings == []
    monkeypatch.undo()
    assert list(interrupted(staging)) == [staging / "new"]


def test_nothing_is_found_while_prefixes_are_published_and_deleted(home: Home) -> None:
    filled(home)
    ended = threading.Event()
    failures: list[BaseException] = []

    def churn(number: int) -> None:
        own = replace(home, path=home.path / f"writer-{number}")  # its files of weights
        own.path.mkdir()
        try:
            while not ended.is_set():
                own.put("busy", seed=float(number))
                home.put_text(f"busy {number}", f"busy-{number}")
                changes.delete(home.store, tenant="acme", name=f"busy-{number}")
                home.store.collect(grace=NOW)
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=churn, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    try:
        findings = [finding for _ in range(5) for finding in check(home)]
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert findings == []
    assert failures == []


def test_rows_are_read_in_pages(home: Home) -> None:
    filled(home)
    lengths: list[int] = []

    def inspect(_: Connection, rows: Sequence[Row[Any]]) -> list[str]:
        lengths.append(len(rows))
        return [row.name for row in rows]

    order = (prefixes.c.tenant, prefixes.c.name)
    names = pages(home.database, select(*order).order_by(*order).limit(4), order, inspect)
    assert next(names) == "deleted"
    assert lengths == [4]
    assert list(names) == ["name-0", "name-1", "name-2", "support", "twin"]
    assert lengths == [4, 2]


def test_blob_that_cannot_be_read_is_found_and_the_check_goes_on(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not isinstance(home.blobs, local_blobs.LocalBlobs):
        pytest.skip("a bucket reports its disk's errors as unavailable")
    key = filled(home)
    sha256_of = files.sha256_of

    def failing(path: Path) -> str:
        if path.name == key.digest:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return sha256_of(path)

    monkeypatch.setattr(local_blobs, "sha256_of", failing)
    findings = check(home)
    assert [finding.problem for finding in findings] == [Problem.BLOB_CORRUPT] * 2
    assert "cannot be read: Input/output error" in findings[0].detail
