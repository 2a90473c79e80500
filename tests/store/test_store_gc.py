"""Delete in two phases: what is collected, what never is."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from datetime import timedelta

import pytest
from sqlalchemy import select

from prefixd.store.catalog.tables import blobs
from prefixd.store.catalog.transaction import CatalogTransaction
from prefixd.store.db.database import reading
from prefixd.store.gc import GcResult, Sweeper
from prefixd.store.names import BlobKey
from prefixd.store.store import Published
from tests.store import store_changes as changes
from tests.store.store_artifacts import BASE
from tests.store.store_home import Home

DAY = timedelta(days=1)
NOW = timedelta(seconds=-60)
"""A grace that has always passed."""


def test_a_deleted_prefix_is_removed_after_the_grace_period(home: Home) -> None:
    manifest = home.put().manifest
    changes.delete(home.store, tenant="acme", name="style")
    assert home.store.collect(grace=DAY) == GcResult()
    assert home.store.fetch(tenant="acme", digest=manifest.digest).is_file()
    home.clock.ahead = 2 * DAY
    expected = GcResult(blobs=1, bytes=manifest.size_bytes)
    assert home.store.collect(grace=DAY, dry_run=True) == expected
    assert len(home.held()) == 1
    assert home.store.collect(grace=DAY) == expected
    assert home.held() == set()


def test_a_collection_covers_all_pages(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefixd.store.catalog.blob_rows._PAGE", 2)
    for number in range(5):
        home.put_text(f"text {number}", f"name-{number}")
        changes.delete(home.store, tenant="acme", name=f"name-{number}")
    assert home.store.collect(grace=NOW, dry_run=True).blobs == 5
    assert home.store.collect(grace=NOW).blobs == 5
    assert home.held() == set()


def test_blobs_referenced_by_another_or_new_version_are_kept(home: Home) -> None:
    home.put("a")
    home.put("b")
    home.put("a", tenant="umbrella")
    changes.delete(home.store, tenant="acme", name="a")
    assert home.store.collect(grace=NOW).blobs == 0
    changes.delete(home.store, tenant="acme", name="b")
    home.put("c")
    assert home.store.collect(grace=NOW).blobs == 0
    changes.delete(home.store, tenant="acme", name="c")
    assert home.store.collect(grace=NOW).blobs == 1
    assert {key.tenant for key in home.held()} == {"umbrella"}


def test_blobs_of_resident_prefixes_are_kept(home: Home) -> None:
    key = BlobKey("acme", home.put().manifest.digest)
    changes.delete(home.store, tenant="acme", name="style")
    home.clock.ahead = 2 * DAY
    assert home.store.collect(grace=DAY, resident=[key]).blobs == 0
    assert home.store.collect(grace=NOW, resident=[key]) == GcResult(resident=1)
    # The sweep of the process that holds it restarted its grace period.
    assert home.store.collect(grace=DAY).blobs == 0
    home.clock.ahead = 4 * DAY
    assert home.store.collect(grace=DAY).blobs == 1


def test_a_blob_that_becomes_used_during_a_collection_is_kept(home: Home) -> None:
    key = BlobKey("acme", home.put().manifest.digest)
    changes.delete(home.store, tenant="acme", name="style")
    rows, now = home.store._rows, home.clock()
    assert [found for found, _ in rows.unreferenced(before=now)] == [key]
    later = now + DAY
    rows.want(key, size_bytes=1, now=later)
    assert not rows.collect(key, before=later, remove=lambda: pytest.fail("removed"))
    home.put("again")
    assert not rows.collect(key, before=later + DAY, remove=lambda: pytest.fail("removed"))


def test_a_blob_row_shows_whether_the_blob_is_referenced(home: Home) -> None:
    def since() -> list[bool]:
        with reading(home.database) as connection:
            found = connection.execute(select(blobs.c.unreferenced_at)).scalars()
            return [moment is None for moment in found]

    home.put("a")
    home.put("b")
    changes.delete(home.store, tenant="acme", name="a")
    assert since() == [True]
    changes.delete(home.store, tenant="acme", name="b")
    assert since() == [False]
    home.put("a")
    assert since() == [True]


def test_deleted_lists_the_blobs_that_no_version_references(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefixd.store.catalog.blob_rows._PAGE", 2)
    keys = {
        BlobKey(tenant, home.put_text(text, name, tenant=tenant).manifest.digest): (tenant, name)
        for tenant in ("acme", "beta")
        for name, text in (("first", "one"), ("second", "two"), ("third", "one"))
    }
    unknown = BlobKey("acme", "0" * 64)
    assert len(keys) == 4
    assert home.store.deleted([*keys, unknown]) == (unknown,)
    changes.delete(home.store, tenant="acme", name="first")
    assert home.store.deleted(list(keys)) == ()
    changes.delete(home.store, tenant="acme", name="third")
    (gone,) = home.store.deleted(list(keys))
    assert keys[gone] == ("acme", "third")
    home.put_text("one", "again", tenant="acme")
    assert home.store.deleted(list(keys)) == home.store.deleted([]) == ()


@pytest.fixture
def overtaken(home: Home, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Published]:
    """Publishes, and twice runs a callback between writing its blob and its row."""

    def publish(happens: Callable[[BlobKey], None]) -> Published:
        change, remaining = home.store.change, [happens] * 2

        def change_late(tenant: str) -> AbstractContextManager[CatalogTransaction]:
            if remaining:
                (key,) = home.held()
                remaining.pop()(key)
                assert home.held() == set()
            return change(tenant)

        monkeypatch.setattr(home.store, "change", change_late)
        published = home.put()
        assert remaining == []
        monkeypatch.undo()
        return published

    return publish


def test_a_publish_overtaken_by_a_collection_starts_again(
    home: Home, overtaken: Callable[..., Published]
) -> None:
    def collected(_: BlobKey) -> None:
        assert home.store.collect(grace=NOW).blobs == 1

    manifest = overtaken(collected).manifest
    assert home.store.fetch(tenant="acme", digest=manifest.digest).is_file()


def test_a_row_recreated_by_another_publish_does_not_prove_that_its_blob_exists(
    home: Home, overtaken: Callable[..., Published]
) -> None:
    def collected_and_wanted(key: BlobKey) -> None:
        assert home.store.collect(grace=NOW).blobs == 1
        # Another publish of the same bytes comes as far as this, and is killed.
        home.store._rows.want(key, size_bytes=1, now=home.clock())

    manifest = overtaken(collected_and_wanted).manifest
    assert home.store.fetch(tenant="acme", digest=manifest.digest).is_file()


def test_a_row_remaining_after_a_killed_collection_does_not_prove_that_its_blob_exists(
    home: Home, overtaken: Callable[..., Published]
) -> None:
    def half_collected(key: BlobKey) -> None:
        def killed() -> None:
            home.blobs.delete(tenant=key.tenant, digest=key.digest)
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            home.store._rows.collect(key, before=home.clock() - NOW, remove=killed)

    manifest = overtaken(half_collected).manifest
    assert home.store.fetch(tenant="acme", digest=manifest.digest).is_file()
    changes.delete(home.store, tenant="acme", name="style")
    assert home.store.collect(grace=NOW).blobs == 1
    assert home.held() == set()


def test_of_two_concurrent_deletes_one_removes_the_last_reference(home: Home) -> None:
    home.put("a")
    home.put("b")
    overtaken = threading.Event()

    def delete_other() -> None:
        with home.store.change("acme") as tx:
            tx.delete("b")
            overtaken.set()

    with ThreadPoolExecutor(1) as pool:
        with home.store.change("acme") as tx:
            tx.delete("a")
            other = pool.submit(delete_other)
            # The other one must wait for this transaction; a failure sets the event at once.
            overtaken.wait(timeout=0.5)
        other.result()
    assert home.store.collect(grace=NOW).blobs == 1
    assert home.held() == set()


def test_concurrent_publishes_deletes_and_collections_never_lose_a_blob(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each delete has a collection follow it, and a publish may begin again after every one."""
    names, times = ("a", "b", "c"), 8
    monkeypatch.setattr("prefixd.store.publisher._PUBLISH_ATTEMPTS", len(names) * times + 1)
    stop, deleted = threading.Event(), threading.Semaphore(0)

    def collect() -> int:
        removed = 0
        while not stop.is_set():
            if deleted.acquire(timeout=0.1):
                removed += home.store.collect(grace=NOW).blobs
        return removed

    def publish(name: str) -> None:
        for number in range(times):
            home.put_text(f"text {number % 2}", name)
            manifest = home.store.resolve(tenant="acme", reference=name, base=BASE)
            assert home.store.fetch(tenant="acme", digest=manifest.digest).is_file()
            changes.delete(home.store, tenant="acme", name=name)
            deleted.release()

    with ThreadPoolExecutor(4) as pool:
        collector = pool.submit(collect)
        try:
            list(pool.map(publish, names))
        finally:
            stop.set()
        removed = collector.result()
    assert removed + home.store.collect(grace=NOW).blobs >= 1
    assert home.held() == set()


def test_files_of_a_running_upload_are_not_removed(home: Home) -> None:
    with home.blobs.staging() as staged:
        staged.write_bytes(b"half")
        home.store.collect(grace=NOW)
        assert staged.exists()
        home.clock.ahead = 2 * DAY
        home.store.collect(grace=NOW)
        assert staged.exists()
        left = staged.with_name("left")
        left.write_bytes(b"half")
        home.store.collect(grace=DAY)
        assert not left.exists()


def test_interrupted_uploads_are_removed_long_before_a_sweep(
    home: Home, caplog: pytest.LogCaptureFixture
) -> None:
    tidied = threading.Semaphore(0)
    failures = [OSError("read-only")] * 2

    def tidy() -> None:
        tidied.release()
        if failures:
            raise failures.pop()
        home.store.remove_interrupted()

    sweeper = Sweeper(lambda: pytest.fail("swept"), interval_s=600, tidy=tidy, tidy_every_s=0.001)
    with home.blobs.staging() as running:
        left = running.with_name("left")
        left.write_bytes(b"half")
        sweeper.start()
        for _ in range(4):
            assert tidied.acquire(timeout=30)
        sweeper.stop()
        assert running.exists()
    assert not left.exists()
    assert caplog.text.count("interrupted uploads were not removed") == 1


def test_a_sweeper_continues_after_errors_until_it_is_stopped(
    caplog: pytest.LogCaptureFixture,
) -> None:
    swept = threading.Semaphore(0)

    def sweep() -> GcResult:
        swept.release()
        raise ConnectionError("the database is unavailable")

    sweeper = Sweeper(sweep, interval_s=0.001)
    sweeper.start()
    for _ in range(2):
        assert swept.acquire(timeout=30)
    sweeper.stop()
    assert "collecting blobs failed" in caplog.text
    assert not [thread for thread in threading.enumerate() if thread.name == "prefixd-sweep"]
