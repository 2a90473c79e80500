"""What one tenant, one key or one address may take of a server at a time, counted in this process.

Everything runs on the event loop: nothing waits for a lock or for the catalog. Bounds that hold
across replicas are quotas of the tenant, which the catalog counts.

::

    request --> authentication   at most so many lookups of one key, and from one address, at a time
            --> requests         in progress: one more is refused
            --> rate             of requests that no bucket of the catalog counts
            --> bodies           bytes of JSON that are received: more of them wait
            --> embeddings       bytes of prompts in progress: more of them wait
            --> uploads          received at a time: more of them wait
            --> reads, changes   of the catalog at a time: more of them wait
            --> templates        of requests that found no place to render theirs, one tries again
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial

from starlette.datastructures import Address

from prefixd.server.api.error_responses import CATALOG_UNAVAILABLE, storage_unavailable
from prefixd.server.errors import PrefixdError, RateLimited, TooManyTemplates
from prefixd.server.tenants.key_text import parse
from prefixd.server.tenants.principal import Principal

LOOKUPS_OF_KEY = 3
LOOKUPS_FROM_ADDRESS = 8
READS_OF_TENANT = 4
CHANGES_OF_TENANT = 1
"""Fewer than the threads that call the catalog, so that one tenant never has all of them. Changes
wait for each other in the catalog anyway: on SQLite all of them, elsewhere those of one tenant."""

CATALOG_WAIT_S = 4.0
"""The longest wait of a request for the catalog, in seconds, calls on it included."""

MAX_PAUSE_S = 0.05

_WAIT_S = 1.0
_RETRY_S = 1.0
_MOST_BUCKETS = 4096


class KeyedSemaphore:
    """For each key at most ``capacity`` at a time; more wait in order of arrival, for at most
    ``wait_s`` seconds, and then get the error that ``refusal`` makes.

    While ``is_shared(key)``, what was held becomes free after a pause as long as it was held, up to
    MAX_PAUSE_S: a key that always wants more has it for half of the time.
    """

    def __init__(
        self,
        capacity: int,
        refusal: Callable[[], PrefixdError],
        *,
        wait_s: float,
        is_shared: Callable[[str], bool] = lambda _key: False,
    ) -> None:
        self.capacity = capacity
        self._refusal = refusal
        self._wait_s = wait_s
        self._is_shared = is_shared
        self._held: Counter[str] = Counter()
        self._waiting: dict[str, deque[tuple[asyncio.Future[None], int]]] = {}

    @asynccontextmanager
    async def hold(self, key: str, amount: int = 1, *, waited: float = 0.0) -> AsyncIterator[None]:
        """Hold ``amount`` of the key's capacity inside the block. ``waited``: seconds to wait
        less. Raises the refusal."""
        amount = min(amount, self.capacity)
        if key in self._waiting or self._held[key] + amount > self.capacity:
            await self._wait(key, amount, max(0.0, self._wait_s - waited))
        else:
            self._held[key] += amount
        begun = time.monotonic()
        try:
            yield
        finally:
            if self._is_shared(key):
                pause = min(time.monotonic() - begun, MAX_PAUSE_S)
                asyncio.get_running_loop().call_later(pause, self._release, key, amount)
            else:
                self._release(key, amount)

    async def _wait(self, key: str, amount: int, wait_s: float) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (turn, amount)
        self._waiting.setdefault(key, deque()).append(entry)
        try:
            async with asyncio.timeout(wait_s):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():  # it came at the same moment
                self._release(key, amount)
            else:
                with suppress(KeyError, ValueError):  # passed over as done
                    self._waiting[key].remove(entry)
                self._wake(key)
            if isinstance(error, TimeoutError):
                raise self._refusal() from None
            raise

    def _release(self, key: str, amount: int) -> None:
        self._held[key] -= amount
        self._wake(key)

    def _wake(self, key: str) -> None:
        """Give what is free to those that wait, in order; forget a key that nothing holds."""
        waiting = self._waiting.get(key)
        while waiting and self._held[key] + waiting[0][1] <= self.capacity:
            turn, amount = waiting.popleft()
            if not turn.done():
                self._held[key] += amount
                turn.set_result(None)
        if waiting is not None and not waiting:
            del self._waiting[key]
        if not self._held[key]:
            del self._held[key]

    def __len__(self) -> int:
        """Keys that hold or wait for something."""
        return len(self._held.keys() | self._waiting.keys())


class RequestRates:
    """A token bucket for each tenant, which holds the amount of one minute: it costs no query, and
    each server counts for itself. ``now`` is in seconds on a clock that does not go back."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._levels: dict[str, tuple[float, float]] = {}

    def take(self, tenant: str, per_minute: int) -> None:
        """Take one request. Raises RateLimited."""
        now = self._now()
        level, at = self._levels.get(tenant, (float(per_minute), now))
        level = min(float(per_minute), level + (now - at) * per_minute / 60.0)
        if level < 1.0:
            wait = (1.0 - level) * 60.0 / per_minute
            raise RateLimited(
                f"the tenant's limit is {per_minute} requests per minute that neither generate nor "
                f"upload (other_requests_per_minute); try again in {wait:.1f} s",
                retry_after=wait,
            )
        self._levels[tenant] = (level - 1.0, now)
        if len(self._levels) > _MOST_BUCKETS:
            # A bucket that nothing took from for a minute is full again.
            kept = {name: value for name, value in self._levels.items() if now - value[1] < 60.0}
            self._levels = kept


def _of_catalog(capacity: int, **options: Callable[[str], bool]) -> KeyedSemaphore:
    """A wait as long as this is one for calls that do not end: the catalog is slow or hangs."""
    refusal = partial(storage_unavailable, CATALOG_UNAVAILABLE)
    return KeyedSemaphore(capacity, refusal, wait_s=CATALOG_WAIT_S, **options)


def _of_tenant(capacity: int, noun: str) -> KeyedSemaphore:
    message = f"the tenant may send {capacity} {noun} at a time to a server, and does; try again"
    refusal = partial(RateLimited, message, code="concurrency_limit_exceeded", retry_after=_RETRY_S)
    return KeyedSemaphore(capacity, refusal, wait_s=_WAIT_S)


def _too_many_templates() -> PrefixdError:
    return TooManyTemplates(
        f"the tenant's chat templates took more than {CATALOG_WAIT_S:g} s to render; try again",
        retry_after=_RETRY_S,
    )


@dataclass(slots=True)
class TenantBounds:
    """The bounds of one server process: of one tenant, how many requests may be in progress, how
    many uploads and imports are received, how many bytes of other bodies, and of how many bytes of
    embeddings requests are in progress."""

    max_requests: int = 1024
    max_uploads: int = 8
    max_body_bytes: int = 64 * 1024 * 1024
    lookups_of_key: KeyedSemaphore = field(init=False)
    lookups_from_address: KeyedSemaphore = field(init=False)
    bodies: KeyedSemaphore = field(init=False)
    embeddings: KeyedSemaphore = field(init=False)
    uploads: KeyedSemaphore = field(init=False)
    reads: KeyedSemaphore = field(init=False)
    changes: KeyedSemaphore = field(init=False)
    templates: KeyedSemaphore = field(init=False)
    rates: RequestRates = field(default_factory=RequestRates)
    requests: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.lookups_of_key = _of_catalog(LOOKUPS_OF_KEY)
        self.lookups_from_address = _of_catalog(LOOKUPS_FROM_ADDRESS)
        self.reads = _of_catalog(READS_OF_TENANT)
        self.changes = _of_catalog(CHANGES_OF_TENANT, is_shared=self._is_shared)
        self.templates = KeyedSemaphore(1, _too_many_templates, wait_s=CATALOG_WAIT_S)
        self.bodies = _of_tenant(self.max_body_bytes, "bytes of request bodies")
        self.embeddings = _of_tenant(self.max_body_bytes, "bytes of embeddings")
        self.uploads = _of_tenant(self.max_uploads, "uploads and imports")

    @asynccontextmanager
    async def lookup(self, key: str, client: Address | None) -> AsyncIterator[None]:
        """Look up a key from an address inside the block. Raises Unavailable."""
        parsed = parse(key)  # None costs no lookup: the key is malformed
        address = "" if client is None else client.host
        begun = time.monotonic()
        async with (
            self.lookups_of_key.hold("" if parsed is None else parsed.key_id),
            self.lookups_from_address.hold(address, waited=time.monotonic() - begun),
        ):
            yield

    @contextmanager
    def request(self, principal: Principal, *, rated: bool) -> Iterator[None]:
        """Count a request as in progress inside the block; ``rated``: take it from the tenant's
        ``other_requests_per_minute``. Raises RateLimited."""
        tenant = principal.tenant
        limit = principal.quota.other_requests_per_minute
        if rated and limit is not None:
            self.rates.take(tenant, limit)
        if self.requests[tenant] >= self.max_requests:
            raise RateLimited(
                f"the tenant may have {self.max_requests} requests in progress on a server, "
                "and has them",
                code="concurrency_limit_exceeded",
                retry_after=_RETRY_S,
            )
        self.requests[tenant] += 1
        try:
            yield
        finally:
            self.requests[tenant] -= 1
            if not self.requests[tenant]:
                del self.requests[tenant]

    def _is_shared(self, tenant: str) -> bool:
        """Whether another tenant has requests in progress."""
        return bool(self.requests.keys() - {tenant})
