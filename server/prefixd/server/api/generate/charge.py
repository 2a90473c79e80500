"""What a running request owes its tenant's limits, settled once, however the request ends."""

import asyncio
from collections.abc import Mapping

import structlog
from fastapi.concurrency import run_in_threadpool
from sqlalchemy.exc import SQLAlchemyError

from prefixd.server.tenants.limiter import Grant, Limiter

log = structlog.get_logger("prefixd")


class UsageCharge:
    """``output_tokens`` counts up while the request runs; ``unserved`` is set when the server
    could not serve it."""

    def __init__(self, limiter: Limiter, grant: Grant, *, prompt_tokens: int) -> None:
        self._limiter = limiter
        self._grant = grant
        self._prompt_tokens = prompt_tokens
        self._settled = False
        self.output_tokens = 0
        self.unserved = False

    @property
    def headers(self) -> Mapping[str, str]:
        """What was left of the tenant's rates when the request was let in."""
        return self._grant.headers

    async def settle(self) -> None:
        """Charge the output, or give back what an unserved request has paid, and free its place;
        again does nothing.

        Goes on to its end when the caller is cancelled: a place not freed would stay taken until
        its lease runs out. Where the catalog is away that is what happens, and the log says so:
        an answer that was made is not lost by it.
        """
        if self._settled or not self._grant.quota.is_metered:
            return
        self._settled = True
        await asyncio.shield(asyncio.ensure_future(self._settle()))

    async def _settle(self) -> None:
        try:
            await run_in_threadpool(self._write)
        except SQLAlchemyError:
            log.exception("a request's limits were not settled", tenant=self._grant.tenant)

    def _write(self) -> None:
        if self.unserved and not self.output_tokens:
            self._limiter.give_back(self._grant, tokens=self._prompt_tokens)
        else:
            self._limiter.settle(self._grant, output_tokens=self.output_tokens)
