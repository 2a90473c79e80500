"""One load on a server: so many requests at a time, or so many a second."""

import asyncio
import math
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from random import Random

from prefixd.server.cli.bench.generation import Generation, Target
from prefixd.server.cli.bench.workload import PromptSource, arrival_times, draw_models


@dataclass(frozen=True, slots=True)
class Load:
    """Either ``concurrency``, requests at a time, or ``rate``, arrivals per second."""

    concurrency: int | None = None
    rate: float | None = None

    def __str__(self) -> str:
        if self.rate is None:
            return f"{self.concurrency} at a time"
        return "all at once" if math.isinf(self.rate) else f"{self.rate:g}/s"


@dataclass
class Level:
    """The results of one load. ``seconds`` and ``client_cpu`` are wall and CPU time of this
    process, from the first request to the end of the last."""

    load: Load
    num_requests: int
    results: list[Generation] = field(default_factory=list)
    seconds: float = 0.0
    client_cpu: float = 0.0

    @property
    def num_unfinished(self) -> int:
        """Requests without a result: not sent, or aborted."""
        return self.num_requests - len(self.results)


@dataclass(frozen=True)
class Traffic:
    """The requests of every level: drawn from one seed, so that none repeats."""

    prompts: PromptSource
    random: Random
    models: tuple[str, ...]
    zipf: float | None
    num_words: int
    output_tokens: int

    def draw(self, count: int) -> Iterator[tuple[str, str]]:
        """Prompt and model of each of ``count`` requests, all drawn before the first is used."""
        models = draw_models(self.models, count, zipf=self.zipf, random=self.random)
        return iter([(self.prompts.draw(self.num_words), model) for model in models])


async def run_level(
    level: Level,
    target: Target,
    traffic: Traffic,
    *,
    max_seconds: float,
    on_result: Callable[[Generation], None] = lambda _: None,
) -> None:
    """Send the requests of a level and record their results in it. Those that have not ended after
    ``max_seconds`` are aborted; the others stay recorded, also when this is cancelled."""
    requests = traffic.draw(level.num_requests)
    started, cpu = time.perf_counter(), time.process_time()

    async def send(prompt: str, model: str, due: float | None) -> None:
        result = await target.measure(
            prompt, model=model, output_tokens=traffic.output_tokens, due=due
        )
        level.results.append(result)
        on_result(result)

    try:
        with suppress(TimeoutError):
            async with asyncio.timeout(max_seconds):
                if level.load.rate is None:
                    await _closed_loop(requests, send, clients=level.load.concurrency or 1)
                else:
                    arrivals = arrival_times(level.load.rate, random=traffic.random)
                    await _open_loop(requests, send, arrivals=arrivals, started=started)
    finally:
        level.seconds = time.perf_counter() - started
        level.client_cpu = time.process_time() - cpu


_Send = Callable[[str, str, float | None], Coroutine[None, None, None]]


async def _closed_loop(requests: Iterable[tuple[str, str]], send: _Send, *, clients: int) -> None:
    """``clients`` at a time: each takes the next request when its previous one ends."""
    remaining = iter(requests)

    async def client() -> None:
        for prompt, model in remaining:
            await send(prompt, model, None)

    async with asyncio.TaskGroup() as group:
        for _ in range(clients):
            group.create_task(client())


async def _open_loop(
    requests: Iterable[tuple[str, str]], send: _Send, *, arrivals: Iterator[float], started: float
) -> None:
    """Each at its time of arrival, however many are running."""
    async with asyncio.TaskGroup() as group:
        for (prompt, model), arrival in zip(requests, arrivals, strict=False):
            due = started + arrival
            await asyncio.sleep(due - time.perf_counter())
            group.create_task(send(prompt, model, due))
