"""Admission of a request as one call on the catalog: resolve, count, and take from the limits."""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial

import structlog
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from prefixd.server.api.admitted import Admitted
from prefixd.server.api.catalog_access import CatalogAccess
from prefixd.server.api.catalog_calls import Access
from prefixd.server.tenants.leases import new_lease
from prefixd.server.tenants.limiter import Grant, Limiter
from prefixd.server.tenants.portions import TURN_S
from prefixd.server.tenants.principal import Principal
from prefixd.server.tenants.quotas import Quota
from prefixd.store.disk import DiskGuard
from prefixd.store.faults import StorageFault, storage_fault

log = structlog.get_logger("prefixd")

Admit = Callable[[], Admitted]


@dataclass(frozen=True, slots=True)
class Charging:
    """Admits requests and charges their prompts; what a refused request was charged is returned."""

    limiter: Limiter
    catalog: CatalogAccess
    disk: DiskGuard
    _taking: dict[str, asyncio.Future[None]] = field(default_factory=dict)

    async def admit(
        self, principal: Principal, admit: Admit, *, waited: float, is_quick: bool = False
    ) -> tuple[Admitted, Grant]:
        """The request that ``admit`` returns, and what its tenant's limits granted. ``waited`` is
        as for ``CatalogCalls``; ``is_quick``: ``admit`` neither asks the catalog nor computes for
        long. Such a request is admitted on the event loop, unless its limits need a transaction.
        Raises as ``admit``, RateLimited, Unavailable."""
        calls, quota = self.catalog.calls, principal.quota
        if is_quick:
            calls.check(Access.WRITE if quota.is_metered else Access.READ)
            admitted, begun = admit(), time.monotonic()
            grant = await self._without_call(principal, tokens=admitted.charged_tokens)
            if grant is not None:
                return admitted, grant
            waited += time.monotonic() - begun
            admit = partial(_same, admitted)
        charge = partial(self._charge, principal, admit)
        if not quota.is_metered:
            return await calls.read(charge, waited=waited)
        # A slow ``admit`` is part of the call: no other request waits for that.
        with self._taking_portion(principal) if is_quick else nullcontext():
            return await calls.write(charge, waited=waited, undo=self._give_back)

    async def _without_call(self, principal: Principal, *, tokens: int) -> Grant | None:
        """What the limits grant without a call, after one that takes a portion of them now: of
        requests that arrive together, the others need no thread to wait for it in."""
        tenant, quota = principal.tenant, principal.quota
        latest = time.monotonic() + TURN_S
        while (grant := self.limiter.admit_at_once(tenant, quota, tokens=tokens)) is None:
            taking, remaining = self._taking.get(tenant), latest - time.monotonic()
            if taking is None or remaining <= 0:
                break
            await asyncio.wait({taking}, timeout=remaining)
        return grant

    @contextmanager
    def _taking_portion(self, principal: Principal) -> Iterator[None]:
        tenant = principal.tenant
        if tenant in self._taking or not self.limiter.takes_portions(tenant, principal.quota):
            yield
            return
        taken = self._taking[tenant] = asyncio.get_running_loop().create_future()
        try:
            yield
        finally:
            del self._taking[tenant]
            taken.set_result(None)

    def _charge(self, principal: Principal, admit: Admit) -> tuple[Admitted, Grant]:
        """Blocking. A charge of which it is unknown whether it was committed is given back."""
        admitted, lease = admit(), new_lease()
        try:
            grant = self._grant(principal, tokens=admitted.charged_tokens, lease=lease)
        except SQLAlchemyError:
            if principal.quota.max_concurrent_requests is not None:
                taken = Grant(principal.tenant, principal.quota, lease=lease)
                self._give_back((admitted, taken), unsure=True)
            raise
        return admitted, grant

    def _grant(self, principal: Principal, *, tokens: int, lease: str) -> Grant:
        """Take a request and its prompt from the tenant's limits. Raises RateLimited.

        On a full disk they cannot be counted: the request runs, as generation needs no room.
        """
        tenant, quota = principal.tenant, principal.quota
        for _ in range(2):  # the first failure frees the reserve, with which the second has room
            try:
                return self.limiter.admit(tenant, quota, tokens=tokens, lease=lease)
            except DBAPIError as error:
                if (
                    storage_fault(error) is None
                    or self.disk.fault_of(error) is not StorageFault.FULL
                ):
                    raise
        log.warning("the disk is full: a request was not counted", tenant=tenant)
        return Grant(tenant, Quota())

    def _give_back(self, charged: tuple[Admitted, Grant], *, unsure: bool = False) -> None:
        """Give back, in the background, what a request was charged that was refused."""
        admitted, grant = charged
        if grant.quota.is_metered:
            give_back = partial(self.limiter.give_back, grant, tokens=admitted.charged_tokens)
            self.catalog.settlements.add(lambda again: give_back(unsure=again), unsure=unsure)


def _same(admitted: Admitted) -> Admitted:
    return admitted
