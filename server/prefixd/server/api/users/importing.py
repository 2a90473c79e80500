"""Bulk import of bindings: lines of JSON, read, checked and written a batch at a time."""

import hashlib
from collections.abc import AsyncIterator, Callable
from functools import partial

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from pydantic import Field
from sqlalchemy import Connection

from prefixd.server.api.body import StrictModel, capped, declared_bytes, parse_json
from prefixd.server.api.values import User
from prefixd.server.errors import BadRequest, QuotaExceeded
from prefixd.server.tenants.bindings import Bindings
from prefixd.server.tenants.principal import Actor
from prefixd.store.artifact.base_spec import BaseSpec
from prefixd.store.catalog.manifests import check_base
from prefixd.store.catalog.reference_locks import lock_references
from prefixd.store.disk import DiskGuard
from prefixd.store.errors import BaseMismatch, InvalidReference, UnknownPrefix
from prefixd.store.store import PrefixStore

BATCH = 5000
MAX_LINE_BYTES = 8 * 1024

_MOST_KNOWN = 10_000


class ImportLine(StrictModel):
    """One line."""

    user: User
    prefix: str = Field(min_length=1, max_length=257)


ImportHook = Callable[[Connection, int, str], object]


def _nothing(*_: object) -> None:
    """The hook of an import for which no response is stored."""


def _finish(at_end: ImportHook, count: int, digest: str, connection: Connection) -> None:
    at_end(connection, count, digest)


class BindingImport:
    """One import by one tenant. Memory holds one batch, for a body of any length."""

    def __init__(
        self,
        *,
        store: PrefixStore,
        base: BaseSpec,
        bindings: Bindings,
        max_bytes: int,
        disk: DiskGuard,
        tenant: str,
        actor: Actor,
    ) -> None:
        self._store = store
        self._base = base
        self._bindings = bindings
        self._max_bytes = max_bytes
        self._disk = disk
        self._tenant = tenant
        self._actor = actor
        self._known: dict[str, tuple[str, int]] = {}
        self._read = 0
        self._written = 0
        self.digest = ""

    async def run(self, request: Request, *, at_end: ImportHook = _nothing) -> int:
        """Import the body; the number of its bindings. ``at_end`` runs in the transaction of the
        audit entry, when all lines were imported, with their number and the SHA-256 of the body.
        Raises BadRequest naming the bad line, StorageFull, and QuotaExceeded naming the first batch
        over the quota, of which no line is imported."""
        calls = request.app.state.catalog.long_calls
        await run_in_threadpool(self._disk.check, declared_bytes(request))
        batch: list[bytes] = []
        total, finish = hashlib.sha256(), _nothing
        try:
            async for line in _lines(_hashed(capped(request, self._max_bytes), total)):
                batch.append(line)
                if len(batch) == BATCH:
                    await calls.write(self._write, batch)
                    batch = []
            await calls.write(self._write, batch)
            self.digest = total.hexdigest()
            finish = partial(_finish, at_end, self._written, self.digest)
        finally:
            if self._written or finish is not _nothing:
                note = partial(self._bindings.note_import, actor=self._actor, at_end=finish)
                await calls.write(note, self._tenant, self._written)
        return self._written

    def _write(self, lines: list[bytes]) -> None:
        self._disk.check()
        pairs, resolved = [], {}
        for line in lines:
            self._read += 1
            if line.strip():
                user, reference = self._parsed(line)
                pairs.append((user, reference))
                resolved[reference] = self._known[reference]
        check = partial(lock_references, tenant=self._tenant, resolved=resolved, base=self._base)
        try:
            self._bindings.bind_many(self._tenant, pairs, check=check)
        except (BaseMismatch, UnknownPrefix) as error:  # deleted since its line was read
            raise self._bad_line(error.message) from None
        except QuotaExceeded as error:
            first = self._read - len(lines) + 1
            raise QuotaExceeded(
                f"lines {first} to {self._read}: {error.message} "
                f"({self._written} bindings before them were imported)",
                param=error.param,
            ) from None
        self._written += len(pairs)

    def _parsed(self, line: bytes) -> tuple[str, str]:
        try:
            binding = parse_json(ImportLine, line)
            if binding.prefix not in self._known:
                manifest = self._store.resolve(
                    tenant=self._tenant, reference=binding.prefix, base=self._base
                )
                check_base(manifest, self._base)
                if len(self._known) >= _MOST_KNOWN:
                    self._known.clear()
                self._known[binding.prefix] = (manifest.name, manifest.version)
        except (BadRequest, BaseMismatch, InvalidReference, UnknownPrefix) as error:
            raise self._bad_line(error.message) from None
        return binding.user, binding.prefix

    def _bad_line(self, message: str) -> BadRequest:
        return BadRequest(
            f"line {self._read}: {message} ({self._written} bindings before it were imported)",
            code="invalid_line",
        )


async def body_digest(request: Request, max_bytes: int) -> str:
    """SHA-256 of a body that is not imported again."""
    total = hashlib.sha256()
    async for _ in _hashed(capped(request, max_bytes), total):
        pass
    return total.hexdigest()


async def _hashed(chunks: AsyncIterator[bytes], total: "hashlib._Hash") -> AsyncIterator[bytes]:
    async for chunk in chunks:
        total.update(chunk)
        yield chunk


async def _lines(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The lines of a body, without their ends. Raises BadRequest for one that is too long."""
    rest, ended = b"", 0
    async for chunk in chunks:
        *whole, rest = (rest + chunk).split(b"\n")
        for number, line in enumerate((*whole, rest), start=ended + 1):
            if len(line) > MAX_LINE_BYTES:
                raise BadRequest(
                    f"line {number}: expected at most {MAX_LINE_BYTES} bytes; received more",
                    code="invalid_line",
                )
        ended += len(whole)
        for line in whole:
            yield line
    if rest:
        yield rest
