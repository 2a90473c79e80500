"""A process that forks one change after another, each to be traced or killed by a test.

For each line ``way folder`` on standard input it forks a child, which prints its process id, and
lets it go with the next line; then it prints how the child ended. The child prints ``ack`` when its
change returned. ``way`` is ``sound`` for a publish, ``stored-file`` for that of a stored file, one
of the mistakes a store could make in a publish, or one of ``CHANGES``.
"""

import ctypes
import os
import shutil
import stat
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefixd.store.artifact.artifact import pack_text
from prefixd.store.blobs.blobs import LocalBlobs, open_blobs
from prefixd.store.catalog.transaction import CatalogTransaction
from prefixd.store.db.database import open_database
from prefixd.store.store import PrefixStore
from tests.store import store_changes as changes
from tests.store.store_artifacts import BASE

MARKER = "the row of the version"
TEXT = "Answer in one line."
HISTORY = "history"
_ANY_TRACER = (0x59616D61, ctypes.c_ulong(-1))  # PR_SET_PTRACER, where only parents may trace


def no_file_fsync() -> None:
    fsync = os.fsync

    def of_directories(fd: Any) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            fsync(fd)

    os.fsync = of_directories


def no_directory_fsync() -> None:
    fsync = os.fsync

    def of_files(fd: Any) -> None:
        if not stat.S_ISDIR(os.fstat(fd).st_mode):
            fsync(fd)

    os.fsync = of_files


def row_before_blob() -> None:
    put, change = LocalBlobs.put, PrefixStore.change
    late: list[Any] = []

    def put_later(blobs: LocalBlobs, source: Path, **key: str) -> None:
        kept = source.with_suffix(".kept")
        shutil.copy(source, kept)
        descriptor = os.open(kept, os.O_RDWR)
        os.fsync(descriptor)
        os.close(descriptor)
        late.append((blobs, kept, key))

    @contextmanager
    def change_first(store: PrefixStore, tenant: str) -> Iterator[CatalogTransaction]:
        with change(store, tenant) as tx:
            yield tx
        for blobs, kept, key in late:
            put(blobs, kept, **key)

    LocalBlobs.put = put_later  # type: ignore[method-assign,assignment]
    PrefixStore.change = change_first  # type: ignore[method-assign,assignment]


WAYS = {
    "sound": lambda: None,
    "stored-file": lambda: None,
    "no-file-fsync": no_file_fsync,
    "no-directory-fsync": no_directory_fsync,
    "row-before-blob": row_before_blob,
}


def rollback(store: PrefixStore) -> None:
    changes.set_alias(store, tenant="acme", name=HISTORY, alias="latest", version=1)


def delete_version(store: PrefixStore) -> None:
    changes.delete_version(store, tenant="acme", name=HISTORY, version=3)


CHANGES = {"rollback": rollback, "delete-version": delete_version}
"""Changes of a prefix that has the versions 1 to 3."""


def act(way: str, folder: Path) -> None:
    store = PrefixStore(
        open_database(f"sqlite:///{folder}/catalog.sqlite"), open_blobs(None, folder)
    )
    if way in CHANGES:
        CHANGES[way](store)
        return
    WAYS[way]()
    options: dict[str, Any] = {
        "tenant": "acme",
        "name": "style",
        "metadata": {"marker": MARKER},
        "base": BASE,
        "count_tokens": len,
    }
    if way == "stored-file":
        upload = folder / "upload"
        pack_text(TEXT, upload)
        changes.publish_artifact(store, artifact=upload, **options)
    else:
        changes.publish_text(store, text=TEXT, **options)


def child(way: str, folder: str, gate: int) -> None:
    ctypes.CDLL(None).prctl(*_ANY_TRACER)
    os.write(1, b"%d\n" % os.getpid())
    os.read(gate, 1)
    status = 1
    try:
        act(way, Path(folder))
        os.write(1, b"ack\n")
        status = 0
    except Exception:  # noqa: BLE001 - the test reports every error
        traceback.print_exc()
    finally:
        os._exit(status)


def main() -> None:
    for line in sys.stdin:
        way, folder = line.split()
        gate, opener = os.pipe()
        pid = os.fork()
        if pid == 0:
            child(way, folder, gate)
        sys.stdin.readline()
        os.write(opener, b"!")
        _, status = os.waitpid(pid, 0)
        os.close(gate)
        os.close(opener)
        os.write(1, b"end %d\n" % os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
