"""A graph without CUDA: it keeps a body with its tensors, and runs it again on their addresses."""

import torch

from prefixd.server.model.buffers import StepTensors
from prefixd.server.model.graphs import Body


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
