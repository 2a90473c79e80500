"""An engine core whose pool holds many resident prefixes, under loads that never end."""

import itertools
import queue
from collections.abc import Callable, Sequence
from typing import Any

from prefixd.server.engine.config import SchedulerConfig
from prefixd.server.engine.core import EngineCore
from prefixd.server.engine.output_processor import OutputProcessor
from prefixd.server.engine.queue_limiter import QueueLimiter
from prefixd.server.engine.request import (
    AdmittedRequest,
    PrefixHandle,
    PrefixKey,
    SamplingParams,
    StopParams,
)
from prefixd.server.engine.runner import BlockingRunner
from prefixd.server.engine.step import Sampled, Step, StepOutput
from prefixd.server.testing import ByteDetokenizer, FakeStaged

VIRTUAL, OWN = 16, 64
TENANTS = 50
SAMPLED = (Sampled(ord("x")),)


class InstantRunner(BlockingRunner):
    """Samples the same token for every row, without any other work."""

    def run(self, step: Step) -> StepOutput:
        sampled: dict[int, Sequence[Sampled]] = {
            chunk.seq_id: SAMPLED for chunk in step.chunks if chunk.sampling is not None
        }
        return StepOutput(sampled, {save.key: FakeStaged(save.num_tokens) for save in step.saves})


class SameSource:
    """All prefixes have one length."""

    def fetch(self, key: PrefixKey) -> FakeStaged:
        del key
        return FakeStaged(VIRTUAL)


def handle(number: int, name: str = "other") -> PrefixHandle:
    return PrefixHandle(PrefixKey(f"t{number % TENANTS}", f"{name}-{number}"), VIRTUAL)


class CrowdedPool:
    """A core on the calling thread, whose pool holds ``own`` prefixes of one block each, for the
    load, and ``others``, which no request uses.

    The pool has ``spare`` blocks besides; prefixes may hold as many tokens as they do at first.
    ``before`` is called before each turn.
    """

    def __init__(self, num_others: int, *, spare: int = 4096, **config: Any) -> None:
        sizes: dict[str, Any] = {
            "num_blocks": 1 + spare + OWN + num_others,
            "max_running": 32,
            "max_resident_tokens": VIRTUAL * (OWN + num_others),
        }
        self.config = SchedulerConfig(**{**sizes, **config})
        self.before: Callable[[], None] = lambda: None
        self._fetched: queue.Queue[Callable[[], None]] = queue.Queue()
        self._num_received = 0
        self._ids = itertools.count()
        self.core = EngineCore(
            config=self.config,
            runner=InstantRunner(),
            source=SameSource(),
            outputs=OutputProcessor(ByteDetokenizer),
            queue_limiter=QueueLimiter(self.config),
            namespace="",
            fetch_threads=1,
            post=self._post,
        )
        self.own = [handle(number, "own") for number in range(OWN)]
        self.others = [handle(number) for number in range(num_others)]
        residency = self.core.scheduler.memory.residency
        for each in (*self.others, *self.own):
            entry = residency.fetch(each)
            residency.staged(entry, FakeStaged(VIRTUAL))
            residency.place(entry, forced=False)
            residency.compiles(entry, VIRTUAL)
            residency.compiled(entry)

    def submit(
        self, prefix: PrefixHandle | None = None, *, tokens: int = 2000, tenant: str = "base"
    ) -> None:
        """Queue a request with a prompt of its own."""
        number = next(self._ids)
        request = AdmittedRequest(
            request_id=str(number),
            tenant=tenant if prefix is None else prefix.key.tenant,
            prompt=(number,) * 8,
            prefix=prefix,
            sampling=SamplingParams(temperature=0.0),
            stop=StopParams(max_tokens=tokens),
            max_resident_tokens=self.config.max_resident_tokens,
        )
        self.core.add(request, lambda _event: None)

    def _post(self, function: Callable[[], None]) -> bool:
        self._fetched.put(function)
        return True

    def prepare(self) -> None:
        """Let all fetches end, and call ``before``."""
        while self._num_received < self.core.scheduler.prefix_loader.num_loads["store"]:
            self._fetched.get(timeout=30)()
            self._num_received += 1
        self.before()

    def close(self) -> None:
        self.core.shut_down()
        self.core.stop_threads()


def decoding(num_others: int, rows: int = 8) -> CrowdedPool:
    """``rows`` sequences decode, each under a resident prefix."""
    pool = CrowdedPool(num_others)
    for number in range(rows):
        pool.submit(pool.own[number])
    return pool


def queued(num_others: int) -> CrowdedPool:
    """All places are taken, and requests under resident prefixes wait for them."""
    pool = CrowdedPool(num_others, max_running=4, max_tenant_wait_s=1e6)
    for number in range(16):
        pool.submit(pool.own[number])
    return pool


def loading(num_others: int, **config: Any) -> CrowdedPool:
    """In each turn a request for another absent prefix arrives; idle ones leave for it."""
    pool = CrowdedPool(num_others, **config)
    numbers = itertools.count()
    pool.before = lambda: pool.submit(handle(next(numbers), "absent"), tokens=1)
    return pool


def saving(num_others: int) -> CrowdedPool:
    """As ``loading``, and those that leave go to the host tier."""
    return loading(num_others, host_tokens=VIRTUAL * (OWN + num_others))


def pinned(num_others: int) -> CrowdedPool:
    """As ``loading``, and half of the others are pinned."""
    pool = loading(num_others)
    pool.core.set_pins(tuple(pool.others[::2]), None)
    return pool


def growing(num_others: int) -> CrowdedPool:
    """Sequences need blocks that idle prefixes hold."""
    pool = CrowdedPool(num_others, spare=16 * 3)
    for _ in range(16):
        pool.submit(tokens=30)
    pool.before = lambda: pool.submit(tokens=30)
    return pool


def forcing(num_others: int) -> CrowdedPool:
    """Requests for an absent prefix are overdue, and what could leave for it is in use."""
    pool = CrowdedPool(num_others, max_prefix_wait_s=0.0)
    pool.core.set_pins((*pool.others, *pool.own[8:]), None)
    for number in range(8):
        pool.submit(pool.own[number])
    pool.submit(handle(0, "absent"))
    return pool


LOADS = (decoding, queued, loading, saving, pinned, growing, forcing)
