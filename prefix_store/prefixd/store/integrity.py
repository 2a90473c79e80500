"""Whether the catalog and the blobs agree, checked while servers change both.

Every page of rows is one snapshot, and a blob is looked at after its rows. A blob has a row before
it exists and a version only afterwards, so a publish in progress is never a finding; what a delete
in progress explains is looked up again before it becomes one.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import groupby, islice
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, Row, and_, or_, select, tuple_

from prefixd.store.artifact.composition import read_members
from prefixd.store.blobs.blobs import Blobs
from prefixd.store.catalog.blob_rows import BlobRows
from prefixd.store.catalog.manifests import present_members
from prefixd.store.catalog.tables import (
    aliases,
    files,
    latest_versions,
    pins,
    prefixes,
    versions,
)
from prefixd.store.db.database import reading
from prefixd.store.errors import CorruptArtifact, MemberDeleted, UnknownPrefix
from prefixd.store.files import UPLOAD_PREFIX, interrupted
from prefixd.store.names import MAX_VERSION, BlobKey, Reference

_PAGE = 500
T = TypeVar("T")

_NAMES = (
    (latest_versions, latest_versions.c.fingerprint, "the latest version for the base {}"),
    (aliases, aliases.c.alias, "the alias {!a}"),
    (pins, pins.c.tenant, "the pin"),
)
"""Tables of rows that point at a version: what distinguishes two of one prefix, and their name."""


class Problem(StrEnum):
    """What is wrong with the subject of a finding."""

    BLOB_MISSING = "blob_missing"
    BLOB_CORRUPT = "blob_corrupt"
    BLOB_SIZE = "blob_size"
    BLOB_WITHOUT_ROW = "blob_without_row"
    ROW_MISSING = "row_missing"
    TARGET_MISSING = "target_missing"
    INTERRUPTED_UPLOAD = "interrupted_upload"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong. ``tenant`` is empty for what belongs to none."""

    problem: Problem
    tenant: str
    subject: str
    detail: str

    def __str__(self) -> str:
        owner = f"tenant {self.tenant}, " if self.tenant else ""
        return f"{self.problem}: {owner}{self.subject}: {self.detail}"


class StoreIntegrity:
    """Checks all versions, files, blobs and names of a store; reads every blob once.

    ``counts`` says how much was checked. Holds one page of rows at a time.
    """

    def __init__(self, engine: Engine, blobs: Blobs, *, upload_dir: Path) -> None:
        self._engine = engine
        self._rows = BlobRows(engine)
        self._blobs = blobs
        self._upload_dir = upload_dir
        self.counts = Counter(versions=0, files=0, blobs=0, bytes=0, quarantined=0)

    def findings(self) -> Iterator[Finding]:
        """Everything that is wrong, as it is found. Raises BlobsUnavailable."""
        suspected = set(self._interrupted())
        yield from self._check_versions()
        yield from self._check_files()
        yield from self._check_names()
        yield from self._check_members()
        yield from self._check_blobs()
        self.counts["quarantined"] = sum(1 for _ in self._blobs.quarantined())
        # Listed twice: an upload that had just begun the first time is locked by now.
        for name in suspected.intersection(self._interrupted()):
            detail = "an upload that no process continues; a running server removes it"
            yield Finding(Problem.INTERRUPTED_UPLOAD, "", name, detail)

    def _interrupted(self) -> Iterator[str]:
        yield from self._blobs.interrupted()
        yield from map(str, interrupted(self._upload_dir, prefix=UPLOAD_PREFIX))

    def _check_versions(self) -> Iterator[Finding]:
        for row, problem in self._check_sizes(self._versions()):
            self.counts["versions"] += 1
            if problem is not None:
                subject = f"{row.name or 'an unknown name'}@{row.version}"
                yield Finding(problem[0], row.tenant, subject, problem[1])

    def _check_files(self) -> Iterator[Finding]:
        for row, problem in self._check_sizes(self._files()):
            self.counts["files"] += 1
            if problem is not None:
                yield Finding(problem[0], row.tenant, row.id, problem[1])

    def _check_sizes(
        self, rows: Iterator[Row[Any]]
    ) -> Iterator[tuple[Row[Any], tuple[Problem, str] | None]]:
        """Rows that have a blob, by blob, and what is wrong with the blob of each."""
        for key, same in groupby(rows, lambda row: BlobKey(row.tenant, row.digest)):
            measured = self._confirmed(key)
            for row in same:
                match measured:
                    case int() if row.size_bytes != measured:
                        detail = f"expected {row.size_bytes} bytes, the blob {key.digest} has "
                        yield row, (Problem.BLOB_SIZE, f"{detail}{measured}")
                    case int() | None:
                        yield row, None
                    case _:
                        yield row, measured

    def _versions(self) -> Iterator[Row[Any]]:
        """All versions, by blob."""
        order = (versions.c.tenant, versions.c.digest, versions.c.prefix_id, versions.c.version)
        statement = (
            select(*order, versions.c.size_bytes, prefixes.c.name)
            .outerjoin_from(versions, prefixes, prefixes.c.id == versions.c.prefix_id)
            .order_by(*order)
            .limit(_PAGE)
        )
        return pages(self._engine, statement, order, lambda _, rows: rows)

    def _files(self) -> Iterator[Row[Any]]:
        """All files, by blob."""
        order = (files.c.tenant, files.c.digest, files.c.id)
        statement = select(*order, files.c.size_bytes).order_by(*order).limit(_PAGE)
        return pages(self._engine, statement, order, lambda _, rows: rows)

    def _confirmed(self, key: BlobKey) -> int | tuple[Problem, str] | None:
        """The size of the blob of a version or file, or what is wrong with it; None when that was
        deleted since it was listed."""
        first = self._measure(key)
        if isinstance(first, int):
            self.counts["bytes"] += first
            return first
        # Deleted and collected, or repaired, while it was read?
        return self._measure(key) if self._rows.is_referenced(key) else None

    def _measure(self, key: BlobKey) -> int | tuple[Problem, str]:
        problem, detail = Problem.BLOB_CORRUPT, "is in quarantine"
        try:
            size, digest = self._blobs.measure(tenant=key.tenant, digest=key.digest)
        except UnknownPrefix:
            problem, detail = Problem.BLOB_MISSING, "is missing"
        except CorruptArtifact as error:
            return problem, error.message
        else:
            if digest != key.digest:
                detail = f"has the digest {digest} now"
            elif self._rows.unknown([key]):
                problem, detail = Problem.ROW_MISSING, "has no row"
            elif not self._rows.is_corrupt(key):
                return size
        return problem, f"the blob {key.digest} {detail}: upload it again"

    def _check_names(self) -> Iterator[Finding]:
        """``latest``, aliases and pins, each kind in one snapshot."""
        for table, key, words in _NAMES:
            target = and_(
                versions.c.prefix_id == table.c.prefix_id, versions.c.version == table.c.version
            )
            if table is latest_versions:
                target = and_(target, versions.c.fingerprint == table.c.fingerprint)
            dangling = (
                select(prefixes.c.tenant, prefixes.c.name, key.label("key"), table.c.version)
                .outerjoin_from(table, versions, target)
                .outerjoin(prefixes, prefixes.c.id == table.c.prefix_id)
                .where(or_(versions.c.version.is_(None), prefixes.c.id.is_(None)))
                .execution_options(yield_per=_PAGE)
            )
            with reading(self._engine) as connection:
                for row in connection.execute(dangling):
                    subject = f"{words.format(row.key)} of {row.name or 'an unknown name'}"
                    detail = f"expected a version {row.version}, which does not exist"
                    yield Finding(Problem.TARGET_MISSING, row.tenant or "", subject, detail)

    def _check_members(self) -> Iterator[Finding]:
        """The members of compositions, which may be deleted."""
        order = (versions.c.prefix_id, versions.c.version)
        statement = (
            select(*order, versions.c.tenant, versions.c.members_json, prefixes.c.name)
            .join(prefixes, prefixes.c.id == versions.c.prefix_id)
            .where(versions.c.members_json.is_not(None))
            .order_by(*order)
            .limit(_PAGE)
        )
        yield from pages(self._engine, statement, order, _without_members)

    def _check_blobs(self) -> Iterator[Finding]:
        """Every blob has a row."""
        listing = self._blobs.walk()
        while page := [key for key, _ in islice(listing, _PAGE)]:
            self.counts["blobs"] += len(page)
            for key in self._rows.unknown(page):
                # A collection removes the blob before the row: is the blob still there?
                try:
                    self._blobs.measure(tenant=key.tenant, digest=key.digest)
                except UnknownPrefix:
                    continue
                except CorruptArtifact:
                    pass
                if self._rows.unknown([key]):
                    detail = "no row of the catalog; `prefixd gc` registers and removes it"
                    subject = f"the blob {key.digest}"
                    yield Finding(Problem.BLOB_WITHOUT_ROW, key.tenant, subject, detail)


def _without_members(connection: Connection, rows: Sequence[Row[Any]]) -> list[Finding]:
    findings = []
    for row in rows:
        members, _ = read_members(row.members_json)
        try:
            present_members(connection, row.tenant, members)
        except MemberDeleted as error:
            subject = f"{row.name}@{row.version}"
            findings.append(Finding(Problem.TARGET_MISSING, row.tenant, subject, error.message))
    return findings


def pages(
    engine: Engine,
    statement: Any,
    order: tuple[Any, ...],
    inspect: Callable[[Connection, Sequence[Row[Any]]], Iterable[T]],
) -> Iterator[T]:
    """What ``inspect`` returns for each page of a statement that is ordered by ``order``, unique,
    and has a limit. A page and its inspection are one snapshot, and each page a new one, so that
    no transaction stays open for long."""
    page = statement
    while True:
        with reading(engine) as connection:
            rows = connection.execute(page).all()
            if not rows:
                return
            results = inspect(connection, rows)
        yield from results
        last = tuple(getattr(rows[-1], column.name) for column in order)
        page = statement.where(tuple_(*order) > last)


def resolvable(
    connection: Connection, tenant: str, references: Iterable[Reference]
) -> set[Reference]:
    """Those of some references of a tenant that mean a version, of any base."""
    wanted = set(references)
    of_names = and_(
        prefixes.c.tenant == tenant, prefixes.c.name.in_({reference.name for reference in wanted})
    )
    numbers = {r.version for r in wanted if r.version is not None and r.version <= MAX_VERSION}
    numbered = connection.execute(
        select(prefixes.c.name, versions.c.version)
        .join_from(prefixes, versions, versions.c.prefix_id == prefixes.c.id)
        .where(of_names, versions.c.version.in_(numbers))
    )
    known = {Reference(row.name, alias=None, version=row.version) for row in numbered}
    named = connection.execute(
        select(prefixes.c.name, aliases.c.alias)
        .join_from(prefixes, aliases, aliases.c.prefix_id == prefixes.c.id)
        .where(of_names, aliases.c.alias.in_({r.alias for r in wanted if r.alias is not None}))
    )
    known |= {Reference(row.name, alias=row.alias) for row in named}
    latest = connection.execute(
        select(prefixes.c.name)
        .join_from(prefixes, latest_versions, latest_versions.c.prefix_id == prefixes.c.id)
        .where(of_names)
    )
    known |= {Reference(row.name) for row in latest}
    return wanted & known
