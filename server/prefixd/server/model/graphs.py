"""Decode steps captured into graphs: a step of a few hundred launches becomes one.

A graph has fixed sizes and addresses. So there is one for each of a few numbers of rows and bounds
of the length, and a step runs in the smallest that holds it: the rows that are missing are padding
of length 0, which reads nothing and writes to the scratch slot. All read the same step buffers and
share one memory pool. Only steps of one token a row are captured: prompts, compiles and proposed
tokens vary too much in size.
"""

import logging
import time
from collections.abc import Callable
from itertools import product
from typing import Any, Protocol

import torch

from prefixd.server.model.batch import FlatBatch
from prefixd.server.model.buffers import StepBuffers, StepTensors

log = logging.getLogger(__name__)

_SMALLEST_LENGTH, _LENGTH_FACTOR = 1024, 4
"""Bounds of the length decide how many programs of attention start; those past a row's end do
nothing, and cost little up to a few times the number that work."""

Body = Callable[[StepTensors], torch.Tensor]
"""Runs a step on the device and returns a tensor of it."""


class Graph(Protocol):
    """A body with fixed addresses, captured once."""

    def capture(self, body: Body, step: StepTensors) -> torch.Tensor:
        """Capture ``body(step)``; returns the tensor that each replay writes."""
        ...

    def replay(self) -> None:
        """Run what was captured on what is in its tensors now."""
        ...


class CudaGraph:
    """A CUDA graph in the memory pool that all graphs share."""

    def __init__(self, pool: Any) -> None:
        """``pool`` is a handle of torch.cuda.graph_pool_handle."""
        self._pool = pool
        self._graph: Any = torch.cuda.CUDAGraph()

    def capture(self, body: Body, step: StepTensors) -> torch.Tensor:
        """Run the body once, to compile its kernels and make cuBLAS's workspace, and capture it."""
        current = torch.cuda.current_stream()
        aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            body(step)
        current.wait_stream(aside)
        # Other threads may use the device meanwhile: those that load prefixes pin memory.
        mode = "thread_local"
        with torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode=mode):
            return body(step)

    def replay(self) -> None:
        """Launch the graph in the current stream."""
        self._graph.replay()


def cuda_graphs() -> Callable[[], Graph]:
    """Makes graphs of one memory pool."""
    pool = torch.cuda.graph_pool_handle()
    return lambda: CudaGraph(pool)


def row_buckets(max_rows: int) -> list[int]:
    """Numbers of rows that are captured: 1, 2, 4, 8, 16, 24 ... ``max_rows``."""
    return [n for n in (1, 2, 4, *range(8, max_rows, 8)) if n < max_rows] + [max_rows]


def length_bounds(max_length: int) -> list[int]:
    """Bounds of the length that are captured, up to ``max_length``."""
    bounds, bound = [], _SMALLEST_LENGTH
    while bound < max_length:
        bounds.append(bound)
        bound *= _LENGTH_FACTOR
    return [*bounds, max_length]


class DecodeGraphs:
    """Graphs of decode steps over the buffers of a decoder."""

    def __init__(self, buffers: StepBuffers, body: Body, *, max_rows: int, max_length: int) -> None:
        """``body`` is run for steps of up to ``max_rows`` rows of at most ``max_length``
        positions."""
        self._buffers, self._body = buffers, body
        self._rows, self._lengths = row_buckets(max_rows), length_bounds(max_length)
        self._new_graph: Callable[[], Graph] | None = None
        self._captured: dict[tuple[int, int], tuple[Graph, torch.Tensor]] = {}
        # Kept, so that no later buffer is at its address.
        self._memory: torch.Tensor | None = None

    def capture(self, new_graph: Callable[[], Graph]) -> None:
        """Capture every bucket, the largest first: the others reuse its memory."""
        self._new_graph = new_graph
        started, before = time.perf_counter(), _reserved_bytes()
        # Torch refuses captures into a pool whose graphs have all ended: these live until the end.
        kept, self._captured = self._captured, {}
        for rows, length in product(reversed(self._rows), reversed(self._lengths)):
            self._buffers.fill(FlatBatch(), num_rows=rows)
            self._buffers.send()
            graph = new_graph()
            output = graph.capture(self._body, self._buffers.tensors(max_length=length))
            self._captured[rows, length] = graph, output
        kept.clear()
        self._memory = self._buffers.memory
        log.info(
            "captured %d decode graphs of up to %d rows in %.1f s; they hold %.0f MiB",
            len(self._captured),
            self._rows[-1],
            time.perf_counter() - started,
            (_reserved_bytes() - before) / 2**20,
        )

    def run(self, batch: FlatBatch) -> torch.Tensor | None:
        """Fill the buffers with a step and replay its graph. Returns what the body returned, with
        the rows of padding, until the next replay; None: no graph holds the step."""
        num_rows = len(batch.rows)
        if batch.inputs or num_rows > self._rows[-1] or not _decodes(batch):
            return None
        if any(row.gated is not None for row in batch.rows):
            return None
        longest = max(row.end for row in batch.rows)
        if longest > self._lengths[-1]:
            return None
        rows = next(n for n in self._rows if n >= num_rows)
        length = next(n for n in self._lengths if n >= longest)
        self._buffers.fill(batch, num_rows=rows)
        if self._buffers.memory is not self._memory:  # a larger step came, and the buffers moved
            assert self._new_graph is not None
            self.capture(self._new_graph)
            self._buffers.fill(batch, num_rows=rows)
        self._buffers.send()
        graph, output = self._captured[rows, length]
        graph.replay()
        return output


def _decodes(batch: FlatBatch) -> bool:
    """Whether each row has one token, and all logits are wanted in order."""
    num_rows = len(batch.rows)
    return len(batch.token_ids) == num_rows > 0 and batch.outputs == list(range(num_rows))


def _reserved_bytes() -> int:
    return torch.cuda.memory_reserved() if torch.cuda.is_available() else 0
