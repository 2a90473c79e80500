"""Several threads and several processes on one catalog."""

import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from prefixd.store.blobs.blobs import LocalBlobs
from prefixd.store.catalog import manifests
from prefixd.store.db.database import open_database, reading, writing
from prefixd.store.db.migrate import upgrade
from prefixd.store.errors import UnknownPrefix
from prefixd.store.store import PrefixStore
from tests.store import store_changes as changes
from tests.store.store_artifacts import BASE, config_bytes, soft, spool
from tests.store.store_home import Home

THREADS = 32


def race(work: Callable[[int], Any]) -> list[Any]:
    """Run ``work(0) .. work(31)`` in threads that start together."""
    barrier = threading.Barrier(THREADS)

    def one(number: int) -> Any:
        barrier.wait()
        return work(number)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(one, range(THREADS)))


def publish(home: Home, number: int) -> Any:
    return changes.publish_text(
        home.store,
        tenant="acme",
        name="style",
        text="x" * (number + 1),
        metadata=None,
        base=BASE,
        count_tokens=len,
    )


def test_concurrent_uploads_of_the_same_bytes_make_one_version(home: Home) -> None:
    weights = spool(home.path, soft())
    published = race(
        lambda _: changes.publish_peft(
            home.store,
            tenant="acme",
            name="style",
            config=config_bytes(),
            weights=weights,
            metadata=None,
            base=BASE,
        )
    )
    assert sum(one.created for one in published) == 1
    assert {one.manifest.version for one in published} == {1}
    assert len(home.store.versions(tenant="acme", name="style")) == 1
    assert len(home.held()) == 1


def test_concurrent_uploads_of_different_bytes_make_one_version_each(home: Home) -> None:
    published = race(lambda number: publish(home, number))
    assert sorted(one.manifest.version for one in published) == list(range(1, THREADS + 1))
    by_version = {one.manifest.version: one.manifest.digest for one in published}
    stored = home.store.versions(tenant="acme", name="style")
    assert {manifest.version: manifest.digest for manifest in stored} == by_version


def test_concurrent_alias_moves_leave_one_of_the_versions(home: Home) -> None:
    for number in range(4):
        publish(home, number)
    race(
        lambda number: changes.set_alias(
            home.store, tenant="acme", name="style", alias="prod", version=number % 4 + 1
        )
    )
    marked = [m for m in home.store.versions(tenant="acme", name="style") if "prod" in m.aliases]
    assert len(marked) == 1


def test_concurrent_pins_of_a_prefix_leave_one_pin(home: Home) -> None:
    for number in range(4):
        publish(home, number)
    race(
        lambda number: changes.set_pin(
            home.store, tenant="acme", reference=f"style@{number % 4 + 1}"
        )
    )
    pinned = [m for m in home.store.versions(tenant="acme", name="style") if m.pinned]
    assert [m.digest for m in pinned] == [
        one.key.digest for one in home.store.pinned(fingerprint=BASE.fingerprint)
    ]


def test_concurrent_changes_of_every_kind_all_finish(home: Home) -> None:
    """Two names with the same bytes: locking in different orders would deadlock."""

    def change(number: int) -> None:
        name = ("style", "tone")[number % 2]
        with suppress(UnknownPrefix):
            match number // 2 % 5:
                case 0:
                    home.put_text(f"text {number % 3}", name)
                case 1:
                    changes.set_alias(home.store, tenant="acme", name=name, alias="prod", version=1)
                case 2:
                    changes.set_pin(home.store, tenant="acme", reference=name)
                case 3:
                    changes.remove_pin(home.store, tenant="acme", name=name)
                case 4:
                    changes.delete(home.store, tenant="acme", name=name)

    for _ in range(3):
        for name in ("style", "tone"):
            home.put_text("text 0", name)
        race(change)
    found = home.store.list(tenant="acme").manifests
    for one in home.store.pinned(fingerprint=BASE.fingerprint):
        versions = [
            version
            for manifest in found
            for version in home.store.versions(tenant="acme", name=manifest.name)
        ]
        assert one.key.digest in {version.digest for version in versions if version.pinned}


def test_readers_never_wait_for_a_writer(home: Home, open_home: Callable[[], Home]) -> None:
    publish(home, 0)
    other = open_home()
    with writing(home.database) as connection:
        connection.execute(text("DELETE FROM latest_versions"))
        assert other.store.resolve(tenant="acme", reference="style", base=BASE).version == 1


def test_a_read_is_consistent_with_one_moment(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """An alias that moves between the two queries of a lookup keeps the version of the first
    one."""
    publish(home, 0)
    publish(home, 1)
    changes.set_alias(home.store, tenant="acme", name="style", alias="prod", version=1)
    alias_names = manifests._alias_names

    def late(*arguments: Any) -> Any:
        monkeypatch.setattr(manifests, "_alias_names", alias_names)
        changes.set_alias(home.store, tenant="acme", name="style", alias="prod", version=2)
        return alias_names(*arguments)

    monkeypatch.setattr(manifests, "_alias_names", late)
    found = home.store.resolve(tenant="acme", reference="style@prod", base=BASE)
    assert (found.version, found.aliases) == (1, ("prod",))
    assert home.store.resolve(tenant="acme", reference="style@prod", base=BASE).version == 2


def test_a_failed_write_is_rolled_back(home: Home) -> None:
    publish(home, 0)

    def interrupted() -> None:
        with writing(home.database) as connection:
            connection.execute(text("DELETE FROM latest_versions"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert home.store.resolve(tenant="acme", reference="style", base=BASE).version == 1


def test_sqlite_is_opened_with_wal_and_full_sync(tmp_path: Path) -> None:
    engine = open_database(f"sqlite:///{tmp_path}/new/catalog.sqlite")
    upgrade(engine)
    with reading(engine) as connection:
        pragmas = {
            name: connection.execute(text(f"PRAGMA {name}")).scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    engine.dispose()
    full = 2
    assert pragmas == {
        "journal_mode": "wal",
        "synchronous": full,
        "foreign_keys": 1,
        "busy_timeout": 30000,
    }


def test_opening_a_locked_new_database_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite refuses to switch such a file to WAL while it is locked, ignoring the busy timeout."""
    other = sqlite3.connect(tmp_path / "catalog.sqlite", isolation_level=None)
    other.execute("CREATE TABLE t (a)")
    other.execute("BEGIN IMMEDIATE")
    other.execute("INSERT INTO t VALUES (1)")
    monkeypatch.setattr("prefixd.store.db.database.time.sleep", lambda _: other.execute("COMMIT"))
    engine = open_database(f"sqlite:///{tmp_path}/catalog.sqlite")
    upgrade(engine)
    with reading(engine) as connection:
        assert connection.execute(text("PRAGMA journal_mode")).scalar() == "wal"
    engine.dispose()
    other.close()


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
def test_a_database_in_memory_is_rejected(url: str) -> None:
    with pytest.raises(ValueError, match="needs a file"):
        open_database(url)


PROCESS = """
import sys
from pathlib import Path
from tests.store.store_artifacts import BASE
from tests.store.store_changes import publish_text
from prefixd.store.blobs.blobs import LocalBlobs
from prefixd.store.db.database import open_database
from prefixd.store.db.migrate import upgrade
from prefixd.store.store import PrefixStore

home, own = Path(sys.argv[1]), sys.argv[2]
sys.stdin.readline()
engine = open_database(f"sqlite:///{home}/catalog.sqlite")
upgrade(engine)
store = PrefixStore(engine, LocalBlobs(home / "blobs"))
for number in range(8):
    for text in (f"shared {number}", f"own {own} {number}"):
        publish_text(
            store,
            tenant="acme",
            name="style",
            text=text,
            metadata=None,
            base=BASE,
            count_tokens=len,
        )
print("done")
"""


def test_several_processes_start_and_publish_concurrently(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    children = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(tmp_path / "data"), str(number)],
            cwd=root,
            env={"PYTHONPATH": str(root)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    for child in children:  # all are waiting by now, or soon
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    outputs = [child.communicate(timeout=120)[0] for child in children]
    assert outputs == ["done\n"] * 4
    engine = open_database(f"sqlite:///{tmp_path}/data/catalog.sqlite")
    store = PrefixStore(engine, LocalBlobs(tmp_path / "data" / "blobs"))
    found = store.versions(tenant="acme", name="style")
    engine.dispose()
    assert [manifest.version for manifest in reversed(found)] == list(range(1, 8 + 4 * 8 + 1))
