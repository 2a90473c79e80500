"""The way in which requests reach the catalog: threads of their own, and bounded waits.

A call that runs in a thread cannot be interrupted. So its caller waits for a bounded time, is then
refused with 503 ``storage_unavailable``, and the thread stays occupied until the call ends. While
the probe of the catalog fails, callers are refused at once (a circuit breaker). Nothing else of the
server uses these threads: a catalog that hangs delays neither health checks nor running streams.
"""

import asyncio
import contextvars
import inspect
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from enum import Enum
from functools import partial, wraps
from typing import Any, Generic, TypeVar

from fastapi import Request
from fastapi.routing import APIRoute

from prefixd.server.api.catalog_health import CatalogHealth
from prefixd.server.api.error_responses import CATALOG_UNAVAILABLE, storage_unavailable

Result = TypeVar("Result")

WAIT_S = 4.0
"""How long a caller waits by default, in seconds: with what comes before and after it, a refused
request takes less than 5 s."""

THREADS = 12
MAX_WAITING = 1000

_BREAKER_POLL_S = 0.25
_REQUEST = "catalog_request"
_LONG = "takes_long"


class Access(Enum):
    """What a call does with the catalog."""

    READ = "read"
    WRITE = "write"


class CatalogCalls:
    """Runs blocking calls on the catalog, on the event loop's behalf.

    ``wait_s`` is the longest wait of a caller in seconds, ``max_waiting`` the number of calls that
    may wait for one of ``threads`` threads. With ``wait_s`` None a caller waits as long as the
    catalog responds: for transfers of artifacts, whose store has bounds of its own.
    """

    def __init__(
        self,
        health: CatalogHealth,
        *,
        wait_s: float | None = WAIT_S,
        threads: int = THREADS,
        max_waiting: int = MAX_WAITING,
        name: str = "prefixd-catalog",
    ) -> None:
        self.health = health
        self._wait_s = wait_s
        self._max_calls = threads + max_waiting
        self._calls: set[Future[Any]] = set()
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix=name)

    @property
    def num_calls(self) -> int:
        """Calls that run or wait for a thread."""
        return len(self._calls)

    async def read(
        self, call: Callable[..., Result], /, *arguments: Any, waited: float = 0.0
    ) -> Result:
        """The result of ``call(*arguments)``, which only reads. ``waited`` is how long the request
        has waited here before, in seconds. Raises Unavailable, and as ``call``."""
        return await self._run(partial(call, *arguments), Access.READ, waited=waited)

    async def write(
        self,
        call: Callable[..., Result],
        /,
        *arguments: Any,
        waited: float = 0.0,
        undo: Callable[[Result], object] | None = None,
    ) -> Result:
        """As ``read``, for a call that may write. ``undo`` is called with the result of a call that
        ended after its caller was refused; it may run in any thread and must not block."""
        return await self._run(partial(call, *arguments), Access.WRITE, waited=waited, undo=undo)

    def close(self, *, timeout_s: float) -> None:
        """Accept no more calls, drop the waiting ones, and wait up to ``timeout_s`` seconds for
        those that run. Blocking."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        wait(tuple(self._calls), timeout_s)

    def check(self, access: Access) -> None:
        """Raise Unavailable when such a call would be refused at once: for what needs no call now,
        and must not run either while the catalog does not respond."""
        if self._refuses(access) or len(self._calls) >= self._max_calls:
            raise storage_unavailable(CATALOG_UNAVAILABLE)

    def _refuses(self, access: Access) -> bool:
        health = self.health
        return health.reads_refused if access is Access.READ else health.writes_refused

    async def _run(
        self,
        call: Callable[[], Result],
        access: Access,
        *,
        waited: float,
        undo: Callable[[Result], object] | None = None,
    ) -> Result:
        self.check(access)
        shared = SharedCall(call, undo)
        try:
            running = self._threads.submit(contextvars.copy_context().run, shared.run)
        except RuntimeError:  # closed: the server has stopped
            raise storage_unavailable(CATALOG_UNAVAILABLE) from None
        self._calls.add(running)
        running.add_done_callback(self._calls.discard)
        try:
            return await self._result(asyncio.wrap_future(running), access, waited)
        except BaseException:
            shared.abandon()
            raise

    async def _result(
        self, running: asyncio.Future[Result], access: Access, waited: float
    ) -> Result:
        if self._wait_s is not None:
            try:
                async with asyncio.timeout(max(0.0, self._wait_s - waited)):
                    return await running
            except TimeoutError:
                raise storage_unavailable(CATALOG_UNAVAILABLE) from None
        try:
            while not running.done():
                await asyncio.wait({running}, timeout=_BREAKER_POLL_S)
                if not running.done() and self._refuses(access):
                    raise storage_unavailable(CATALOG_UNAVAILABLE)
            return running.result()
        finally:
            running.cancel()


class SharedCall(Generic[Result]):
    """A call that its caller may abandon: then its result, if there is one, is undone."""

    def __init__(self, call: Callable[[], Result], undo: Callable[[Result], object] | None) -> None:
        self._call = call
        self._undo = undo
        self._lock = threading.Lock()
        self._results: list[Result] = []
        self._abandoned = False

    def run(self) -> Result:
        """Run the call, in its thread."""
        result = self._call()
        with self._lock:
            self._results.append(result)
            late = self._abandoned
        if late:
            self._undo_all()
        return result

    def abandon(self) -> None:
        """The caller no longer takes the result."""
        with self._lock:
            self._abandoned = True
        self._undo_all()

    def _undo_all(self) -> None:
        with self._lock:
            results, self._results = self._results, []
        if self._undo is not None:
            for result in results:
                self._undo(result)


def takes_long(endpoint: Callable[..., Result]) -> Callable[..., Result]:
    """Mark an endpoint that transfers an artifact: it may take longer than other calls."""
    setattr(endpoint, _LONG, True)
    return endpoint


class CatalogRoute(APIRoute):
    """A route whose blocking endpoint runs as a call on the catalog."""

    def __init__(
        self, path: str, endpoint: Callable[..., Any], *, methods: Any = None, **options: Any
    ) -> None:
        if not inspect.iscoroutinefunction(endpoint):
            access = Access.READ if set(methods or ()) <= {"GET", "HEAD"} else Access.WRITE
            endpoint = _awaiting(endpoint, access)
        super().__init__(path, endpoint, methods=methods, **options)


def _awaiting(endpoint: Callable[..., Any], access: Access) -> Callable[..., Awaitable[Any]]:
    """``endpoint`` as a coroutine, with the request as a further parameter where it has none."""
    signature = inspect.signature(endpoint)
    own = [name for name, given in signature.parameters.items() if given.annotation is Request]

    @wraps(endpoint)
    async def awaiting(**values: Any) -> Any:
        request: Request = values[own[0]] if own else values.pop(_REQUEST)
        catalog = request.app.state.catalog
        call = partial(endpoint, **values)
        if getattr(endpoint, _LONG, False):
            return await catalog.long_calls.read(call)
        run = catalog.calls.read if access is Access.READ else catalog.calls.write
        return await run(call, waited=waited_by(request))

    if not own:
        added = inspect.Parameter(_REQUEST, inspect.Parameter.KEYWORD_ONLY, annotation=Request)
        parameters = [*signature.parameters.values(), added]
        signature = signature.replace(parameters=parameters)
    awaiting.__signature__ = signature  # type: ignore[attr-defined]
    return awaiting


def waited_by(request: Request) -> float:
    """How long ``request`` waited for its authentication, in seconds."""
    seconds: float = getattr(request.state, "catalog_waited", 0.0)
    return seconds
