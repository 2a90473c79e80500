"""Admission of a request as one call on the catalog: resolve, count, and take from the limits."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import structlog
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from prefixd.server.api.catalog_access import CatalogAccess
from prefixd.server.api.catalog_calls import Access
from prefixd.server.api.request_record import Admitted
from prefixd.server.tenants.leases import new_lease
from prefixd.server.tenants.limiter import Grant, Limiter
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

    async def admit(
        self, principal: Principal, admit: Admit, *, waited: float, is_quick: bool = False
    ) -> tuple[Admitted, Grant]:
        """The request that ``admit`` returns, and what its tenant's limits granted. ``waited`` is
        as for ``CatalogCalls``; ``is_quick``: ``admit`` neither asks the catalog nor computes for
        long. Such a request is admitted on the event loop, unless its limits need a transaction.
        Raises as ``admit``, RateLimited, Unavailable."""
        calls = self.catalog.calls
        if is_quick:
            calls.check(Access.WRITE if principal.quota.is_metered else Access.READ)
            admitted = admit()
            grant = self.limiter.admit_at_once(
                principal.tenant, principal.quota, tokens=admitted.prompt_tokens
            )
            if grant is not None:
                return admitted, grant
            admit = partial(_same, admitted)
        charge = partial(self._charge, principal, admit)
        if not principal.quota.is_metered:
            return await calls.read(charge, waited=waited)
        return await calls.write(charge, waited=waited, undo=self._give_back)

    def _charge(self, principal: Principal, admit: Admit) -> tuple[Admitted, Grant]:
        """Blocking. A charge of which it is unknown whether it was committed is given back."""
        admitted, lease = admit(), new_lease()
        try:
            grant = self._grant(principal, tokens=admitted.prompt_tokens, lease=lease)
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
            give_back = partial(self.limiter.give_back, grant, tokens=admitted.prompt_tokens)
            self.catalog.settlements.add(lambda again: give_back(unsure=again), unsure=unsure)


def _same(admitted: Admitted) -> Admitted:
    return admitted
