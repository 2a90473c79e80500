"""A graph without CUDA: it keeps a body with its tensors, and runs it again on their addresses."""

import os
from collections.abc import Callable

import torch

from prefixd.server.model.buffers import StepTensors
from prefixd.server.model.graphs import Body, CudaGraph, Graph

DEVICE = os.environ.get("PREFIXD_TEST_DEVICE", "cpu")


class FakeGraph:
    """Replays a body on what is in its tensors now, into the tensor of the capture."""

    replays = 0

    def capture(self, body: Body, step: StepTensors) -> torch.Tensor:
        self.body, self.step = body, step
        self.addresses = self._addresses()
        self.output = body(step).clone()
        return self.output

    def replay(self) -> None:
        FakeGraph.replays += 1
        assert self._addresses() == self.addresses
        self.output.copy_(self.body(self.step))

    def _addresses(self) -> list[int]:
        step = self.step
        inputs = (step.tokens, step.positions, step.slots, step.outputs, *step.rows)
        return [tensor.data_ptr() for tensor in inputs]


class _CountedGraph(CudaGraph):
    def replay(self) -> None:
        FakeGraph.replays += 1
        super().replay()


def graphs_of_the_device() -> Callable[[], Graph]:
    """Makes fake graphs on a CPU, and CUDA graphs of one memory pool on a GPU. Both are counted."""
    if DEVICE == "cpu":
        return FakeGraph
    pool = torch.cuda.graph_pool_handle()
    return lambda: _CountedGraph(pool)
