"""Stored artifacts for the engine: validated against the served base, failures with their code."""

import structlog
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from prefixd.server.api.error_responses import CATALOG_UNAVAILABLE, DISK_FAILED, DISK_FULL
from prefixd.server.api.served import ServedModel
from prefixd.server.engine.prefix_source import (
    CORRUPT_PREFIX,
    PREFIX_NOT_FOUND,
    PREFIX_REFUSED,
    STORAGE_FULL,
    STORAGE_UNAVAILABLE,
    PrefixUnavailable,
)
from prefixd.server.engine.request import PrefixKey
from prefixd.store.artifact.artifact import Artifact, read_artifact
from prefixd.store.artifact.kinds import Kind
from prefixd.store.disk import DiskGuard
from prefixd.store.errors import (
    ArtifactRefused,
    BlobsUnavailable,
    CorruptArtifact,
    StoreError,
    UnknownPrefix,
)
from prefixd.store.faults import StorageFault
from prefixd.store.names import BlobKey
from prefixd.store.store import PrefixStore

log = structlog.get_logger("prefixd")


class Artifacts:
    """Opens a stored artifact and validates it again, against the base served now. The tokens of a
    text are counted again: an earlier version of the server may have counted others."""

    def __init__(self, store: PrefixStore, served: ServedModel, disk: DiskGuard) -> None:
        self._store = store
        self._served = served
        self._disk = disk

    def __call__(self, key: PrefixKey) -> Artifact:
        try:
            return self._read(key)
        except StoreError as error:
            raise PrefixUnavailable(error.message, code=_code_of(error)) from error
        except (OSError, SQLAlchemyError) as error:
            log.exception("the storage failed")
            match self._disk.fault_of(error):
                case StorageFault.FULL:
                    raise PrefixUnavailable(DISK_FULL, code=STORAGE_FULL) from error
                case StorageFault.FAILED:
                    raise PrefixUnavailable(DISK_FAILED, code=STORAGE_UNAVAILABLE) from error
                case None if isinstance(error, SQLAlchemyError):
                    raise PrefixUnavailable(
                        CATALOG_UNAVAILABLE, code=STORAGE_UNAVAILABLE
                    ) from error
            raise

    def _read(self, key: PrefixKey) -> Artifact:
        base = self._served.base
        path = self._store.fetch(tenant=key.tenant, digest=key.digest)
        artifact = read_artifact(path, base=base, count_tokens=self._served.count_prefix_tokens)
        if artifact.kind is Kind.HARD_PROMPT:
            try:
                self._store.correct_count(
                    BlobKey(key.tenant, key.digest),
                    fingerprint=base.fingerprint,
                    num_virtual_tokens=artifact.num_virtual_tokens,
                )
            except DBAPIError as error:
                if self._disk.fault_of(error) is None:
                    raise
                log.warning("a manifest was not corrected: the storage failed")
        return artifact


def _code_of(error: StoreError) -> str | None:
    match error:
        case BlobsUnavailable():
            return STORAGE_UNAVAILABLE
        case UnknownPrefix():  # deleted since the request was admitted
            return PREFIX_NOT_FOUND
        case CorruptArtifact():
            return CORRUPT_PREFIX
        case ArtifactRefused():  # the base or its limits have changed since the upload
            return PREFIX_REFUSED
        case _:
            return None
