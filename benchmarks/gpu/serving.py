"""Requests through the engine on a GPU, so that the time of the host shows."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from benchmarks.gpu.sizes import BLOCK
from prefixd.server.engine.request import (
    AdmittedRequest,
    Event,
    FinishEvent,
    SamplingParams,
    StopParams,
    TokenEvent,
)
from prefixd.server.model.device_runner import DeviceRunner
from prefixd.server.model.paged import PagedDecoder
from prefixd.server.model.prefix import SoftPrompt
from tests.golden.golden_harness import Served

WAIT_S = 60.0


@contextmanager
def running(decoder: PagedDecoder, *, num_blocks: int, max_rows: int) -> Iterator[Served]:
    """An engine that runs on the decoder."""
    runner = DeviceRunner(decoder, max_rows=max_rows)
    served = Served(decoder.base, runner)
    served.restart(
        num_blocks=num_blocks,
        block_size=BLOCK,
        max_tokens_per_step=2048,
        max_prefill_chunk=2048,
        max_running=max_rows,
    )
    try:
        yield served
    finally:
        served.engine.stop()


@dataclass
class Stream:
    """When the tokens of a request came."""

    times: list[float] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)
    error: str | None = None

    def put(self, event: Event) -> None:
        """Takes an event of the engine."""
        if isinstance(event, TokenEvent):
            self.times += [time.perf_counter()] * len(event.token_ids)
        elif isinstance(event, FinishEvent):
            self.error = event.error
            self.ended.set()


@dataclass(frozen=True, slots=True)
class Workload:
    """``requests`` of ``prompt`` and ``output`` tokens; with ``virtual`` each under a soft prompt
    of its own."""

    requests: int
    prompt: int
    output: int
    virtual: int = 20


def run_requests(served: Served, load: Workload, *, prefixes: list[object]) -> list[Stream]:
    """Start all requests at once, and wait; ``prefixes`` are handles, or empty for the base."""
    generator = torch.Generator().manual_seed(0)
    ids = served.base.num_embeddings
    prompts = torch.randint(3, ids, (load.requests, load.prompt), generator=generator).tolist()
    streams = [Stream() for _ in prompts]
    with served.held():  # or few tokens of the first may have come before the last is submitted
        for number, (prompt, stream) in enumerate(zip(prompts, streams, strict=True)):
            request = AdmittedRequest(
                request_id=str(next(served.numbers)),
                tenant="t",
                prompt=tuple(prompt),
                prefix=prefixes[number] if prefixes else None,  # type: ignore[arg-type]
                sampling=SamplingParams(temperature=0),
                stop=StopParams(max_tokens=load.output),
                kv_reuse=False,
            )
            served.engine.submit(request, stream.put)
    for stream in streams:
        if not stream.ended.wait(WAIT_S):
            raise TimeoutError(f"a request did not end within {WAIT_S} s")
        if stream.error:
            raise RuntimeError(stream.error)
    return streams


def soft_prompts(served: Served, load: Workload) -> list[object]:
    """A soft prompt for each request."""
    shape = (load.virtual, served.base.shape.embedding_width)
    return [
        served.put(SoftPrompt(0.02 * torch.randn(shape, dtype=served.base.dtype)))
        for _ in range(load.requests)
    ]


def output_rate(served: Served, load: Workload, prefixes: list[object]) -> float:
    """Output tokens a second of all requests, prompts included in the time."""
    started = time.perf_counter()
    streams = run_requests(served, load, prefixes=prefixes)
    seconds = max(stream.times[-1] for stream in streams) - started
    return load.requests * load.output / seconds


def steady_rate(served: Served, load: Workload) -> float:
    """Tokens a second while all requests decode: from the last's first token to the first's
    last."""
    return rate_between([stream.times for stream in run_requests(served, load, prefixes=[])])


def rate_between(times: list[list[float]]) -> float:
    """Tokens a second of streams between the last beginning and the first end."""
    begin, end = max(each[0] for each in times), min(each[-1] for each in times)
    if end <= begin:
        raise ValueError("the requests never decoded all at once: more output tokens are needed")
    return sum(begin < each <= end for stream in times for each in stream) / (end - begin)
