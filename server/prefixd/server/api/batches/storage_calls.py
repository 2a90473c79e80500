"""Calls of a batch on the catalog and the blobs, which wait until these are available."""

import asyncio
from collections.abc import Callable
from typing import TypeVar

import structlog
from sqlalchemy.exc import SQLAlchemyError

from prefixd.server.api.catalog_calls import CatalogCalls
from prefixd.server.errors import InsufficientStorage, Unavailable
from prefixd.store.errors import BlobsUnavailable, StorageFull

Result = TypeVar("Result")

log = structlog.get_logger("prefixd")

TEMPORARY = (Unavailable, InsufficientStorage, BlobsUnavailable, StorageFull, SQLAlchemyError)
"""Errors of a catalog, a disk or a bucket that may be available again."""

_FIRST_S = 0.5
_MOST_S = 15.0


async def until_available(
    calls: CatalogCalls, call: Callable[..., Result], /, *arguments: object
) -> Result:
    """The result of ``call(*arguments)``, which may have run several times: a call that took too
    long may end later. Other errors than TEMPORARY are raised."""
    pause = _FIRST_S
    while True:
        try:
            return await calls.write(call, *arguments)
        except TEMPORARY as error:
            why = str(error).partition("\n")[0]
            log.warning("a batch waits for the storage", why=why, retry_after=pause)
        await asyncio.sleep(pause)
        pause = min(2 * pause, _MOST_S)
