"""MLPs of lean layers on a GPU, dense or with experts. No shape depends on data.

The experts of a step are one product for all: the inputs of each expert are consecutive rows of one
matrix, which holds each token once for each expert that it chose::

    token 0: experts 2, 5    token 1: experts 0, 2        rows  1.0 | 0.2 1.2 | 0.5
                                                        experts   0 | 2       | 5
"""

from dataclasses import dataclass

import torch
from torch.nn import functional

from prefixd.server.model.exact import NotExact
from prefixd.server.model.kernels import silu_and_mul
from prefixd.server.model.load import LoadedBase
from prefixd.server.model.parts import Dense, Experts, Linear
from prefixd.server.model.products import merged


@dataclass(frozen=True, slots=True)
class PagedDense:
    """down(silu(gate(x)) * up(x)), with gate above up."""

    gate_up: Linear
    down: Linear

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, width] to [n, width]."""
        return product(silu_and_mul(product(rows, self.gate_up)), self.down)


@dataclass(frozen=True, slots=True)
class PagedExperts:
    """``parts.Experts`` with weights as products take them: ``gate_up`` [experts, width,
    2 * inner], ``down`` [experts, inner, width]."""

    router: torch.Tensor
    gate_up: torch.Tensor
    down: torch.Tensor
    per_token: int
    normalize: bool
    shared: PagedDense | None
    shared_gate: torch.Tensor | None

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, width] to [n, width]."""
        num_experts, count = len(self.router), self.per_token
        scores = functional.linear(rows, self.router).softmax(-1, dtype=torch.float32)
        weights, chosen = scores.topk(count)  # [n, per_token]
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        # The experts of a token are summed by their number, as the model's own layers do.
        chosen, by_number = chosen.sort(-1)
        weights = weights.gather(-1, by_number).to(rows.dtype)
        order = chosen.view(-1).argsort(stable=True)  # [n * per_token], by expert
        ones = torch.ones_like(order, dtype=torch.int32)
        sizes = ones.new_zeros(num_experts).index_add_(0, chosen.view(-1), ones)
        ends = sizes.cumsum(0, dtype=torch.int32)
        inputs = rows.index_select(0, order.div(count, rounding_mode="floor"))
        gated = silu_and_mul(functional.grouped_mm(inputs, self.gate_up, offs=ends))
        answers = functional.grouped_mm(gated, self.down, offs=ends)
        answers = torch.empty_like(answers).index_copy_(0, order, answers)
        out = (answers.view(len(rows), count, -1) * weights[:, :, None]).sum(1)
        if self.shared is not None and self.shared_gate is not None:
            out = out + functional.linear(rows, self.shared_gate).sigmoid() * self.shared(rows)
        return out


def product(rows: torch.Tensor, linear: Linear) -> torch.Tensor:
    """[n, in] to [n, out]."""
    return functional.linear(rows, linear.weight, linear.bias)


def require_grouped_products(base: LoadedBase) -> None:
    """Raise NotExact where torch cannot multiply the inputs of all experts in one operation."""
    if not hasattr(functional, "grouped_mm"):
        version = torch.__version__
        raise NotExact(f"{base.name} has experts, for which torch {version} has no grouped_mm")
    if base.device.type == "cuda" and base.dtype is not torch.bfloat16:
        raise NotExact(f"{base.name} has experts in {base.dtype}; expected bfloat16 on a GPU")


def paged_mlp(mlp: Dense | Experts) -> PagedDense | PagedExperts:
    """The MLP of a layer."""
    if isinstance(mlp, Dense):
        return _dense(mlp)
    return PagedExperts(
        router=mlp.router,
        gate_up=mlp.gate_up.transpose(1, 2),
        down=mlp.down.transpose(1, 2),
        per_token=mlp.per_token,
        normalize=mlp.normalize,
        shared=None if mlp.shared is None else _dense(mlp.shared),
        shared_gate=mlp.shared_gate,
    )


def _dense(mlp: Dense) -> PagedDense:
    return PagedDense(merged([mlp.gate, mlp.up]), mlp.down)
