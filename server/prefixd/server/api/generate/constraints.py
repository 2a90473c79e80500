"""Gives admitted requests the constraints that they ask for: compiled once, and bounded."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

import structlog

from prefixd.server.api.admitted import Admitted
from prefixd.server.api.metrics import GrammarLookup, GrammarOutcome, Metrics
from prefixd.server.engine.constraint import (
    Constraint,
    Grammar,
    GrammarCompiler,
    GrammarRefused,
)
from prefixd.server.errors import BadRequest, RateLimited

log = structlog.get_logger("prefixd")

MAX_KEPT, MAX_KEPT_BYTES = 32, 1024 * 1024
"""Grammars that are kept for each tenant, and the length of their texts."""

MAX_TENANTS = 256
"""Tenants whose grammars are kept."""

MAX_WAITING = 64
"""Requests of a tenant that wait for a grammar to compile; each tenant compiles one at a time."""

INVALID_GRAMMAR = "invalid_grammar"

_THREADS = 2
_MAX_MESSAGE = 500

Compiled = Constraint | GrammarRefused


@dataclass(slots=True)
class _Tenant:
    """What is kept of one tenant, least recently used first; ``turn`` is held to compile."""

    kept: OrderedDict[Grammar, Compiled] = field(default_factory=OrderedDict)
    num_bytes: int = 0
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    num_waiting: int = 0

    def get(self, grammar: Grammar) -> Compiled | None:
        """What the grammar compiled to, if that is kept."""
        found = self.kept.get(grammar)
        if found is not None:
            self.kept.move_to_end(grammar)
        return found

    def keep(self, grammar: Grammar, compiled: Compiled) -> None:
        """Keep it, in place of those used longest ago."""
        self.kept[grammar] = compiled
        self.num_bytes += len(grammar.source)
        while len(self.kept) > MAX_KEPT or self.num_bytes > MAX_KEPT_BYTES:
            dropped, _ = self.kept.popitem(last=False)
            self.num_bytes -= len(dropped.source)


class ConstraintLoader:
    """Compiles on threads of its own. For one event loop.

    A tenant compiles one grammar at a time, and what is kept is its own: grammars that take long
    cost the requests of their tenant alone.
    """

    def __init__(self, compiler: GrammarCompiler, metrics: Metrics) -> None:
        self._compiler = compiler
        self._tenants: OrderedDict[str, _Tenant] = OrderedDict()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="prefixd-grammars")
        self._metrics = metrics

    async def fill(self, admitted: Admitted) -> Admitted:
        """The requests with their constraint. Raises BadRequest, RateLimited."""
        asked = admitted.grammar
        if asked is None:
            return admitted
        tenant = admitted.requests[0].tenant
        try:
            constraint = await self.compile(tenant, asked.grammar)
        except GrammarRefused as refused:
            raise BadRequest(
                f"'{asked.param}': {_shown(refused.message)}",
                code=INVALID_GRAMMAR,
                param=asked.param,
            ) from refused
        requests = [replace(request, constraint=constraint) for request in admitted.requests]
        return replace(admitted, requests=tuple(requests), grammar=None)

    async def compile(self, tenant: str, grammar: Grammar) -> Constraint:
        """The constraint of a grammar. Raises GrammarRefused, RateLimited."""
        own = self._of(tenant)
        compiled = own.get(grammar)
        if compiled is None:
            async with _turn(own):
                compiled = own.get(grammar)
                found = GrammarLookup.MISS if compiled is None else GrammarLookup.HIT
                self._metrics.grammar_looked_up(found)
                if compiled is None:
                    # Shielded: the turn lasts as long as the thread compiles.
                    task = asyncio.ensure_future(self._compile(tenant, grammar))
                    compiled = await _to_the_end(task)
                    own.keep(grammar, compiled)
        else:
            self._metrics.grammar_looked_up(GrammarLookup.HIT)
        if isinstance(compiled, GrammarRefused):
            raise GrammarRefused(compiled.message)  # a new one: each raise adds to its traceback
        return compiled

    def close(self) -> None:
        """End the threads, and the processes of the compiler."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._compiler.close()

    async def _compile(self, tenant: str, grammar: Grammar) -> Compiled:
        loop, began = asyncio.get_running_loop(), time.perf_counter()
        compiled: Compiled
        try:
            compiled = await loop.run_in_executor(self._threads, self._compiler.compile, grammar)
        except GrammarRefused as refused:
            compiled = refused.with_traceback(None)
            if refused.over_limit:
                log.warning("a grammar was too costly", tenant=tenant, reason=refused.message)
        is_refused = isinstance(compiled, GrammarRefused)
        outcome = GrammarOutcome.REFUSED if is_refused else GrammarOutcome.COMPILED
        self._metrics.grammar_compiled(outcome, time.perf_counter() - began)
        return compiled

    def _of(self, tenant: str) -> _Tenant:
        own = self._tenants.setdefault(tenant, _Tenant())
        self._tenants.move_to_end(tenant)
        while len(self._tenants) > MAX_TENANTS:
            idle = next(
                (name for name, each in self._tenants.items() if not each.num_waiting), None
            )
            if idle is None or idle == tenant:
                break
            del self._tenants[idle]
        return own


def _shown(message: str) -> str:
    """In one line of bounded length: names of properties are the caller's."""
    cut = message if len(message) <= _MAX_MESSAGE else f"{message[:_MAX_MESSAGE]}..."
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in cut)


@asynccontextmanager
async def _turn(own: _Tenant) -> AsyncIterator[None]:
    if own.num_waiting >= MAX_WAITING:
        raise RateLimited(
            f"expected at most {MAX_WAITING} requests that wait for a new schema or grammar",
            code="too_many_grammars",
            retry_after=1.0,
        )
    own.num_waiting += 1
    try:
        async with own.turn:
            yield
    finally:
        own.num_waiting -= 1


async def _to_the_end(task: "asyncio.Task[Compiled]") -> Compiled:
    """The result, after the task has ended even if the caller is cancelled."""
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise
